"""What a manifest declares must fit together: spaces, heads, fallback, exploration, masks and memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from policies.bundle import read_bundle
from policies.deployment import read_deployment
from policies.errors import BundleError, UnknownAction
from policies.graph import MAX_PARTS, parse_model
from policies.manifest import action_spec, check_head, fallback_action, observation_spec, read_manifest, sigma_of
from policies.types import Box, Choices
from tests.policies.networks import bundle_files, identity_files, linear, manifest

POINT = {"kind": "continuous", "low": [-1.0, 0.0], "high": [1.0, 2.0]}
OPEN = {"kind": "continuous", "low": [None, 0.0], "high": [1.0, 2.0]}
FACTORS = {"kind": "multi_discrete", "nvec": [2, 3], "factors": [{"name": "lane", "names": ["l", "r"]}, {"name": "t"}]}


def declared(**changes: Any) -> Any:
    """Read a manifest and everything that it declares about actions."""
    import yaml

    read = read_manifest(yaml.safe_dump(manifest(b"", 2, 2, **changes)).encode())
    observation_spec(read)
    action = action_spec(read)
    check_head(read, action)
    return read, action, fallback_action(read.fallback, action), sigma_of(read, action)


def test_points_and_several_factors_are_declared() -> None:
    _, action, fallback, sigma = declared(
        action=POINT, head="action", fallback=[0.5, 1.0], exploration={"epsilon": 0.1, "sigma": 0.2}
    )
    assert (action, fallback, sigma) == (Box((-1.0, 0.0), (1.0, 2.0)), (0.5, 1.0), (0.2, 0.2))
    _, action, fallback, sigma = declared(action=FACTORS, head="logits", fallback=["r", 2])
    assert action == Choices((("l", "r"), ("0", "1", "2")), ("lane", "t"))
    assert (fallback, sigma) == ((1, 2), None)
    _, action, _, _ = declared(action={"kind": "multi_discrete", "nvec": [2, 2]}, head="logits", fallback=[0, 1])
    assert action.factors == ("factor_0", "factor_1")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"action": {"kind": "discrete", "n": 2, "names": ["a"]}}, "action.names"),
        (
            {"observation": {"shape": [1], "features": [{"name": "x", "low": 1.0, "high": 0.0}]}},
            "observation.features[0]",
        ),
        (
            {"observation": {"shape": [1], "features": [{"name": "x", "quantiles": {"p50": math.nan}}]}},
            "observation.features[0]",
        ),
        ({"action": {"kind": "multi_discrete", "nvec": [65_536, 2]}}, "action.nvec"),
        ({"action": {"kind": "multi_discrete", "nvec": [2, 2], "factors": [{"name": "x"}]}}, "action.factors"),
        ({"action": {**FACTORS, "factors": [{"name": "x"}, {"name": "x"}]}}, "action.factors"),
        ({"action": {**POINT, "low": [0.0]}}, "action.low"),
        ({"action": {**POINT, "low": [2.0, 0.0]}}, "action.low"),
        ({"action": {**POINT, "low": [math.nan, 0.0]}}, "action.low"),
        ({"action": {**POINT, "low": [math.inf, 0.0], "high": [math.inf, 2.0]}}, "action.low"),
        ({"action": {**POINT, "names": ["x", "x"]}}, "action.names"),
        ({"action": {**POINT, "names": ["x"]}}, "action.names"),
        ({"action": POINT, "head": "q_values", "fallback": [0, 0]}, "head"),
        ({"head": "gaussian"}, "head"),
        ({"head": "squashed_gaussian", "temperature": 1.0}, "temperature"),
        ({"action": POINT, "head": "squashed_gaussian", "action_transform": "unscale"}, "action_transform"),
        ({"head": "action", "action_transform": "unscale"}, "action_transform"),
        ({"model": {"sha256": "0" * 64, "input": "a", "output": "b", "log_std": "c"}}, "model.log_std"),
        (
            {
                "action": POINT,
                "head": "action",
                "model": {"sha256": "0" * 64, "input": "a", "output": "b", "mask": "c"},
            },
            "model.mask",
        ),
        ({"action": OPEN, "head": "squashed_gaussian"}, "action.low"),
        ({"action": OPEN, "head": "action", "action_transform": "unscale"}, "action.low"),
        ({"exploration": {"sigma": 1.0}}, "exploration.sigma"),
        ({"action": POINT, "head": "action", "fallback": [0, 0], "exploration": {"epsilon": 0.1}}, "exploration.sigma"),
        (
            {"action": POINT, "head": "action", "fallback": [0, 0], "exploration": {"sigma": [1.0] * 3}},
            "exploration.sigma",
        ),
        (
            {"action": POINT, "head": "action", "fallback": [0, 0], "exploration": {"sigma": math.inf}},
            "exploration.sigma",
        ),
        ({"action": POINT, "head": "action", "fallback": [0.0, 3.0]}, "fallback"),
        ({"action": POINT, "head": "action", "fallback": [0.0, "x"]}, "fallback[1]"),
        ({"action": POINT, "head": "action", "fallback": 0.0}, "fallback"),
        ({"action": FACTORS, "head": "logits", "fallback": ["up", 0]}, "fallback[0]"),
        ({"action": FACTORS, "head": "logits", "fallback": 1}, "fallback"),
        ({"fallback": [0]}, "fallback"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(BundleError) as caught:
        declared(**changes)
    assert caught.value.field == field
    assert "; " in caught.value.detail  # and then what to do


def test_a_continuous_policy_that_does_not_explore_needs_no_deviation() -> None:
    assert declared(action=POINT, head="action", fallback=[0, 0], exploration=None)[3] is None


def test_the_document_is_as_large_as_it_looks() -> None:
    bomb = "a: &a [" + "1, " * 99 + "1]\nb: &b [" + "*a, " * 99 + "*a]\nc: [" + "*b, " * 99 + "*b]\n"
    with pytest.raises(BundleError, match="aliases"):
        read_manifest(bomb.encode())
    with pytest.raises(BundleError):
        read_manifest(b"a: &a {x: 1}\nb:\n  <<: *a\n")
    with pytest.raises(BundleError):
        read_manifest(b'schema: 1\npolicy: "\\ud800"\n')


def test_a_box_reads_only_finite_points_of_its_width() -> None:
    box = Box((-math.inf,), (1.0,))
    assert (box.parse([0]), box.bounded, box.kind) == ((0.0,), False, "continuous")
    for wrong in ([], [math.nan], ["1"], 1):
        with pytest.raises(UnknownAction):
            box.parse(wrong)


def test_a_deployment_says_what_a_version_does() -> None:
    raw = b"{schema: 1, policy: toy, champion: a, baseline: b, challengers: [{version: c, weight: 0.5}]}"
    found = read_deployment(raw, "here")
    assert [found.role_of(label) for label in "abcd"] == ["champion", "baseline", "challenger", None]


# Interfaces: masks, memory, heads with deviations.

GOLDEN = [[0.0, 1.0], [2.0, 3.0]]


def network(
    mask: int | None = None,
    taken: tuple[int, tuple[int | str, ...]] | None = None,
    given: tuple[int, tuple[int | str, ...] | None] | None = None,
    log_std: tuple[int | str, ...] | None = None,
) -> onnx.ModelProto:
    """A network that answers with its state, told of a mask, with a memory, and with deviations where asked."""
    proto = linear([[1, 0], [0, 1]])
    name = proto.graph.output[0].name
    if mask is not None:
        proto.graph.input.append(helper.make_tensor_value_info("mask", mask, ("batch", 2)))
    if taken is not None and given is not None:
        proto.graph.input.append(helper.make_tensor_value_info("h_in", *taken))
        proto.graph.output.append(helper.make_tensor_value_info("h_out", *given))
        proto.graph.node.append(helper.make_node("Identity", ["h_in"], ["h_out"]))
    if log_std is not None:
        proto.graph.output.append(helper.make_tensor_value_info("log_std", TensorProto.FLOAT, log_std))
        proto.graph.node.append(helper.make_node("Identity", [name], ["log_std"]))
    return proto


def with_interface(proto: onnx.ModelProto, model: dict[str, Any], **changes: Any) -> dict[str, bytes]:
    from hashlib import sha256

    raw = proto.SerializeToString()
    named = {"sha256": sha256(raw).hexdigest(), "input": "observation", "output": "q_values", **model}
    return bundle_files(proto, GOLDEN, GOLDEN, model=named, **changes)


MEMORY = {"states": [{"input": "h_in", "output": "h_out", "shape": [4], "batch_axis": 1}]}


@pytest.mark.parametrize(
    ("proto", "model", "changes", "field"),
    [
        (network(mask=TensorProto.INT64), {"mask": "mask"}, {}, "model.mask"),
        (
            network(taken=(1, (1, "batch", 4)), given=(1, None)),
            {},
            {"recurrent": {"states": [{**MEMORY["states"][0], "batch_axis": 3}]}},
            "recurrent.states[0].batch_axis",
        ),
        (
            network(taken=(1, ("batch", 4)), given=(11, None)),
            {},
            {"recurrent": {"states": [{"input": "h_in", "output": "h_out", "shape": [4]}]}},
            "recurrent.states[0].input",
        ),
        (
            network(taken=(1, ("batch", 4)), given=(1, ("batch", 5))),
            {},
            {"recurrent": {"states": [{"input": "h_in", "output": "h_out", "shape": [4]}]}},
            "recurrent.states[0].output",
        ),
        (
            network(taken=(1, ("batch", 4)), given=(1, None)),
            {},
            {"recurrent": {"states": [{"input": "h_in", "output": "none", "shape": [4]}]}},
            "recurrent.states[0].output",
        ),
        (
            network(log_std=("batch", 3)),
            {"log_std": "log_std"},
            {"action": POINT, "head": "gaussian", "fallback": [0, 0]},
            "action.low",
        ),
    ],
)
def test_an_interface_that_does_not_fit_is_named(
    proto: onnx.ModelProto, model: dict[str, Any], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(BundleError) as caught:
        read_bundle(with_interface(proto, model, **changes))
    assert "; " in caught.value.detail
    assert (caught.value.field, caught.value.check) in ((field, "interface"), (field, "manifest"))


def test_an_interface_that_fits_is_read() -> None:
    proto = network(mask=TensorProto.BOOL, taken=(1, ("batch", 4)), given=(1, None))
    states = {"states": [{"input": "h_in", "output": "h_out", "shape": [4]}]}
    found = read_bundle(with_interface(proto, {"mask": "mask"}, recurrent=states)).interface
    assert (found.mask, found.memory_size, found.one_by_one) == ("mask", 4, False)
    proto = network(log_std=("batch", 2))
    continuous = {"action": POINT, "head": "gaussian", "fallback": [0, 0], "exploration": {"epsilon": 0.0}}
    files = with_interface(proto, {"log_std": "log_std"}, **continuous)
    assert read_bundle(files | {"golden.json": b'{"states": [[0, 1]], "outputs": [[0, 1, 0, 1]]}'}).interface.width == 4


def test_golden_numbers_are_finite() -> None:
    files = identity_files() | {"golden.json": b'{"states": [[1e300, 1]], "outputs": [[1, 1]]}'}
    with pytest.raises(BundleError, match="not finite"):
        read_bundle(files)


def test_a_head_must_answer_with_floats() -> None:
    proto = linear([[1, 0], [0, 1]])
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(BundleError, match="float32 or float64") as caught:
        read_bundle(bundle_files(proto, GOLDEN, GOLDEN))
    assert (caught.value.field, caught.value.check) == ("model.output", "interface")


def test_networks_of_very_many_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = linear([[1, 0], [0, 1]])
    for _ in range(MAX_PARTS + 1):
        proto.metadata_props.add()
    with pytest.raises(BundleError) as caught:
        parse_model(proto.SerializeToString())
    assert caught.value.check == "size"

    def full(_: bytes) -> onnx.ModelProto:
        from google.protobuf.message import DecodeError

        raise DecodeError("Wire format: Arena alloc failed")

    monkeypatch.setattr(onnx, "load_model_from_string", full)
    with pytest.raises(BundleError) as caught:
        parse_model(b"")
    assert caught.value.check == "memory"


def test_operators_are_those_of_every_graph() -> None:
    from policies.graph import operators_of

    proto = linear(np.eye(2).tolist())
    inner = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "inner", [], [])
    proto.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner))
    assert {"If", "Relu"} <= operators_of(proto)
