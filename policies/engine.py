"""EDGE: ONNX Runtime. The only importer of onnxruntime.

Duty: one session per version; where it runs; whether it reproduces its golden vectors; how long a call will take.
It knows nothing of masks, exploration or requests.
Strategy: one intra-op and one inter-op thread per session on CPU (a pool per session would fight the event loop for
cores). ONNX Runtime falls back to CPU without an error when CUDA is missing, so the session's providers are checked.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

# ONNX Runtime's Linux builds report usage to their vendor unless told not to. A policy server does not phone home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort
import structlog

from policies.bundle import PolicyBundle
from policies.errors import BundleError, ConfigError
from policies.heads import index_rows

Device = Literal["auto", "cpu", "cuda"]
Outputs = npt.NDArray[np.floating]

WARM_UP_CALLS = 8
# Weight of the newest call in the moving average: 0.05 forgets a stall within some 50 calls.
SMOOTHING = 0.05

# How to export again, so that one call answers a whole batch.
DYNAMIC_BATCH = (
    "the network was exported for a batch of one, so a batch is one call per state; export again with "
    "torch.onnx.export(…, dynamic_axes={{'{input}': {{0: 'batch'}}, '{output}': {{0: 'batch'}}}})"
)

log = structlog.get_logger("policies.engine")


def resolve_device(device: Device) -> Literal["cpu", "cuda"]:
    """Say where networks will run. Raises ConfigError when cuda is asked for and cannot be had."""
    if device == "cpu":
        return "cpu"
    usable = "CUDAExecutionProvider" in ort.get_available_providers() and _driver_loads()
    if device == "cuda" and not usable:
        raise ConfigError(
            "device cuda was asked for, but this machine has no CUDA driver or this onnxruntime no CUDA provider; "
            "install surefoot[gpu] on a machine with an NVIDIA GPU, or set SUREFOOT_DEVICE=auto",
            "SUREFOOT_DEVICE",
        )
    return "cuda" if usable else "cpu"


def _driver_loads() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def answer(session: Any, input: str, output: str, states: npt.NDArray[np.floating], one_by_one: bool) -> Outputs:
    """Ask an open session. A network that takes one state at a time is asked row by row; a lone number is a row."""
    calls = [states[row : row + 1] for row in range(len(states))] if one_by_one else [states]
    answers = [np.atleast_1d(session.run([output], {input: call})[0]) for call in calls]
    return answers[0] if len(answers) == 1 else np.concatenate(answers)


def answer_of_file(
    model: bytes, input: str, output: str, states: npt.NDArray[np.floating], one_by_one: bool
) -> Outputs:
    """Open a network on the CPU for one question, as an export does for its golden vectors. Raises BundleError."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return answer(session, input, output, states, one_by_one)
    except Exception as error:
        raise BundleError(f"ONNX Runtime cannot run the network: {error}", "model.onnx", "load") from None


class Engine:
    """A version's network, ready to run: `run` takes observations [B, *shape] and gives outputs [B, n]."""

    def __init__(
        self,
        bundle: PolicyBundle,
        device: Device = "cpu",
        monotonic_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Load, hold against the golden vectors, warm up and time. Raises BundleError or ConfigError."""
        self.bundle = bundle
        self.device = resolve_device(device)
        self._monotonic_s = monotonic_s
        self._session = self._open(device)
        self._fixed_s = self._row_s = 0.0
        self._scale = 1.0
        self._check_golden()
        self._warm_up()
        if bundle.one_by_one:
            log.warning(
                "policy_runs_one_state_at_a_time",
                policy=bundle.policy,
                version=bundle.version,
                mend=DYNAMIC_BATCH.format(input=bundle.input, output=bundle.output),
            )

    def run(self, states: npt.NDArray[np.floating]) -> Outputs:
        """Run one call. Raises RuntimeError when the network fails or answers with another shape."""
        started = self._monotonic_s()
        outputs = self._infer(states)
        took = self._monotonic_s() - started
        ratio = took / max(self._fixed_s + self._row_s * len(states), 1e-9)
        self._scale += SMOOTHING * (ratio - self._scale)
        return outputs

    def predicted_s(self, rows: int) -> float:
        """Predict the duration of a call with so many rows, in seconds."""
        return self._scale * (self._fixed_s + self._row_s * rows)

    def rows_within(self, budget_s: float) -> int:
        """Predict how many rows fit a call of that duration, at least one."""
        fixed, row = self._scale * self._fixed_s, self._scale * self._row_s
        return max(1, int((budget_s - fixed) / max(row, 1e-9)))

    def _infer(self, states: npt.NDArray[np.floating]) -> Outputs:
        try:
            outputs = answer(self._session, self.bundle.input, self.bundle.output, states, self.bundle.one_by_one)
            if self.bundle.head == "action":
                outputs = index_rows(outputs, self.bundle.action.n)
        except Exception as error:  # ONNX Runtime raises a dozen types of its own, all from pybind
            raise RuntimeError(f"{self.bundle.policy}/{self.bundle.version}: {error}") from error
        if outputs.shape != (len(states), self.bundle.action.n):
            raise RuntimeError(f"{self.bundle.policy}/{self.bundle.version} answered with shape {outputs.shape}")
        return outputs

    def _open(self, device: Device) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[self.device]
        providers = list(dict.fromkeys([wanted, "CPUExecutionProvider"]))
        try:
            session = ort.InferenceSession(self.bundle.model, options, providers=providers)
        except Exception as error:
            raise BundleError(f"ONNX Runtime cannot load the network: {error}", "model.onnx", "load") from None
        if session.get_providers()[0] != wanted:
            if device == "cuda":
                raise ConfigError("device cuda was asked for, but its libraries do not load", "SUREFOOT_DEVICE")
            self.device = "cpu"
        return session

    def _check_golden(self) -> None:
        bundle = self.bundle
        try:
            outputs = self._infer(bundle.golden_states)
        except RuntimeError as error:
            raise BundleError(str(error), "golden.json", "golden") from None
        if not np.isfinite(outputs).all():
            raise BundleError("the network answers golden states with NaN or infinity", "golden.json", "finite")
        close = np.isclose(outputs, bundle.golden_outputs, rtol=bundle.golden_rtol, atol=bundle.golden_atol)
        if not close.all():
            row = int(np.flatnonzero(~close.all(axis=1))[0])
            detail = f"golden state {row}: expected {bundle.golden_outputs[row].tolist()}, got {outputs[row].tolist()}"
            raise BundleError(detail, f"golden.json outputs[{row}]", "golden")

    def _warm_up(self) -> None:
        """Measure calls of one row and of a full golden batch: a fixed part and a part for each row."""
        one, many = self.bundle.golden_states[:1], np.repeat(self.bundle.golden_states[:1], 32, axis=0)
        lone, full = self._median(one), self._median(many)
        self._row_s = max((full - lone) / (len(many) - 1), 1e-9)
        self._fixed_s = max(lone - self._row_s, 1e-9)
        budget_s = self.bundle.latency_budget_ms / 1000
        if lone > budget_s:
            detail = f"one state takes {lone * 1000:.2f} ms, the budget is {self.bundle.latency_budget_ms} ms"
            raise BundleError(detail, "latency_budget_ms", "latency")

    def _median(self, states: npt.NDArray[np.floating]) -> float:
        took = []
        for _ in range(WARM_UP_CALLS):
            started = self._monotonic_s()
            self._infer(states)
            took.append(self._monotonic_s() - started)
        return sorted(took)[len(took) // 2]
