"""Transitions for trainers: an iterator of numpy batches over a Redis consumer group, and a reader without one.

Duty: what is delivered when, and acknowledged when. The commands are in `group.py`, the meaning of an entry in
`entries.py`. It imports nothing of the service.
Strategy: after every (re)connection first what this consumer was given before and has not acknowledged, then, each
half `claim_idle_s`, what dead consumers left behind, then what is new. A reply that was lost is thus found again as
pending. Errors of the connection are retried here with backoff.
Promise: **at least once.** A transition is acknowledged only after `Batch.ack`, which the iterator calls for the previous
batch when it is asked for the next; copies that the service sent twice are dropped by (producer, epoch, seq).
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

import redis

from surefoot.backoff import Backoff
from surefoot.batch import Batch
from surefoot.dedupe import Seen
from surefoot.entries import Row, Spec
from surefoot.errors import Gap, Unreachable
from surefoot.group import Delivery, Group, GroupMissing, connect, stream_key

T = TypeVar("T")

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"

_AWAY = (
    redis.ConnectionError,  # also LOADING
    redis.TimeoutError,
    redis.exceptions.ReadOnlyError,  # a failover is under way
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
)
_REFUSED = (redis.AuthenticationError, redis.exceptions.AuthorizationError)
_ANSWER_S = 5.0  # redis-py's own default for a command's answer


class Transitions(Iterator[Batch]):
    """Iterator of batches. Made by `transitions`. For use from one thread."""

    def __init__(
        self,
        policy: str,
        group: Group,
        *,
        batch_size: int,
        block_s: float,
        claim_idle_s: float,
        dedupe_window: int,
        max_wait_s: float | None,
        auto_ack: bool,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._policy, self._group = policy, group
        self._batch_size, self._block_s = batch_size, block_s
        self._claim_idle_s, self._max_wait_s, self._auto_ack = claim_idle_s, max_wait_s, auto_ack
        self._clock, self._sleep = clock, sleep
        self._seen = Seen(dedupe_window)
        self._open = False
        self._own_after: bytes | None = b"0-0"  # None: nothing of ours is left to be delivered again
        self._claim_cursor, self._claim_at_s = b"0-0", clock()
        self._rows: list[Row] = []
        self._copies: list[bytes] = []  # acknowledged with the batch being filled, never before what they are copies of
        self._in_flight: set[bytes] = set()  # given out or collected, not acknowledged
        self._ready: deque[Batch] = deque()
        self._gaps: deque[Gap] = deque()
        self._last: Batch | None = None
        self._counts: Counter[str] = Counter()

    def __next__(self) -> Batch:
        """Acknowledge the batch before, and return the next.

        Raises Gap for a loss (go on iterating to continue behind it), Unreachable when Redis was away for
        `max_wait_s`, Unreadable for an entry that a newer service wrote (it stays pending: upgrade this package).
        """
        if self._auto_ack and self._last is not None:
            self._last.ack()
            self._last = None
        if not self._ready and not self._gaps:
            self._fill()
        if self._gaps:
            raise self._gaps.popleft()
        if not self._ready:
            raise StopIteration
        self._last = self._ready.popleft()
        self._counts["delivered"] += len(self._last)
        return self._last

    def __enter__(self) -> Transitions:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. What was not acknowledged will be delivered again."""
        self._group.close()

    def statistics(self) -> dict[str, int]:
        """Counts since the start: delivered, copies, claimed, reconnects, gaps; and how many are in flight."""
        names = ("delivered", "copies", "claimed", "reconnects", "gaps")
        return {name: self._counts[name] for name in names} | {"in_flight": len(self._in_flight)}

    def _fill(self) -> None:
        """Collect until the batch is full, `block_s` after its first row, a gap, or `max_wait_s` of nothing."""
        begun_s = self._clock()
        first_s = begun_s if self._rows else None
        while not self._gaps and len(self._rows) < self._batch_size:
            now_s = self._clock()
            left_s = self._block_s if first_s is None else first_s + self._block_s - now_s
            if first_s is None and self._max_wait_s is not None:
                left_s = min(left_s, begun_s + self._max_wait_s - now_s)
            if left_s <= 0:
                break
            self._take(self._persist(lambda left_s=left_s: self._step(left_s)))  # type: ignore[misc]
            if first_s is None and self._rows:
                first_s = self._clock()
        if not self._gaps:
            self._cut()

    def _step(self, left_s: float) -> Delivery:
        """Ask Redis for the next thing in order: the group, what is ours, what others left, what is new."""
        room = self._batch_size - len(self._rows)
        if not self._open:
            found = self._group.open()
            self._open, self._own_after = True, b"0-0"
            return found
        if self._own_after is not None:
            found = self._group.own(self._own_after, room)
            self._own_after = found.entries[-1][0] if found.entries else None
            return found
        if self._clock() >= self._claim_at_s:
            return self._claim(room)
        found = self._group.new(room)
        if not found.entries and not found.gaps:
            self._group.wait(int(left_s * 1000))
        return found

    def _claim(self, room: int) -> Delivery:
        self._claim_cursor, found = self._group.claim(self._claim_cursor, int(self._claim_idle_s * 1000), room)
        if self._claim_cursor == b"0-0":
            self._claim_at_s = self._clock() + self._claim_idle_s / 2
        self._counts["claimed"] += len(found.entries)
        return found

    def _take(self, found: Delivery) -> None:
        """Add what is new to the batch being filled; set copies aside; keep gaps to be raised."""
        self._own_after = b"0-0" if found.entries and self._own_after is None else self._own_after
        fresh = [(stream_id, fields) for stream_id, fields in found.entries if fields]
        rows = [Row.read(*entry) for entry in fresh if entry[0] not in self._in_flight]
        for row in rows:
            self._in_flight.add(row.stream_id)
            if self._seen.add(*row.identity):
                self._rows.append(row)
            else:
                self._copies.append(row.stream_id)
                self._counts["copies"] += 1
        self._gaps.extend(found.gaps)
        # An entry that was deleted while it was being trained on has been seen: no loss.
        if unseen := [stream_id.decode() for stream_id in found.deleted if stream_id not in self._in_flight]:
            detail = f"{len(unseen)} pending entries were deleted before they were acknowledged"
            self._gaps.append(Gap(detail, reason="deleted", lost=len(unseen), ids=unseen))
        self._counts["gaps"] += len(found.gaps) + bool(unseen)

    def _cut(self) -> None:
        """Make batches of the collected rows, one for each observation and action spec, in order of first appearance."""
        by_spec: dict[Spec, list[Row]] = {}
        for row in self._rows:
            by_spec.setdefault(row.spec, []).append(row)
        for number, rows in enumerate(by_spec.values(), start=1):
            copies = self._copies if number == len(by_spec) else []
            self._ready.append(Batch.of(self._policy, rows, self._acknowledge, copies))
        if by_spec:
            self._rows, self._copies = [], []
        elif self._copies and len(self._in_flight) == len(self._copies):
            self._settle(self._copies)  # copies of what has been acknowledged before
            self._copies = []

    def _acknowledge(self, batch: Batch) -> None:
        self._settle(batch.stream_ids)

    def _settle(self, stream_ids: Sequence[bytes]) -> None:
        self._persist(lambda: self._group.ack(stream_ids))
        self._in_flight.difference_update(stream_ids)

    def _persist(self, command: Callable[[], T | None]) -> T | Any:
        """Run a command until Redis answers, for `max_wait_s` at most. Everything sent here may be sent twice."""
        backoff = Backoff(None if self._max_wait_s is None else self._clock() + self._max_wait_s)
        while True:
            try:
                return command()
            except GroupMissing:
                self._open = False
                return Delivery()
            except _REFUSED:
                raise
            except _AWAY as error:
                self._open = False
                self._counts["reconnects"] += 1
                delay_s = backoff.delay_s(self._clock())
                if delay_s is None:
                    raise Unreachable(f"Redis does not answer: {error}", maybe_received=True) from error
                self._sleep(delay_s)
