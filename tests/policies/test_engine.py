"""The engine reproduces golden vectors or refuses, says what a call will take, and never falls back to CPU silently."""

from __future__ import annotations

import numpy as np
import pytest
from structlog.testing import capture_logs

from policies.bundle import read_bundle
from policies.engine import Engine, resolve_device
from policies.errors import BundleError, ConfigError
from tests.policies.networks import bundle_files, identity_files, index_of_largest, indexer, linear, logarithm

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
