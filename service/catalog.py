"""What a worker has loaded, and how it comes to have what is deployed. Two loops that do not wait for each other:

    listen:  read Redis -> safeguards in force -> publish the plan, if it is loaded -> wait for a hint, or half a second
    follow:  list what changed -> load what is live -> publish the plan -> load one that stands by -> again

Duty: hold what is known of deployments and versions against what is loaded here, and close the gap. Knowing is
`hearing.py`'s, loading `opening.py`'s, serving `serving.py`'s, changes come from `changes.py`.
Strategy: a plan is published only when all versions that may answer are loaded and warm; until then the one before
serves. Then come shadows, then versions without a role, the most recently pushed ones first. Halts wait for no load,
and for no store of bundles: `listen` asks Redis alone.
Promise: whatever fails here (Redis away, a version that does not load) is reported, and what is served goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Final

import structlog
from msgspec.structs import replace

from policies.deployment import Deployment
from policies.errors import AuditBroken, StoreAway, SurefootError
from policies.store import Store, StoredPolicy
from safety.halt import KillSwitch
from service.absence import Absence
from service.audit_log import SYSTEM, AuditLog, by_itself
from service.clock import Clock
from service.control import Control, Snapshot
from service.hearing import Hearing
from service.loading import Loading
from service.metrics import Metrics
from service.opening import AWAY as AWAY
from service.opening import Opening
from service.plan import Plan
from service.rolling import after_trips
from service.serving import plan_of
from service.standing import Document, PolicyState, SafetySide, deciding, freshness, reserves, standby, watching

POLL_S: Final = 0.5
# What was asked for a moment ago is about to be deployed: it is not unloaded, however many versions there are.
HOLD_S: Final = 5.0

log = structlog.get_logger(__name__)


class Catalog:
    """The policies of one worker. Use from the event loop's thread only."""

    def __init__(
        self,
        seeds: Sequence[StoredPolicy],
        store: Store,
        control: Control,
        snapshot: Snapshot,
        loading: Loading,
        publish: Callable[[Plan, Deployment], None],
        guard: Callable[[str, SafetySide, int], None],
        trips: list[tuple[str, str]],
        metrics: Metrics,
        clock: Clock,
        max_loaded: int,
        audit: AuditLog | None = None,
        max_stale_s: float = math.inf,
    ) -> None:
        self._hearing = Hearing(seeds, store, control, snapshot, loading, clock, audit)
        self.states = self._hearing.states
        self.store, self.control, self.loading = store, control, loading
        self.on_served: Callable[[], None] = lambda: None  # told when another generation is served
        self._opening = Opening(loading, metrics, clock)
        self._publish = publish
        self._guard = guard
        self._trips = trips
        self._metrics = metrics
        self._clock = clock
        self._max_loaded = max_loaded
        self._max_stale_s = max_stale_s
        self._audit = audit
        self.absence = Absence(self.states, lambda: self._hearing.asked)
        self._turn, self._wake = asyncio.Lock(), asyncio.Event()
        self._loads: dict[tuple[str, str, str | None], asyncio.Task[None]] = {}  # under way
        self._required: dict[tuple[str, str], float] = {}  # versions that somebody wants loaded, and since when

    # For the rest of the service

    async def start(self) -> None:
        """Load and publish what is live. Raises BundleError when a version that only the directory deploys fails."""
        try:
            await self._hearing.ask()
            await self._hearing.list_all()
        except AWAY as error:
            log.warning("deployments_from_snapshot", reason=error.detail)
            await self._hearing.remember()
        for state in list(self.states.values()):
            self._safeguard(state)
            for _, label in deciding([state]):
                with contextlib.suppress(SurefootError):
                    await self.require(state, label)
            if state.served is None and state.seeded is not None:
                await self._serve_seed(state, state.seeded)

    async def run(self) -> None:
        """Listen and follow for ever."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._listen())
            both.create_task(self._follow())

    async def converge(self) -> None:
        """Read what is deployed and what there is, and serve what of it is loaded. Does not raise for what may work
        later.
        """
        await self._look()
        with contextlib.suppress(*AWAY):
            await self._hearing.list_changed()
        self._fit()
        await self._hearing.save()

    async def fill(self) -> bool:
        """Unload what is too much, and load one version: a live one, a shadow, or one that stands by. Return whether
        one was loaded.
        """
        states = self.states.values()
        wanted = [*reserves(states), *watching(states), *standby(states, self._max_loaded)]
        now_s = self._clock.monotonic_s()
        self._required = {each: at_s for each, at_s in self._required.items() if now_s - at_s < HOLD_S}
        for state in self.states.values():
            loaded = {label for label in state.loaded if (state.name, label) not in (*wanted, *self._required)}
            self._unload(state, loaded - state.live)
        for name, label in [*deciding(self.states.values()), *wanted]:
            state = self.states[name]
            if not state.has(label) and self._opening.worth_a_try(state, label):
                try:
                    await self._load(state, label)
                except SurefootError:
                    continue
                return True
        return False

    async def require(self, state: PolicyState, label: str) -> None:
        """Have a version loaded. Raises BundleError, ConfigError, StoreAway or BundlesAway."""
        self._required[state.name, label] = self._clock.monotonic_s()
        if not state.has(label):
            await self._load(state, label)

    def halt_here(self, state: PolicyState, switches: Collection[KillSwitch]) -> None:
        """Throw kill switches on this worker at once; the others are told by `changes.py`, or when Redis is back."""
        state.halted_here = state.halted_here | frozenset(switches)
        self._safeguard(state)

    async def refresh(self, name: str) -> PolicyState:
        """Give a policy's state as it is this moment. Raises StoreAway or BundlesAway."""
        async with self._turn:
            state = await self._hearing.ask_for(name)
            self._fit()
            return state

    @property
    def age_s(self) -> float:
        """Seconds since Redis last told what is deployed: this worker, or the one that left the snapshot."""
        return self._hearing.age_s

    # Listening

    async def _listen(self) -> None:
        while True:
            await self._look()
            await self._hearing.save()
            self._wake.set()
            try:
                await self.control.heed(POLL_S)
            except StoreAway:
                await asyncio.sleep(POLL_S)

    async def _look(self) -> None:
        """Read what is deployed; put in force what is safe, and serve what is loaded."""
        async with self._turn:
            try:
                await self._hearing.ask()
            except StoreAway as error:
                log.debug("deployments_not_read", reason=error.detail)
            for state in self.states.values():
                self._safeguard(state)
            await self._take_trips()
            for state in list(self.states.values()):
                if self._hearing.there:
                    await self._agree(state)
                self._renew(state)

    async def _follow(self) -> None:
        while True:
            if self._hearing.there:
                try:
                    await self._hearing.catch_up()
                except AWAY as error:
                    log.debug("versions_not_listed", reason=error.detail)
                self._fit()
            if not await self.fill():
                await self._wake.wait()
                self._wake.clear()

    # Serving

    def _fit(self) -> None:
        """Let go of what is no more, and serve what is there, now that versions were listed."""
        for state in self.states.values():
            self._unload(state, {label for label in state.loaded if not state.has(label)} - state.live)
            self._renew(state)

    async def _load(self, state: PolicyState, label: str) -> None:
        """Load a version, once, however many ask for it at a time; what was begun goes on when they leave."""
        key = state.name, label, state.digest(label)
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = asyncio.get_running_loop().create_task(self._open(state, label))
            load.add_done_callback(lambda done: (self._loads.pop(key), done.cancelled() or done.exception()))
        await asyncio.shield(load)

    async def _open(self, state: PolicyState, label: str) -> None:
        version = await self._opening.open(state, label)
        if version.bundle.digest == state.digest(label):
            state.loaded[label] = version
            self._renew(state)

    async def _serve_seed(self, state: PolicyState, seeded: Document) -> None:
        """Nothing of what is deployed can be loaded at the start: serve what the directory says, or do not start."""
        assert state.seed is not None
        for label in seeded.deployment.deciding:
            if label not in state.loaded:
                state.loaded[label] = await self.loading.load_bundle(state.seed.bundles[label])
        if state.document != seeded:
            log.error("deployment_from_directory", policy=state.name, generation=state.generation)
        self._serve(state, seeded)

    def _safeguard(self, state: PolicyState) -> None:
        """Put the safety side in force, whether or not what is deployed with it can be loaded."""
        state.freshness = freshness(self.age_s, self._max_stale_s, asked=self._hearing.asked)
        if state.side != (now := state.safety_side):
            self._guard(state.name, now, state.generation)
            log.info("safety", policy=state.name, halts=sorted(now.halts), tripped=sorted(now.tripped), stale=now.stale)
            state.side = now

    async def _agree(self, state: PolicyState) -> None:
        """Tell Redis what was thrown or has tripped here; forget it once Redis says the same."""
        document = state.document
        if document is None or not (state.halted_here or state.tripped_here):
            return
        if state.halts <= frozenset(document.halts) and state.tripped <= frozenset(document.tripped):
            state.halted_here, state.tripped_here = frozenset(), frozenset()
            return
        told = replace(document, halts=tuple(sorted(state.halts)), tripped=tuple(sorted(state.tripped & state.labels)))
        now_ms = self._clock.event_ms()
        back = after_trips(told, lambda label: state.digest(label) or "", now_ms)
        wanted = replace(back or told, generation=document.generation + 1)
        action = "roll_back" if back else "trip" if state.tripped_here else "halt"
        with contextlib.suppress(StoreAway), by_itself(action):  # the next reading shows what came of it
            await self.control.change(state.name, wanted, 0 if state.seeded is None else 1)

    async def _take_trips(self) -> None:
        while self._trips:
            name, label = self._trips.pop()
            log.error("breaker_tripped", policy=name, version=label)
            self._metrics.breaker_trips.labels(name, label).inc()
            self.states[name].tripped_here |= {label}
            if self._audit is not None:
                with contextlib.suppress(AuditBroken):  # logged there; the breaker has opened whatever the disk says
                    await self._audit.record(SYSTEM, "trip_here", name, label)

    def _renew(self, state: PolicyState) -> None:
        """Publish a plan when what is deployed, or what is loaded, has changed; its safety side goes before."""
        self._safeguard(state)
        document = state.document
        if document is None or not all(map(state.has, document.deployment.deciding)):
            document = state.served
        changed = document != state.served or state.served_alone != state.alone
        if document is not None and (changed or state.published != state.digests):
            self._serve(state, document)

    def _serve(self, state: PolicyState, document: Document) -> None:
        deployment = document.deployment
        self._publish(plan_of(state.name, document, state.loaded, alone=state.alone), deployment)
        if document != state.served or state.served_alone != state.alone:
            told = {"generation": document.generation, "champion": deployment.champion, "alone": state.alone}
            log.info("deployed", policy=state.name, **told)
        state.served, state.published, state.served_alone = document, state.digests, state.alone
        self._metrics.control_stale.labels(state.name, "challenger").set(state.alone)
        self.on_served()

    def _unload(self, state: PolicyState, labels: set[str]) -> None:
        for label in labels:
            del state.loaded[label]
            log.info("version_unloaded", policy=state.name, version=label)
        if labels:
            self._renew(state)
