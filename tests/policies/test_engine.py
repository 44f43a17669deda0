"""The engine reproduces golden vectors or refuses, says what a call will take, and never falls back to CPU silently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from structlog.testing import capture_logs

from policies.bundle import PolicyBundle, read_bundle
from policies.engine import REOPEN_PAUSE_S, Engine, OutOfMemory, Reopening, resolve_device
from policies.errors import BundleError, ConfigError
from policies.network import Network, open_on
from service.clock import ManualClock
from tests.policies.growing import BURSTING, square
from tests.policies.networks import bundle_files, identity_files, index_of_largest, indexer, linear, logarithm
from tests.waiting import until

STATES = [[0.0, 1.0], [1.0, 0.0]]


class StepClock:
    """A clock on which every reading is `step` seconds after the last."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_it_answers_a_whole_batch_in_one_call() -> None:
    engine = Engine(read_bundle(bundle_files(linear([[1, 2], [3, 4]], [1, 1]), STATES, [[4, 5], [2, 3]])))
    outputs = engine.run(np.array([[1, 1], [0, 2], [1, 0]], dtype=np.float32))
    np.testing.assert_allclose(outputs, [[5, 7], [7, 9], [2, 3]])


def test_a_network_that_misses_its_golden_vectors_is_refused() -> None:
    files = bundle_files(linear([[1, 0], [0, 1]]), STATES, [[0.0, 1.0], [1.0, 0.5]])
    with pytest.raises(BundleError, match="golden state 1") as caught:
        Engine(read_bundle(files))
    assert caught.value.check == "golden"


def test_a_network_that_answers_golden_states_with_nan_is_refused() -> None:
    files = bundle_files(logarithm(), [[-1.0, 1.0]], [[0.0, 0.0]])
    with pytest.raises(BundleError) as caught:
        Engine(read_bundle(files))
    assert caught.value.check == "finite"


def test_a_network_that_cannot_run_its_golden_states_is_refused() -> None:
    with pytest.raises(BundleError) as caught:
        Engine(read_bundle(bundle_files(indexer(), [[7.0, 0.0]], [[0.0, 0.0]])))
    assert caught.value.check == "golden"


def test_a_network_that_fails_raises_with_its_name() -> None:
    engine = Engine(read_bundle(bundle_files(indexer(), STATES, [[1, 0], [0, 1]])))
    with pytest.raises(RuntimeError, match="toy/v1"):
        engine.run(np.array([[9.0, 0.0]], dtype=np.float32))


def test_a_network_over_its_latency_budget_is_refused() -> None:
    bundle = read_bundle(identity_files(latency_budget_ms=10))
    with pytest.raises(BundleError) as caught:
        Engine(bundle, monotonic_s=StepClock(0.02))
    assert caught.value.check == "latency"


def test_predictions_follow_what_calls_take() -> None:
    clock = StepClock(0.001)
    engine = Engine(read_bundle(identity_files()), monotonic_s=clock)
    assert engine.predicted_s(1) == pytest.approx(0.001)
    assert engine.rows_within(0.0) == 1
    clock.step = 0.004
    for _ in range(200):
        engine.run(np.zeros((1, 2), dtype=np.float32))
    assert engine.predicted_s(1) == pytest.approx(0.004, rel=0.01)


def test_a_call_that_was_interrupted_says_little_of_the_network() -> None:
    clock = StepClock(0.00001)
    engine = Engine(read_bundle(identity_files()), monotonic_s=clock)
    clock.step = 0.05  # another program had the core
    engine.run(np.zeros((1, 2), dtype=np.float32))
    assert engine.predicted_s(1) < 0.00002


def test_a_graph_that_onnx_runtime_cannot_load_is_refused() -> None:
    proto = linear([[1, 0], [0, 1]])
    proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(BundleError) as caught:
        Engine(read_bundle(bundle_files(proto, STATES, STATES)))
    assert caught.value.check == "load"


def test_cuda_without_cuda_is_an_error_and_auto_is_not() -> None:
    assert resolve_device("cpu") == "cpu"
    if resolve_device("auto") == "cuda":
        assert resolve_device("cuda") == "cuda"
        return
    with pytest.raises(ConfigError, match="no CUDA driver") as caught:
        resolve_device("cuda")
    assert caught.value.field == "SUREFOOT_DEVICE"


def test_an_index_is_read_as_a_row_and_a_batch_of_one_is_asked_row_by_row() -> None:
    files = bundle_files(index_of_largest(), STATES, [[0.0, 1.0], [1.0, 0.0]], head="action")
    engine = Engine(read_bundle(files))
    assert engine.run(np.array([[5, 6], [6, 5]], dtype=np.float32)).tolist() == [[0, 1], [1, 0]]
    with capture_logs() as logs:
        looped = Engine(read_bundle(bundle_files(linear([[1, 0], [0, 1]], batch=1), STATES, STATES)))
    assert [entry["event"] for entry in logs] == ["policy_runs_one_state_at_a_time"]
    assert "dynamic_axes" in logs[0]["mend"]
    assert looped.run(np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32)).tolist() == [[1, 2], [3, 4], [5, 6]]


def test_after_out_of_memory_the_session_is_opened_again_and_the_old_one_has_left() -> None:
    opened: list[weakref.ref[Network]] = []
    left: list[bool] = []

    def open_counted(bundle: PolicyBundle, device: str) -> Network:
        left.extend(old() is None for old in opened)
        network = open_on(bundle.model, bundle.interface, device)
        opened.append(weakref.ref(network))
        return network

    engine = Engine(read_bundle(bundle_files(square(), STATES, STATES)), open_network=open_counted)
    with capture_logs() as logs:
        with pytest.raises(OutOfMemory, match="toy/v1"):
            engine.run(np.array([BURSTING], np.float32))
        until(lambda: logs, "the session")
    assert [entry["event"] for entry in logs] == ["session_reopened"]
    assert (len(opened), left) == (2, [True]), "its memory was given back before the new session asked for any"
    assert engine.run(np.array(STATES, np.float32)).tolist() == STATES


def test_while_a_session_is_opened_again_calls_raise_at_once_and_it_is_tried_once_a_second() -> None:
    clock, working, tries = ManualClock(), threading.Event(), [0]
    working.set()

    def open_if_working(bundle: PolicyBundle, device: str) -> Network:
        tries[0] += 1
        if not working.is_set():
            raise BundleError("Failed to allocate memory", "model.onnx", "load")
        return open_on(bundle.model, bundle.interface, device)

    def failures() -> int:
        return sum(entry["event"] == "session_not_reopened" for entry in logs)

    bundle, states = read_bundle(bundle_files(square(), STATES, STATES)), np.array(STATES, np.float32)
    engine = Engine(bundle, monotonic_s=clock.monotonic_s, open_network=open_if_working)
    working.clear()
    with capture_logs() as logs:
        with pytest.raises(OutOfMemory):
            engine.run(np.array([BURSTING], np.float32))
        until(lambda: failures() == 1, "the first try")
        for _ in range(5):
            with pytest.raises(Reopening, match="toy/v1"):
                engine.run(states)
        assert tries == [2]
        clock.advance(int(REOPEN_PAUSE_S * 1000) + 1)
        until(lambda: not engine._reopening.locked(), "the end of the first try")
        with pytest.raises(OutOfMemory):
            engine.run(states)
        until(lambda: failures() == 2, "the second try")
        clock.advance(int(REOPEN_PAUSE_S * 1000) + 1)
        working.set()
        until(lambda: not engine._reopening.locked(), "the end of the second try")
        with pytest.raises(OutOfMemory):
            engine.run(states)
        until(lambda: engine._network is not None, "the session")
    assert engine.run(states).tolist() == STATES
    assert tries == [4]


ON_CUDA = """
import json, sys
from structlog.testing import capture_logs
from policies.bundle import read_bundle
from policies.engine import Engine
from policies.errors import ConfigError
from tests.policies.networks import identity_files
with capture_logs() as logs:
    try:
        engine = Engine(read_bundle(identity_files()), sys.argv[1])
        said = [engine.device, engine._network.provider, engine.run(engine.bundle.golden_states).tolist()]
    except ConfigError as error:
        said = [error.field, error.detail]
print(json.dumps([said, [entry["event"] for entry in logs]]))
"""


@pytest.mark.skipif(
    resolve_device("auto") == "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs an onnxruntime with CUDA on a machine without",
)
def test_a_driver_without_libraries_is_noticed_though_onnx_runtime_falls_back_in_silence(tmp_path: Path) -> None:
    """Any library passes for the driver. ONNX Runtime then looks for CUDA's own, and does not find them."""
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime_providers_shared.so"))
    (tmp_path / "libcuda.so.1").symlink_to(library)

    def engine_on(device: str) -> list[list[object]]:
        done = subprocess.run(
            [sys.executable, "-c", ON_CUDA, device],
            env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        answer: list[list[object]] = json.loads(done.stdout.splitlines()[-1])
        return answer

    said, logs = engine_on("cuda")
    assert (said[0], logs) == ("SUREFOOT_DEVICE", [])
    assert "libraries do not load" in str(said[1])
    golden = [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    assert engine_on("auto") == [["cpu", "CPUExecutionProvider", golden], ["cuda_fell_back_to_cpu"]]
