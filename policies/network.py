"""EDGE: one open ONNX Runtime session, and how it is asked. The only importer of onnxruntime.

Duty: states, mask and memory in, one row of numbers for each state out, whatever the network calls its tensors and
however it takes batches. It knows nothing of golden vectors, time or devices beyond what it is told.
Strategy: on a CPU a plain run for exactly the rows there are; on CUDA fixed buffers for each power of two (`cuda.py`),
the batch filled up with its first row, as measured: see `docs/engine.md`. ONNX Runtime's own fallback to another
provider, which prints a line and goes on, is switched off.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

# ONNX Runtime's Linux builds report usage to their vendor unless told not to. A policy server does not phone home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from policies.bundle import Interface
from policies.cuda import LARGEST, Buffers, padded, provider_options, size_for
from policies.errors import BundleError
from policies.heads import index_rows
from policies.types import Bools, Choices
from policies.watchdog import Endable

Outputs = npt.NDArray[np.floating]
Memory = npt.NDArray[np.floating]  # [B, memory_size], all states of an episode side by side
Feeds = dict[str, npt.NDArray[Any]]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def new_call() -> Endable:
    """One call's options. `terminate`, set from any thread, ends it; used once, so that no flag stays behind."""
    return cast(Endable, ort.RunOptions())


def available_providers() -> list[str]:
    """What this build of ONNX Runtime could run on; whether the machine can is another question."""
    return list(ort.get_available_providers())


class Network:
    """A network that answers `ask`."""

    def __init__(
        self, model: bytes, interface: Interface, providers: Sequence[Any] = (CPU,), bound_to: str | None = None
    ) -> None:
        """Open a session. Raises BundleError when ONNX Runtime cannot.

        bound_to: keep the buffers of each batch size on this device, `cpu` or `cuda`; None: a plain run for each call.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # a pool for each session would fight the event loop for cores
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what fails is raised; a client's odd states are no lines of ours
        # Otherwise bytes that say so are read as ONNX Runtime's own format, which no check of `graph.py` has seen.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            self.session = ort.InferenceSession(model, options, providers=list(providers), enable_fallback=0)
        except Exception as error:
            detail = f"ONNX Runtime cannot load the network: {error}; export it again, with opset_version=17"
            raise BundleError(detail, "model.onnx", "load") from None
        self.interface = interface
        self._outputs = [interface.output, *([interface.log_std] if interface.log_std else [])]
        self._heads = len(self._outputs)
        self._outputs += [state.output for state in interface.recurrent]
        taken = {value.name: value.type for value in self.session.get_inputs()}
        self._memory_size = interface.memory_size  # zero unless it is recurrent
        self._memory_dtype = np.float64 if any(s.dtype == "float64" for s in interface.recurrent) else np.float32
        self._mask_dtype = {"tensor(bool)": np.bool_, "tensor(double)": np.float64}.get(
            taken.get(interface.mask or "", ""), np.float32
        )
        self.buffers = None if bound_to is None else self._buffers(bound_to)

    def _buffers(self, device: str) -> Buffers:
        chosen = self.session.get_provider_options().get(CUDA, {})
        graphs = device == "cuda" and chosen.get("enable_cuda_graph") == "1"
        return Buffers(
            self.session, self._outputs, lambda array: ort.OrtValue.ortvalue_from_numpy(array, device), graphs
        )

    @property
    def provider(self) -> str:
        """Where the session really runs."""
        return str(self.session.get_providers()[0])

    def first_memory(self, rows: int) -> Memory:
        """What a recurrent network remembers of an episode that has not begun, [rows, memory_size]."""
        return np.zeros((rows, self._memory_size), dtype=self._memory_dtype)

    def ask(
        self,
        states: npt.NDArray[np.floating],
        mask: Bools | None = None,
        memory: Memory | None = None,
        call: Endable | None = None,
    ) -> tuple[Outputs, Memory]:
        """Ask for rows [B, width] and the memory after the step, [B, memory_size].

        mask: bool [B, N], for networks with a mask input; all allowed unless given. memory: as `first_memory` unless
        given. call: by which the caller may end it. Raises RuntimeError when the network fails, is ended, or answers
        with another shape.
        """
        if memory is None:
            memory = self.first_memory(len(states))
        step = 1 if self.interface.one_by_one else LARGEST if self.buffers else max(1, len(states))
        if len(states) <= step:
            return self._part(states, mask, memory, call or new_call())
        parts = []
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            parts.append(
                self._part(states[part], None if mask is None else mask[part], memory[part], call or new_call())
            )
        return np.concatenate([rows for rows, _ in parts]), np.concatenate([after for _, after in parts])

    def _part(
        self, states: npt.NDArray[np.floating], mask: Bools | None, memory: Memory, call: Endable
    ) -> tuple[Outputs, Memory]:
        """Ask for as many rows as go into one run."""
        count = len(states)
        if self.buffers is None:
            return self._read(self._run(self._feeds(states, mask, memory), call), count)
        size = size_for(count)
        mask = None if mask is None else padded(mask, size)
        feeds = self._feeds(padded(states, size), mask, padded(memory, size))
        rows, after = self._read(self._run_bound(size, feeds, call), size)
        return rows[:count], after[:count]

    def _run(self, feeds: Feeds, call: Endable) -> list[npt.NDArray[Any]]:
        try:
            return list(self.session.run(self._outputs, feeds, call))
        except Exception as error:  # ONNX Runtime raises a dozen types of its own, all from pybind
            raise RuntimeError(str(error)) from error

    def _run_bound(self, size: int, feeds: Feeds, call: Endable) -> list[npt.NDArray[Any]]:
        assert self.buffers is not None
        try:
            return self.buffers.run(size, feeds, call)
        except Exception as error:
            raise RuntimeError(str(error)) from error

    def _feeds(self, states: npt.NDArray[np.floating], mask: Bools | None, memory: Memory) -> Feeds:
        feeds: Feeds = {self.interface.input: states}
        if self.interface.mask is not None:
            allowed = np.ones((len(states), self.interface.action.size), np.bool_) if mask is None else mask
            feeds[self.interface.mask] = allowed.astype(self._mask_dtype)
        start = 0
        for state in self.interface.recurrent:
            size = int(np.prod(state.shape, dtype=np.int64))
            own = memory[:, start : start + size].reshape(len(states), *state.shape).astype(state.dtype)
            feeds[state.input] = np.ascontiguousarray(np.moveaxis(own, 0, state.batch_axis))
            start += size
        return feeds

    def _read(self, answers: list[npt.NDArray[Any]], count: int) -> tuple[Outputs, Memory]:
        rows = self._rows(answers[: self._heads], count)
        memory = self.first_memory(count)
        start = 0
        for state, answer in zip(self.interface.recurrent, answers[self._heads :], strict=True):
            size = int(np.prod(state.shape, dtype=np.int64))
            after = np.moveaxis(answer, state.batch_axis, 0)
            if after.shape != (count, *state.shape):
                raise RuntimeError(f"state {state.output!r} came out with shape {answer.shape}")
            memory[:, start : start + size] = after.reshape(count, size)
            start += size
        return rows, memory

    def _rows(self, heads: Sequence[npt.NDArray[Any]], count: int) -> Outputs:
        interface = self.interface
        if interface.head == "action" and isinstance(interface.action, Choices):
            if heads[0].size != count * len(interface.action.nvec):
                raise RuntimeError(f"the network answered {count} states with shape {heads[0].shape}")
            return index_rows(heads[0].reshape(count, -1), interface.action.nvec)
        if any(head.ndim != 2 for head in heads):
            raise RuntimeError(f"the network answered with shape {heads[0].shape}, not [batch, {interface.width}]")
        rows = heads[0] if len(heads) == 1 else np.concatenate(list(heads), axis=1)
        if rows.shape != (count, interface.width):
            raise RuntimeError(f"the network answered {count} states with shape {rows.shape}")
        return rows


def open_on(model: bytes, interface: Interface, device: str) -> Network:
    """Open a network on `cpu` or `cuda`; its `provider` says where it really is. Raises BundleError.

    CUDA graphs are tried first: ONNX Runtime refuses to open a session for them when the network has a branch or a
    loop, or an operator that CUDA does not have.
    """
    if device == "cpu":
        return Network(model, interface)
    try:
        return _on_cuda(model, interface, graphs=True)
    except BundleError:
        return _on_cuda(model, interface, graphs=False)


def _on_cuda(model: bytes, interface: Interface, *, graphs: bool) -> Network:
    network = Network(model, interface, [(CUDA, provider_options(graphs=graphs)), CPU], "cuda")
    if network.provider != CUDA:
        network.buffers = None  # its libraries do not load, so it is a network on the CPU
    return network


def golden_outputs(model: bytes, interface: Interface, states: npt.NDArray[np.floating]) -> Outputs:
    """Ask a network on the CPU what its golden vectors are, rows [G, width], each from an empty memory.

    Raises BundleError when it cannot be run.
    """
    try:
        return Network(model, interface).ask(states)[0]
    except RuntimeError as error:
        raise BundleError(f"ONNX Runtime cannot run the network: {error}", "model.onnx", "load") from None
