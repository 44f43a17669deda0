"""A network gives the same answers by fixed buffers as by plain runs, and never those of another call."""

from __future__ import annotations

import threading
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from policies.bundle import read_bundle
from policies.cuda import LARGEST, Buffers, graph_id, padded, size_for
from policies.network import CPU, CUDA, Network, open_on
from tests.policies.networks import bundle_files, index_of_largest, linear

FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL
STATES = [[0.0, 1.0], [1.0, 0.0]]


def recalling() -> onnx.ModelProto:
    """Scores from state, mask and memory, and a memory with the batch on its second axis that adds the state up."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Unsqueeze", ["observation", "zero"], ["now"]),
            helper.make_node("Add", ["now", "h"], ["h_out"]),
            helper.make_node("Squeeze", ["h_out", "zero"], ["sum"]),
            helper.make_node("Cast", ["mask"], ["allowed"], to=FLOAT),
            helper.make_node("Mul", ["sum", "allowed"], ["q_values"]),
        ],
        "recalling",
        [
            value("observation", FLOAT, ["batch", 2]),
            value("mask", BOOL, ["batch", 2]),
            value("h", FLOAT, [1, "batch", 2]),
        ],
        [value("q_values", FLOAT, ["batch", 2]), value("h_out", FLOAT, [1, "batch", 2])],
        [numpy_helper.from_array(np.array([0], np.int64), "zero")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def both(proto: onnx.ModelProto, **changes: Any) -> tuple[Network, Network]:
    """The same network, asked plainly and by fixed buffers."""
    bundle = read_bundle(bundle_files(proto, STATES, STATES, **changes))
    return Network(bundle.model, bundle.interface), Network(bundle.model, bundle.interface, bound_to="cpu")


def both_recalling() -> tuple[Network, Network]:
    proto = recalling()
    model = {"sha256": sha256(proto.SerializeToString()).hexdigest(), "input": "observation", "output": "q_values"}
    states = [{"input": "h", "output": "h_out", "shape": [1, 2], "batch_axis": 1}]
    return both(proto, model=model | {"mask": "mask"}, recurrent={"states": states})


def test_sizes_are_powers_of_two_and_name_their_graphs_from_one_on() -> None:
    assert [size_for(rows) for rows in (1, 2, 3, 4, 5, 64, 65, LARGEST)] == [1, 2, 4, 4, 8, 64, 128, LARGEST]
    assert [graph_id(size) for size in (1, 2, 4, 1024)] == ["1", "2", "3", "11"], "0 is reserved"
    rows = np.array([[1, 2], [3, 4], [5, 6]])
    assert padded(rows, 4).tolist() == [[1, 2], [3, 4], [5, 6], [1, 2]]
    assert padded(rows, 3) is rows


def test_every_batch_size_is_answered_as_by_a_plain_run() -> None:
    plain, bound = both(linear([[1, 2], [3, 4]], [0.5, -0.5]))
    random = np.random.default_rng(1)
    for rows in [*range(1, 70), 1, 7, LARGEST, LARGEST + 1, 2 * LARGEST + 3]:
        states = random.normal(size=(rows, 2)).astype(np.float32)
        for _ in range(2):  # the first call of a size is a plain one itself
            np.testing.assert_allclose(bound.ask(states)[0], plain.ask(states)[0], rtol=1e-6)


def test_masks_and_memory_go_through_the_buffers() -> None:
    plain, bound = both_recalling()
    random = np.random.default_rng(2)
    for rows in [*range(1, 18), *range(17, 0, -1)]:
        states, memory = random.normal(size=(2, rows, 2)).astype(np.float32)
        mask = random.random((rows, 2)) < 0.5
        for given in (None, mask):
            expected, got = plain.ask(states, given, memory), bound.ask(states, given, memory)
            np.testing.assert_array_equal(got[0], expected[0])
            np.testing.assert_array_equal(got[1], expected[1])
            assert got[0].shape == got[1].shape == (rows, 2)
        np.testing.assert_array_equal(bound.ask(states)[1], plain.ask(states)[1], "an episode that has not begun")


def test_an_answer_is_not_overwritten_by_the_next_call() -> None:
    _, bound = both_recalling()
    ones, twos = np.full((3, 2), 1, np.float32), np.full((3, 2), 2, np.float32)
    bound.ask(ones)
    outputs, memory = bound.ask(ones)
    bound.ask(twos)
    assert outputs.tolist() == memory.tolist() == ones.tolist()


def test_calls_from_many_threads_do_not_meet_in_a_buffer() -> None:
    _, bound = both(linear([[1, 0], [0, 1]]))
    wrong: list[float] = []

    def ask(number: float) -> None:
        states = np.full((3, 2), number, np.float32)
        wrong.extend(number for _ in range(300) if not (bound.ask(states)[0] == number).all())

    threads = [threading.Thread(target=ask, args=(float(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_batch_of_one_and_an_index_go_through_the_buffers() -> None:
    plain, bound = both(linear([[1, 0], [0, 1]], batch=1))
    states = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    for _ in range(2):
        assert bound.ask(states)[0].tolist() == plain.ask(states)[0].tolist() == states.tolist()
    for shape in (("batch",), ("batch", 1)):
        plain, bound = both(index_of_largest(shape=shape), head="action")
        for _ in range(2):
            assert bound.ask(states)[0].tolist() == plain.ask(states)[0].tolist() == [[0, 1]] * 3


def test_states_of_another_type_are_refused_not_read_as_nonsense() -> None:
    plain, bound = both(linear([[1, 0], [0, 1]]))
    bound.ask(np.ones((4, 2), np.float32))
    for network in (plain, bound):
        with pytest.raises(RuntimeError, match=r"double|float64"):
            network.ask(np.ones((4, 2), np.float64))
    assert bound.ask(np.ones((4, 2), np.float32))[0].tolist() == [[1, 1]] * 4


def test_a_network_that_fails_by_its_buffers_raises_and_goes_on() -> None:
    from tests.policies.networks import indexer

    _, bound = both(indexer())
    good, bad = np.array([[1, 0]], np.float32), np.array([[7, 0]], np.float32)
    for _ in range(2):
        assert bound.ask(good)[0].tolist() == [[0, 1]]
        with pytest.raises(RuntimeError):
            bound.ask(bad)


class Recorder:
    """A session that only remembers by which graph it was asked: all that a machine without a GPU can show."""

    def __init__(self, network: Network) -> None:
        self._session = network.session
        self.graphs: list[str] = []
        self.fails = False

    def run(self, names: Any, feeds: Any, options: Any) -> Any:
        self.graphs.append(options.get_run_config_entry("gpu_graph_id"))
        return self._session.run(names, feeds, options)

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.graphs.append(options.get_run_config_entry("gpu_graph_id"))
        if self.fails:
            raise RuntimeError("not captured")
        self._session.run_with_iobinding(binding, options)


@pytest.fixture
def recorded() -> tuple[Network, Recorder, Buffers]:
    """A network on the CPU whose runs say which graph they would have been."""
    _, network = both(linear([[1, 0], [0, 1]]))
    assert network.buffers is not None
    recorder = Recorder(network)
    network.buffers.session, network.buffers.graphs = recorder, True
    return network, recorder, network.buffers


def test_each_size_has_a_graph_once_the_serving_thread_asks(recorded: tuple[Network, Recorder, Buffers]) -> None:
    network, recorder, buffers = recorded
    one, three = np.ones((1, 2), np.float32), np.ones((3, 2), np.float32)
    for _ in range(3):
        network.ask(one)
    assert recorder.graphs == ["-1"] * 3, "while warming up"
    buffers.capturing = True
    for states in (one, three, three, one):
        assert network.ask(states)[0].tolist() == states.tolist()
    assert recorder.graphs[3:] == ["1", "-1", "3", "1"]
    thread = threading.Thread(target=network.ask, args=(three,))
    thread.start()
    thread.join()
    assert recorder.graphs[7:] == ["-1"], "a graph belongs to the thread that captured it"


def test_nothing_is_captured_while_a_session_is_opened(recorded: tuple[Network, Recorder, Buffers]) -> None:
    from policies.cuda import DEVICE

    network, recorder, buffers = recorded
    one, held, done = np.ones((1, 2), np.float32), threading.Event(), threading.Event()

    def open_slowly() -> None:
        with DEVICE:
            held.set()
            done.wait(60)

    network.ask(one)
    buffers.capturing = True
    thread = threading.Thread(target=open_slowly)
    thread.start()
    held.wait(60)
    network.ask(one)
    done.set()
    thread.join()
    network.ask(one)
    assert recorder.graphs == ["-1", "-1", "1"]


def test_a_capture_that_fails_is_one_calls_failure(recorded: tuple[Network, Recorder, Buffers]) -> None:
    network, recorder, buffers = recorded
    one = np.ones((1, 2), np.float32)
    network.ask(one)
    buffers.capturing = recorder.fails = True
    with pytest.raises(RuntimeError, match="not captured"):
        network.ask(one)
    recorder.fails = False
    assert network.ask(one)[0].tolist() == [[1, 1]]
    assert recorder.graphs == ["-1", "1", "-1"]


def test_a_network_that_cannot_be_on_cuda_says_so() -> None:
    """ONNX Runtime opens the session on the CPU, prints a line and raises nothing."""
    bundle = read_bundle(bundle_files(linear([[1, 0], [0, 1]]), STATES, STATES))
    network = open_on(bundle.model, bundle.interface, "cuda")
    if network.provider == CUDA:
        pytest.skip("this machine has CUDA")
    assert (network.provider, network.buffers) == (CPU, None)
    assert network.ask(bundle.golden_states)[0].tolist() == STATES
