"""One ONNX Runtime session in a bare loop: the most that a server of the same network could reach. EDGE: onnxruntime.

Duty: open a network on a device, plainly, with bound buffers or with CUDA graphs, and run batches of one size. It
serves nobody, draws nothing, records nothing.
Strategy: states come from the host and answers go back to it in every call, as in a server; one thread, as the service
has it. Where a session really runs is asked of the session: ONNX Runtime falls back to the CPU without an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Device = Literal["cpu", "cuda"]
Way = Literal["plain", "bound", "graphs"]
Array = npt.NDArray[np.float32]

WAYS: dict[Device, tuple[Way, ...]] = {"cpu": ("plain", "bound"), "cuda": ("plain", "bound", "graphs")}
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INPUT, OUTPUT = "observation", "q_values"
QUIET = 4  # fatal errors alone: that CUDA is missing is said by us
# ONNX Runtime runs a network twice before it captures its graph.
WARM_CALLS = 4


class NoCudaError(Exception):
    """The session does not run on CUDA. Install onnxruntime-gpu[cuda,cudnn] on a machine with an NVIDIA GPU."""


def version() -> str:
    return str(ort.__version__)


def open_session(model: bytes, device: Device, *, graphs: bool = False) -> Any:
    """Open a session. Raises NoCudaError when it is to run on CUDA and does not."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = QUIET
    ort.set_default_logger_severity(QUIET)
    settings = {"enable_cuda_graph": "1" if graphs else "0", "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    providers: list[Any] = [CPU] if device == "cpu" else [(CUDA, settings), CPU]
    if device == "cuda" and CUDA not in ort.get_available_providers():
        raise NoCudaError(f"ONNX Runtime {version()} was built without CUDA")
    session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    if session.get_providers()[0] != (CPU if device == "cpu" else CUDA):
        raise NoCudaError(f"CUDA's libraries or driver do not load: the session runs on {session.get_providers()[0]}")
    return session


def asker(model: bytes, device: Device, way: Way, states: Array) -> Callable[[], Array]:
    """Give a function that asks about these states once. Raises NoCudaError."""
    session = open_session(model, device, graphs=way == "graphs")
    if way == "plain":
        return lambda: session.run([OUTPUT], {INPUT: states})[0]
    return _bound(session, device, states, graphs=way == "graphs")


def _bound(session: Any, device: Device, states: Array, *, graphs: bool) -> Callable[[], Array]:
    """Buffers on the device, bound once, filled in every call."""
    options = ort.RunOptions()
    if graphs:
        options.add_run_config_entry("gpu_graph_id", "1")
    (first,) = session.run([OUTPUT], {INPUT: states}, _without_graph(graphs))
    given = ort.OrtValue.ortvalue_from_numpy(np.array(states), device)
    answer = ort.OrtValue.ortvalue_from_numpy(np.array(first), device)
    binding = session.io_binding()
    binding.bind_ortvalue_input(INPUT, given)
    binding.bind_ortvalue_output(OUTPUT, answer)

    def ask() -> Array:
        given.update_inplace(states)
        session.run_with_iobinding(binding, options)
        return np.array(answer.numpy())

    return ask


def _without_graph(graphs: bool) -> Any:
    options = ort.RunOptions()
    if graphs:
        options.add_run_config_entry("gpu_graph_id", "-1")
    return options


@dataclass(slots=True)
class Bare:
    """A session that is asked again and again."""

    ask: Callable[[], Array]
    rows: int

    def warm(self) -> Array:
        """Ask a few times. Gives the answer."""
        return [self.ask() for _ in range(WARM_CALLS)][-1]

    def measure(self, seconds: float) -> float:
        """Ask for so long. Gives rows a second."""
        calls = 0
        began_s = time.perf_counter()
        while (lasted_s := time.perf_counter() - began_s) < seconds or not calls:
            self.ask()
            calls += 1
        return calls * self.rows / max(lasted_s, 1e-9)
