"""Where the events of one (policy, producer, epoch) stand: assigned, committed, shipped, applied, confirmed. Pure.

Duty: the arithmetic of a lane, in seqs. Knows nothing of files, threads, Redis or clocks.
Strategy: three marks on one line of seqs. `applied` is what Redis says it has; `next_seq` is read next; `end` is the
end of what is committed; `assigned` the end of what was given out. Committed rows not yet applied are held in memory as
a suffix of the line (`window`); what is before it is read from the spool. A hole that nothing can fill (damage, or
rows deleted long ago) is stepped over, and counted once.
Promise: `through_ms` never claims a time that an unshipped event of this lane is stamped with.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from service.shipcall import Confirm, ShipCall
from service.spool_file import Row


@dataclass(slots=True)
class Held:
    """Bytes of events in memory, over all lanes that share this."""

    pending: int = 0
    window: int = 0


@dataclass(slots=True, eq=False)
class Lane:
    """One policy's events of one epoch. `live`: this process still appends to it."""

    policy: str
    producer: str
    epoch: int
    live: bool = True
    known: bool = True  # Redis has said what it has; a lane found on disk asks first
    # Invariant: next_seq <= end <= assigned, and applied <= next_seq
    applied: int = 1
    next_seq: int = 1
    end: int = 1
    assigned: int = 1
    head_ms: int = 0  # a time no later than that of the row at `next_seq`, where that is on disk
    window: deque[Row] = field(default_factory=deque)  # committed, contiguous, up to `end`
    pending: deque[Row] = field(default_factory=deque)  # given to the writer
    held: Held = field(default_factory=Held)
    lost: int = 0
    rejected: int = 0
    counted: int = 1  # holes below this seq have been counted
    # The shipper's, by its monotonic clock:
    waiting_since_s: float | None = None  # since when a committed row has been waiting here
    called_s: float = float("-inf")
    beat_s: float = 1.0  # a call goes out at least so often
    blocked_until_s: float = float("-inf")  # Redis answers, but refuses this lane altogether
    row_limit: int | None = None  # most rows in a call, while a row that Redis refuses is being searched
    rejects_in_a_row: int = 0
    said_bye: bool = False
    # Where rows count only once replicas have them:
    confirms: bool = False
    confirmed: int = 1  # replicas have everything before this seq, or it was stepped over
    confirm_again_s: float = float("-inf")  # no call waits for replicas before this time

    def append(self, count: int, at_ms: int, blob: bytes) -> Row:
        row = Row(self.policy, self.assigned, count, at_ms, blob)
        self.assigned = row.end
        self.pending.append(row)
        self.held.pending += len(blob)
        return row

    def commit(self) -> None:
        """The oldest pending row is on disk."""
        row = self.pending.popleft()
        self.held.pending -= len(row.blob)
        self.window.append(row)
        self.held.window += len(row.blob)
        self.end = row.end

    def abort(self) -> None:
        """Nothing that is pending will ever be committed: its seqs are given out again."""
        self.held.pending -= sum(len(row.blob) for row in self.pending)
        self.pending.clear()
        self.assigned = self.end

    def evict(self) -> None:
        """Forget the oldest row in memory; it is on disk."""
        row = self.window.popleft()
        self.held.window -= len(row.blob)
        if row.first_seq <= self.next_seq:
            self.head_ms = row.at_ms

    @property
    def stored(self) -> bool:
        """Whether what is to be shipped next lies on disk only."""
        return self.next_seq < (self.window[0].first_seq if self.window else self.end)

    @property
    def stop(self) -> int:
        """Up to where the disk is to be read."""
        return self.window[0].first_seq if self.window else self.end

    @property
    def unshipped(self) -> int:
        return self.assigned - self.next_seq

    @property
    def drained(self) -> bool:
        return self.known and self.next_seq >= self.assigned

    @property
    def oldest_ms(self) -> int | None:
        """The event time of the oldest unshipped event, or a little less."""
        if self.next_seq >= self.assigned:
            return None
        if self.stored and self.head_ms:
            return self.head_ms
        row = next(iter(self.window or self.pending), None)
        return row.at_ms if row else None

    def through_ms(self, batch: list[Row], now_ms: int) -> int:
        """The event time through which everything has been shipped, once `batch` has been."""
        end = batch[-1].end if batch else self.next_seq
        if end >= self.assigned:
            return now_ms - 1
        if end < self.stop:  # the next row lies on disk, unread: not before the batch's last
            return (batch[-1].at_ms if batch else self.head_ms) - 1
        unshipped = next((row for row in self.window if row.first_seq >= end), None)
        return (unshipped or self.pending[0]).at_ms - 1

    def from_window(self, max_events: int, max_bytes: int) -> list[Row]:
        """Take the next rows from memory: one at least, if there is one, then up to a limit."""
        batch: list[Row] = []
        events = size = 0
        for row in self.window:
            if batch and (events + row.count > max_events or size + len(row.blob) > max_bytes):
                break
            batch.append(row)
            events, size = events + row.count, size + len(row.blob)
        return batch

    def call(self, rows: list[Row], now_ms: int, bye: bool, confirm: Confirm | None) -> ShipCall:
        """Build the call that ships these rows, the next ones without a hole, or a heartbeat."""
        first = rows[0].first_seq if rows else self.applied
        return ShipCall(
            policy=self.policy,
            producer=self.producer,
            epoch=self.epoch,
            first_seq=first,
            count=sum(row.count for row in rows),
            through_ms=self.through_ms(rows, now_ms),
            now_ms=now_ms,
            force=first > self.applied,
            bye=bye,
            blobs=tuple(row.blob for row in rows),
            confirm=confirm,
        )

    def ack(self, last: int) -> None:
        """Redis has everything up to `last`."""
        self.known = True
        self.applied = min(last + 1, self.assigned)
        self.next_seq = max(self.next_seq, self.applied)
        self._forget()

    def _forget(self) -> None:
        """Drop from memory what needs no shipping; the spool keeps it a while."""
        while self.window and self.window[0].end <= self.next_seq:
            row = self.window.popleft()
            self.held.window -= len(row.blob)

    def confirm(self) -> None:
        """Replicas have what Redis said it has: to be called right after `ack`."""
        self.confirmed = self.next_seq

    @property
    def unconfirmed(self) -> bool:
        """Whether Redis has rows that its replicas have not confirmed."""
        return self.confirms and self.confirmed < self.next_seq

    @property
    def releasable(self) -> int:
        """The seq before which the spool may be let go, once it is old."""
        return min(self.next_seq, self.confirmed) if self.confirms else self.next_seq

    def rewind(self, last: int) -> None:
        """Redis has only what is up to `last`: ship again from there."""
        self.known = True
        self.applied = self.next_seq = min(last + 1, self.end)
        self.confirmed = min(self.confirmed, self.applied)
        if self.stored:
            self.head_ms = 0  # unknown until it is read

    def skip(self, seq: int) -> int:
        """Step over a hole up to `seq`. Return how many events that loses, those counted before left out."""
        lost = max(0, seq - max(self.next_seq, self.counted))
        self.lost += lost
        self._step_to(seq)
        return lost

    def reject(self, row: Row) -> None:
        """Step over a row that was set aside."""
        self.rejected += row.count
        self._step_to(row.end)

    def _step_to(self, seq: int) -> None:
        self.counted = max(self.counted, seq)
        self.next_seq = seq
        self._forget()
