"""EDGE: streams are kept as long as somebody needs them, and no longer. The commands stand in `trim.lua`.

Duty: for every served policy and stream, every few seconds: one call of the script, and what it tells as metrics. It
knows nothing of what is in an entry, and never removes a group: only an operator does (`cli_streams.py`).
Strategy: all is decided inside the script, by Redis's clock, so that any number of replicas may run it at once: each
frees what the others have left. What is younger than `SETTLE_MS` stays though every group has it, for `burning.py`
reads the stream without one; so do the newest `keep` entries, which dry runs of rules read (`recent.py`).
Promise: nothing at or past what any group has yet to acknowledge goes. Without groups, the service's own apart, age and
size decide, and what goes so is counted as `no_group`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import structlog
from prometheus_client import Gauge

from policies.errors import StoreAway
from service.metrics import Metrics
from service.redis_streams import RedisStreams, base
from service.settings import Settings

TRANSITIONS: Final = "transitions"
STREAMS: Final = (TRANSITIONS, "late", "orphan", "correction", "quarantined", "nstep")
PAUSE_S: Final = 5.0
SETTLE_MS: Final = 10_000  # twenty turns of `burning.py`
# What XTRIM takes by default. It frees 10,000 small transitions in about a millisecond, while nobody else is answered.
LIMIT: Final = 10_000
ROUNDS: Final = 100  # for each stream and turn: 200,000 entries a second, 20 times what one core joins
GROUPS_SHOWN: Final = 16  # of a stream, with labels of their own
OTHERS: Final = "other"
OURS: Final = "surefoot."  # names of groups by which the service itself holds a stream; `trim.lua` knows them, too
# The flag lets the script write at the memory cap; without such a first line Redis decides command by command.
TRIM: Final = b"#!lua flags=allow-oom\n" + (Path(__file__).parent / "trim.lua").read_bytes()

Reason = Literal["acknowledged", "no_group"]
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Rules:
    """What is kept. Ages in milliseconds."""

    max_age_ms: int = 7 * 86_400_000
    max_bytes: int = 1 << 30
    keep: int = 1_000
    group_ttl_ms: int = 7 * 86_400_000
    settle_ms: int = SETTLE_MS
    limit: int = LIMIT

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        return cls(
            max_age_ms=int(settings.stream_max_age_s * 1000),
            max_bytes=settings.stream_max_bytes,
            keep=settings.stream_keep,
            group_ttl_ms=int(settings.group_ttl_s * 1000),
        )


@dataclass(frozen=True, slots=True)
class GroupView:
    """A consumer group, as Redis tells."""

    name: str
    consumers: int
    pending: int  # delivered, not acknowledged
    lag: int | None  # not delivered; None where Redis cannot tell
    last_delivered: str
    first_needed: str  # it keeps the stream from here on
    idle_ms: int  # since a consumer has asked, in vain or not; without consumers: since that was first seen


@dataclass(frozen=True, slots=True)
class StreamView:
    """A stream at one moment, after what was trimmed."""

    name: str
    entries: int
    bytes: int | None  # None where Redis does not tell
    first: str | None  # id of the oldest entry
    last: str  # id that was given last
    now_ms: int  # by Redis's clock
    groups: tuple[GroupView, ...]
    trimmed: int
    more: bool  # more may go than one call frees

    @property
    def reason(self) -> Reason:
        return "acknowledged" if any(not group.name.startswith(OURS) for group in self.groups) else "no_group"

    @property
    def oldest_s(self) -> float:
        return 0.0 if self.first is None else max(0.0, (self.now_ms - milliseconds(self.first)) / 1000)

    def needed_by(self, group: GroupView) -> int:
        """About how many entries stay for a group, as if they had come evenly: Redis counts none in between."""
        if self.first is None:
            return 0
        first, last, needed = (milliseconds(each) for each in (self.first, self.last, group.first_needed))
        if needed <= first:
            return self.entries
        share = max(0.0, (last - needed) / (last - first)) if last > first else 0.0
        return min(self.entries, max(round(share * self.entries), group.pending + (group.lag or 0)))


class Trimming:
    """The trimmer of a worker. Use from the event loop's thread only."""

    def __init__(self, streams: RedisStreams, metrics: Metrics, rules: Rules) -> None:
        self._streams = streams
        self._metrics = metrics
        self._rules = rules
        self._shown: dict[str, _Shown] = {}  # by policy
        self._abandoned: set[tuple[str, str, str]] = set()

    async def run(self, policies: Collection[str]) -> None:
        """Trim for ever. policies: those served, as they are at the moment."""
        while True:
            await self.run_once(tuple(policies))
            await asyncio.sleep(PAUSE_S)

    async def run_once(self, policies: Collection[str]) -> None:
        """Trim every stream of these policies once. Never raises for what may pass."""
        for gone in self._shown.keys() - set(policies):
            self._shown.pop(gone).clear()
        try:
            for policy in policies:
                self._show(policy, [view async for view in self._trimmed(policy)])
            await self._memory()
        except StoreAway as error:
            log.debug("trimming_waits", reason=error.detail)

    async def _trimmed(self, policy: str) -> Any:
        for name in STREAMS:
            for _ in range(ROUNDS):
                view = await trim(self._streams, policy, name, self._rules)
                if view is None:
                    break
                if view.trimmed:
                    self._metrics.stream_trimmed.labels(policy, name, view.reason).inc(view.trimmed)
                if not view.more:
                    yield view
                    break

    def _show(self, policy: str, views: list[StreamView]) -> None:
        shown = _Shown(self._metrics, policy)
        for view in views:
            shown.stream(view)
            shown.groups(view, self._rules.group_ttl_ms)
            for group in view.groups:
                self._tell(policy, view.name, group)
        if before := self._shown.get(policy):
            before.clear(besides=shown)
        self._shown[policy] = shown

    def _tell(self, policy: str, stream: str, group: GroupView) -> None:
        """Log a group that nobody reads any more, once."""
        place = policy, stream, group.name
        if group.idle_ms < self._rules.group_ttl_ms:
            self._abandoned.discard(place)
        elif place not in self._abandoned:
            self._abandoned.add(place)
            log.warning("group_abandoned", policy=policy, stream=stream, group=group.name, idle_s=group.idle_ms / 1000)

    async def _memory(self) -> None:
        told = await self._streams.command("INFO", "memory")
        self._metrics.store_memory.set(told["used_memory"])
        self._metrics.store_memory_limit.set(told.get("maxmemory") or math.inf)


class _Shown:
    """The series of one policy that stand: what is not told again is taken away, so that their number stays bounded."""

    def __init__(self, metrics: Metrics, policy: str) -> None:
        self._metrics = metrics
        self._policy = policy
        self._series: set[tuple[Gauge, tuple[str, ...]]] = set()

    def stream(self, view: StreamView) -> None:
        self._set(self._metrics.stream_entries, view.entries, view.name)
        self._set(self._metrics.stream_bytes, math.nan if view.bytes is None else view.bytes, view.name)
        self._set(self._metrics.stream_oldest, view.oldest_s, view.name)

    def groups(self, view: StreamView, ttl_ms: int) -> None:
        """Show the first groups by name, and of each number the worst of all others."""
        ordered = sorted(view.groups, key=lambda group: group.name)
        self._together(view.name, OTHERS, ordered[GROUPS_SHOWN:], ttl_ms)
        for group in ordered[:GROUPS_SHOWN]:
            self._together(view.name, group.name, [group], ttl_ms)

    def clear(self, besides: _Shown | None = None) -> None:
        for gauge, labels in self._series - (besides._series if besides else set()):
            with contextlib.suppress(KeyError):
                gauge.remove(*labels)

    def _together(self, stream: str, name: str, groups: list[GroupView], ttl_ms: int) -> None:
        if not groups:
            return
        lags = [math.nan if group.lag is None else group.lag for group in groups]
        self._set(self._metrics.group_lag, max(lags), stream, name)
        self._set(self._metrics.group_pending, max(group.pending for group in groups), stream, name)
        abandoned = any(group.idle_ms >= ttl_ms for group in groups)
        self._set(self._metrics.group_abandoned, abandoned, stream, name)

    def _set(self, gauge: Gauge, value: float, *labels: str) -> None:
        gauge.labels(self._policy, *labels).set(value)
        self._series.add((gauge, (self._policy, *labels)))


async def trim(streams: RedisStreams, policy: str, stream: str, rules: Rules) -> StreamView | None:
    """Trim one stream by one call, and tell how it stands; None: there is no such stream. Raises StoreAway."""
    numbers = rules.max_age_ms, rules.max_bytes, rules.keep, rules.settle_ms, rules.limit
    reply = await streams.script(TRIM, base(policy), stream, *numbers)
    return None if reply is None else _view(stream, reply)


async def survey(streams: RedisStreams, policy: str) -> list[StreamView]:
    """Tell how a policy's streams stand, and change nothing. Raises StoreAway."""
    found = [await trim(streams, policy, name, Rules(limit=0)) for name in STREAMS]
    return [view for view in found if view is not None]


async def drop_group(streams: RedisStreams, policy: str, stream: str, group: str) -> bool:
    """Remove a group with all that it has yet to read and to acknowledge; False: it is not there. Raises StoreAway."""
    return bool(await streams.command("XGROUP", "DESTROY", f"{base(policy)}:{stream}", group))


def milliseconds(stream_id: str) -> int:
    return int(stream_id.partition("-")[0])


def _view(stream: str, reply: list[Any]) -> StreamView:
    trimmed, (entries, size, first, last), now_ms, more, groups = reply
    return StreamView(
        name=stream,
        entries=entries,
        bytes=None if size < 0 else size,
        first=first.decode() or None,
        last=last.decode(),
        now_ms=now_ms,
        groups=tuple(_groups(groups)),
        trimmed=trimmed,
        more=bool(more),
    )


def _groups(rows: list[list[Any]]) -> Iterator[GroupView]:
    for name, consumers, pending, lag, delivered, needed, idle_ms in rows:
        yield GroupView(
            name.decode(errors="replace"),
            consumers,
            pending,
            None if lag < 0 else lag,
            delivered.decode(),
            needed.decode(),
            idle_ms,
        )
