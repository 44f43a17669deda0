"""EDGE: fixed buffers for batches, bound to a session once, and CUDA graphs over them. Only `network.py` uses it.

Duty: feeds in, outputs out, by IO binding: a set of buffers for each power of two, into which a batch is copied. It
imports no onnxruntime: session and values are given to it. It knows no head, mask or memory: feeds are named arrays.
Strategy: the first call of a size runs plainly and shows what the outputs look like; from then on the same buffers
serve. With graphs, the kernels of a size are captured once, by the thread that serves, and replayed with one launch.
Facts (ONNX Runtime's `cuda_execution_provider.cc`): a graph belongs to the thread that captured it; `gpu_graph_id`
picks it, -1 runs without, 0 is reserved; while one thread captures, an allocation on another one spoils it: `DEVICE`.
**The CUDA graphs have not been run on a GPU.** All else here runs on a CPU too, and is tested there;
`pytest tests/policies/test_cuda.py` tests the rest on a machine with CUDA.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
# Makes a value on a device from an array: `OrtValue.ortvalue_from_numpy`.
NewValue = Callable[[Array], Any]

# Eleven sizes. A batch request has 1,024 rows at most unless an operator raises that; more rows take several calls.
LARGEST = 1024
GRAPH_ID = "gpu_graph_id"
NO_GRAPH = "-1"

# Held while a graph is captured, and while a session is opened and warmed up: capturing is a state of the process.
DEVICE = threading.RLock()

log = structlog.get_logger("policies.cuda")


def provider_options(*, graphs: bool) -> dict[str, str]:
    """How ONNX Runtime's CUDA provider is set. TF32 has 10 bits of mantissa: golden vectors are held to 1e-4."""
    return {
        "enable_cuda_graph": "1" if graphs else "0",
        "use_tf32": "0",
        # The default tries every algorithm of a convolution at the first call of each size, while a caller waits.
        "cudnn_conv_algo_search": "HEURISTIC",
    }


def size_for(rows: int) -> int:
    """Give the least power of two that holds so many rows."""
    return 1 << (rows - 1).bit_length()


def padded(array: Array, size: int) -> Array:
    """Repeat the first row until there are `size`: of all rows the one that is certain to be harmless."""
    missing = size - len(array)
    return array if missing == 0 else np.concatenate([array, np.repeat(array[:1], missing, axis=0)])


@dataclass(slots=True)
class _Bound:
    """The buffers of one size."""

    binding: Any
    inputs: dict[str, Any]
    outputs: list[Any]
    layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
    graph_of: int | None = None  # the thread whose graph there is


@dataclass
class Buffers:
    """All buffers of one session. Calls wait for each other."""

    session: Any
    names: Sequence[str]  # of the outputs
    new_value: NewValue
    graphs: bool = False  # the session was opened for them
    capturing: bool = False  # from now on the calling thread is the one that serves
    _sizes: dict[int, _Bound] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, size: int, feeds: Feeds, options: Any) -> list[Array]:
        """Run a batch of exactly `size` rows. Gives arrays of its own; raises what ONNX Runtime raises.

        Raises RuntimeError for feeds of another shape or dtype than the first ones of this size.
        """
        with self._lock:
            bound = self._sizes.get(size)
            if bound is None:
                return self._first(size, feeds, options)
            _check_layout(bound, feeds)
            for name, value in bound.inputs.items():
                value.update_inplace(feeds[name])
            self._run_bound(size, bound, options)
            # On a CPU `numpy` is a view of the buffer, which the next call overwrites.
            return [np.array(value.numpy()) for value in bound.outputs]

    def _first(self, size: int, feeds: Feeds, options: Any) -> list[Array]:
        """Run plainly, and make the buffers after what came out."""
        options.add_run_config_entry(GRAPH_ID, NO_GRAPH)
        answers = [np.asarray(each) for each in self.session.run(self.names, feeds, options)]
        binding = self.session.io_binding()
        inputs = {name: self.new_value(np.array(array)) for name, array in feeds.items()}
        outputs = [self.new_value(np.array(array)) for array in answers]
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(self.names, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        layout = {name: (array.shape, array.dtype) for name, array in feeds.items()}
        self._sizes[size] = _Bound(binding, inputs, outputs, layout)
        return answers

    def _run_bound(self, size: int, bound: _Bound, options: Any) -> None:
        """Run with or without a graph.

        It is always said which: for a missing entry ONNX Runtime spends 60 µs on an exception, and swallows it.
        """
        may_capture = self.graphs and self.capturing and bound.graph_of is None
        if self.graphs and bound.graph_of == threading.get_ident():
            options.add_run_config_entry(GRAPH_ID, graph_id(size))
            self.session.run_with_iobinding(bound.binding, options)
        elif may_capture and DEVICE.acquire(blocking=False):
            try:
                self._capture(size, bound, options)
            finally:
                DEVICE.release()
        else:
            options.add_run_config_entry(GRAPH_ID, NO_GRAPH)
            self.session.run_with_iobinding(bound.binding, options)

    def _capture(self, size: int, bound: _Bound, options: Any) -> None:
        """Run, and capture while at it: ONNX Runtime repeats the call inside until it has the graph."""
        options.add_run_config_entry(GRAPH_ID, graph_id(size))
        try:
            self.session.run_with_iobinding(bound.binding, options)
        except Exception as error:
            self.graphs_failed(size, error)
            raise
        bound.graph_of = threading.get_ident()

    def graphs_failed(self, size: int, error: Exception) -> None:
        """Capture no more in this session: what failed once would fail on every call, and this way it is one row's."""
        self.capturing = False
        log.warning("cuda_graph_not_captured", rows=size, error=str(error)[:200])


def graph_id(size: int) -> str:
    """Name the graph of a size: 1 for one row, 2 for two, 3 for four."""
    return str(size.bit_length())


def _check_layout(bound: _Bound, feeds: Feeds) -> None:
    """A buffer takes any bytes of its length: another dtype would be read as nonsense."""
    for name, (shape, dtype) in bound.layout.items():
        given = feeds[name]
        if given.shape != shape or given.dtype != dtype:
            raise RuntimeError(f"input {name!r} is {given.dtype} {given.shape}, expected {dtype} {shape}")
