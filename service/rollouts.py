"""EDGE: the controller: what closed decisions say of a rollout's step, and the next move, once a second.

    stream -> outcomes -> the step's tests -> kept in Redis -> propose -> compare and set

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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from uuid import uuid4

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
from service.rolling import begun, followed, next_version, salt_of
from service.rollout_metrics import RolloutMetrics
from service.rollout_store import PAGE, Page, RolloutStore, View, before
from service.standing import Document, PolicyState
from shadow.evidence import Trial
from shadow.gate import Verdict as GateVerdict
from shadow.rollout import BACK, Evidence, Proposal, Stage, Standing, propose
from shadow.units import Plan

TURN_S: Final = 1.0
PAGES: Final = 40  # of the stream, for each turn: 20,000 decisions
EPISODE_MS: Final = 3_600_000  # without a step for so long, an episode is known no more: else a day's fill the book
FORGET_MS: Final = 60_000  # how often they are looked for
SETTLE_MS: Final = 8_000  # the stream keeps what is younger than 10 s, whoever has read it

log = structlog.get_logger(__name__)
GateOf = Callable[[str, str], GateVerdict | None]  # what the gate says of a policy's shadow
FaultOf = Callable[[str, str], str | None]  # why a policy's shadow is not asked any more


@dataclass(slots=True)
class _Watch:
    """A step as this worker follows it."""

    of: str
    turn: int
    trial: Trial | None  # None: its weight assigns no unit anew
    anew: bool  # nothing has been kept of the step
    cursor: str = ""  # of the last entry that was read
    low: str = ""  # Invariant: no entry at or before it belongs to an open unit; empty where nothing is read
    blind: str = ""  # why there is no trial
    forget_ms: int = 0  # episodes that are through and were last seen before that are forgotten
    began: dict[str, str] = field(default_factory=dict)  # open units: the first entry of each, in the stream's order


class _Taken(Exception):
    """Another leader has counted meanwhile."""


class Rollouts:
    """The controller of one worker. Use from the event loop's thread only."""

    def __init__(
        self,
        store: RolloutStore,
        leader: Leader,
        catalog: Catalog,
        changes: Changes,
        clock: Clock,
        gate_of: GateOf,
        fault_of: FaultOf,
        metrics: RolloutMetrics,
    ) -> None:
        self._store = store
        self._leader = leader
        self._catalog = catalog
        self._changes = changes
        self._clock = clock
        self._gate_of = gate_of
        self._fault_of = fault_of
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
        return await self._store.view(policy)

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
        watches = standing.stage is Stage.SHADOW
        gate = self._gate_of(state.name, standing.version) if watches else None
        fault = self._fault_of(state.name, standing.version) if watches else None
        watch = self._watches.get(state.name)
        if watch is None or watch.of != of:
            watch = self._watches[state.name] = await self._open(state.name, document, standing, of)
        if watch.trial is not None:
            await self._read(state.name, document, watch, watch.trial)
        evidence = _evidence(watch.trial, gate)._replace(broken=fault or "", blind=watch.blind)
        proposal = propose(standing, evidence, self._clock.event_ms())
        await self._keep(state.name, standing, watch, proposal, gate)
        if proposal.move is not None or proposal.pause:
            await self._follow(state.name, standing, proposal, watch.trial)

    async def _open(self, policy: str, document: Document, standing: Standing, of: str) -> _Watch:
        """Begin to follow a step, or go on where somebody has left it."""
        stored = await self._store.stored(policy, of)
        if standing.stage is not Stage.CANARY:
            return _Watch(of, stored.turn, None, True)
        now_ms = self._clock.event_ms()
        again = now_ms - standing.since_ms >= SETTLE_MS and stored.kept is None
        since_ms = now_ms if again else standing.since_ms
        low = stored.low or await self._store.beginning(now_ms - since_ms + SETTLE_MS)
        salt, units = salt_of(document, policy_digest(policy)), _units(document, standing)
        try:
            trial = Trial(_dealt(document, standing), units, salt, stored.kept, stored.through, since_ms, again=again)
        except ValueError as error:
            log.warning("rollout_measures_nothing", policy=policy, version=standing.version, reason=str(error))
            return _Watch(of, stored.turn, None, True, blind=str(error))
        return _Watch(of, stored.turn, trial, stored.kept is None, low, low)

    async def _read(self, policy: str, document: Document, watch: _Watch, trial: Trial) -> None:
        """Read what has closed; settle what is ripe once all of it has been read."""
        route_by = document.deployment.route_by
        for _ in range(PAGES):
            page = await self._store.page(policy, watch.cursor)
            if page.size:
                await asyncio.to_thread(_add, watch, trial, page, route_by)
            if page.size < PAGE:
                await asyncio.to_thread(trial.settle, page.through_ms)
                oldest_ms = page.through_ms - EPISODE_MS
                if route_by == "episode" and oldest_ms >= watch.forget_ms + FORGET_MS:  # a key stays the same for ever
                    watch.forget_ms = oldest_ms
                    await asyncio.to_thread(trial.book.forget, oldest_ms)
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
        self._metrics.tell(policy, standing, shown)
        kept, through = (None, {}) if trial is None else (trial.kept, trial.book.take_through())
        view = View(watch.of, proposal.reason, shown, gate)
        try:
            turn = await self._store.keep(
                policy, watch.turn, view, kept, watch.low, through, anew=watch.anew, forget_ms=watch.forget_ms
            )
        except StoreAway:
            self._watches.pop(policy, None)  # kept or not: Redis knows
            raise
        if turn is None:
            raise _Taken("another leader has counted meanwhile")
        watch.turn, watch.anew = turn, False

    async def _follow(self, policy: str, standing: Standing, proposal: Proposal, trial: Trial | None) -> None:
        """Make the move that follows, from the standing that was judged."""
        lower = None if trial is None else trial.readings()["return"].lower
        name = _named(standing, proposal)
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
            await self._store.rest(policy)
            self._rested[policy] = of


def _named(standing: Standing, proposal: Proposal) -> str:
    """What the audit log calls what is done: what waits for a person has not been done."""
    if proposal.pause or proposal.move is None:
        return "pause"
    waits = standing.plan.mode == "manual" and proposal.move not in BACK
    return f"propose_{proposal.move.value}" if waits else proposal.move.value


def _add(watch: _Watch, trial: Trial, page: Page, route_by: RouteBy | None) -> None:
    """Add entries of the stream, in its order."""
    for stream_id, fields in page.entries():
        closed = outcome(fields, route_by)
        trial.add(closed)
        if closed.unit in trial.book:
            watch.began.setdefault(closed.unit, stream_id)
        watch.cursor = stream_id


def _evidence(trial: Trial | None, gate: GateVerdict | None) -> Evidence:
    if trial is not None:
        return trial.evidence()
    if gate is not None:
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
