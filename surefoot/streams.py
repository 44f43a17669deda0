"""Transitions for trainers: an iterator of numpy batches over a Redis consumer group, and a reader without one.

Duty: what is delivered when, and acknowledged when. The commands are in `group.py`, the meaning of an entry in
`entries.py`. It imports nothing of the service.
Strategy: after every (re)connection first what this consumer was given before and has not acknowledged, then, each
half `claim_idle_s`, what dead consumers left behind, then what is new. A reply that was lost is thus found again as
pending. Errors of the connection are retried here with backoff.
Promise: **at least once.** A transition is acknowledged only by `Batch.ack`, which the iterator calls for the previous
batch when it is asked for the next; copies that the service sent twice are dropped by (producer, epoch, seq).
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import redis

from surefoot.backoff import Backoff
from surefoot.batch import Batch
from surefoot.dedupe import Seen
from surefoot.entries import Row, Spec
from surefoot.errors import Gap, Unreadable
from surefoot.group import Delivery, Entry, Group, GroupMissing, connect, is_away, stream_key, translated

T = TypeVar("T")

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"

_ANSWER_S = 5.0  # redis-py's own default for a command's answer
_TAIL_BLOCK_S, _TAIL_COUNT = 1.0, 100


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
            found = self._persist(self._step)
            self._take(found)
            now_s = self._clock()
            if first_s is None and self._rows:
                first_s = now_s
            left_s = self._left_s(begun_s, first_s, now_s)
            if left_s <= 0 and (found.idle or self._rows):
                break
            if found.idle and not self._gaps:
                self._persist(partial(self._group.wait, int(left_s * 1000)))
        if not self._gaps:
            self._cut()

    def _left_s(self, begun_s: float, first_s: float | None, now_s: float) -> float:
        """How long may still be waited: for more rows, or for the first one."""
        if first_s is not None:
            return first_s + self._block_s - now_s
        if self._max_wait_s is not None:
            return min(self._block_s, begun_s + self._max_wait_s - now_s)
        return self._block_s

    def _step(self) -> Delivery:
        """Ask Redis for the next thing in order: the group, what is ours, what others left, what is new."""
        room = self._batch_size - len(self._rows)
        try:
            if not self._open:
                found = self._group.open()
                self._open, self._own_after = True, b"0-0"
                return found
            if self._own_after is not None:
                found = self._group.own(self._own_after, room)
                self._own_after = found.entries[-1][0] if found.entries else None
                return found
            return self._claim(room) if self._clock() >= self._claim_at_s else self._group.new(room)
        except GroupMissing:
            self._open = False
            return Delivery()

    def _claim(self, room: int) -> Delivery:
        self._claim_cursor, found = self._group.claim(self._claim_cursor, int(self._claim_idle_s * 1000), room)
        if self._claim_cursor == b"0-0":
            self._claim_at_s = self._clock() + self._claim_idle_s / 2
        self._counts["claimed"] += len(found.entries)
        return found

    def _take(self, found: Delivery) -> None:
        """Add what is new to the batch being filled; set copies aside; keep gaps to be raised."""
        self._gaps.extend(found.gaps)
        # An entry that was deleted while it was being trained on has been seen: no loss.
        if unseen := [stream_id.decode() for stream_id in found.deleted if stream_id not in self._in_flight]:
            detail = f"{len(unseen)} pending entries were deleted before they were acknowledged"
            self._gaps.append(Gap(detail, reason="deleted", lost=len(unseen), ids=unseen))
        self._counts["gaps"] += len(found.gaps) + bool(unseen)
        fresh = [entry for entry in found.entries if entry[1] and entry[0] not in self._in_flight]
        try:
            rows = [Row.read(*entry) for entry in fresh]
        except Unreadable:
            self._own_after = b"0-0"  # all of them are pending: have them delivered again
            raise
        for row in rows:
            self._in_flight.add(row.stream_id)
            if self._seen.add(*row.identity):
                self._rows.append(row)
            else:
                self._copies.append(row.stream_id)
                self._counts["copies"] += 1

    def _cut(self) -> None:
        """Make batches of the collected rows: one for each observation and action spec, in order of appearance."""
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

    def _persist(self, command: Callable[[], T]) -> T:
        """Run a command until Redis answers, for `max_wait_s` at most. Everything sent here may be sent twice."""
        backoff = Backoff(None if self._max_wait_s is None else self._clock() + self._max_wait_s)
        while True:
            try:
                return command()
            except redis.RedisError as error:
                delay_s = backoff.delay_s(self._clock()) if is_away(error) else None
                if delay_s is None:
                    raise translated(error) from error
                self._open = False
                self._counts["reconnects"] += 1
                self._sleep(delay_s)


def transitions(
    policy: str,
    group: str,
    consumer: str,
    *,
    redis_url: str = DEFAULT_REDIS_URL,
    batch_size: int = 256,
    block_s: float = 1.0,
    start: str = "0",
    claim_idle_s: float = 60.0,
    dedupe_window: int = 1 << 20,
    max_wait_s: float | None = None,
    auto_ack: bool = True,
) -> Transitions:
    """Read a policy's transitions as a member of a consumer group, as batches of numpy arrays.

    The members of a group share its transitions. `consumer` names this one and must stay the same over restarts, for
    then it is given again what it had not acknowledged. The group is made if it is missing, from `start`: "0", all that
    is kept; "$", only what comes; or a stream id.

    batch_size: most rows in a batch. block_s: a batch that is not full leaves this long after its first row.
    claim_idle_s: what another consumer has left unacknowledged for this long is taken over; it must exceed the longest
    training step. dedupe_window: sequence numbers remembered of each (producer, epoch), at a bit each.
    max_wait_s: the iterator ends when nothing has come for this long, and raises Unreachable when Redis is away that
    long; None waits for ever. auto_ack: acknowledge a batch when the next is asked for, which is after the training
    step; with False call `Batch.ack()` yourself. A `break` leaves the last batch unacknowledged: call its `ack()`.

    Raises what `Transitions.__next__` does, and Refused when Redis does not let this consumer in.
    """
    if batch_size < 1 or block_s < 0 or claim_idle_s <= 0:
        raise ValueError("batch_size and claim_idle_s must be positive, block_s not negative")
    client = connect(redis_url, timeout_s=block_s + _ANSWER_S)
    return Transitions(
        policy,
        Group(client, policy, group, consumer, start),
        batch_size=batch_size,
        block_s=block_s,
        claim_idle_s=claim_idle_s,
        dedupe_window=dedupe_window,
        max_wait_s=max_wait_s,
        auto_ack=auto_ack,
    )


def tail(
    policy: str,
    redis_url: str = DEFAULT_REDIS_URL,
    follow: bool = False,
    from_: str = "0",
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Read a policy's transitions without a group, as values that JSON can hold; nothing is consumed.

    from_: "0", all that is kept; "$", only what comes after the call; or a stream id. Ends at the end of the stream
    unless `follow`, and after `limit` transitions. Raises Unreachable at once when Redis does not answer.
    """
    client = connect(redis_url, timeout_s=_TAIL_BLOCK_S + _ANSWER_S)
    try:
        entries = _entries_after(client, stream_key(policy), from_, follow)
        for stream_id, fields in itertools.islice(entries, limit):
            yield Row.read(stream_id, fields).plain(policy)
    except redis.RedisError as error:
        raise translated(error) from error
    finally:
        client.close()


def _entries_after(client: redis.Redis, key: str, from_: str, follow: bool) -> Iterator[Entry]:
    after: Any = from_
    if from_ == "$":
        # Resolved once: between two reads of "$" an entry could slip through.
        newest: Any = client.xrevrange(key, count=1)
        after = newest[0][0] if newest else "0-0"
    while True:
        reply: Any = client.xread({key: after}, count=_TAIL_COUNT, block=int(_TAIL_BLOCK_S * 1000) if follow else None)
        entries: list[Entry] = reply[0][1] if reply else []
        yield from entries
        if entries:
            after = entries[-1][0]
        elif not follow:
            return
