"""EDGE: a version ready to run. One session per version; where it runs; whether it may; how long a call will take.

Duty: open the network on the device that was asked for, hold it against its golden vectors, warm it up and time it, end
calls that take too long, and open it anew when the device has run out of memory. It knows nothing of masks,
exploration or requests.
Strategy: ONNX Runtime falls back to CPU without an error when CUDA is missing, so the session's providers are checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import structlog

from policies.bundle import PolicyBundle
from policies.cuda import DEVICE
from policies.errors import BundleError, ConfigError
from policies.extent import grows_with_values
from policies.graph import parse_model
from policies.network import CPU, CUDA, Memory, Network, Outputs, available_providers, new_call, open_on
from policies.types import Bools
from policies.watchdog import Endable, Watchdog

Device = Literal["auto", "cpu", "cuda"]

WARM_UP_CALLS = 8
# Weight of the newest call in the moving average: 0.05 forgets a stall within some 50 calls.
SMOOTHING = 0.05
# One call counts as at most so many of what was predicted: longer ones were interrupted, which says nothing of the
# network. One that has become slower for good is known for it within some 30 calls all the same.
MOST_AT_ONCE = 4.0
PROVIDERS = {"cpu": CPU, "cuda": CUDA}
# Between two tries to open a session on a device without memory.
REOPEN_PAUSE_S = 1.0
# How ONNX Runtime's and CUDA's own messages say that memory has run out.
OUT_OF_MEMORY = ("out of memory", "out_of_memory", "failed to allocate memory", "bad_alloc")

# How to export again, so that one call answers a whole batch.
DYNAMIC_BATCH = (
    "the network was exported for a batch of one, so a batch is one call per state; export again with "
    "torch.onnx.export(…, dynamic_axes={{'{input}': {{0: 'batch'}}, '{output}': {{0: 'batch'}}}})"
)

log = structlog.get_logger("policies.engine")


class OutOfMemory(RuntimeError):
    """The device ran out of memory: this call has no answer, the next ones will when the session is open again."""


class Reopening(OutOfMemory):
    """The network was not asked: its session is being opened again. No fault of this call."""


class Overdue(RuntimeError):
    """The call took longer than its limit: it was ended, or came too late. The next one may be fine."""


def resolve_device(device: Device) -> Literal["cpu", "cuda"]:
    """Say where networks will run. Raises ConfigError when cuda is asked for and cannot be had."""
    if device == "cpu":
        return "cpu"
    usable = PROVIDERS["cuda"] in available_providers() and _driver_loads()
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


class Engine:
    """A version's network, ready to run: `run` takes observations [B, *shape] and gives outputs [B, width]."""

    def __init__(
        self,
        bundle: PolicyBundle,
        device: Device = "cpu",
        monotonic_s: Callable[[], float] = time.perf_counter,
        open_network: Callable[[PolicyBundle, str], Network] | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Load, hold against the golden vectors, warm up and time. Raises BundleError or ConfigError.

        watchdog: of the process; without one the engine has its own, whose thread lives while there are calls.
        """
        self.bundle = bundle
        self.device = resolve_device(device)
        self._asked = device
        self._monotonic_s = monotonic_s
        self._open_network = open_network or _open
        self._watchdog = watchdog or Watchdog()
        # Whether a call may hold up whoever waits for it far beyond what is predicted.
        self.may_hang = grows_with_values(parse_model(bundle.model)) is not None
        self._network: Network | None = None
        self._reopening = threading.Lock()
        self._reopen_after_s = -math.inf
        self._fixed_s = self._row_s = 0.0
        self._scale = 1.0
        with self._device_to_itself():
            self._network = self._open()
            self._check_golden()
            self._warm_up()
        _capture_from_now(self._network)
        if bundle.interface.one_by_one:
            mend = DYNAMIC_BATCH.format(input=bundle.interface.input, output=bundle.interface.output)
            log.warning("policy_runs_one_state_at_a_time", policy=bundle.policy, version=bundle.version, mend=mend)

    def run(self, states: npt.NDArray[np.floating], mask: Bools | None = None) -> Outputs:
        """Run one call of a network without memory. Raises RuntimeError as `step` does."""
        return self.step(states, mask, None)[0]

    def step(
        self,
        states: npt.NDArray[np.floating],
        mask: Bools | None,
        memory: Memory | None,
        limit_s: float = math.inf,
    ) -> tuple[Outputs, Memory]:
        """Run one call: outputs [B, width] and the memory after it, [B, memory_size], from the memory before it.

        Raises RuntimeError when the network fails or answers with another shape, OutOfMemory when the device has no
        memory for it, Reopening until it has again, Overdue when it takes longer than `limit_s`: the caller answers
        with the fallback, and may call again at any time.
        """
        started = self._monotonic_s()
        answer = self._watched(states, mask, memory, limit_s)
        took = self._monotonic_s() - started
        ratio = took / max(self._fixed_s + self._row_s * len(states), 1e-9)
        self._scale += SMOOTHING * (min(ratio, MOST_AT_ONCE * self._scale) - self._scale)
        return answer

    def first_memory(self, rows: int) -> Memory:
        """What a recurrent network remembers of an episode that has not begun, [rows, memory_size]."""
        doubles = any(state.dtype == "float64" for state in self.bundle.interface.recurrent)
        return np.zeros((rows, self.bundle.interface.memory_size), dtype=np.float64 if doubles else np.float32)

    def predicted_s(self, rows: int) -> float:
        """Predict the duration of a call with so many rows, in seconds."""
        return self._scale * (self._fixed_s + self._row_s * rows)

    def rows_within(self, budget_s: float) -> int:
        """Predict how many rows fit a call of that duration, at least one."""
        fixed, row = self._scale * self._fixed_s, self._scale * self._row_s
        return max(1, int((budget_s - fixed) / max(row, 1e-9)))

    def _watched(
        self, states: npt.NDArray[np.floating], mask: Bools | None, memory: Memory | None, limit_s: float
    ) -> tuple[Outputs, Memory]:
        call = new_call()
        if limit_s == math.inf:
            return self._ask(states, mask, memory, call)
        self._watchdog.begin(call, limit_s)
        try:
            answer = self._ask(states, mask, memory, call)
        except RuntimeError as error:
            if call.terminate:
                raise self._overdue(limit_s) from error
            raise
        finally:
            self._watchdog.finish(call)
        if call.terminate:  # it ended by itself, and late
            raise self._overdue(limit_s)
        return answer

    def _overdue(self, limit_s: float) -> Overdue:
        self.may_hang = True
        return Overdue(f"{self.bundle.policy}/{self.bundle.version}: the call took longer than {limit_s:g} s")

    def _ask(
        self,
        states: npt.NDArray[np.floating],
        mask: Bools | None,
        memory: Memory | None,
        call: Endable | None = None,
    ) -> tuple[Outputs, Memory]:
        network, name = self._network, f"{self.bundle.policy}/{self.bundle.version}"
        if network is None:
            self._reopen()
            raise Reopening(f"{name}: the session is being opened again after the device ran out of memory")
        try:
            return network.ask(states, mask, memory, call)
        except RuntimeError as error:
            said = str(error)
            if not any(sign in said.lower() for sign in OUT_OF_MEMORY):
                raise RuntimeError(f"{name}: {said}") from error
        # Out of the clause above, where the error's frames still hold the session and with it the memory.
        del network
        self._reopen()
        raise OutOfMemory(f"{name}: {said}")

    def _reopen(self) -> None:
        """Close the session, which gives its memory back, and open it again beside: until then there is no network.

        An arena that has grown over its limit, or was cut into pieces, does not recover by itself.
        """
        if self._monotonic_s() < self._reopen_after_s or not self._reopening.acquire(blocking=False):
            return
        self._reopen_after_s = self._monotonic_s() + REOPEN_PAUSE_S
        self._network = None
        threading.Thread(target=self._open_again, name="reopen", daemon=True).start()

    def _open_again(self) -> None:
        try:
            with self._device_to_itself():
                network = self._open()
            _capture_from_now(network)
            self._network = network
            log.warning("session_reopened", policy=self.bundle.policy, version=self.bundle.version, device=self.device)
        except Exception as error:  # still no memory: the next call tries again
            log.error("session_not_reopened", policy=self.bundle.policy, version=self.bundle.version, error=str(error))
        finally:
            self._reopening.release()

    @contextlib.contextmanager
    def _device_to_itself(self) -> Iterator[None]:
        """Let no CUDA graph be captured meanwhile: what is allocated here would spoil it."""
        with DEVICE if self.device == "cuda" else contextlib.nullcontext():
            yield

    def _open(self) -> Network:
        network = self._open_network(self.bundle, self.device)
        if network.provider != PROVIDERS[self.device]:
            if self._asked == "cuda":
                raise ConfigError("device cuda was asked for, but its libraries do not load", "SUREFOOT_DEVICE")
            log.warning("cuda_fell_back_to_cpu", policy=self.bundle.policy, version=self.bundle.version)
            self.device = "cpu"
        return network

    def _check_golden(self) -> None:
        bundle = self.bundle
        try:
            outputs, memory = self._ask(bundle.golden_states, None, None)
        except RuntimeError as error:
            raise BundleError(f"{error}; export the bundle again", "golden.json", "golden") from None
        if not (np.isfinite(outputs).all() and np.isfinite(memory).all()):
            detail = "the network answers golden states with NaN or infinity; look for log(0), 0/0 or overflow in it"
            raise BundleError(detail, "golden.json", "finite")
        close = np.isclose(outputs, bundle.golden_outputs, rtol=bundle.golden_rtol, atol=bundle.golden_atol)
        if not close.all():
            row = int(np.flatnonzero(~close.all(axis=1))[0])
            expected, got = bundle.golden_outputs[row].tolist(), outputs[row].tolist()
            detail = (
                f"golden state {row}: expected {expected}, got {got}; model.onnx and golden.json are of two exports, "
                "or the network behaves differently here: export both again"
            )
            raise BundleError(detail, f"golden.json outputs[{row}]", "golden")

    def _warm_up(self) -> None:
        """Measure calls of one row and of a full golden batch: a fixed part and a part for each row."""
        one, many = self.bundle.golden_states[:1], np.repeat(self.bundle.golden_states[:1], 32, axis=0)
        lone, full = self._median(one), self._median(many)
        self._row_s = max((full - lone) / (len(many) - 1), 1e-9)
        self._fixed_s = max(lone - self._row_s, 1e-9)
        budget_s = self.bundle.latency_budget_ms / 1000
        if lone > budget_s:
            detail = (
                f"one state takes {lone * 1000:.2f} ms, the budget is {self.bundle.latency_budget_ms} ms; "
                "raise latency_budget_ms, export a smaller network, or serve it on a GPU"
            )
            raise BundleError(detail, "latency_budget_ms", "latency")

    def _median(self, states: npt.NDArray[np.floating]) -> float:
        took = []
        for _ in range(WARM_UP_CALLS):
            started = self._monotonic_s()
            self._ask(states, None, None)
            took.append(self._monotonic_s() - started)
        return sorted(took)[len(took) // 2]


def _open(bundle: PolicyBundle, device: str) -> Network:
    return open_on(bundle.model, bundle.interface, device)


def _capture_from_now(network: Network) -> None:
    """Warm-up is over: whichever thread asks from now on serves, and CUDA graphs belong to threads."""
    if network.buffers is not None:
        network.buffers.capturing = True
