"""Transitions for trainers: an iterator of numpy batches over a Redis consumer group, and a reader without one.

Duty: the doors of a stream, for programs with and without an event loop. What is delivered when is decided in
`consumer.py`, the commands are in `group.py`, the meaning of an entry in `entries.py`. It imports nothing of the
service.
Promise: **at least once**, and exactly once for a trainer that keeps `state()` with its weights: see `transitions`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import redis
import redis.asyncio

from surefoot.batch import Batch
from surefoot.consumer import Consumer, Feed, ParcelT, Terms
from surefoot.entries import Row, Spec
from surefoot.exchange import Exchange, connect, connect_async, run, run_async, translated
from surefoot.group import Group, stream_key
from surefoot.progress import Stream
from surefoot.survey import Entry

T = TypeVar("T")

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"

ANSWER_S = 5.0  # redis-py's own default for a command's answer
_TAIL_BLOCK_S, _TAIL_COUNT = 1.0, 100


class Reader(Generic[ParcelT]):
    """What can be asked of a consumer without waiting."""

    _consumer: Consumer[Any, ParcelT]

    def state(self) -> bytes:
        """Give what was handed out so far, the last batch included, as a value to be kept beside the weights.

        Make it after the training step, write it into the same file as the weights, put that in place with one atomic
        rename, then call `ack()`. Pass it as `state=` after a restart. It is small: a bit for each transition within
        `dedupe_window`, compressed.
        """
        return self._consumer.state()

    def statistics(self) -> dict[str, int]:
        """Counts since the start: delivered, copies, claimed, reconnects, gaps; and how many are in flight."""
        return self._consumer.statistics()


class BlockingReader(Reader[ParcelT], Iterator[ParcelT]):
    """Carries a consumer's exchanges out, blocking. For use from one thread."""

    def __init__(
        self, consumer: Consumer[Any, ParcelT], client: redis.Redis, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._consumer, self._client, self._sleep = consumer, client, sleep

    def __next__(self) -> ParcelT:
        """Acknowledge what was handed out last, unless `auto_ack` is off, and give the next.

        Raises Gap for a loss (go on iterating to continue behind it), Unreachable when Redis was away for
        `max_wait_s`, Unreadable for an entry that a newer service wrote (it stays pending: upgrade this package).
        """
        found = self._run(self._consumer.next())
        if found is None:
            raise StopIteration
        return found

    def ack(self, parcel: ParcelT | None = None) -> None:
        """Acknowledge a batch, or without an argument all that were handed out."""
        self._run(self._consumer.ack(None if parcel is None else parcel.stream_ids))

    def close(self) -> None:
        """Close the connection. What was not acknowledged will be delivered again."""
        self._client.close()

    def _run(self, exchange: Exchange[T]) -> T:
        return run(exchange, self._client, self._sleep)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Transitions(BlockingReader[Batch]):
    """Iterator of batches. Made by `transitions`. For use from one thread."""

    def __enter__(self) -> Transitions:
        return self


class AwaitingReader(Reader[ParcelT], AsyncIterator[ParcelT]):
    """Carries a consumer's exchanges out, awaiting. For use from one event loop.

    A task that is cancelled while it waits for the next batch loses nothing: whatever was on its way is found again by
    whoever asks next.
    """

    def __init__(self, consumer: Consumer[Any, ParcelT], client: redis.asyncio.Redis) -> None:
        self._consumer, self._client = consumer, client
        self._asked = False

    async def __anext__(self) -> ParcelT:
        """Do and raise what the blocking iterator does. One task at a time: RuntimeError for the second."""
        if self._asked:
            raise RuntimeError("another task waits for the next batch")
        self._asked = True
        try:
            found = await run_async(self._consumer.next(), self._client)
        finally:
            self._asked = False
        if found is None:
            raise StopAsyncIteration
        return found

    async def ack(self, parcel: ParcelT | None = None) -> None:
        """Acknowledge a batch, or without an argument all that were handed out. Allowed while another task waits."""
        await run_async(self._consumer.ack(None if parcel is None else parcel.stream_ids), self._client)

    async def aclose(self) -> None:
        """Close the connections. What was not acknowledged will be delivered again."""
        await self._client.aclose()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncTransitions(AwaitingReader[Batch]):
    """Asynchronous iterator of batches. Made by `transitions_async`. For use from one event loop."""

    async def __aenter__(self) -> AsyncTransitions:
        return self


class ReaderOptions(TypedDict, total=False):
    """Options of a reader; `transitions` says what they mean and what they are without being given."""

    redis_url: str
    batch_size: int
    block_s: float
    start: str
    claim_idle_s: float
    dedupe_window: int
    max_wait_s: float | None
    auto_ack: bool
    n_step: bool
    state: bytes | None
    peers: Callable[[], Iterable[bytes]] | None


def transitions(policy: str, group: str, consumer: str, **options: Unpack[ReaderOptions]) -> Transitions:
    """Read a policy's transitions as a member of a consumer group, as batches of numpy arrays.

    The members of a group share its transitions. `consumer` names this one and must stay the same over restarts, for
    then it is given again what it had not acknowledged. The group is made if it is missing.

    redis_url: where the streams are (redis://127.0.0.1:6379/0).
    start: where a new group begins: "0", all that is kept (the default); "$", only what comes; or a stream id.
    batch_size: most rows in a batch (256). block_s: a batch that is not full leaves this long after its first row (1).
    claim_idle_s: what another consumer has left unacknowledged for this long is taken over (60). What this one holds
    is renewed whenever it asks for the next batch, so a training step must be shorter than two thirds of it.
    dedupe_window: sequence numbers remembered of each (producer, epoch), at a bit each (2²⁰).
    max_wait_s: the iterator ends when nothing has come for this long, and raises Unreachable when Redis is away that
    long; None waits for ever (the default).
    auto_ack: acknowledge a batch when the next is asked for, which is after the training step (true); else call
    `ack()` yourself. A `break` leaves the last batch unacknowledged: call its `ack()`.
    n_step: read the policy's n-step transitions instead (false).
    state: what `state()` gave, from the checkpoint that the weights come from. What that checkpoint has been trained
    on is dropped and acknowledged when it is delivered again; what it has not is delivered. With auto_ack=False, and
    `ack()` after each checkpoint, each transition is thus in the weights exactly once.
    peers: called before anything that somebody was given before is handed out; gives the states in the last
    checkpoints of the group's other consumers, and what these hold is dropped too.

    Raises what `Transitions.__next__` does; Refused when Redis does not let this consumer in; ValueError for a state of
    another stream or group.
    """
    url, block_s, join = _prepared(policy, group, consumer, options)
    client = connect(url, timeout_s=block_s + ANSWER_S)
    reader: Transitions
    reader = Transitions(join(lambda batch: reader.ack(batch)), client)
    return reader


def transitions_async(policy: str, group: str, consumer: str, **options: Unpack[ReaderOptions]) -> AsyncTransitions:
    """Read a policy's transitions as `transitions` does, with `async for`. `peers` is called on the event loop."""
    url, block_s, join = _prepared(policy, group, consumer, options)
    return AsyncTransitions(join(_must_be_awaited), connect_async(url, timeout_s=block_s + ANSWER_S))


Acknowledge = Callable[[Batch], None]


def _prepared(
    policy: str, group: str, consumer: str, options: ReaderOptions
) -> tuple[str, float, Callable[[Acknowledge], Consumer[Row, Batch]]]:
    """Where to connect, how long a command may block, and how to make the consumer, given what acknowledges."""
    given: dict[str, Any] = dict(options)
    url = given.pop("redis_url", DEFAULT_REDIS_URL)
    start = given.pop("start", "0")
    stream = "nstep" if given.pop("n_step", False) else "transitions"
    terms = Terms(**given)

    def join(acknowledge: Acknowledge) -> Consumer[Row, Batch]:
        feed = Feed(Row.read, partial(_pack, policy, acknowledge))
        at = Group(policy, group, consumer, start, stream, known=terms.state is not None)
        return Consumer(Stream(stream_key(policy, stream), group), at, feed, terms, time.monotonic)

    return url, terms.block_s, join


def _pack(policy: str, acknowledge: Acknowledge, rows: Sequence[Row], copies: Sequence[bytes]) -> list[Batch]:
    """Make batches: one for each observation and action spec, in order of appearance."""
    by_spec: dict[Spec, list[Row]] = {}
    for row in rows:
        by_spec.setdefault(row.spec, []).append(row)
    also = [copies if number == len(by_spec) else () for number in range(1, len(by_spec) + 1)]
    return [Batch.of(policy, rows, acknowledge, more) for rows, more in zip(by_spec.values(), also, strict=True)]


def _must_be_awaited(batch: Batch) -> None:
    raise RuntimeError("this batch was read asynchronously: `await reader.ack(batch)`")


def tail(
    policy: str,
    redis_url: str = DEFAULT_REDIS_URL,
    follow: bool = False,
    from_: str = "0",
    limit: int | None = None,
    n_step: bool = False,
) -> Iterator[dict[str, Any]]:
    """Read a policy's transitions without a group, as values that JSON can hold; nothing is consumed.

    from_: "0", all that is kept; "$", only what comes after the call; or a stream id. Ends at the end of the stream
    unless `follow`, and after `limit` transitions. Raises Unreachable at once when Redis does not answer.
    """
    client = connect(redis_url, timeout_s=_TAIL_BLOCK_S + ANSWER_S)
    try:
        entries = _entries_after(client, stream_key(policy, "nstep" if n_step else "transitions"), from_, follow)
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
