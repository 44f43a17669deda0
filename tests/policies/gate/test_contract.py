"""The contract kit on a bundle: every promise has its verdict, in the order of a load, and says what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from policies.archive import read_folder_files
from policies.bundle import read_bundle
from policies.confine import Limits
from policies.contract import GATE, MARKS, examine, refused
from policies.engine import Engine
from policies.errors import BundleError
from policies.probes import leaves_room_in_its_latency_budget
from policies.store import BUNDLED
from tests.policies.gate import hostile, odd
from tests.policies.gate.cases import CASES, TIGHT, around
from tests.policies.networks import identity_files, linear
from tests.policies.test_engine import StepClock

ALL = [sentence for _, _, sentence in GATE]


def verdicts(files: Mapping[str, bytes], limits: Limits = TIGHT) -> dict[str, tuple[str, str]]:
    report = examine(files, limits)
    return {promise.sentence: (promise.verdict, promise.detail) for promise in report.promises}


@pytest.mark.parametrize("label", ["v1", "v2", "baseline"])
def test_the_bundles_that_ship_keep_every_promise(label: str) -> None:
    report = examine(read_folder_files(BUNDLED / "cartpole" / label, hardlinks=True))
    assert report.ok
    assert not report.warnings, report.text()
    assert "accepted: " in report.text()
    assert 0 < report.peak_bytes < Limits().memory_bytes / 2


@pytest.mark.parametrize(
    "files",
    [odd.good(), odd.masked(-1e9), odd.deviating(-1.0), odd.recurrent(0.5)],
    ids=["plain", "masked", "gaussian", "recurrent"],
)
def test_of_a_good_bundle_there_is_nothing_to_say(files: Mapping[str, bytes]) -> None:
    found = verdicts(files)
    assert {verdict for verdict, _ in found.values()} == {"passed"}, found


WARNED = {
    "batch of one": (
        around(linear([[1, 0], [0, 1]], batch=1)), "It answers a batch in one call", "dynamic_axes",
    ),
    "no support": (identity_files(), "It says what training has seen of every feature", "of f0, f1"),
    "no features": (
        identity_files(observation={"shape": [2]}), "It says what training has seen of every feature", "of any feature",
    ),
    "quantiles": (
        odd.good() | {"policy.yaml": odd.good()["policy.yaml"].replace(b"high: 10.0", b"quantiles: {p01: 9, p99: 1}")},
        "Its bounds and quantiles are in order", "out of order",
    ),
    "no fallback": (odd.good(fallback="none"), "It declares a fallback", "409"),
    "few golden": (identity_files(), "Its golden states are many and different", "3 different states of 3"),
    "alike": (
        identity_files() | {"golden.json": json.dumps({"states": [[1, 2]] * 9, "outputs": [[1, 2]] * 9}).encode()},
        "Its golden states are many and different", "1 different states of 9",
    ),
    "one action": (identity_files(), "Its golden states call for different actions", "same action"),
    "out of bounds": (
        odd.good() | {"policy.yaml": odd.good()["policy.yaml"].replace(b"high: 10.0", b"high: 5.0")},
        "Its golden states lie within its bounds", "other units",
    ),
    "tolerance": (
        odd.good() | {"golden.json": json.dumps({"states": odd.NINE, "outputs": odd.NINE, "rtol": 1e300}).encode()},
        "Its golden vectors are held tightly", "rtol",
    ),
    "draws": (odd.drawing(), "It answers the same twice", "at random"),
    "mixes rows": (odd.mixing(), "It answers a state alone as in a batch", "eval mode"),
    "NaN": (odd.undefined_below_zero(), "It answers corners and random states with finite numbers", "log(0)"),
    "fails": (odd.failing_above_nine(), "It answers corners and random states with finite numbers", "fallback"),
    "loop": (odd.looping_above(1000.0), "It ends, whatever the state", "Loop"),
    "endless": (
        odd.looping_above(50.0), "It answers corners and random states with finite numbers", "CPU time",
    ),
    "memory": (odd.recurrent(1000.0), "Its memory stays finite over an episode", "recurrent.states"),
    "mask": (odd.masked(-float("inf")), "It takes a mask of one choice", "-1e9"),
    "sums": (odd.no_distribution(), "Its probabilities sum to one", "softmax"),
    "deviation": (odd.deviating(40.0), "Its deviations are usable", "logarithm"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNED)
def test_what_an_owner_should_know_is_a_warning_and_no_refusal(name: str) -> None:
    files, sentence, detail = WARNED[name]
    report = examine(files, TIGHT)
    assert report.ok, report.text()
    found = next(promise for promise in report.promises if promise.sentence == sentence)
    assert found.verdict == "warned", report.text()
    assert detail in found.detail
    assert f"! {sentence}" in report.text()
    assert "warning" in report.text().splitlines()[-1]


def test_a_latency_close_to_its_budget_is_a_warning() -> None:
    bundle = read_bundle(odd.good(latency_budget_ms=10))
    assert leaves_room_in_its_latency_budget(Engine(bundle, monotonic_s=StepClock(0.004))) == ("passed", "")
    found = leaves_room_in_its_latency_budget(Engine(bundle, monotonic_s=StepClock(0.006)))
    assert found is not None
    assert found[0] == "warned"


BROKEN = [case for case in CASES if not case.name.startswith("tar_") and case.check != "links"]


@pytest.mark.parametrize(
    "name", ["no_model", "over_the_cap", "manifest", "digest", "truncated", "external_traversal", "old_opset",
             "operators_ep_context", "wrong_input", "golden_shape", "load_declared_huge", "golden_mismatch", "nan",
             "too_slow", "bomb_expand", "loop_without_end"],
)  # fmt: skip
def test_the_first_broken_promise_refuses_and_the_rest_is_not_reached(name: str, tmp_path: Path) -> None:
    case = next(case for case in BROKEN if case.name == name)
    try:
        report = examine(read_folder_files(case.make(tmp_path)), case.limits)
    except BundleError as error:
        report = refused(error)
    assert not report.ok
    (broken,) = [promise for promise in report.promises if promise.verdict == "failed"]
    assert broken.check == case.check
    assert case.check in next(checks for _, checks, sentence in GATE if sentence == broken.sentence)
    assert report.text().endswith(f"refused: {case.check}")
    after = report.promises[report.promises.index(broken) + 1 :]
    assert {promise.verdict for promise in after} == {"not reached"}
    before = {promise.verdict for promise in report.promises[: report.promises.index(broken)]}
    assert before <= {"passed", "not reached"}


def test_golden_vectors_of_the_wrong_shape_and_of_wrong_values_break_different_promises() -> None:
    shape = verdicts(odd.good() | {"golden.json": b'{"states": [[1]], "outputs": [[1, 2]]}'})
    values = verdicts(odd.good() | {"golden.json": b'{"states": [[1, 2]], "outputs": [[1, 3]]}'})
    assert shape["Its golden vectors fit its spaces"][0] == "failed"
    assert shape["It reproduces its golden vectors"][0] == "not reached"
    assert values["Its golden vectors fit its spaces"][0] == "passed"
    assert values["It reproduces its golden vectors"][0] == "failed"


def test_a_trial_that_ends_while_reading_says_nothing_of_what_it_did_not_finish() -> None:
    found = verdicts(around(hostile.loop(None)), Limits(cpu_s=1))
    assert found["Its golden vectors fit its spaces"][0] == "passed"
    assert found["ONNX Runtime opens it"][0] == "not reached"
    assert found["It stays within a trial's memory and time"][0] == "failed"


def test_a_bundle_refused_on_the_way_in_has_a_report_too() -> None:
    report = refused(BundleError("model.onnx is a symbolic link; put a plain copy in its place", "model.onnx", "links"))
    assert [promise.verdict for promise in report.promises[:3]] == ["passed", "failed", "not reached"]
    assert "    model.onnx is a symbolic link" in report.text()


def test_every_promise_is_a_sentence_of_its_own() -> None:
    assert len(set(ALL)) == len(ALL)
    assert set(MARKS) == {"passed", "failed", "warned", "not reached"}
