"""Where a stream and a consumer group stood at one moment, and what that says about loss. Pure.

Strategy: Redis counts entries ever added and entries read by the group; what was removed from the front beyond what was
read is lost. (XTRIM does not move `max-deleted-entry-id`, only XDEL does: that id alone would miss every trim.)
Promise: a loss is never claimed unless it is certain; its size is given only where it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Entry = tuple[bytes, Mapping[bytes, bytes]]
StreamId = tuple[int, int]

NEVER: StreamId = (0, 0)


class GroupMissing(Exception):
    """The group, or the stream with it, is not there."""


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
        if self.entries_read is None or NEVER < self.first <= position:
            return 0
        return max(0, self.removed - self.entries_read)

    def gone(self, stream_id: bytes) -> bool:
        """Whether an entry that the group has not read was removed from the front."""
        unread = parse_id(stream_id)
        return parse_id(self.last_delivered) < unread and not NEVER < self.first <= unread

    def stepped_over(self, entries: Sequence[Entry], count: int) -> bool:
        """Whether a read of up to `count` entries that brought `entries` went past a deleted one.

        Not for a group that has read nothing yet: what was deleted since it was made is counted by `cut_off` then.
        """
        end = parse_id(entries[-1][0] if len(entries) == count else self.last_generated)
        return NEVER < parse_id(self.last_delivered) < self.max_deleted <= end

    def skipped(self, entries: Sequence[Entry], count: int) -> int | None:
        """How many deleted entries such a read went past. None where that cannot be told.

        It can where it reached the end: of all that were added since what the group had read, `entries` are left.
        """
        if self.entries_read is None or len(entries) == count:
            return None
        return self.added - self.entries_read - len(entries)

    def ahead(self) -> bytes:
        """The least id of what the group will read next."""
        first = b"%d-%d" % self.first
        return max(first, following(self.last_delivered), key=parse_id)


def parse_id(raw: bytes) -> StreamId:
    milliseconds, _, number = raw.partition(b"-")
    return int(milliseconds), int(number or 0)


def following(stream_id: bytes) -> bytes:
    """The least id behind this one."""
    milliseconds, number = parse_id(stream_id)
    return b"%d-%d" % (milliseconds, number + 1)
