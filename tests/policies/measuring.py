"""What the engine's choices cost, as ratios from one run: `python -m tests.policies.measuring`.

Duty: the numbers that `docs/engine.md` gives: fixed buffers against plain runs on a CPU, and a watched call against one
that nobody watches. No test reads them; a machine that is busy gives other ones.
Strategy: what is compared runs in turns, and the least of many means counts, so that a neighbour disturbs both alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from policies.bundle import read_bundle
from policies.engine import Engine
from policies.network import Network
from policies.watchdog import Watchdog
from tests.policies.networks import bundle_files

FEATURES, WIDTH, ACTIONS = 8, 64, 4
BATCHES = (1, 16, 256)
TURNS, CALLS = 15, 400


def q_network() -> onnx.ModelProto:
    """The network of the speed targets: 8-64-64-4."""
    random = np.random.default_rng(0)
    sizes = [FEATURES, WIDTH, WIDTH, ACTIONS]
    nodes, constants, at = [], [], "observation"
    for layer, (taken, given) in enumerate(pairwise(sizes)):
        last = layer == len(sizes) - 2
        weights = random.normal(size=(taken, given)).astype(np.float32) / taken
        constants.append(numpy_helper.from_array(weights, f"w{layer}"))
        out = "q_values" if last else f"sum{layer}"
        nodes.append(helper.make_node("MatMul", [at, f"w{layer}"], [out]))
        if not last:
            at = f"hidden{layer}"
            nodes.append(helper.make_node("Relu", [out], [at]))
    graph = helper.make_graph(
        nodes,
        "q_network",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("q_values", TensorProto.FLOAT, ["batch", ACTIONS])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def least_us(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Time calls in turns; the least mean of each, in microseconds."""
    least = [float("inf")] * len(calls)
    for _ in range(TURNS):
        for at, call in enumerate(calls):
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            least[at] = min(least[at], (time.perf_counter() - started) / CALLS * 1e6)
    return least


def main() -> None:
    proto = q_network()
    states = [[0.0] * FEATURES]
    bundle = read_bundle(bundle_files(proto, states, [[0.0] * ACTIONS]))
    plain = Network(bundle.model, bundle.interface)
    bound = Network(bundle.model, bundle.interface, bound_to="cpu")
    say = sys.stdout.write
    say("rows  plain µs  buffers µs  buffers / plain\n")
    for rows in BATCHES:
        batch = np.ones((rows, FEATURES), np.float32)
        np.testing.assert_allclose(bound.ask(batch)[0], plain.ask(batch)[0], rtol=1e-5)
        one, other = least_us([lambda batch=batch: plain.ask(batch), lambda batch=batch: bound.ask(batch)])  # type: ignore[misc]
        say(f"{rows:4}  {one:8.1f}  {other:10.1f}  {other / one:15.2f}\n")
    watchdog = Watchdog()
    engine, batch = Engine(bundle, watchdog=watchdog), np.ones((1, FEATURES), np.float32)
    unwatched, watched = least_us([lambda: engine.step(batch, None, None), lambda: engine.step(batch, None, None, 1.0)])
    say(f"one row, watched / unwatched: {watched:.1f} / {unwatched:.1f} µs = {watched / unwatched:.3f}\n")
    started, used = time.perf_counter(), time.process_time()
    call = type("Call", (), {"terminate": False})()
    watchdog.begin(call, 60.0)
    time.sleep(2.0)
    watchdog.finish(call)
    share = (time.process_time() - used) / (time.perf_counter() - started)
    say(f"the thread, while calls run: {100 * share:.2f} % of a core\n")


if __name__ == "__main__":
    main()
