"""One consumer of one group on a policy's stream: every Redis command that a trainer sends, and what each reply means.

Duty: key names, commands, and the detection of loss. It neither retries nor decodes entries (`consumer.py` does), and
sends nothing itself: each method is an exchange.
Strategy: what is new is read in one transaction with the state of stream and group from just before, so that a loss is
found exactly when the group steps over it, once, whichever consumer does.
Promise: no entry is acknowledged here unless the caller says so, or it no longer exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from surefoot.errors import Gap, GapReason
from surefoot.exchange import Command, Exchange, Request, Transaction
from surefoot.exchange import connect as connect
from surefoot.exchange import is_away as is_away
from surefoot.exchange import translated as translated
from surefoot.survey import NEVER, Entry, GroupMissing, Survey, following
from surefoot.survey import StreamId as StreamId
from surefoot.survey import parse_id as parse_id

_DELETED_BEFORE = b"max-deleted-entry-id"  # a field beside those of producers in the hash of what the group knows
_RENEWED_AT_ONCE = 1000  # ids in one command
_TRANSITIONS = "transitions"


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one command brought: entries, ids of pending entries that no longer exist, and losses found by the way."""

    entries: Sequence[Entry] = ()
    deleted: Sequence[bytes] = ()
    gaps: Sequence[Gap] = ()
    idle: bool = False  # there is nothing new now
    again: bool = False  # somebody was given these entries before


class Group:
    """A consumer's view of its group. `known`: the group is there, unless it has been lost."""

    def __init__(
        self,
        policy: str,
        group: str,
        consumer: str,
        start: str,
        stream: str = _TRANSITIONS,
        known: bool = False,
    ) -> None:
        self._group, self._consumer, self._start = group, consumer, start
        self._key = stream_key(policy, stream)
        self._lost_key = f"sf:{{{policy}}}:lost"
        self._told_key = told_key(policy, group, stream)
        self._opened = known
        self._position: bytes = b"0-0"
        self._reported = 0  # `removed` at the last report: what was found once is not reported again
        self._trimmed: dict[bytes, int] = {}  # reported by position: the last one's alone are kept
        self._told: dict[bytes, int] = {}  # by lane, what this group has been told of the service's losses
        self._deleted_before: StreamId = NEVER  # `max-deleted-entry-id` when the group was made
        self._next: bytes | None = None  # what is to be read next, kept while Redis cannot count for the group
        self._owed: list[Gap] = []  # found, but not yet handed to the caller: the connection may break in between

    def open(self) -> Exchange[Delivery]:
        """Find the group, or make it. A group that was there before and is not any more is a gap."""
        try:
            survey = yield from self._survey()
        except GroupMissing:
            yield from self._create()
        else:
            # Also here and not only when reading: the reply of the read that stepped over a gap may have been lost.
            self._note_trimmed(survey)
        told = yield Command("hgetall", self._told_key)
        self._deleted_before = parse_id(told.get(_DELETED_BEFORE, b"0-0"))
        self._told = _counts(told)
        self._opened = True
        return Delivery(gaps=self._settle_owed())

    def own(self, after: bytes, count: int) -> Exchange[Delivery]:
        """Deliver again what this consumer was given and has not acknowledged, behind the id `after`."""
        command = Command("xreadgroup", self._group, self._consumer, {self._key: after}, count=count)
        found = _entries((yield from self._ask(command)))
        deleted = [stream_id for stream_id, fields in found if not fields]
        if deleted:
            yield from self.ack(deleted)
        return Delivery(found, deleted, again=True)

    def claim(self, cursor: bytes, idle_ms: int, count: int) -> Exchange[tuple[bytes, Delivery]]:
        """Take over what other consumers have left lying for `idle_ms`. Returns where to go on, b"0-0" at the end."""
        command = Command("xautoclaim", self._key, self._group, self._consumer, idle_ms, cursor, count=count)
        reply = yield from self._ask(command)
        return reply[0], Delivery([entry for entry in reply[1] if entry[1]], reply[2], again=True)

    def renew(self, idle_ms: int) -> Exchange[None]:
        """Keep what this consumer holds from being taken over: what has lain for `idle_ms` counts as given out now.

        Only what is its own: between the two commands another may have taken an entry, but then not `idle_ms` ago.
        """
        after = "-"
        while True:
            count, options = _RENEWED_AT_ONCE, {"consumername": self._consumer, "idle": idle_ms}
            held = yield from self._ask(Command("xpending_range", self._key, self._group, after, "+", count, **options))
            ids = [each["message_id"] for each in held]
            if ids:
                yield Command("xclaim", self._key, self._group, self._consumer, idle_ms, ids, justid=True)
            if len(ids) < count:
                return
            after = f"({ids[-1].decode()}"

    def new(self, count: int) -> Exchange[Delivery]:
        """Deliver what no consumer of the group has been given, and tell what the group stepped over to get there."""
        read = Command("xreadgroup", self._group, self._consumer, {self._key: ">"}, count=count)
        reply = yield from self._ask(Transaction((*self._look(), Command("hgetall", self._lost_key), read)))
        stream, groups, lost, found = reply
        survey, entries = Survey.of(stream, groups, self._group), _entries(found)
        self._note_trimmed(survey)
        if survey.max_deleted > self._deleted_before and survey.stepped_over(entries, count):
            self._note_deleted(survey, entries, count)
        yield from self._note_spool_losses(lost, entries[0][0] if entries else survey.ahead())
        if self._owed and not entries:
            # Nothing was read, so nothing moved the group past the gap: do it, or it would be found for ever.
            yield Command("xgroup_setid", self._key, self._group, survey.last_generated, entries_read=survey.added)
        self._position = entries[-1][0] if entries else survey.last_delivered
        self._next = (yield from self._behind(self._position)) if survey.entries_read is None else None
        gaps = self._settle_owed()
        return Delivery(entries, gaps=gaps, idle=not entries and not gaps)

    def wait(self, block_ms: int) -> Exchange[None]:
        """Wait until there is something behind the group's position, at most `block_ms`. Takes nothing."""
        yield Command("xread", {self._key: self._position}, count=1, block=max(1, block_ms))

    def ack(self, stream_ids: Sequence[bytes]) -> Exchange[None]:
        yield Command("xack", self._key, self._group, *stream_ids)

    def _create(self) -> Exchange[None]:
        lost_it = self._opened and all(gap.reason != "group_missing" for gap in self._owed)
        # Recreated after a loss it starts from what is there, wherever it was to start at first.
        wanted: Any = b"0" if self._opened else self._start.encode()
        start, read, known, there = wanted, None, dict((yield Command("hgetall", self._lost_key))), "nothing"
        resume = b"0-1"
        try:
            stream = yield Command("xinfo_stream", self._key)
        except redis.ResponseError as error:
            _reraise_unless(error, "no such key")
        else:
            start, read = _beginning(wanted, stream)
            self._next = (yield from self._behind(start)) if read is None else None
            known[_DELETED_BEFORE] = stream["max-deleted-entry-id"]
            resume = stream["recorded-first-entry-id"] if stream["length"] else following(stream["last-generated-id"])
            there = f"{stream['length']} entries"
        if lost_it:
            detail = f"the consumer group or its stream has vanished; a new group begins with {there}"
            self._owe(detail, "group_missing", resume)
        if known:
            yield Command("hset", self._told_key, mapping=known)
        create = Command("xgroup_create", self._key, self._group, start, mkstream=True, entries_read=read)
        if _DELETED_BEFORE not in known:
            yield from self._unless_quicker(create)
            return
        found = yield from self._unless_quicker(Transaction((Command("xinfo_stream", self._key), create)))
        if found is not None and (found[0], _beginning(wanted, found[0])) != (stream, (start, read)):
            yield from self._begin_again(wanted, found[0])

    def _unless_quicker(self, create: Request) -> Exchange[Any]:
        """Make the group; None when another consumer was quicker."""
        try:
            return (yield create)
        except redis.ResponseError as error:
            _reraise_unless(error, "BUSYGROUP")
            return None

    def _begin_again(self, wanted: bytes, stream: Mapping[str, Any]) -> Exchange[None]:
        """The stream went on, or was trimmed, between the look at it and the group: what went then is not its loss."""
        start, read = _beginning(wanted, stream)
        yield Command("xgroup_setid", self._key, self._group, start, entries_read=read)
        yield Command("hset", self._told_key, mapping={_DELETED_BEFORE: stream["max-deleted-entry-id"]})

    def _behind(self, position: bytes) -> Exchange[bytes | None]:
        """The first entry behind a position."""
        found = yield Command("xrange", self._key, f"({position.decode()}", "+", count=1)
        return found[0][0] if found else None

    def _survey(self) -> Exchange[Survey]:
        stream, groups = yield from self._ask(Transaction(self._look()))
        return Survey.of(stream, groups, self._group)

    def _look(self) -> tuple[Command, Command]:
        return Command("xinfo_stream", self._key), Command("xinfo_groups", self._key)

    def _note_trimmed(self, survey: Survey) -> None:
        if survey.entries_read is None and self._next is not None and survey.gone(self._next):
            resume = survey.ahead()
            detail = f"the stream was trimmed past the group: at least 1 entry lost; it goes on at {resume.decode()}"
            self._owe(detail, "trimmed", resume)
            self._next = None
        lost = min(survey.cut_off(), survey.removed - self._reported)
        if lost > 0:
            self._reported = survey.removed
            self._trimmed = {survey.last_delivered: lost}
            resume = survey.ahead()
            detail = f"the stream was trimmed past the group: {lost} entries lost; it goes on at {resume.decode()}"
            self._owe(detail, "trimmed", resume, lost)

    def _note_deleted(self, survey: Survey, entries: Sequence[Entry], count: int) -> None:
        lost = survey.skipped(entries, count)
        if lost is not None and (counted := self._trimmed.get(survey.last_delivered)):
            lost -= counted
            if lost <= 0:
                return  # told with what was trimmed
        behind = (stream_id for stream_id, _ in entries if parse_id(stream_id) > survey.max_deleted)
        resume = next(behind, following(survey.last_generated))
        many = "at least 1" if lost is None else lost
        detail = f"entries were deleted before they were read: {many} lost; reading goes on at {resume.decode()}"
        self._owe(detail, "deleted", resume, lost)

    def _note_spool_losses(self, lost: Mapping[bytes, bytes], resume: bytes) -> Exchange[None]:
        """What the service counted as lost before it reached Redis and this group has not been told yet."""
        news = {lane: n for lane, n in _counts(lost).items() if n > self._told.get(lane, 0)}
        if not news:
            return
        new = {lane: n - self._told.get(lane, 0) for lane, n in news.items()}
        yield Command("hset", self._told_key, mapping=news)
        self._told.update(news)
        lanes = ", ".join(f"{lane.decode()}: {n}" for lane, n in sorted(new.items()))
        total = sum(new.values())
        self._owe(f"the service lost {total} events before they reached Redis ({lanes})", "spool", resume, total)

    def _owe(self, detail: str, reason: GapReason, resume: bytes, lost: int | None = None) -> None:
        self._owed.append(Gap(detail, reason=reason, lost=lost, resume=resume.decode()))

    def _settle_owed(self) -> list[Gap]:
        owed, self._owed = self._owed, []
        return owed

    def _ask(self, request: Request) -> Exchange[Any]:
        """Make a request that needs the group. Raises GroupMissing."""
        try:
            return (yield request)
        except redis.ResponseError as error:
            # A pipeline puts the failed command in front of Redis's words.
            if "NOGROUP" in str(error) or "no such key" in str(error):
                raise GroupMissing(str(error)) from error
            raise


def stream_key(policy: str, stream: str = _TRANSITIONS) -> str:
    """A stream of a policy. The braces are Redis Cluster's hash tag."""
    return f"sf:{{{policy}}}:{stream}"


def told_key(policy: str, group: str, stream: str = _TRANSITIONS) -> str:
    """Where it stands what a group knows: losses it has been told of, and deletions from before its time."""
    return f"sf:{{{policy}}}:lost:told:{group}" if stream == _TRANSITIONS else f"sf:{{{policy}}}:{stream}:told:{group}"


def _beginning(start: bytes, stream: Mapping[str, Any]) -> tuple[bytes, int | None]:
    """Where a new group begins, and how many entries count as read: what went before it is not its loss."""
    if start == b"0":
        return start, stream["entries-added"] - stream["length"]
    if start in (b"$", stream["last-generated-id"]):
        return stream["last-generated-id"], stream["entries-added"]
    return start, None  # Redis counts for the group once it has reached the end


def _counts(mapping: Mapping[Any, Any]) -> dict[bytes, int]:
    return {lane: int(count) for lane, count in mapping.items() if lane != _DELETED_BEFORE}


def _entries(reply: Any) -> list[Entry]:
    return list(reply[0][1]) if reply else []


def _reraise_unless(error: redis.ResponseError, expected: str) -> None:
    if expected not in str(error):
        raise error
