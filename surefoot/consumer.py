"""What one consumer of a group is handed, and when: the logic of reading a stream, without sending anything.

Duty: order of delivery, batches, copies, what is in flight. Requests are made in `group.py` and carried out by
`exchange.py`; what an entry means is the `Feed`'s affair. The clock is an argument.
Strategy: after every (re)connection first what this consumer was given before and has not acknowledged, then, each
half `claim_idle_s`, what dead consumers left behind, then what is new. A reply that was lost is thus found again as
pending. Errors of the connection are retried here with backoff.
Promise: **at least once.** An entry is acknowledged only when asked for; a copy not before what it is a copy of.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

import redis

from surefoot.backoff import Backoff
from surefoot.dedupe import Identity, Ids
from surefoot.errors import Gap
from surefoot.exchange import Exchange, Pause, is_away, translated
from surefoot.group import Delivery, Group
from surefoot.progress import Progress, Stream
from surefoot.survey import Entry, GroupMissing, following, parse_id

_COUNTED = ("delivered", "copies", "claimed", "reconnects", "gaps")


class Item(Protocol):
    """What is read of one entry."""

    @property
    def stream_id(self) -> bytes: ...

    @property
    def identity(self) -> Identity | None: ...  # None: never a copy of another


class Parcel(Protocol):
    """What is handed out at once."""

    @property
    def stream_ids(self) -> tuple[bytes, ...]: ...  # acknowledged with it


T = TypeVar("T")
ItemT = TypeVar("ItemT", bound=Item)
ParcelT = TypeVar("ParcelT", bound=Parcel)


class Feed(NamedTuple, Generic[ItemT, ParcelT]):
    """What entries become: `read` makes an item of one, `pack` parcels of items, the last with the ids of copies."""

    read: Callable[[bytes, Mapping[bytes, bytes]], ItemT]
    pack: Callable[[Sequence[ItemT], Sequence[bytes]], Sequence[ParcelT]]


@dataclass(frozen=True, slots=True)
class Terms:
    """How a consumer reads. `transitions` says what each means."""

    batch_size: int = 256
    block_s: float = 1.0
    claim_idle_s: float = 60.0
    dedupe_window: int = 1 << 20
    max_wait_s: float | None = None
    auto_ack: bool = True
    state: bytes | None = None
    peers: Callable[[], Iterable[bytes]] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.block_s < 0 or self.claim_idle_s <= 0:
            raise ValueError("batch_size and claim_idle_s must be positive, block_s not negative")


class _Held(NamedTuple):
    """An entry that was given to this consumer and is not acknowledged."""

    identity: Identity | None
    copy: bool


class Consumer(Generic[ItemT, ParcelT]):
    """One member of a group. Its methods are exchanges, of which one at a time is under way; `ack` may be beside it."""

    def __init__(
        self, stream: Stream, group: Group, feed: Feed[ItemT, ParcelT], terms: Terms, clock: Callable[[], float]
    ) -> None:
        self._stream, self._group, self._feed, self._terms, self._clock = stream, group, feed, terms, clock
        self._progress = Progress.read(stream, terms.dedupe_window, terms.state)
        self._open = False
        self._own_after: bytes | None = b"0-0"  # None: nothing of ours is left to be delivered again
        self._claim_cursor, self._claim_at_s = b"0-0", clock()
        self._claimed = False  # a round of claims has ended: what is new comes before the next
        self._trying: Backoff | None = None  # since when nothing was read, though Redis may have answered
        self._renew_at_s = clock() + terms.claim_idle_s / 3
        self._items: list[ItemT] = []
        self._copies: list[bytes] = []  # acknowledged with the batch being filled, never before what they are copies of
        self._needless: list[bytes] = []  # copies of what is done with: to be acknowledged at once
        self._in_flight: dict[bytes, _Held] = {}
        self._waiting: set[bytes] = set()  # those in flight that are collected, but not handed out yet
        self._outstanding = Ids()  # what is in flight, without copies
        self._ready: deque[ParcelT] = deque()
        self._gaps: deque[Gap] = deque()
        self._last: ParcelT | None = None
        self._counts: Counter[str] = Counter()

    def next(self) -> Exchange[ParcelT | None]:
        """Hand out the next parcel, or None at the end. Raises what is documented of the iterators."""
        if self._terms.auto_ack and self._last is not None:
            yield from self.ack(self._last.stream_ids)
            self._last = None
        if not self._ready and not self._gaps:
            yield from self._fill()
        if self._gaps:
            raise self._gaps.popleft()
        if not self._ready:
            return None
        self._last = self._ready.popleft()
        self._waiting.difference_update(self._last.stream_ids)
        self._counts["delivered"] += sum(not self._in_flight[each].copy for each in self._last.stream_ids)
        return self._last

    def ack(self, stream_ids: Sequence[bytes] | None = None) -> Exchange[None]:
        """Acknowledge these entries, or all that were handed out."""
        if stream_ids is None:
            stream_ids = [each for each in self._in_flight if each not in self._waiting]
        if not stream_ids:
            return
        yield from self._persist(partial(self._group.ack, stream_ids))
        for stream_id in stream_ids:
            held = self._in_flight.pop(stream_id, None)
            if held is not None and held.identity is not None and not held.copy:
                self._outstanding.discard(*held.identity)

    def state(self) -> bytes:
        """Everything handed out so far, to be kept with what was made of it."""
        held = (each.identity for each in self._in_flight.values())
        waiting = (self._in_flight[each] for each in self._waiting)
        collected = (each.identity for each in waiting if not each.copy)
        return self._progress.dump(filter(None, held), filter(None, collected))

    def statistics(self) -> dict[str, int]:
        return {name: self._counts[name] for name in _COUNTED} | {"in_flight": len(self._in_flight)}

    def _fill(self) -> Exchange[None]:
        """Collect until the batch is full, `block_s` after its first row, a gap, or `max_wait_s` of nothing."""
        begun_s = self._clock()
        first_s = begun_s if self._items else None
        while not self._gaps and len(self._items) < self._terms.batch_size:
            found = yield from self._persist(self._step)
            self._take(found)
            yield from self._drop_needless()
            now_s = self._clock()
            if first_s is None and self._items:
                first_s = now_s
            left_s = self._left_s(begun_s, first_s, now_s)
            if left_s <= 0 and (found.idle or self._items):
                break
            if found.idle and not self._gaps:
                yield from self._persist(partial(self._group.wait, int(self._nap_s(left_s, now_s) * 1000)))
        if not self._gaps:
            self._cut()

    def _left_s(self, begun_s: float, first_s: float | None, now_s: float) -> float:
        """How long may still be waited: for more rows, or for the first one."""
        if first_s is not None:
            return first_s + self._terms.block_s - now_s
        if self._terms.max_wait_s is not None:
            return min(self._terms.block_s, begun_s + self._terms.max_wait_s - now_s)
        return self._terms.block_s

    def _nap_s(self, left_s: float, now_s: float) -> float:
        """How long to wait at once: what is held has to be renewed in between."""
        return min(left_s, max(0.0, self._renew_at_s - now_s)) if self._in_flight else left_s

    def _step(self) -> Exchange[Delivery]:
        """Ask Redis for the next thing in order: the group, what is ours, what others left, what is new."""
        room = self._terms.batch_size - len(self._items)
        try:
            return (yield from self._ask(room))
        except GroupMissing:
            self._open = False
            return Delivery()
        except BaseException:
            self._open = False  # its reply may be lost: what it brought is found as pending
            raise

    def _ask(self, room: int) -> Exchange[Delivery]:
        if not self._open:
            found = yield from self._group.open()
            self._open, self._own_after = True, b"0-0"
            return found
        if self._own_after is not None:
            found = yield from self._group.own(self._own_after, room)
            self._own_after = found.entries[-1][0] if found.entries else None
            if self._own_after is None:
                self._progress.held = Ids()  # what it held and was not delivered again is acknowledged
            else:
                self._trying = None
            return found
        if self._in_flight and self._clock() >= self._renew_at_s:
            yield from self._renew()
        claims = self._clock() >= self._claim_at_s and not self._claimed
        found = yield from (self._claim(room) if claims else self._group.new(room))
        self._claimed = claims and self._claim_cursor == b"0-0"
        self._trying = None
        return found

    def _renew(self) -> Exchange[None]:
        """Keep what is in flight from being taken over while this consumer is alive."""
        third_s = self._terms.claim_idle_s / 3
        yield from self._group.renew(max(1, int(third_s * 1000)))
        self._renew_at_s = self._clock() + third_s

    def _claim(self, room: int) -> Exchange[Delivery]:
        idle_ms = int(self._terms.claim_idle_s * 1000)
        self._claim_cursor, found = yield from self._group.claim(self._claim_cursor, idle_ms, room)
        if self._claim_cursor == b"0-0":
            self._claim_at_s = self._clock() + self._terms.claim_idle_s / 2
        self._counts["claimed"] += len(found.entries)
        return found

    def _take(self, found: Delivery) -> None:
        """Add what is new to the batch being filled; set copies aside; keep gaps to be raised."""
        self._gaps.extend(found.gaps)
        # An entry that was deleted while it was being trained on has been seen: no loss.
        if unseen := [stream_id for stream_id in found.deleted if stream_id not in self._in_flight]:
            self._gaps.append(deleted_while_pending(unseen))
        self._counts["gaps"] += len(found.gaps) + bool(unseen)
        fresh = [entry for entry in found.entries if entry[1] and entry[0] not in self._in_flight]
        try:
            items, elsewhere = self._read(fresh), self._elsewhere(found.again and bool(fresh))
        except BaseException:
            self._own_after = b"0-0"  # all of them are pending: have them delivered again
            raise
        for item in items:
            self._sort(item, elsewhere)

    def _read(self, entries: Sequence[Entry]) -> list[ItemT]:
        return [self._feed.read(*entry) for entry in entries]

    def _elsewhere(self, wanted: bool) -> list[Progress]:
        """What the group's other consumers have trained on. They cannot have what nobody was given before."""
        if not wanted or self._terms.peers is None:
            return []
        return [Progress.read(self._stream, self._terms.dedupe_window, state) for state in self._terms.peers()]

    def _sort(self, item: ItemT, elsewhere: Sequence[Progress]) -> None:
        identity, copy = item.identity, False
        if identity is not None:
            known = identity in self._progress.held or any(other.trained(identity) for other in elsewhere)
            copy = not self._progress.seen.add(*identity) or known
        self._in_flight[item.stream_id] = _Held(identity, copy)
        if copy and identity is not None:
            self._counts["copies"] += 1
            self._set_aside(item.stream_id, identity)
            return
        self._waiting.add(item.stream_id)
        self._items.append(item)
        if identity is not None:
            self._outstanding.add(*identity)

    def _set_aside(self, stream_id: bytes, identity: Identity) -> None:
        if identity not in self._outstanding:
            self._needless.append(stream_id)
            return
        self._waiting.add(stream_id)
        self._copies.append(stream_id)

    def _drop_needless(self) -> Exchange[None]:
        if self._needless:
            yield from self.ack(self._needless)
            self._needless = []

    def _cut(self) -> None:
        """Make parcels of what was collected."""
        if self._items:
            self._ready.extend(self._feed.pack(self._items, self._copies))
            self._items, self._copies = [], []

    def _persist(self, exchange: Callable[[], Exchange[T]]) -> Exchange[T]:
        """Go on until Redis answers, for `max_wait_s` at most. Everything sent here may be sent twice.

        A Redis that lets itself be looked at and refuses what is written is away all the same: the time runs on.
        """
        max_wait_s = self._terms.max_wait_s
        backoff = self._trying or Backoff(None if max_wait_s is None else self._clock() + max_wait_s)
        while True:
            try:
                return (yield from exchange())
            except redis.RedisError as error:
                delay_s = backoff.delay_s(self._clock()) if is_away(error) else None
                if delay_s is None:
                    self._trying = None
                    raise translated(error) from error
                self._open, self._trying = False, backoff
                self._counts["reconnects"] += 1
            yield Pause(delay_s)


def deleted_while_pending(stream_ids: Sequence[bytes]) -> Gap:
    """The gap of entries that were given out, and were deleted before they were acknowledged."""
    ids = [stream_id.decode() for stream_id in stream_ids]
    detail = f"{len(ids)} pending entries were deleted before they were acknowledged"
    resume = following(max(stream_ids, key=parse_id)).decode()
    return Gap(detail, reason="deleted", lost=len(ids), ids=ids, resume=resume)
