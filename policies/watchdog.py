"""EDGE: calls of a network that take too long are ended, from a thread beside.

Duty: know which calls run and until when each may; set `terminate` on those that are late. It knows no network, no
request and no reason: whoever made the call finds out by the flag.
Strategy: a call costs two changes of a dictionary, which the interpreter makes whole, so there is no lock; a thread
looks at it every 50 ms, and exists only while there are calls: 100 versions that stand by cost nothing.
Promise: a call that heeds its flag has ended some 50 ms after its limit. ONNX Runtime looks at the flag between two
nodes and between two turns of a Loop: a single kernel, however long, is not interrupted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

# A twentieth of the default limit. Each look costs some 20 µs of one core, 0.04 %.
TICK_S = 0.05
# Without a call for so long the thread ends; starting it again takes some 100 µs.
IDLE_S = 5.0


class Endable(Protocol):
    """A call that ends soon after its flag is set: `onnxruntime.RunOptions`."""

    terminate: bool


class Watchdog:
    """Watches calls from any thread."""

    def __init__(
        self, tick_s: float = TICK_S, idle_s: float = IDLE_S, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._tick_s = tick_s
        self._idle_s = idle_s
        self._monotonic_s = monotonic_s
        self._running: dict[Endable, float] = {}  # until when each may run
        self._begun = False  # a call has begun since somebody looked
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._wake = threading.Event()  # never set: a sleep that a test can see

    def begin(self, call: Endable, limit_s: float) -> None:
        """Watch a call until `finish`. Costs less than a microsecond."""
        self._running[call] = self._monotonic_s() + limit_s
        self._begun = True
        if self._thread is None:
            self._start()

    def finish(self, call: Endable) -> None:
        """Forget a call. It may have been ended: its flag says so."""
        del self._running[call]

    @property
    def watching(self) -> bool:
        """Whether the thread exists."""
        return self._thread is not None

    def run_once(self) -> None:
        """End every call that is late now."""
        now_s = self._monotonic_s()
        for call, until_s in self._running.copy().items():
            if now_s > until_s:
                call.terminate = True

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread = thread
                thread.start()

    def _watch(self) -> None:
        """Look every tick. Without calls for a while, end: a call that begins meanwhile sees that, or is seen here."""
        seen_s = self._monotonic_s()
        while True:
            self._wake.wait(self._tick_s)
            self.run_once()
            if self._begun or self._running:
                self._begun = False
                seen_s = self._monotonic_s()
            elif self._monotonic_s() - seen_s > self._idle_s:
                self._thread = None
                if self._running:
                    self._start()
                return
