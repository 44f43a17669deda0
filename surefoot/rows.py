"""A stretch of a policy's stream as rows, in chunks of bounded size: what exports and statistics are made of.

Duty: which entries are read, and in which order; nothing of what becomes of them. The commands of a group are in
`group.py`, the meaning of an entry in `entries.py`.
Strategy: without a group, XRANGE between two ids, in one transaction with the stream's own counts, so that what is
trimmed before it was read is noticed. With a group, the iterator that trainers use, and the rows behind its batches.
Promise: memory holds one chunk, whatever the stream's length; nothing is acknowledged here unless `Chunk.ack` is
called; copies that the service sent twice are dropped, and counted.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import redis

from surefoot.backoff import Backoff
from surefoot.consumer import Consumer, Feed, Terms
from surefoot.dedupe import Seen
from surefoot.entries import Row
from surefoot.errors import Gap
from surefoot.exchange import Command, Transaction, connect, is_away, translated
from surefoot.group import Group, stream_key
from surefoot.progress import Stream
from surefoot.streams import ANSWER_S, BlockingReader
from surefoot.survey import Entry, StreamId, parse_id

_PAGE = 500  # entries of one command: 28 MB of the largest common observation, four frames of 84 by 84 bytes, twice
_CHUNK_BYTES = 64 << 20
_WINDOW = 1 << 20  # sequence numbers remembered of each lane, as `transitions` does
_BLOCK_S = 0.05  # a group's batch that is not full waits so long: the end of the stream is near

_WITH_REWARD = ("joined", "defaulted")
_ID = re.compile(r"\d+(-\d+)?")


class ExportError(ValueError):
    """What was asked for cannot be done: the message says what can."""


def has_reward(row: Row) -> bool:
    """Whether the row's reward may be learnt from. A join state that is not known here brings none."""
    return row.join in _WITH_REWARD and not math.isnan(row.reward)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows in the order of the stream."""

    rows: Sequence[Row]
    stream_ids: tuple[bytes, ...] = ()  # what is acknowledged with them: theirs, and those of copies


@dataclass(slots=True)
class Losses:
    """What a reader has noticed by the way."""

    copies: int = 0  # entries of the same event under another id, dropped
    gaps: list[str] = field(default_factory=list)  # transitions that are gone and were never read here


class Reader(Protocol):
    """Where chunks come from."""

    losses: Losses

    def chunks(self) -> Generator[Chunk, None, None]: ...

    def ack(self, chunk: Chunk) -> None:
        """What became of a chunk is safe."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Which part of a stream: inclusive ids, or times at which entries were added. None: from, or to, its end."""

    first: str | None = None
    last: str | None = None

    @property
    def start(self) -> str:
        return "-" if self.first is None else bound(self.first, last=False)

    def end(self, last_generated: bytes) -> str:
        """The end of the stretch; a stream that grows is read up to where it stood when reading began."""
        return last_generated.decode() if self.last is None else bound(self.last, last=True)


def bound(text: str, *, last: bool) -> str:
    """Give a stream id. Takes one, milliseconds since 1970, or an ISO 8601 time (UTC where it names no zone)."""
    if _ID.fullmatch(text):
        return text
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ExportError(f"{text!r} is neither a stream id nor a time such as 2026-11-21T10:00:00Z") from None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    milliseconds = math.floor(at.timestamp() * 1000)
    return str(milliseconds) if last else f"{milliseconds}-0"  # a bare number as an end takes in its whole millisecond


class RangeReader:
    """Reads a stretch without a group: nothing is consumed."""

    def __init__(self, policy: str, redis_url: str, stretch: Stretch, batch_size: int, retry_for_s: float) -> None:
        self.losses = Losses()
        self._key, self._policy = stream_key(policy), policy
        self._stretch, self._batch_size, self._retry_for_s = stretch, batch_size, retry_for_s
        self._redis = connect(redis_url, ANSWER_S)
        self._seen = Seen(_WINDOW)

    def chunks(self) -> Generator[Chunk, None, None]:
        """Read the stretch. Raises ExportError for a stream that is not there, Unreachable, Refused, Unreadable."""
        rows: list[Row] = []
        size = 0
        try:
            for stream_id, fields in self._entries():
                row = Row.read(stream_id, fields)
                if not self._seen.add(*row.identity):
                    self.losses.copies += 1
                    continue
                rows.append(row)
                size += sum(map(len, fields.values()))
                if len(rows) >= self._batch_size or size >= _CHUNK_BYTES:
                    yield Chunk(rows)
                    rows, size = [], 0
            if rows:
                yield Chunk(rows)
        finally:
            self._redis.close()

    def ack(self, chunk: Chunk) -> None:
        """Nobody is told: nothing was consumed."""

    def _entries(self) -> Iterator[Entry]:
        if not self._persist(Command("exists", self._key)):
            raise ExportError(f"there are no transitions of policy {self._policy!r} in this Redis")
        after: bytes | None = None
        end = ""
        removed = 0
        while True:
            start = self._stretch.start if after is None else f"({after.decode()}"
            # The first page has no end yet: it is told by the same transaction.
            page = Command("xrange", self._key, start, end or "+", count=_PAGE)
            stream, entries = self._persist(Transaction((Command("xinfo_stream", self._key), page)))
            if after is not None:
                self._notice_trimming(stream, after, removed)
            end, removed = end or self._stretch.end(stream["last-generated-id"]), _removed(stream)
            within = [entry for entry in entries if _at_most(entry[0], end)]
            yield from within
            if len(within) < _PAGE:
                return
            after = within[-1][0]

    def _notice_trimming(self, stream: Any, after: bytes, removed: int) -> None:
        first = parse_id(stream["recorded-first-entry-id"])
        if _removed(stream) > removed and not (0, 0) < first <= parse_id(after):
            self.losses.gaps.append(
                f"the stream was trimmed while it was read: entries behind {after.decode()} may be missing"
            )

    def _persist(self, request: Command | Transaction) -> Any:
        """Ask until Redis answers, for `retry_for_s` at most. Nothing that is asked here changes anything."""
        backoff = Backoff(time.monotonic() + self._retry_for_s)
        while True:
            try:
                return request.on(self._redis)
            except redis.RedisError as error:
                delay_s = backoff.delay_s(time.monotonic()) if is_away(error) else None
                if delay_s is None:
                    raise translated(error) from error
                time.sleep(delay_s)


class GroupReader:
    """Reads as one consumer of a group what the group has not acknowledged, until nothing is left."""

    def __init__(
        self,
        policy: str,
        redis_url: str,
        group: str,
        consumer: str,
        *,
        start: str | None,
        batch_size: int,
        wait_s: float,
        claim_idle_s: float,
    ) -> None:
        self.losses = Losses()
        begin = "0" if start is None else _before(bound(start, last=False))
        terms = Terms(
            batch_size=batch_size,
            block_s=max(wait_s, _BLOCK_S),
            claim_idle_s=claim_idle_s,
            dedupe_window=_WINDOW,
            max_wait_s=wait_s,
            auto_ack=False,
        )
        at = Group(policy, group, consumer, begin)
        made = Consumer(Stream(stream_key(policy), group), at, Feed(Row.read, _pack), terms, time.monotonic)
        self._reader: BlockingReader[Chunk] = BlockingReader(made, connect(redis_url, terms.block_s + ANSWER_S))

    def chunks(self) -> Generator[Chunk, None, None]:
        """Read what the group has left. Raises Unreachable, Refused, Unreadable; a Gap is noted, not raised."""
        try:
            while True:
                try:
                    chunk = next(self._reader, None)
                except Gap as gap:
                    self.losses.gaps.append(gap.detail)
                    continue
                if chunk is None:
                    return
                yield chunk
        finally:
            self.losses.copies = self._reader.statistics()["copies"]
            self._reader.close()

    def ack(self, chunk: Chunk) -> None:
        """Tell the group."""
        self._reader.ack(chunk)


def _pack(rows: Sequence[Row], copies: Sequence[bytes]) -> list[Chunk]:
    return [Chunk(rows, (*(row.stream_id for row in rows), *copies))]


def _removed(stream: Any) -> int:
    return int(stream["entries-added"]) - int(stream["length"])


def _at_most(stream_id: bytes, end: str) -> bool:
    milliseconds, dash, number = end.partition("-")
    limit: StreamId = (int(milliseconds), int(number) if dash else 2**64 - 1)
    return parse_id(stream_id) <= limit


def _before(stream_id: str) -> str:
    """The largest id below one: a group is made behind an id, and the first entry is to be included."""
    milliseconds, number = parse_id(stream_id.encode())
    if number:
        return f"{milliseconds}-{number - 1}"
    return f"{milliseconds - 1}-{2**64 - 1}" if milliseconds else "0"
