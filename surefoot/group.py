"""One consumer of one group on a policy's transitions stream: every Redis command that a trainer sends.

Duty: key names, commands, and the detection of loss. It neither retries nor decodes entries: `streams.py` does.
Strategy: what is new is read in one transaction with the state of stream and group from just before, so that a loss is
found exactly when the group steps over it, once, whichever consumer does. Redis counts entries ever added and entries
read by the group; what was removed from the front beyond what was read is lost. (XTRIM does not move
`max-deleted-entry-id`, only XDEL does: that id alone would miss every trim.)
Promise: no entry is acknowledged here unless the caller says so, or it no longer exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from surefoot.errors import Gap, Refused, SurefootError, Unreachable

Entry = tuple[bytes, Mapping[bytes, bytes]]
StreamId = tuple[int, int]

_NEVER: StreamId = (0, 0)
_DELETED_BEFORE = b"max-deleted-entry-id"  # a field beside those of producers in the hash of what the group knows

_AWAY = (
    redis.ConnectionError,  # also LOADING
    redis.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.TryAgainError,
    redis.exceptions.ClusterDownError,
)


class GroupMissing(Exception):
    """The group, or the stream with it, is not there."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one command brought: entries, ids of pending entries that no longer exist, and losses found by the way."""

    entries: Sequence[Entry] = ()
    deleted: Sequence[bytes] = ()
    gaps: Sequence[Gap] = ()
    idle: bool = False  # there is nothing new now


@dataclass(frozen=True, slots=True)
class Survey:
    """Where stream and group stood at one moment."""

    first: StreamId  # of the entries that are there; (0, 0) if there are none
    last_generated: bytes
    max_deleted: StreamId
    removed: int  # entries ever added that are there no more
    added: int
    last_delivered: bytes
    entries_read: int | None  # None where Redis cannot tell

    @classmethod
    def of(cls, stream: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], group: str) -> Survey:
        found = next((each for each in groups if each["name"] == group.encode()), None)
        if found is None:
            raise GroupMissing(group)
        return cls(
            first=parse_id(stream["recorded-first-entry-id"]),
            last_generated=stream["last-generated-id"],
            max_deleted=parse_id(stream["max-deleted-entry-id"]),
            removed=stream["entries-added"] - stream["length"],
            added=stream["entries-added"],
            last_delivered=found["last-delivered-id"],
            entries_read=found["entries-read"],
        )

    def cut_off(self) -> int:
        """How many entries were removed from the front before the group had read them."""
        position = parse_id(self.last_delivered)
        if self.entries_read is None or _NEVER < self.first <= position:
            return 0
        return max(0, self.removed - self.entries_read)

    def stepped_over(self, entries: Sequence[Entry], count: int) -> bool:
        """Whether a read of up to `count` entries that brought `entries` went past a deleted one.

        Not for a group that has read nothing yet: what was deleted since it was made is counted by `cut_off` then.
        """
        end = parse_id(entries[-1][0] if len(entries) == count else self.last_generated)
        return _NEVER < parse_id(self.last_delivered) < self.max_deleted <= end


class Group:
    """A consumer's view of its group."""

    def __init__(self, client: redis.Redis, policy: str, group: str, consumer: str, start: str) -> None:
        self._redis = client
        self._group, self._consumer, self._start = group, consumer, start
        self._key = stream_key(policy)
        self._lost_key = f"sf:{{{policy}}}:lost"
        self._told_key = f"sf:{{{policy}}}:lost:told:{group}"
        self._opened = False
        self._position: bytes = b"0-0"
        self._reported = 0  # `removed` at the last report: what was found once is not reported again
        self._told: dict[
            bytes, int
        ] = {}  # by producer and epoch, what this group has been told of the service's losses
        self._deleted_before: StreamId = _NEVER  # `max-deleted-entry-id` when the group was made
        self._owed: list[Gap] = []  # found, but not yet handed to the caller: the connection may break in between

    def open(self) -> Delivery:
        """Find the group, or make it. A group that was there before and is not any more is a gap."""
        try:
            survey = self._survey()
        except GroupMissing:
            if self._opened and all(gap.reason != "group_missing" for gap in self._owed):
                self._owed.append(Gap("the consumer group or its stream has vanished", reason="group_missing"))
            self._create()
        else:
            # Also here and not only when reading: the reply of the read that stepped over a gap may have been lost.
            self._note_trimmed(survey)
        told: Mapping[Any, Any] = self._redis.hgetall(self._told_key)
        self._deleted_before = parse_id(told.get(_DELETED_BEFORE, b"0-0"))
        self._told = _counts(told)
        self._opened = True
        return Delivery(gaps=self._settle_owed())

    def own(self, after: bytes, count: int) -> Delivery:
        """Deliver again what this consumer was given and has not acknowledged, behind the id `after`."""
        reply = self._ask(self._redis.xreadgroup, self._group, self._consumer, {self._key: after}, count=count)
        found = _entries(reply)
        deleted = [stream_id for stream_id, fields in found if not fields]
        if deleted:
            self.ack(deleted)
        return Delivery(found, deleted)

    def claim(self, cursor: bytes, idle_ms: int, count: int) -> tuple[bytes, Delivery]:
        """Take over what other consumers have left lying for `idle_ms`. Returns where to go on, b"0-0" at the end."""
        reply = self._ask(self._redis.xautoclaim, self._key, self._group, self._consumer, idle_ms, cursor, count=count)
        return reply[0], Delivery([entry for entry in reply[1] if entry[1]], reply[2])

    def new(self, count: int) -> Delivery:
        """Deliver what no consumer of the group has been given, and tell what the group stepped over to get there."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.xinfo_stream(self._key)
        pipe.xinfo_groups(self._key)
        pipe.hgetall(self._lost_key)
        pipe.xreadgroup(self._group, self._consumer, {cast(Any, self._key): ">"}, count=count)
        stream, groups, lost, reply = self._ask(pipe.execute)
        survey, entries = Survey.of(stream, groups, self._group), _entries(reply)
        self._note_trimmed(survey)
        if survey.max_deleted > self._deleted_before and survey.stepped_over(entries, count):
            self._owed.append(Gap("an entry was deleted before it was read", reason="deleted"))
        self._note_spool_losses(lost)
        if self._owed and not entries:
            # Nothing was read, so nothing moved the group past the gap: do it, or it would be found for ever.
            self._redis.xgroup_setid(self._key, self._group, survey.last_generated, entries_read=survey.added)
        self._position = entries[-1][0] if entries else survey.last_delivered
        gaps = self._settle_owed()
        return Delivery(entries, gaps=gaps, idle=not entries and not gaps)

    def wait(self, block_ms: int) -> None:
        """Wait until there is something behind the group's position, at most `block_ms`. Takes nothing."""
        self._redis.xread({self._key: self._position}, count=1, block=max(1, block_ms))

    def ack(self, stream_ids: Sequence[bytes]) -> None:
        self._redis.xack(self._key, self._group, *stream_ids)

    def close(self) -> None:
        self._redis.close()

    def _create(self) -> None:
        # Recreated after a loss it starts from what is there, wherever it was to start at first.
        start = "0" if self._opened else self._start
        read, known = None, dict(self._redis.hgetall(self._lost_key))
        try:
            stream = self._redis.xinfo_stream(self._key)
        except redis.ResponseError as error:
            _reraise_unless(error, "no such key")
        else:
            # What was removed before the group existed is not its loss.
            read = stream["entries-added"] - stream["length"] if start == "0" else None
            known[_DELETED_BEFORE] = stream["max-deleted-entry-id"]
        if known:
            self._redis.hset(self._told_key, mapping=cast(Any, known))
        try:
            self._redis.xgroup_create(self._key, self._group, start, mkstream=True, entries_read=read)
        except redis.ResponseError as error:
            _reraise_unless(error, "BUSYGROUP")  # another consumer was quicker

    def _survey(self) -> Survey:
        pipe = self._redis.pipeline(transaction=True)
        pipe.xinfo_stream(self._key)
        pipe.xinfo_groups(self._key)
        stream, groups = self._ask(pipe.execute)
        return Survey.of(stream, groups, self._group)

    def _note_trimmed(self, survey: Survey) -> None:
        lost = min(survey.cut_off(), survey.removed - self._reported)
        if lost > 0:
            self._reported = survey.removed
            detail = f"the stream was trimmed past the group: {lost} entries lost"
            self._owed.append(Gap(detail, reason="trimmed", lost=lost))

    def _note_spool_losses(self, lost: Mapping[bytes, bytes]) -> None:
        """What the service counted as lost before it reached Redis and this group has not been told yet."""
        news = {name: n for name, n in _counts(lost).items() if n > self._told.get(name, 0)}
        if not news:
            return
        total = sum(n - self._told.get(name, 0) for name, n in news.items())
        self._redis.hset(self._told_key, mapping=cast(Any, news))
        self._told.update(news)
        detail = f"the service lost {total} events before they reached Redis"
        self._owed.append(Gap(detail, reason="spool", lost=total))

    def _settle_owed(self) -> list[Gap]:
        owed, self._owed = self._owed, []
        return owed

    def _ask(self, command: Any, *arguments: Any, **options: Any) -> Any:
        """Send a command that needs the group. Raises GroupMissing."""
        try:
            return command(*arguments, **options)
        except redis.ResponseError as error:
            # A pipeline puts the failed command in front of Redis's words.
            if "NOGROUP" in str(error) or "no such key" in str(error):
                raise GroupMissing(str(error)) from error
            raise


def connect(redis_url: str, timeout_s: float) -> redis.Redis:
    """Make a client that fails at once: whoever uses it knows better what may be repeated, and how often."""
    return redis.Redis.from_url(
        redis_url,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
    )


def is_away(error: redis.RedisError) -> bool:
    """Whether waiting may help: Redis restarts, loads its files, or a failover is under way."""
    if isinstance(error, redis.AuthenticationError | redis.exceptions.AuthorizationError):
        return False
    return isinstance(error, _AWAY)


def translated(error: redis.RedisError) -> SurefootError:
    """Give an error of redis-py as one of this package's."""
    if is_away(error):
        return Unreachable(f"Redis does not answer: {error}", maybe_received=True)
    return Refused(f"Redis refuses: {error}")


def stream_key(policy: str) -> str:
    """The stream of a policy's transitions. The braces are Redis Cluster's hash tag."""
    return f"sf:{{{policy}}}:transitions"


def parse_id(raw: bytes) -> StreamId:
    milliseconds, _, number = raw.partition(b"-")
    return int(milliseconds), int(number or 0)


def _counts(mapping: Mapping[Any, Any]) -> dict[bytes, int]:
    return {name: int(count) for name, count in mapping.items() if name != _DELETED_BEFORE}


def _entries(reply: Any) -> list[Entry]:
    return list(reply[0][1]) if reply else []


def _reraise_unless(error: redis.ResponseError, expected: str) -> None:
    if expected not in str(error):
        raise error
