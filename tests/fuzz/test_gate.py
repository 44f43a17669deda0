"""The gate on mutated bundles, bounded: what the fuzz target's first line says holds on every one of them."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.confine import Limits
from policies.errors import BundleError
from policies.trial import try_bundle
from tests.fuzz.fuzz_gate import hold_files, hold_tar, one_input, packed, refitted, unpacked
from tests.fuzz.mutations import SEEDS, Files, mutated_bundles, mutated_bytes
from tests.policies.gate.cases import member
from tests.policies.gate.cases import packed as tar
from tests.policies.networks import identity_files

# Far above what reading the seeds takes, far below what a few bytes could stand for.
ROOM_BYTES = 256 << 20

many = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
TARS = [tar(*(member(name, content) for name, content in seed.items()), mode="w") for seed in SEEDS[:4]]
TARS += [tar(*(member(f"v1/{name}", content) for name, content in SEEDS[0].items()), mode="w:gz")]


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < ROOM_BYTES


@given(mutated_bundles())
@many
def test_a_mutated_bundle_is_read_or_refused(files: Files) -> None:
    hold_files(files)


@given(st.sampled_from(TARS).flatmap(lambda data: mutated_bytes(data, TARS)))
@many
def test_a_mutated_archive_is_read_or_refused(data: bytes) -> None:
    hold_tar(data)


@given(st.binary(max_size=2048))
@many
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    one_input(data)
    hold_tar(data.ljust(512, b"\0"))


@given(mutated_bundles())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_mutated_bundle_is_loaded_or_refused_by_a_trial(files: Files) -> None:
    with suppress(BundleError):
        assert try_bundle(files, Limits(cpu_s=5)).policy


def _manifest(text: str) -> Files:
    return SEEDS[0] | {"policy.yaml": SEEDS[0]["policy.yaml"] + text.encode()}


def _each_ten_times(line: str) -> Files:
    """Thirty lines, each holding the one before ten times."""
    lines = ["training:", "  a0: &a0 {x: [1]}"]
    lines += [f"  a{i}: &a{i} " + line.format(", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 30)]
    return _manifest("\n".join(lines))


def _model(content: bytes) -> Files:
    return refitted(SEEDS[0] | {"model.onnx": content})


FEW_BYTES = {
    "names that are not text": _model(SEEDS[0]["model.onnx"].replace(b"observation", b"observati\xff\xfe")),
    "aliases": _each_ten_times("[{}]"),
    "merges": _each_ten_times("{{<<: [{}]}}"),
    "pairs": _each_ten_times("!!pairs [x: [{}]]"),
    "endless": _manifest("training: &a {x: *a}"),
    "choices": identity_files(action={"kind": "multi_discrete", "nvec": [65_536] * 1_024}, fallback="none"),
    "surrogate": _manifest('description: "\\ud800"'),
    "not finite": identity_files(observation={"shape": [1], "features": [{"name": "x", "low": float("nan")}]}),
    "upside down": identity_files(observation={"shape": [1], "features": [{"name": "x", "low": 1, "high": 0}]}),
    "brackets": _manifest("training: " + "[" * 100_000),
    "deep golden": SEEDS[0] | {"golden.json": b'{"states": ' + b"[" * 100_000},
    "huge integer": SEEDS[0] | {"golden.json": b'{"states": [[1' + b"0" * 400 + b', 1]], "outputs": [[1, 1]]}'},
}


@pytest.mark.parametrize("name", FEW_BYTES)
def test_a_few_bytes_that_stand_for_gigabytes_or_for_nothing_are_refused(name: str) -> None:
    refused = hold_files(FEW_BYTES[name]) is None  # apart: pytest would write the bundle out, gigabytes and all
    assert refused


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_the_target_reads_its_own_seeds(seed: int) -> None:
    files = SEEDS[seed]
    assert unpacked(packed(files)[1:]) == files
    assert (hold_files(files) is None) == (seed == len(SEEDS) - 1)  # the last keeps data elsewhere
    one_input(packed(files))


@pytest.mark.parametrize("data", TARS)
def test_the_target_reads_its_own_archives(data: bytes) -> None:
    assert hold_tar(data) is not None
    one_input(b"T" + data)
