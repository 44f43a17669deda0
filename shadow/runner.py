"""EDGE: one shadow at work: its queue, its thread, its pace. Nothing that answers ever waits for it.

    offer_nowait (any thread) -> waiting -> [its thread] score -> scores to the sink

Duty: take rows without waiting, score them when there is time, count what became of them. What is compared stands in
`compare.py`, what is kept when not all fits in `waiting.py`.
Strategy: one daemon thread for each shadow, which takes `cpu_share` of a core at most: it pauses as long as its work
was worth, so that the interpreter's lock is free for the event loop. A shadow that is slower than the traffic scores a
share of it. Its breaker counts its calls; when it trips, nothing is asked until it is re-armed.
Promise: `offer_nowait` takes no longer for a shadow that is stuck, dead or slow, and what waits is bounded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from policies.engine import Engine
from shadow.scores import encode_score, scores
from shadow.scoring import Scorer, Uniforms
from shadow.shown import Rows, joined
from shadow.totals import Drop, Totals
from shadow.waiting import Waiting

# Rows scored together: the fixed cost of a comparison, some 0.5 ms, is spread over them, and no job takes long.
BATCH_ROWS = 64
# Of one core. The event loop waits for the interpreter's lock at most this share of the time.
CPU_SHARE = 0.2
# Pauses are this long at most: a slow network is bounded by its own calls.
LONGEST_PAUSE_S = 5.0

Status = Literal["watching", "tripped", "failed", "closed"]
Sink = Callable[[list[tuple[str, bytes]]], None]  # decision ids and encoded scores; must not block
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Statistics:
    """A shadow at one moment."""

    status: Status
    totals: Totals  # live: read it, do not keep it
    waiting_rows: int
    waiting_bytes: int
    in_hand: int  # rows that are being scored
    share: float  # of what comes, kept at the moment
    lag_s: float  # age of the oldest row that has not been scored
    busy_s: float  # since the batch in hand was begun; far beyond the limit of a call: it is stuck
    why: str | None = None  # it has failed


@dataclass(frozen=True, slots=True)
class _InHand:
    """Rows that are being scored, and since when."""

    rows: int
    offered_s: float
    taken_s: float


NOTHING = _InHand(0, 0.0, 0.0)


class Runner:
    """One shadow. `offer_nowait`, `statistics`, `rearm` and `close` from any thread; `run_once` from one."""

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        uniforms: Uniforms,
        sink: Sink,
        called: Callable[[float], None] = lambda seconds: None,
        *,
        limit_s: float = 1.0,
        cpu_share: float = CPU_SHARE,
        waiting: Waiting | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """open_engine: called on the shadow's thread, once, before the first row."""
        self.totals = Totals()
        self._open_engine = open_engine
        self._uniforms, self._called, self._limit_s = uniforms, called, limit_s
        self._sink = sink
        self._cpu_share = cpu_share
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()  # over _waiting and totals.dropped; held for microseconds
        self._waiting = waiting or Waiting()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._scorer: Scorer | None = None
        self._status: Status = "watching"
        self._why: str | None = None
        self._rearmed = False
        self._in_hand = NOTHING
        self._thread: threading.Thread | None = None

    def start(self, name: str) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name=f"shadow-{name}", daemon=True)
        self._thread.start()

    def offer_nowait(self, rows: Rows) -> None:
        """Show rows to the shadow. Never waits, never raises for want of room."""
        if self._status != "watching":
            with self._lock:
                self.totals.dropped[_REASON[self._status]] += len(rows)
            return
        with self._lock:
            self.totals.dropped["shed"] += self._waiting.put(rows)
        self._wake.set()

    def run_once(self) -> int:
        """Score what may be scored together. Gives how many rows were taken from the queue."""
        if self._rearmed and self._scorer is not None:
            self._rearmed = False
            self._scorer.rearm()
        with self._lock:
            taken = self._waiting.take(BATCH_ROWS)
            if not taken:
                return 0
            count = sum(map(len, taken))
            self._in_hand = _InHand(count, float(taken[0].offered_s[0]), self._monotonic_s())
        try:
            for rows in joined(taken):
                self._guarded(rows)
        except Exception:  # a bug of ours: it must not end the thread
            log.exception("shadow_failed")
            self._drop("internal", count)
        self._in_hand = NOTHING
        return count

    def rearm(self) -> None:
        """Watch again after a trip or a failure to start."""
        if self._status in ("tripped", "failed"):
            self._rearmed, self._why = True, None
            self._status = "watching"

    def close(self) -> None:
        """Take nothing more, drop what waits, and let the thread end after the call that it is in."""
        self._status = "closed"
        with self._lock:
            self.totals.dropped["closed"] += self._waiting.clear()
        self._closing.set()
        self._wake.set()

    def join(self, seconds: float) -> bool:
        """Wait for the thread to end. Gives whether it has."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def statistics(self) -> Statistics:
        now_s = self._monotonic_s()
        with self._lock:
            waiting = self._waiting
            in_hand, oldest_s = self._in_hand, waiting.oldest_s
            rows, size, share = waiting.rows, waiting.bytes, waiting.share
        since_s = in_hand.offered_s if in_hand.rows else now_s if oldest_s is None else oldest_s
        busy_s = now_s - in_hand.taken_s if in_hand.rows else 0.0
        return Statistics(
            self._status, self.totals, rows, size, in_hand.rows, share, now_s - since_s, busy_s, self._why
        )

    def view(self) -> dict[str, Any]:
        """The same for people."""
        now = self.statistics()
        return {
            "status": now.status,
            "reason": now.why,
            "waiting": now.waiting_rows,
            "in_hand": now.in_hand,
            "share": now.share,
            "lag_s": round(now.lag_s, 3),
            "busy_s": round(now.busy_s, 3),
        } | now.totals.view()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            began_s = time.thread_time()
            while self.run_once() and not self._closing.is_set():
                self._closing.wait(self._pause_s(time.thread_time() - began_s))
                began_s = time.thread_time()

    def _pause_s(self, spent_s: float) -> float:
        return min(LONGEST_PAUSE_S, spent_s * (1.0 / self._cpu_share - 1.0))

    def _guarded(self, rows: Rows) -> None:
        """Score rows in calls of a bearable size. A fault here is the shadow's, and ends at its breaker."""
        scorer = self._opened()
        if scorer is None or self._status != "watching":
            self._drop(_REASON.get(self._status, "internal"), len(rows))
            return
        size = max(1, min(BATCH_ROWS, scorer.most_rows))
        for start in range(0, len(rows), size):
            part = rows if len(rows) <= size else rows.some(range(start, min(start + size, len(rows))))
            try:
                self._score(scorer, part)
            except Exception:
                log.exception("shadow_not_compared")
                scorer.fault()
                self._drop("internal", len(part))
            if scorer.tripped and self._status == "watching":
                self._status = "tripped"
                self._drop("tripped", len(rows) - start - len(part))
                return

    def _score(self, scorer: Scorer, rows: Rows) -> None:
        scored = scorer.score(rows)
        if scored is None:
            return
        bundle = self._engine.bundle
        self.totals.add(scored.compared, sum(map(bool, scored.faults)))
        found = scores(
            scored.rows,
            scored.compared,
            bundle.version,
            bundle.digest,
            bundle.action,
            scored.faults,
            round(scored.row_s * 1e6, 1),
        )
        self._sink([(score.decision_id, encode_score(score)) for score in found])

    def _opened(self) -> Scorer | None:
        if self._scorer is None:
            try:
                self._engine = self._open_engine()
            except Exception as error:
                log.error("shadow_not_opened", error=str(error))
                self._status, self._why = "failed", str(error)
                return None
            self._scorer = Scorer(
                self._engine, self._uniforms, self.totals, self._limit_s, self._monotonic_s, self._called
            )
        return self._scorer

    def _drop(self, reason: Drop, count: int) -> None:
        if count:
            with self._lock:
                self.totals.dropped[reason] += count


_REASON: dict[Status, Drop] = {"tripped": "tripped", "failed": "internal", "closed": "closed"}
