"""EDGE: the controller: what closed decisions say of a rollout's step, and the next move, once a second.

    stream -> outcomes -> the step's tests -> kept in Redis -> propose -> compare and set

    sf:{policy}:rollout          hash: `turn` (grows), `of` (rollout and generation), `kept` (`shadow.evidence.Kept`),
                                 `low` (from where on to read again), `view` (for people)
    sf:{policy}:rollout:through  sorted set: units of the step that are through, by when they were last seen
    group `surefoot.rollout`     of the transitions stream: keeps it from being trimmed past `low`

Duty: for each policy whose rollout is under way, on the worker that holds the lease: read, count, keep, move. What a
move does is `rolling.py`'s; whether one is due, `shadow/rollout.py`'s.
Strategy: nothing is concluded from what has not been kept, and it is kept by compare-and-set on `turn`: of two leaders
the later one finds the turn taken, forgets what it knows, and reads again. A move is made from the very standing that
was judged, or not at all.
Promise: every unit counts once, whoever leads, dies or loses an answer; without Redis nothing moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final
from uuid import uuid4

import msgspec
import structlog
from msgspec.structs import replace

from policies.deployment import RouteBy
from policies.errors import GenerationMoved, MoveRefused, StoreAway, SurefootError
from service.audit_log import by_itself
from service.catalog import Catalog
from service.changes import Changes
from service.clock import Clock
from service.ids import policy_digest
from service.leader import Leader
from service.outcomes import outcome
from service.redis_streams import RedisStreams, base
from service.rolling import begun, followed, next_version, salt_of
from service.rollout_metrics import RolloutMetrics
from service.standing import Document, PolicyState
from shadow.evidence import Kept, Shown, Trial
from shadow.gate import Verdict as GateVerdict
from shadow.rollout import Evidence, Proposal, Stage, Standing, propose
from shadow.units import Plan

TURN_S: Final = 1.0
PAGE: Final = 512  # entries for each call of the script, which takes some 2 ms for them
PAGES: Final = 40  # for each turn: 20,000 decisions
GROUP: Final = "surefoot.rollout"
SETTLE_MS: Final = 8_000  # the stream keeps what is younger than 10 s, whoever has read it
MOST: Final = 10_000  # names for one command
FIELDS: Final = 7  # of an entry, behind its id

# ARGV: read after, most entries. Gives the event time through which every decision has closed, how many entries there
# are, and these in one string: stream id and what `outcomes.py` reads, each part behind its length. As 4,000 strings
# they would cost the event loop 11 ms. A decision that was due at the horizon has closed, unless it is still listed.
READ: Final = b"""
local through = tonumber(redis.call('GET', KEYS[1] .. ':horizon') or '0')
local due = redis.call('ZRANGE', KEYS[1] .. ':due', 0, 0, 'WITHSCORES')
if due[2] then through = math.min(through, tonumber(due[2]) - 1) end
local entries, told = redis.call('XRANGE', KEYS[1] .. ':transitions', '(' .. ARGV[1], '+', 'COUNT', ARGV[2]), {}
for _, entry in ipairs(entries) do
  local f = {}
  for i = 1, #entry[2], 2 do f[entry[2][i]] = entry[2][i + 1] end
  for _, part in ipairs({entry[1], f.i, f.ep, f.t, f.r, f.j, f.x, f.d}) do
    told[#told + 1] = struct.pack('<I4', #part)
    told[#told + 1] = part
  end
end
return {string.format('%.0f', through), #entries, table.concat(told)}
"""
# ARGV: expected turn, next turn, of, kept, low, view, group, anew, then (last seen, name) of units that are through.
# Gives whether it was kept.
KEEP: Final = b"""
local key, stream = KEYS[1] .. ':rollout', KEYS[1] .. ':transitions'
if (redis.call('HGET', key, 'turn') or '0') ~= ARGV[1] then return 0 end
redis.call('HSET', key, 'turn', ARGV[2], 'of', ARGV[3], 'kept', ARGV[4], 'low', ARGV[5], 'view', ARGV[6])
if ARGV[8] == '1' then redis.call('DEL', key .. ':through') end
for i = 9, #ARGV, 2 do redis.call('ZADD', key .. ':through', ARGV[i], ARGV[i + 1]) end
if ARGV[5] ~= '' and redis.pcall('XGROUP', 'SETID', stream, ARGV[7], ARGV[5]).err then
  redis.pcall('XGROUP', 'CREATE', stream, ARGV[7], ARGV[5], 'MKSTREAM')
end
return 1
"""
# ARGV: group. What was kept for going on goes; what was shown stays.
REST: Final = b"""
redis.call('DEL', KEYS[1] .. ':rollout:through')
redis.call('HDEL', KEYS[1] .. ':rollout', 'kept', 'low')
redis.pcall('XGROUP', 'DESTROY', KEYS[1] .. ':transitions', ARGV[1])
return 1
"""

log = structlog.get_logger(__name__)
_encode, _decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(Kept).decode
_json = msgspec.json.Encoder().encode
GateOf = Callable[[str, str], GateVerdict | None]


class View(msgspec.Struct, frozen=True):
    """What the leader says of a rollout, for every replica to show."""

    of: str
    next: str = ""
    evidence: Shown | None = None
    gate: GateVerdict | None = None


_view = msgspec.json.Decoder(View).decode


@dataclass(slots=True)
class _Watch:
    """A step as this worker follows it."""

    of: str
    turn: int
    trial: Trial | None  # None: its weight assigns no unit anew
    anew: bool  # nothing has been kept of the step
    cursor: str = ""  # of the last entry that was read
    low: str = ""  # Invariant: no entry at or before it belongs to an open unit; empty where nothing is read
    began: dict[str, str] = field(default_factory=dict)  # open units: the first entry of each, in the stream's order


class _Taken(Exception):
    """Another leader has counted meanwhile."""


class Rollouts:
    """The controller of one worker. Use from the event loop's thread only."""

    def __init__(
        self,
        streams: RedisStreams,
        leader: Leader,
        catalog: Catalog,
        changes: Changes,
        clock: Clock,
        gate_of: GateOf,
        metrics: RolloutMetrics,
    ) -> None:
        self._streams = streams
        self._leader = leader
        self._catalog = catalog
        self._changes = changes
        self._clock = clock
        self._gate_of = gate_of
        self._metrics = metrics
        self._watches: dict[str, _Watch] = {}
        self._rested: dict[str, str] = {}
        self._refused: dict[str, tuple[str, int]] = {}  # what could not begin by itself, and at which generation

    async def run(self) -> None:
        """Look after rollouts for ever."""
        while True:
            await self.run_once()
            await asyncio.sleep(TURN_S)

    async def run_once(self) -> None:
        """One turn for each policy. Never raises for what may pass."""
        for state in list(self._catalog.states.values()):
            document = state.document
            if document is None:
                continue
            try:
                await self._begin_next(state, document)
                if document.standing is not None:
                    await self._turn(state, document, document.standing)
            except StoreAway as error:  # what has been read stays: else a Redis that is often late holds it for ever
                log.debug("rollout_waits", policy=state.name, reason=error.detail)
            except (GenerationMoved, _Taken) as error:
                self._watches.pop(state.name, None)
                log.debug("rollout_waits", policy=state.name, reason=str(error))
            except SurefootError as error:
                log.warning("rollout_does_not_move", policy=state.name, reason=error.detail)

    async def _begin_next(self, state: PolicyState, document: Document) -> None:
        """Begin what begins by itself. What is refused is told once, and tried again when something has changed."""
        label = next_version(document, {each.version: each.pushed_at_ms for each in state.known.versions.values()})
        if label is None or self._refused.get(state.name) == (label, document.generation):
            return
        if not await self._leader.leads(state.name):
            return

        def change(state: PolicyState, document: Document) -> Document:
            digest = state.digest(label) or ""
            return begun(document, label, digest, uuid4().hex[:12], "pushed", self._clock.event_ms())

        try:
            with by_itself("begin", label):
                await self._changes.amend(state.name, document.generation, change, "surefoot")
            log.info("rollout_begun", policy=state.name, version=label)
        except (StoreAway, GenerationMoved):
            raise
        except SurefootError as error:
            self._refused[state.name] = label, document.generation
            log.warning("rollout_not_begun", policy=state.name, version=label, reason=error.detail)

    async def view(self, policy: str) -> View | None:
        """What the leader said last. Raises StoreAway."""
        raw = await self._streams.command("HGET", f"{base(policy)}:rollout", "view")
        return _view(raw) if raw else None

    async def _turn(self, state: PolicyState, document: Document, standing: Standing) -> None:
        of = f"{standing.id}:{standing.generation}"
        if not standing.under_way:
            self._metrics.tell(state.name, standing, None)
            await self._rest(state.name, of)
            return
        if not await self._leader.leads(state.name):
            self._watches.pop(state.name, None)
            said = await self.view(state.name)
            self._metrics.tell(state.name, standing, said.evidence if said is not None and said.of == of else None)
            return
        gate = self._gate_of(state.name, standing.version) if standing.stage is Stage.SHADOW else None
        watch = self._watches.get(state.name)
        if watch is None or watch.of != of:
            watch = self._watches[state.name] = await self._open(state.name, document, standing, of)
        if watch.trial is not None:
            await self._read(state.name, document, watch, watch.trial)
        evidence = _evidence(standing, watch.trial, gate)
        proposal = propose(standing, evidence, self._clock.event_ms())
        await self._keep(state.name, standing, watch, proposal, gate)
        if proposal.move is not None or proposal.pause:
            await self._follow(state.name, standing, proposal, watch.trial)

    async def _open(self, policy: str, document: Document, standing: Standing, of: str) -> _Watch:
        """Begin to follow a step, or go on where somebody has left it."""
        fields = await self._streams.command("HMGET", f"{base(policy)}:rollout", "turn", "of", "kept", "low")
        turn, goes_on = int(fields[0] or 0), fields[1] == of.encode() and fields[2] is not None
        if standing.stage is not Stage.CANARY:
            return _Watch(of, turn, None, True)
        now_ms = self._clock.event_ms()
        since_ms = standing.since_ms if now_ms - standing.since_ms < SETTLE_MS else now_ms
        known: dict[str, int] = {}
        if goes_on:
            flat = await self._streams.command("ZRANGE", f"{base(policy)}:rollout:through", 0, -1, "WITHSCORES")
            known = {name.decode(): int(float(seen)) for name, seen in _pairs(flat)}
        kept = _decode(fields[2]) if goes_on else None
        low = fields[3].decode() if goes_on else await self._beginning(now_ms - since_ms)
        salt = salt_of(document, policy_digest(policy))
        try:
            trial = Trial(_dealt(document, standing), _units(document, standing), salt, kept, known, since_ms)
        except ValueError as error:
            log.warning("rollout_measures_nothing", policy=policy, version=standing.version, reason=str(error))
            return _Watch(of, turn, None, True)
        return _Watch(of, turn, trial, not goes_on, low, low)

    async def _beginning(self, age_ms: int) -> str:
        """From where on to read a step of this age: entries bear the server's time."""
        seconds, micros = await self._streams.command("TIME")
        return f"{int(seconds) * 1000 + int(micros) // 1000 - age_ms - SETTLE_MS}-0"

    async def _read(self, policy: str, document: Document, watch: _Watch, trial: Trial) -> None:
        """Read what has closed; settle what is ripe once all of it has been read."""
        route_by = document.deployment.route_by
        for _ in range(PAGES):
            through, count, told = await self._streams.script(READ, base(policy), watch.cursor, PAGE)
            if count:
                await asyncio.to_thread(_add, watch, trial, told, route_by)
            if count < PAGE:
                await asyncio.to_thread(trial.settle, int(through))
                break
        while watch.began and next(iter(watch.began)) not in trial.book:
            del watch.began[next(iter(watch.began))]
        watch.low = before(next(iter(watch.began.values()))) if watch.began else watch.cursor

    async def _keep(
        self, policy: str, standing: Standing, watch: _Watch, proposal: Proposal, gate: GateVerdict | None
    ) -> None:
        """Have what is known stand in Redis before anything follows from it. Raises _Taken."""
        trial = watch.trial
        shown = None if trial is None else trial.shown(self._clock.event_ms())
        view = _json(View(watch.of, proposal.reason, shown, gate))
        self._metrics.tell(policy, standing, shown)
        kept = b"" if trial is None else _encode(trial.kept)
        through = [] if trial is None else list(trial.book.take_through().items())
        for names in _slices(through):
            flat = [part for name, seen in names for part in (seen, name)]
            arguments = (watch.turn, watch.turn + 1, watch.of, kept, watch.low, view, GROUP, int(watch.anew), *flat)
            try:
                kept_it = await self._streams.script(KEEP, base(policy), *arguments)
            except StoreAway:
                self._watches.pop(policy, None)  # kept or not: Redis knows
                raise
            if not kept_it:
                raise _Taken("another leader has counted meanwhile")
            watch.turn, watch.anew = watch.turn + 1, False

    async def _follow(self, policy: str, standing: Standing, proposal: Proposal, trial: Trial | None) -> None:
        """Make the move that follows, from the standing that was judged."""
        lower = None if trial is None else trial.readings()["return"].lower
        name = "pause" if proposal.pause or proposal.move is None else proposal.move.value
        unchanged = MoveRefused("nothing changes")

        def change(state: PolicyState, document: Document) -> Document:
            if document.standing != standing:
                raise MoveRefused("it has moved meanwhile")
            wanted = followed(document, proposal, self._clock.event_ms(), state.digest(standing.version) or "", lower)
            if wanted is document:
                raise unchanged
            return wanted

        with contextlib.suppress(MoveRefused), by_itself(name, standing.version):
            state = await self._changes.amend(policy, None, change, "surefoot")
            self._metrics.moves.labels(policy, standing.version, name).inc()
            log.info("rollout_moved", policy=policy, version=standing.version, move=name, reason=proposal.reason)
            self._watches.pop(state.name, None)

    async def _rest(self, policy: str, of: str) -> None:
        """Once a rollout has ended: let the stream be trimmed."""
        self._watches.pop(policy, None)
        if self._rested.get(policy) != of:
            await self._streams.script(REST, base(policy), GROUP)
            self._rested[policy] = of


def _add(watch: _Watch, trial: Trial, told: bytes, route_by: RouteBy | None) -> None:
    """Add entries of the stream, in its order."""
    parts = _parts(told)
    for raw in parts:
        stream_id, closed = raw.decode(), outcome(list(islice(parts, FIELDS)), route_by)
        trial.add(closed)
        if closed.unit in trial.book:
            watch.began.setdefault(closed.unit, stream_id)
        watch.cursor = stream_id


def _parts(told: bytes) -> Iterator[bytes]:
    """Strings, each behind its length."""
    at = 0
    while at < len(told):
        size = int.from_bytes(told[at : at + 4], "little")
        yield told[at + 4 : at + 4 + size]
        at += 4 + size


def _evidence(standing: Standing, trial: Trial | None, gate: GateVerdict | None) -> Evidence:
    if trial is not None:
        return trial.evidence()
    if standing.stage is Stage.SHADOW and gate is not None:
        return Evidence(None, 0, gate=gate.outcome, reason="; ".join(gate.reasons))
    return Evidence(None, 0)


def _dealt(document: Document, standing: Standing) -> Standing:
    """Episodes and single decisions are new in each step: none of them was the challenger's before."""
    return standing if document.deployment.route_by in (None, "key") else replace(standing, floor=0.0)


def _units(document: Document, standing: Standing) -> Plan:
    """How units are valued: as the rollout's plan and the policy's rewards say."""
    plan, reward = standing.plan, document.deployment.reward
    low = reward.range[0]
    return Plan(
        objective=plan.objective,
        unit_time_ms=int(plan.unit_time_s * 1000),
        window_ms=int(reward.window_s * 1000),
        unit_decisions=plan.unit_decisions,
        default_reward=reward.default,
        worst_reward=-math.inf if low is None else low,
    )


def before(stream_id: str) -> str:
    """The last id there can be before this one."""
    ms, seq = map(int, stream_id.split("-"))
    return f"{ms}-{seq - 1}" if seq else f"{ms - 1}-{2**64 - 1}"


def _pairs(flat: Any) -> Iterator[tuple[bytes, bytes]]:
    """Names and scores, as RESP2 or RESP3 gives them."""
    if flat and isinstance(flat[0], (list, tuple)):
        yield from ((name, seen) for name, seen in flat)
    else:
        yield from zip(flat[::2], flat[1::2], strict=True)


def _slices(items: list[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Parts of what one command may carry; one that is empty where there is nothing."""
    for at in range(0, max(1, len(items)), MOST):
        yield items[at : at + MOST]
