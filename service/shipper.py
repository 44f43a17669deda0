"""The shipping loop: takes committed rows from every lane to the join in Redis, in order, until Redis has them.

Duty: when to call, with what, and what an answer means for the lane. Knows nothing of Redis commands, files or what is
in a blob. One task for all lanes; one call in flight.
Strategy: Redis remembers the last seq it applied from each producer. Whatever happens (lost reply, restart, failover,
FLUSHALL, restored backup), either it skips what it has, or it answers `Gap last` and we ship again from there. Waiting
between attempts happens here and nowhere else. Where rows count only once Redis's replicas have them, they go out at
once, and a call that replicas confirm confirms everything up to `last`; while replicas are silent, one call a second
waits for them, the others only ship.
Promise: no committed event is stepped over but those that cannot be read any more (counted lost) and those that Redis
refuses by themselves (kept aside, counted rejected).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from policies.errors import StoreAway
from service.backoff import MAX_BACKOFF_S, Backoff
from service.clock import Clock
from service.lanes import Lane
from service.ledger import Ledger
from service.shipcall import Acks, Confirm, Gap, Refused, ShipCall, Shipped
from service.spool_file import Row
from service.verdicts import Verdicts

BATCH_EVENTS = 256  # a call goes out at once when this many wait
MAX_EVENTS = 256
MAX_BYTES = 4 << 20
LINGER_S = 0.05
HEARTBEAT_S = 1.0
SWEEP_S = 0.05  # while the join has deadlines left to work off; one such call takes Redis up to 10 ms
TIDY_S = 5.0
QUICK_REJECTS = 8
UNCONFIRMED = "unconfirmed"  # a reason beside those of StoreAway: replicas were too few, or too slow
INTERNAL = "internal"  # a fault of ours

log = structlog.get_logger(__name__)


class Streams(Protocol):
    """The join in Redis."""

    async def ship(self, call: ShipCall) -> Shipped | Gap:
        """Raises StoreAway when it may work later, Refused when Redis will not take these events."""


@dataclass(frozen=True, slots=True)
class ShipperStatistics:
    calls: int
    gaps: int
    failures: dict[str, int]  # calls that Redis did not answer, or not as asked, by reason
    away_since_s: float | None  # by the monotonic clock; None: the last call was answered
    waiting_verdicts: int
    acks: Acks | None  # what replicas said last


class Shipper:
    def __init__(
        self, ledger: Ledger, streams: Streams, clock: Clock, *, jitter: Callable[[], float] = random.random
    ) -> None:
        self._ledger = ledger
        self._streams = streams
        self._clock = clock
        self._backoff = Backoff(jitter)
        self._linger_s = LINGER_S if ledger.confirm is None else 0.0
        self._verdicts = Verdicts()
        self._turn = asyncio.Lock()  # `run` and `drain` take turns
        self._wake = asyncio.Event()
        self._hurry = False
        self._closing = False
        self._tidied_s = float("-inf")
        self._calls = self._gaps = 0
        self._failures: Counter[str] = Counter()
        self._acks: Acks | None = None
        # Told of rows once Redis has them; of the same ones again when Redis has lost them and they were shipped again.
        self.on_shipped: Callable[[Lane, list[Row]], None] = lambda lane, rows: None
        # Told the reason of each call that failed.
        self.on_failure: Callable[[str], None] = lambda reason: None
        ledger.on_commit = self._on_commit

    # For the rest of the service

    def register(self, policy: str) -> None:
        """Announce this producer for a policy: from the first heartbeat on, deadlines wait for what it ships."""
        self._ledger.register(policy)
        self._wake.set()

    def verdict(self, policy: str, seq: int) -> asyncio.Future[str]:
        """Give a future for the join's verdict on the reward event `seq`. Cancel it when waiting no longer."""
        return self._verdicts.expect(policy, seq)

    def kick(self) -> None:
        """Ship what is committed at once: somebody is waiting."""
        self._hurry = True
        self._wake.set()

    def statistics(self) -> ShipperStatistics:
        away_since_s, waiting = self._backoff.away_since_s, len(self._verdicts)
        return ShipperStatistics(self._calls, self._gaps, dict(self._failures), away_since_s, waiting, self._acks)

    @property
    def retry_in_s(self) -> float:
        """How long until the next call may be made; 0 when Redis is not away."""
        return max(0.0, self._backoff.retry_s - self._clock.monotonic_s())

    # The loop

    async def run(self) -> None:
        """Ship until `drain` is called. Survives whatever one turn raises."""
        while not self._closing:
            try:
                progress = await self.run_once()
            except Exception:
                log.exception("shipping_failed")
                self._back_off(INTERNAL)
                progress = False
            if not progress:
                await self._idle(HEARTBEAT_S)

    async def run_once(self) -> bool:
        """Visit every lane once, with one call at most for each. Return whether events moved."""
        async with self._turn:
            if self._clock.monotonic_s() < self._backoff.retry_s:
                return False
            await self._tidy()
            self._hurry, hurry = False, self._hurry
            progress = False
            for lane in self._ledger.lanes():
                try:
                    progress |= await self._visit(lane, hurry or self._closing)
                except StoreAway as error:
                    self._hurry |= hurry
                    self._back_off(error.reason, error.detail)
                    return False
            return progress

    async def drain(self, deadline_s: float) -> bool:
        """Ship all that is left, say bye, end `run`. Gives up after `deadline_s`; return whether nothing is left."""
        self._closing = True
        self._wake.set()
        until = self._clock.monotonic_s() + deadline_s
        while not self._finished():
            left = until - self._clock.monotonic_s()
            if left <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                progress = await asyncio.wait_for(self.run_once(), left)
                if not progress and not self._finished():
                    await self._idle(min(left, LINGER_S))
        return True

    def _finished(self) -> bool:
        return all(lane.drained and lane.said_bye for lane in self._ledger.lanes())

    async def _idle(self, most_s: float) -> None:
        """Wait until something is due or somebody wakes us."""
        now = self._clock.monotonic_s()
        wait_s = min([most_s, *(self._due_s(lane) - now for lane in self._ledger.lanes())])
        wait_s = max(wait_s, self._backoff.retry_s - now)
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)
        self._wake.clear()

    def _due_s(self, lane: Lane) -> float:
        beat = lane.called_s + lane.beat_s
        due = beat if lane.waiting_since_s is None else min(beat, lane.waiting_since_s + self._linger_s)
        if lane.unconfirmed:
            due = min(due, lane.confirm_again_s)
        return max(due, lane.blocked_until_s)

    def _on_commit(self, lane: Lane) -> None:
        if lane.waiting_since_s is None:
            lane.waiting_since_s = self._clock.monotonic_s()
            self._wake.set()
        elif lane.end - lane.next_seq >= BATCH_EVENTS:
            self._wake.set()

    async def _tidy(self) -> None:
        now = self._clock.monotonic_s()
        if now - self._tidied_s >= TIDY_S and not self._closing:
            self._tidied_s = now
            await self._ledger.tidy()

    # One lane

    async def _visit(self, lane: Lane, hurry: bool) -> bool:
        now = self._clock.monotonic_s()
        if now < lane.blocked_until_s:
            return False
        try:
            return await self._advance(lane, hurry, now)
        except StoreAway:
            raise
        except Exception:  # a heartbeat refused, a disk that cannot be read: this lane waits, the others go on
            log.exception("lane_failed", policy=lane.policy, producer=lane.producer, epoch=lane.epoch)
            self._count(INTERNAL)
            lane.blocked_until_s = now + MAX_BACKOFF_S
            return False

    async def _advance(self, lane: Lane, hurry: bool, now: float) -> bool:
        if not lane.known:
            return await self._call(lane, [])
        if lane.next_seq < lane.end and (hurry or self._ripe(lane, now)):
            return await self._ship(lane)
        bye_is_due = self._closing and lane.drained and not lane.said_bye
        confirming_is_due = lane.unconfirmed and now >= lane.confirm_again_s
        if bye_is_due or confirming_is_due or now - lane.called_s >= lane.beat_s:
            await self._call(lane, [])
        return False

    def _ripe(self, lane: Lane, now: float) -> bool:
        if not lane.live or lane.stored or lane.end - lane.next_seq >= BATCH_EVENTS:
            return True
        return lane.waiting_since_s is None or now - lane.waiting_since_s >= self._linger_s

    async def _ship(self, lane: Lane) -> bool:
        rows = await self._next_rows(lane)
        if not rows:
            self._step_over(lane, lane.stop)
            return True
        if rows[0].first_seq > lane.next_seq:
            self._step_over(lane, rows[0].first_seq)
        try:
            return await self._call(lane, rows)
        except Refused as refusal:
            return await self._isolate(lane, rows, str(refusal))

    async def _next_rows(self, lane: Lane) -> list[Row]:
        """Take the next rows, without a hole between them."""
        if lane.stored:
            rows = await self._ledger.read(lane, MAX_EVENTS, MAX_BYTES)
            if rows:
                lane.head_ms = rows[0].at_ms
        else:
            rows = lane.from_window(MAX_EVENTS, MAX_BYTES)
        whole = rows[:1]
        for row in rows[1 : lane.row_limit]:
            if row.first_seq != whole[-1].end:
                break
            whole.append(row)
        return whole

    def _step_over(self, lane: Lane, seq: int) -> None:
        if lost := lane.skip(seq):
            log.error("events_lost", policy=lane.policy, producer=lane.producer, epoch=lane.epoch, lost=lost)

    async def _call(self, lane: Lane, rows: list[Row]) -> bool:
        """Make one call and move the lane by its answer. Return whether the lane moved."""
        bye = not rows and lane.drained and (self._closing or not lane.live)
        call = lane.call(rows, self._clock.event_ms(), bye, self._confirm(lane))
        before = lane.known, lane.next_seq
        reply = await self._streams.ship(call)
        self._answered(lane)
        if isinstance(reply, Gap):
            self._gaps += 1
            log.warning("join_gap", policy=lane.policy, producer=lane.producer, epoch=lane.epoch, last=reply.last)
            lane.rewind(reply.last)
            return before != (lane.known, lane.next_seq)
        if reply.last >= lane.assigned:
            log.error("join_is_ahead", policy=lane.policy, producer=lane.producer, epoch=lane.epoch, last=reply.last)
        lane.ack(reply.last)
        lane.beat_s = SWEEP_S if reply.more else HEARTBEAT_S
        if reply.acks is not None:
            self._judge(lane, reply.acks)
        lane.said_bye = bye
        lane.waiting_since_s = None if lane.next_seq >= lane.end else self._clock.monotonic_s()
        if rows:
            self.on_shipped(lane, rows)
            lane.rejects_in_a_row = 0
            if lane.row_limit is not None:
                lane.row_limit = lane.row_limit * 2 if lane.row_limit < MAX_EVENTS else None
        if lane.live:
            for seq, verdict in reply.verdicts:
                self._verdicts.resolve(lane.policy, seq, verdict)
        return before != (lane.known, lane.next_seq)

    def _confirm(self, lane: Lane) -> Confirm | None:
        """Whom this call is to wait for: while replicas do not confirm, nobody most of the time."""
        return None if self._clock.monotonic_s() < lane.confirm_again_s else self._ledger.confirm

    def _judge(self, lane: Lane, acks: Acks) -> None:
        """Take what replicas said of everything that Redis has of a lane."""
        self._acks = acks
        if acks.enough == (lane.confirm_again_s > float("-inf")):
            log.warning("replication", policy=lane.policy, confirms=acks.enough, by=acks.by, detail=acks.detail)
        if acks.enough:
            lane.confirm_again_s = float("-inf")
            self._ledger.confirmed(lane)
            return
        lane.confirm_again_s = self._clock.monotonic_s() + HEARTBEAT_S
        self._ledger.doubt(lane)
        self._count(UNCONFIRMED)

    def _answered(self, lane: Lane) -> None:
        lane.called_s = self._clock.monotonic_s()
        self._calls += 1
        self._backoff.answered()

    def _back_off(self, reason: str, detail: str = "") -> None:
        """Wait before the next call."""
        if self._backoff.failed(self._clock.monotonic_s()):
            log.warning("join_away", reason=reason, detail=detail)
        self._ledger.doubt()
        self._count(reason)

    def _count(self, reason: str) -> None:
        self._failures[reason] += 1
        self.on_failure(reason)

    async def _isolate(self, lane: Lane, rows: list[Row], reason: str) -> bool:
        """Find the row that Redis refuses, by halves; keep it aside once it stands alone."""
        if len(rows) > 1:
            lane.row_limit = len(rows) // 2
            return True
        if await self._call(lane, []):  # where even a heartbeat is refused, the row is not to blame
            return True
        await self._ledger.reject(lane, rows[0], reason)
        lane.rejects_in_a_row += 1
        if lane.rejects_in_a_row > QUICK_REJECTS:  # not one bad row but something wrong with all: no haste
            lane.blocked_until_s = self._clock.monotonic_s() + MAX_BACKOFF_S
        return True
