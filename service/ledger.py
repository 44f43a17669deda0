"""The ledger: events are appended here, committed, and held until they are shipped.

Duty: give out sequence numbers, bound what waits, tell the caller when an event is durable, and keep the lanes that the
shipper reads. Knows nothing of Redis and of what is in a blob. Used from the event loop's thread alone.
Strategy: an append is a commit, or two queue operations: one thread writes what is not committed at once. Another reads
back and tidies up. Their results come home through `call_soon_threadsafe`, one call for each commit.
Promise: once `committed` is done the events survive, by tier: the process's own life alone (`memory`); SIGKILL of it
(`process`); power loss of this machine (`node`); the loss of this machine or of Redis's primary (`replicated`). If it
fails they were not kept and their sequence numbers are given to others, but for `Unconfirmed`: kept as in `process`,
and on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import structlog

from policies.errors import LedgerBroken, LedgerFull
from service.adoption import Adoption
from service.clock import Clock
from service.confirmation import Confirmation, State
from service.lanes import Held, Lane
from service.rejects import set_aside
from service.shipcall import Confirm
from service.slots import Slot
from service.spool import KEEP_BYTES, KEEP_S, ROTATE_BYTES, Damage, Spool
from service.spool_file import Row, sync_folder
from service.writer import Writer

Tier = Literal["memory", "process", "node", "replicated"]
MAX_BUFFER_BYTES = 64 << 20
MIN_FREE_BYTES = 64 << 20
PROBE_S = 1.0

_T = TypeVar("_T")

log = structlog.get_logger(__name__)


class Appended(NamedTuple):
    """`first_seq` numbers the first event; `committed` is done once all are durable, or raises LedgerBroken."""

    first_seq: int
    committed: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    state: Literal["ok", "full", "broken", "closed"]
    waiting_rows: int  # for their commit
    held_bytes: int  # in memory: waiting for their commit, or committed and not yet shipped
    unshipped_events: int
    unconfirmed_events: int  # tier `replicated`: appended, and not yet with Redis's replicas
    oldest_unshipped_ms: int | None
    commits: int
    lost_events: int
    rejected_events: int
    corrupt_rows: int
    corrupt_files: int
    torn_tails: int
    files: int
    discarded_files: int  # damaged or refused, kept for long enough, deleted


class Ledger:
    def __init__(
        self,
        slot: Slot | None,
        clock: Clock,
        *,
        tier: Tier = "process",
        max_buffer_bytes: int = MAX_BUFFER_BYTES,
        min_free_bytes: int = MIN_FREE_BYTES,
        rotate_bytes: int = ROTATE_BYTES,
        keep_bytes: int = KEEP_BYTES,
        keep_s: float = KEEP_S,
        probe_s: float = PROBE_S,
        confirm: Confirm | None = None,
    ) -> None:
        """Needs a running event loop. Tier `memory` takes no slot: its producer is a name that never comes back.

        `confirm` goes with tier `replicated`: whom to wait for, and how long.
        """
        if (tier == "memory") != (slot is None):
            raise ValueError("tier memory takes no slot, the others need one")
        if (tier == "replicated") != (confirm is not None):
            raise ValueError("tier replicated needs to know whom to wait for, the others wait for nobody")
        self._slot = slot
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._max_buffer_bytes = max_buffer_bytes
        self._max_window_bytes = max_buffer_bytes // 2
        self.producer = slot.producer if slot else f"memory-{secrets.token_hex(4)}"
        self.epoch = slot.epoch if slot else 1
        self.on_commit: Callable[[Lane], None] = lambda lane: None
        self.confirm = confirm
        self._lanes: dict[str, Lane] = {}
        self._confirmations: dict[str, Confirmation] = {}  # by policy, in tier `replicated`
        self._held = Held()
        self._waiting: deque[tuple[Lane, int, asyncio.Future[None]]] = deque()
        # What need not reach the disk itself is written where it is appended, for changing threads costs more than
        # writing: the first row of a turn of the event loop. Others of the same turn share a commit in the thread.
        self._inline = tier == "process"
        self._broken: str | None = None
        self._closed = False
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._done.set_result(None)
        self._spool: Spool | None = None
        self._adoption: Adoption | None = None
        if slot is not None:
            if tier == "node":
                for folder in (slot.path.parent, slot.path.parent.parent):  # the slot's own name, and its folder's
                    sync_folder(folder)
            self._spool = Spool(
                slot.path,
                slot.producer,
                slot.epoch,
                rotate_bytes=rotate_bytes,
                keep_bytes=keep_bytes,
                keep_s=keep_s,
                fsync=tier == "node",
            )
            self._adoption = Adoption(slot, keep_bytes=keep_bytes, keep_s=keep_s, confirms=confirm is not None)
            self._reader = ThreadPoolExecutor(1, "spool-reader")
            self._writer = Writer(
                self._spool,
                min_free_bytes=min_free_bytes,
                probe_s=probe_s,
                on_commit=lambda count: self._post(self._committed, count),
                on_failure=lambda detail: self._post(self._failed, detail),
                on_recovery=lambda: self._post(self._recovered),
            )

    # Appending

    def register(self, policy: str) -> Lane:
        """Give a policy its lane, so that this producer is heard of before its first event."""
        lane = self._lanes.get(policy)
        if lane is None:
            confirms = self.confirm is not None
            lane = self._lanes[policy] = Lane(policy, self.producer, self.epoch, held=self._held, confirms=confirms)
            if self.confirm is not None:
                self._confirmations[policy] = Confirmation(self._loop, self.confirm.wait_s)
        return lane

    def append_nowait(self, policy: str, count: int, blob: bytes, at_ms: int) -> Appended:
        """Record `count` events of one policy, encoded as one blob.

        `at_ms` must be read from the clock in the same turn of the event loop. Raises LedgerFull when too much waits,
        and LedgerBroken when the spool cannot be written; then nothing was recorded.
        """
        if self._broken is not None or self._closed:
            raise LedgerBroken(self._broken or "the ledger is closed")
        if self._held.pending + self._held.window + len(blob) > self._max_buffer_bytes:
            raise LedgerFull(f"{self._max_buffer_bytes} bytes of events are waiting")
        lane = self.register(policy)
        row = lane.append(count, at_ms, blob)
        if self._spool is None:
            lane.commit()
            self.on_commit(lane)
            return Appended(row.first_seq, self._done)
        if self._inline and not self._waiting and self._writer.write_now(row):
            self._inline = False
            self._loop.call_soon(self._open_turn)
            lane.commit()
            self.on_commit(lane)
            self._evict()
            return Appended(row.first_seq, self._done)
        committed = self._loop.create_future()
        self._waiting.append((lane, row.end, committed))
        self._writer.put(row)
        return Appended(row.first_seq, committed)

    @property
    def accepting(self) -> bool:
        """Whether an append would be taken now."""
        held = self._held.pending + self._held.window
        return self._broken is None and not self._closed and held < self._max_buffer_bytes

    def recording(self, policy: str) -> bool:
        """Whether what is decided now will be recorded as the tier promises, as far as can be known beforehand."""
        if not self.accepting or (self._spool is not None and self._writer.scarce):
            return False
        confirmation = self._confirmations.get(policy)
        return self.confirm is None or (confirmation is not None and confirmation.state is State.CONFIRMING)

    def _post(self, callback: Callable[..., None], *values: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is waiting any more
            self._loop.call_soon_threadsafe(callback, *values)

    def _committed(self, count: int) -> None:
        for _ in range(count):
            lane, end, committed = self._waiting.popleft()
            lane.commit()
            if (confirmation := self._confirmations.get(lane.policy)) is not None:
                confirmation.kept(end, committed)
            elif not committed.done():
                committed.set_result(None)
            self.on_commit(lane)
        self._evict()

    def _open_turn(self) -> None:
        self._inline = True

    def _evict(self) -> None:
        while self._held.window > self._max_window_bytes:
            max(self._lanes.values(), key=lambda lane: len(lane.window)).evict()

    def _failed(self, detail: str) -> None:
        if self._broken is None:
            log.error("ledger_broken", detail=detail)
        self._broken = detail
        for lane in self._lanes.values():
            lane.abort()
        while self._waiting:
            _, _, committed = self._waiting.popleft()
            if not committed.done():
                committed.set_exception(LedgerBroken(detail))
                committed.exception()  # seen: nobody needs to await it

    def _recovered(self) -> None:
        log.info("ledger_recovered", was=self._broken)
        self._broken = None
        self._writer.resume()

    # What replicas say, told by the shipper

    def confirmed(self, lane: Lane) -> None:
        """Replicas have everything of a lane that Redis has."""
        lane.confirm()
        if lane.live and (confirmation := self._confirmations.get(lane.policy)) is not None:
            confirmation.confirmed(lane.next_seq)

    def doubt(self, lane: Lane | None = None) -> None:
        """A lane's call was not confirmed; None: Redis did not answer at all."""
        for policy, confirmation in self._confirmations.items():
            if lane is None or (lane.live and lane.policy == policy):
                confirmation.doubt()

    # Reading, for the shipper

    def lanes(self) -> list[Lane]:
        """List the lanes to ship: those of this process, then those found on disk."""
        found = self._adoption.lanes() if self._adoption else ()
        return [*self._lanes.values(), *found]

    async def read(self, lane: Lane, max_events: int, max_bytes: int) -> list[Row]:
        """Read committed rows from `lane.next_seq` on. None are left before `lane.stop` when there are none."""
        spool = self._spool if lane.live else self._adoption and self._adoption.spool_of(lane)
        if not spool:
            return []
        return await self._in_reader(spool.read, lane.policy, lane.next_seq, lane.stop, max_events, max_bytes)

    async def reject(self, lane: Lane, row: Row, reason: str) -> None:
        """Keep a row that Redis refuses, and step over it."""
        log.error("row_rejected", policy=lane.policy, first_seq=row.first_seq, count=row.count, reason=reason)
        if self._slot is not None:
            await self._in_reader(set_aside, self._slot.path, lane.producer, lane.epoch, row, reason)
        lane.reject(row)
        if lane.live and (confirmation := self._confirmations.get(lane.policy)) is not None:
            confirmation.refuse(row.end)

    async def tidy(self) -> None:
        """Adopt what dead workers left, and delete files that are shipped and old. To be called every few seconds."""
        if self._spool is None or self._adoption is None:
            return
        await self._in_reader(self._adoption.look_around)
        now_s = self._clock.monotonic_s()
        done = {lane.policy: lane.releasable for lane in self._lanes.values()}
        await self._in_reader(self._spool.expire, done, now_s)
        await self._in_reader(self._adoption.expire, now_s)
        await self._in_reader(self._adoption.discard, now_s, self._clock.event_ms())

    async def _in_reader(self, call: Callable[..., _T], *values: object) -> _T:
        return await self._loop.run_in_executor(self._reader, call, *values)

    # State

    def statistics(self) -> LedgerStatistics:
        lanes = self.lanes()
        spools = [spool for spool in (self._spool, *(self._adoption.spools() if self._adoption else ())) if spool]
        damage = [spool.damage for spool in spools] + ([self._adoption.gone] if self._adoption else [])
        rows, files, torn = (sum(column) for column in zip(*damage or [Damage()], strict=True))
        return LedgerStatistics(
            state=self._state(),
            waiting_rows=len(self._waiting),
            held_bytes=self._held.pending + self._held.window,
            unshipped_events=sum(lane.unshipped for lane in lanes),
            unconfirmed_events=sum(lane.assigned - lane.releasable for lane in lanes if lane.confirms),
            oldest_unshipped_ms=min((ms for lane in lanes if (ms := lane.oldest_ms) is not None), default=None),
            commits=self._writer.commits if self._spool else 0,
            lost_events=sum(lane.lost for lane in lanes) + (self._adoption.lost if self._adoption else 0),
            rejected_events=sum(lane.rejected for lane in lanes) + (self._adoption.rejected if self._adoption else 0),
            corrupt_rows=rows,
            corrupt_files=files,
            torn_tails=torn,
            files=sum(spool.files for spool in spools),
            discarded_files=self._adoption.discarded if self._adoption else 0,
        )

    def _state(self) -> Literal["ok", "full", "broken", "closed"]:
        if self._closed:
            return "closed"
        if self._broken is not None:
            return "broken"
        return "ok" if self.accepting else "full"

    async def aclose(self) -> None:
        """Commit what was appended, end both threads and close the files. The slot stays the caller's to release."""
        if self._closed:
            return
        self._closed = True
        if self._spool is not None and self._adoption is not None:
            await self._loop.run_in_executor(None, self._writer.stop)
            for confirmation in self._confirmations.values():
                confirmation.close()
            await self._loop.run_in_executor(None, self._reader.shutdown)
            self._spool.close()
            self._adoption.close()
