"""EDGE: what the reader of live estimates keeps in Redis, and how it reads. The script stands in `estimates.lua`.

    sf:{policy}:estimates             hash: `version`, `head`, `view`, and `t:<label>` for each version's tallies
    sf:{policy}:estimates:through     names of units that are through, by when they were last seen

Duty: pages of transitions and of scores, the state, its save by compare-and-set, its end. It decides nothing.
Promise: a save that answers False has changed nothing. Every call raises StoreAway when it may work later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import structlog

from service.estimate_rows import Said, Seen, entry_id, said, seen, text_id
from service.estimate_tallies import Line, View
from service.estimate_units import MOST_NAMES, Id
from service.redis_streams import RedisStreams, base

GROUP: Final = "surefoot.estimates"
KEPT_MS: Final = 90 * 86_400_000
NAMES: Final = 10_000  # for each call
SCRIPT: Final = b"#!lua flags=allow-oom\n" + (Path(__file__).parent / "estimates.lua").read_bytes()
_FIELDS: Final = (b"i", b"ep", b"st", b"t", b"a", b"s", b"m", b"d", b"r", b"j", b"x", b"tf")
_T = TypeVar("_T")

log = structlog.get_logger(__name__)


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """All that is kept besides tallies and names.

    asked: what was asked for; another question begins anew. low: transitions after it are read again, by whoever goes
    on; first: the first of them, if it was read before; counted: up to here they were counted, being the `added`-th of
    all that there ever were. scores: the same by shadow, low alone. thinnings: shares that were kept,
    by shadow, "" for the reader's own.
    """

    asked: str
    named: bool
    since_ms: int
    mark_ms: int
    low: Id
    first: Id | None
    counted: Id
    added: int
    share: float = 1.0
    counts: dict[str, int] = {}
    scores: dict[str, Id] = {}
    thinnings: dict[str, dict[int, float]] = {}


@dataclass(frozen=True, slots=True)
class State:
    """What stands in Redis. version: counts saves; 0: there is none."""

    version: int
    head: Head | None = None
    lines: dict[str, Line] = field(default_factory=dict)
    through: list[tuple[bytes, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Page:
    """Transitions, and the moment they were read at. closed_ms: event time through which all decisions are closed."""

    rows: list[Seen]
    ids: list[Id]  # of all that were read
    unreadable: list[Id]  # those that cannot be read
    last: Id  # in the stream
    added: int  # to the stream, ever
    now_ms: int
    closed_ms: int
    grouped: bool  # the group stands, and holds the stream


_encode = msgspec.msgpack.Encoder().encode
_head = msgspec.msgpack.Decoder(Head)
_line = msgspec.msgpack.Decoder(Line)
_view = msgspec.msgpack.Decoder(View)


class EstimateStore:
    """Calls for all policies."""

    def __init__(self, streams: RedisStreams) -> None:
        self._streams = streams

    async def load(self, policy: str) -> State:
        """Read what stands; a state that another release wrote is as good as none."""
        key = f"{base(policy)}:estimates"
        found: dict[bytes, bytes] = await self._streams.command("HGETALL", key)
        version = int(found.get(b"version", b"0"))
        head = _decoded(_head, policy, found.get(b"head"))
        lines = {
            name.decode()[2:]: _decoded(_line, policy, raw) for name, raw in found.items() if name.startswith(b"t:")
        }
        if head is None or None in lines.values():
            return State(version)
        whole = {label: line for label, line in lines.items() if line is not None}
        return State(version, head, whole, [name async for name in self._names(policy)])

    async def view(self, policy: str) -> View | None:
        """Read what was told last."""
        return _decoded(_view, policy, await self._streams.command("HGET", f"{base(policy)}:estimates", "view"))

    async def begin(self, policy: str) -> tuple[Id, int, int]:
        """Say where the stream ends, how many entries it ever had, and the time."""
        last, added, now_ms = await self._call(policy, "begin", GROUP)
        return entry_id(last), int(added), int(now_ms)

    async def read(self, policy: str, after: Id, most: int, with_state: bool) -> tuple[Any, ...]:
        """Read a page of transitions; `page` makes rows of it, which takes some milliseconds."""
        return tuple(await self._call(policy, "read", GROUP, f"({text_id(after)}", most, int(with_state)))

    async def scores(self, policy: str, label: str, after: Id, most: int) -> list[tuple[bytes, bytes]]:
        """Read a page of a shadow's scores: ids of entries, and what `said` reads."""
        key = f"{base(policy)}:shadow:{label}"
        found = await self._streams.command("XRANGE", key, f"({text_id(after)}", "+", "COUNT", most)
        return [(name, fields[b"d"]) for name, fields in found]

    async def save(
        self,
        policy: str,
        version: int,
        head: Head,
        view: View,
        through: Mapping[bytes, int],
        lines: Mapping[str, Line],
        gone: Iterable[str],
        *,
        anew: bool,
    ) -> bool:
        """Replace what stands, if it is `version` still. lines: those that changed; gone: labels to forget; anew:
        forget everything else.
        """
        names = [part for each in through.items() for part in each]
        fields: list[str | bytes] = ["head", _encode(head), "view", _encode(view)]
        for label, line in lines.items():
            fields += [f"t:{label}", _encode(line)]
        numbers = version, version + 1, text_id(head.low), int(anew), MOST_NAMES, KEPT_MS, len(through)
        dropped = [f"t:{label}" for label in gone]
        return bool(await self._call(policy, "save", GROUP, *numbers, *names, len(fields) // 2, *fields, *dropped))

    async def end(self, policy: str) -> bool:
        """Forget a policy's estimates, and let its stream go. Gives whether there was anything."""
        return bool(await self._call(policy, "end", GROUP))

    async def _names(self, policy: str) -> Any:
        key, first = f"{base(policy)}:estimates:through", 0
        while True:
            flat = await self._streams.command("ZRANGE", key, first, first + NAMES - 1, "WITHSCORES")
            for name, at_ms in _pairs(flat):
                yield name, int(float(at_ms))
            if len(flat) < NAMES:
                return
            first += NAMES

    async def _call(self, policy: str, *arguments: Any) -> Any:
        return await self._streams.script(SCRIPT, base(policy), *arguments)


def page(reply: Sequence[Any]) -> Page:
    """Make rows of what was read. What cannot be read is counted."""
    last, added, now_ms, closed_ms, grouped = reply[:5]
    rows: list[Seen] = []
    unreadable: list[Id] = []
    entries = reply[5:]
    for stream_id, *values in entries:
        try:
            rows.append(seen(stream_id, dict(zip(_FIELDS, values, strict=True)), with_state=True))
        except (msgspec.MsgspecError, KeyError, ValueError, TypeError):
            unreadable.append(entry_id(stream_id))
    return Page(
        rows,
        [entry_id(each[0]) for each in entries],
        unreadable,
        entry_id(last),
        int(added),
        int(now_ms),
        int(closed_ms),
        bool(grouped),
    )


def read_scores(entries: Sequence[tuple[bytes, bytes]]) -> list[tuple[Id, Said]]:
    """Make scores of what was read; what cannot be read is left out, and then its decision is not scored."""
    found = []
    for stream_id, raw in entries:
        try:
            found.append((entry_id(stream_id), said(raw)))
        except msgspec.MsgspecError:
            continue
    return found


def _pairs(flat: Sequence[Any]) -> Iterable[tuple[bytes, Any]]:
    """Members and scores, which clients give flat or in pairs."""
    if flat and isinstance(flat[0], list | tuple):
        return [(each[0], each[1]) for each in flat]
    return list(zip(flat[::2], flat[1::2], strict=True))


def _decoded(decoder: msgspec.msgpack.Decoder[_T], policy: str, raw: bytes | None) -> _T | None:
    if raw is None:
        return None
    try:
        return decoder.decode(raw)
    except msgspec.MsgspecError as error:  # another release wrote it
        log.warning("estimates_unreadable", policy=policy, reason=str(error))
        return None
