"""CUDA for real: the same answers as on the CPU, by fixed buffers and captured graphs. Skipped without a GPU.

Run it on a machine with CUDA: `pip install 'surefoot[gpu]' && pytest tests/policies/test_cuda.py -v`.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from policies.bundle import read_bundle
from policies.engine import Engine, OutOfMemory, resolve_device
from policies.network import CUDA, Network
from tests.policies.growing import BURSTING, loop, square
from tests.policies.networks import bundle_files, linear
from tests.policies.test_network import STATES, both_recalling
from tests.waiting import until

pytestmark = pytest.mark.skipif(resolve_device("auto") != "cuda", reason="no usable CUDA device on this machine")


@pytest.fixture
def engine() -> Engine:
    return Engine(read_bundle(bundle_files(linear([[1, 2], [3, 4]], [1, 1]), STATES, [[4, 5], [2, 3]])), "cuda")


def test_every_batch_size_is_answered_as_on_the_cpu_once_captured_and_replayed(engine: Engine) -> None:
    on_cpu = Engine(engine.bundle, "cpu")
    assert engine.device == "cuda"
    random = np.random.default_rng(3)
    with ThreadPoolExecutor(1) as device:
        for rows in [*range(1, 70), 500, 1024, 1025]:
            for _ in range(4):
                states = random.normal(size=(rows, 2)).astype(np.float32)
                got = device.submit(engine.run, states).result()
                np.testing.assert_allclose(got, on_cpu.run(states), rtol=1e-5, atol=1e-5)
        network = engine._network
        assert network is not None
        assert network.provider == CUDA
        assert network.buffers is not None
        assert network.buffers.graphs, "this network has neither branches nor loops"
        captured = [bound.graph_of for bound in network.buffers._sizes.values()]
        served_by = device.submit(threading.get_ident).result()
        assert captured == [served_by] * len(captured)


def test_masks_and_memory_are_those_of_the_call() -> None:
    plain, _ = both_recalling()
    bound = Network(plain.session._model_bytes, plain.interface, [CUDA, "CPUExecutionProvider"], "cuda")
    random = np.random.default_rng(4)
    for rows in (1, 3, 8, 3, 1):
        states, memory = random.normal(size=(2, rows, 2)).astype(np.float32)
        mask = random.random((rows, 2)) < 0.5
        for _ in range(3):
            expected, got = plain.ask(states, mask, memory), bound.ask(states, mask, memory)
            np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
            np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)


def test_versions_are_loaded_while_another_one_captures(engine: Engine) -> None:
    random = np.random.default_rng(5)
    with ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as device:
        loads = [loader.submit(Engine, engine.bundle, "cuda") for _ in range(5)]
        while not all(load.done() for load in loads):
            rows = int(random.integers(1, 256))
            states = np.ones((rows, 2), np.float32)
            assert device.submit(engine.run, states).result().tolist() == [[5.0, 7.0]] * rows
        for load in loads:
            assert load.result().device == "cuda"


def test_a_network_with_a_loop_runs_without_graphs() -> None:
    engine = Engine(read_bundle(bundle_files(loop(), STATES, STATES)), "cuda")
    network = engine._network
    assert network is not None
    assert network.provider == CUDA
    assert network.buffers is not None
    assert not network.buffers.graphs
    for _ in range(3):
        assert engine.run(np.array(STATES, np.float32)).tolist() == STATES


def test_after_out_of_memory_the_session_is_opened_again() -> None:
    engine = Engine(read_bundle(bundle_files(square(), STATES, STATES)), "cuda")
    with pytest.raises(OutOfMemory):
        engine.run(np.array([BURSTING], np.float32))
    until(lambda: engine._network is not None, "the session")
    assert engine.run(np.array(STATES, np.float32)).tolist() == STATES
    assert engine.device == "cuda"
