"""Limits on what one policy executes: room is reserved before the draw, and what the draw did not take goes back.

Duty: for the rows of a batch, ask whoever keeps each limit (Redis, a leased portion, this replica's memory), in the
order of the rows, and tell them afterwards what was executed. It speaks to Redis through `limit_calls.py` only.
Strategy: Redis is asked first, in one call for the whole batch, and only where a rule needs it; portions and memory are
looked at when its answer is there, so nothing is awaited between them and the draw.
Promise: `reserve` answers within 20 ms and denies what it could not ask about; `settle` never blocks. Executions that a
rule masks never exceed it in any window, over all replicas (`local`: in each).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Final

import numpy as np

from policies.types import Bools
from safety.facts import Masked
from safety.limits import Entry, LimitSet
from safety.local import NO_ROOM, LocalLimits, LocalRoom
from safety.past import UNKNOWN
from service.clock import Clock
from service.decision import action_text, read_action
from service.limit_calls import HOLD_S, CallStatistics, LimitCalls
from service.limit_requests import Asked, Room
from service.limit_tells import Tell, charges_of
from service.redis_streams import RedisStreams

# Of some 500 bytes with a few charges: 50 MB at most.
LOCAL_KEYS: Final = 100_000


@dataclass(frozen=True, slots=True)
class LimitRow:
    """A row before its draw. fallback: what it executes when it falls back, whatever is masked."""

    key: str | None = None
    fallback: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Held:
    """What was reserved for a row. order: in Redis, 0: not known. answered: by Redis. local_order: in memory."""

    name: str
    digest: str
    order: int = 0
    answered: bool = False
    local_order: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """What `settle` needs to know of a reservation."""

    limits: LimitSet
    rows: Sequence[LimitRow]
    held: Sequence[_Held]
    sent: bool


@dataclass(frozen=True, slots=True)
class Reserved:
    """What limits say about B rows. previous, past: as in `Facts`. until_s: monotonic; the draw must come before."""

    verdicts: list[Masked]
    previous: list[tuple[float, ...] | None]
    past: Bools
    until_s: float
    token: Token

    def holds(self, now_s: float) -> bool:
        """Whether the draw may still be made: a process that slept too long must deny everything."""
        return now_s < self.until_s


@dataclass(frozen=True, slots=True)
class LimitStatistics:
    calls: CallStatistics
    portions: dict[str, int] = field(default_factory=dict)  # held, by rule
    local_keys: int = 0


class Limits:
    """All limits of one policy in one worker. Use from the event loop's thread only."""

    def __init__(
        self,
        streams: RedisStreams,
        policy: str,
        clock: Clock,
        *,
        holder: str | None = None,
        local_keys: int = LOCAL_KEYS,
        now_ms: int = 0,
    ) -> None:
        self._holder = holder or secrets.token_hex(6)  # of this life of this worker: never the same again
        self.calls = LimitCalls(streams, policy, self._holder, clock, now_ms=now_ms)
        self._clock = clock
        self._limits = LimitSet()
        self._local = LocalLimits(local_keys, _ms(HOLD_S))
        self._rows = 0

    def configure(self, limits: LimitSet) -> None:
        """Go by other limits from the next batch on. A rule that keeps its name keeps its count."""
        self._limits = limits
        self._local.configure(limits)
        self.calls.configure(limits)

    async def reserve(self, rows: Sequence[LimitRow], possible: Bools | None = None) -> Reserved:
        """Reserve for each row the most it may come to, in the order of the rows.

        possible: bool [B, N], what other rules leave, so that no room is held for what cannot happen. Each `Reserved`
        must be settled, whatever follows; one that is not counts as executed, at its worst.
        """
        limits = self._limits
        held = [self._name(limits, row) for row in rows]
        entries = {each.name: each.entries([row.fallback for row in rows], possible) for each in limits.all}
        asked = Asked(None, False, self._clock.monotonic_s())
        if limits.asks_redis:
            asked = await self.calls.ask(limits, *_question(limits, held, entries))
        now_s = self._clock.monotonic_s()
        until_s = (asked.sent_s if asked.sent else now_s) + HOLD_S
        answers = asked.rooms or [_unanswered(limits)] * len(rows)
        here: list[LocalRoom] = []
        rooms: dict[str, list[int]] = {each.name: [] for each in limits.all}
        for index, (row, each, answer) in enumerate(zip(rows, held, answers, strict=True)):
            own = {name: column[index] for name, column in entries.items()}
            found = dict(zip([limit.name for limit in limits.keyed + limits.strict], answer.rooms, strict=True))
            until_s = min(until_s, self._lease(limits, each, own, found, now_s))
            here.append(self._local.reserve(limits, each.name, row.key, own, _ms(now_s)))
            for name, room in {**found, **here[-1].rooms}.items():
                rooms[name].append(room)
        previous, past = _previous(limits, rows, answers, here)
        done = [
            replace(each, order=answer.order, answered=asked.rooms is not None, local_order=local.order)
            for each, answer, local in zip(held, answers, here, strict=True)
        ]
        verdicts = [each.allow(rooms[each.name]) for each in limits.all]
        return Reserved(verdicts, previous, past, until_s, Token(limits, list(rows), done, asked.sent))

    def settle(self, token: Token, actions: Sequence[tuple[float, ...] | None]) -> None:
        """Tell what each row executed, fallbacks too; None: nothing, because it was refused. Never blocks."""
        now_s, limits, tells = self._clock.monotonic_s(), token.limits, []
        for row, held, action in zip(token.rows, token.held, actions, strict=True):
            text = "" if action is None else action_text(action)
            for limit in limits.leased:
                places = self.calls.places.get(limit.field)
                if places is not None:
                    places.settle(held.name, limit.charge(action))
            self._local.settle(limits, held.name, row.key, held.local_order, action, text, _ms(now_s))
            if limits.asks_redis:
                tells.append(_tell(token, held, action, text, now_s))
        self.calls.tell_nowait(each for each in tells if each.sent or each.charges or each.policy or each.action)
        if any(places.short for places in self.calls.places.values()):
            self.calls.hasten()

    async def run_once(self) -> None:
        """Renew portions and deliver what Redis has not been told; call it every quarter of a second."""
        await self.calls.run_once()

    async def close(self) -> None:
        """Give portions back and tell what is left to tell, in one try."""
        await self.calls.close()

    def statistics(self) -> LimitStatistics:
        portions = {each.limit.name: each.held for each in self.calls.places.values()}
        return LimitStatistics(self.calls.statistics(), portions, len(self._local))

    def _lease(
        self, limits: LimitSet, held: _Held, entries: Mapping[str, Entry], found: dict[str, int], now_s: float
    ) -> float:
        """Reserve for a row from the portions, add the room there was to `found`, and say until when that holds."""
        until_s = now_s + HOLD_S
        for limit in limits.leased:
            places = self.calls.places.get(limit.field)  # none: the rules were changed meanwhile
            found[limit.name] = places.reserve(held.name, entries[limit.name], now_s, until_s) if places else NO_ROOM
            if places and found[limit.name] > 0:  # what is drawn after the lease has ended is not covered
                until_s = min(until_s, places.until_s)
        return until_s

    def _name(self, limits: LimitSet, row: LimitRow) -> _Held:
        self._rows += 1
        asks = limits.keyed or limits.remembers == "shared"
        digest = blake2b(row.key.encode(), digest_size=12).hexdigest() if asks and row.key is not None else ""
        return _Held(f"{self._holder}:{self._rows}", digest)


def _question(
    limits: LimitSet, held: Sequence[_Held], entries: Mapping[str, Sequence[Entry]]
) -> tuple[list[list[object]], list[str]]:
    """Rows as `limits.lua` reads them, and the keys that they are about."""
    rows: list[list[object]] = []
    for index, each in enumerate(held):
        keyed = [_entry(entries[limit.name][index]) for limit in limits.keyed]
        rows.append([each.name, each.digest, keyed, [_entry(entries[limit.name][index]) for limit in limits.strict]])
    return rows, [each.digest for each in held]


def _entry(entry: Entry) -> object:
    return entry.least if entry.levels is None else [entry.least, *(level + 1 for level in entry.levels)]


def _unanswered(limits: LimitSet) -> Room:
    return Room(0, UNKNOWN, [NO_ROOM] * len(limits.keyed + limits.strict))


def _previous(
    limits: LimitSet, rows: Sequence[LimitRow], answers: Sequence[Room], here: Sequence[LocalRoom]
) -> tuple[list[tuple[float, ...] | None], Bools]:
    """The last executed actions, and whether they are known."""
    kept: Sequence[Room | LocalRoom] = answers if limits.remembers == "shared" else here
    if limits.remembers is None:
        texts = [""] * len(rows)
    else:
        texts = [UNKNOWN if row.key is None else each.previous for row, each in zip(rows, kept, strict=True)]
    known = np.array([text != UNKNOWN for text in texts], dtype=np.bool_)
    return [None if text in ("", UNKNOWN) else read_action(text) for text in texts], known


def _tell(token: Token, held: _Held, action: Sequence[float] | None, text: str, now_s: float) -> Tell:
    limits = token.limits
    strict = charges_of(limits.strict, action)
    return Tell(
        name=held.name,
        key=held.digest,
        charges=charges_of(limits.keyed, action) if held.digest else (),
        policy=strict if strict or (limits.strict and token.sent) else None,
        action=text if held.digest and limits.remembers == "shared" else "",
        order=held.order,
        drawn_s=now_s,
        sent=token.sent,
        answered=held.answered,
    )


def _ms(seconds: float) -> int:
    return int(1000 * seconds)
