"""docs/bundles.md says what the code does: its examples are read, and its checks and limits are the code's."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from policies.archive import MAX_HEADERS, MEMBER_CAPS
from policies.bundle import CAPS, MANIFEST
from policies.confine import Limits
from policies.deployment import read_deployment
from policies.graph import IR_VERSIONS, MAX_PARTS, OPSETS
from policies.manifest import MAX_VALUES, Manifest, action_spec, check_head, fallback_action, read_manifest, sigma_of
from policies.probes import FEW_GOLDEN, LARGEST_LOG_STD, STEPS
from policies.trial_cache import MAX_ENTRIES
from policies.types import HeadKind, TransformKind

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "bundles.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]
FALLBACKS = {
    kind: re.findall(r"`fallback: ([^`]+)`", line)
    for line, kind in re.findall(r"^(\|.*\| `(discrete|multi_discrete|continuous)`.*)$", PAGE, re.MULTILINE)
    if "fallback:" in line
}


def example(**changes: Any) -> Manifest:
    """The page's manifest, with the parts that its other examples replace."""
    (whole,) = (block for block in BLOCKS if "head" in block)
    model = {**whole["model"], "sha256": "0" * 64}
    return read_manifest(yaml.safe_dump({**whole, "model": model, **changes}).encode())


def test_the_examples_are_manifests() -> None:
    read = example()
    check_head(read, action_spec(read))
    assert action_spec(read).parse("left") == (0,)
    (recurrent,) = (block for block in BLOCKS if "recurrent" in block)
    assert example(**recurrent).recurrent is not None
    (deployment,) = (block for block in BLOCKS if "champion" in block)
    assert read_deployment(yaml.safe_dump(deployment).encode(), "here").champion == "v2"


@pytest.mark.parametrize(
    ("kind", "head"), [("discrete", "logits"), ("multi_discrete", "logits"), ("continuous", "action")]
)
def test_the_forms_of_a_fallback_are_read(kind: str, head: str) -> None:
    (action,) = (block["action"] for block in BLOCKS if block.get("action", {}).get("kind") == kind)
    read = example(action=action, head=head, exploration={"epsilon": 0.1, "sigma": 0.2} if kind == "continuous" else {})
    space = action_spec(read)
    check_head(read, space)
    sigma_of(read, space)
    assert FALLBACKS[kind]
    for written in FALLBACKS[kind]:
        found = fallback_action(yaml.safe_load(written), space)
        assert found is not None
        assert space.validate(found)


def test_every_check_that_can_refuse_stands_in_the_page_and_no_other() -> None:
    raised = {"manifest"}  # the default
    for path in (*(ROOT / "policies").glob("*.py"), *(ROOT / "service").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "BundleError":
                named = [*node.args[2:3], *(word.value for word in node.keywords if word.arg == "check")]
                raised |= {str(check.value) for check in named if isinstance(check, ast.Constant)}
    raised |= {"links"}  # chosen by what a tar's member is
    table = PAGE[PAGE.index("## What a load refuses") : PAGE.index("## surefoot policy check")]
    rows = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)} == raised


def test_limits_are_the_codes() -> None:
    limits, mib = Limits(), 1 << 20
    for said in (
        f"{limits.memory_bytes // mib} MiB of address space and {limits.memory_factor} bytes",
        f"{limits.cpu_s} s of CPU time, {limits.wall_s:g} s in all",
        f"`policy.yaml` over {CAPS[MANIFEST] >> 10} KiB, `model.onnx` over {CAPS['model.onnx'] // mib} MiB",
        f"`golden.json` over {CAPS['golden.json'] // mib} MiB, `model.sig` over {MEMBER_CAPS['model.sig'] // mib} MiB",
        f"over {MAX_PARTS:,} nodes",
        f"more than {MAX_VALUES:,} values",
        f"more than {MAX_HEADERS} headers",
        f"IR outside {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}, opset outside {OPSETS[0]} to {OPSETS[-1]}",
        f"the last {MAX_ENTRIES:,}",
        f"fewer than {FEW_GOLDEN}",
        f"over {STEPS} steps",
        f"log deviations pass {LARGEST_LOG_STD:g}",
    ):
        assert said in PAGE.replace("\n", " "), said


def test_every_head_and_transform_is_explained() -> None:
    named = set(re.findall(r"^\| `([a-z_]+)` \| (?:choices|continuous) \|", PAGE, re.MULTILINE))
    assert named == set(get_args(HeadKind))
    for transform in get_args(TransformKind):
        assert f"{transform}: T(z)" in PAGE
