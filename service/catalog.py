"""What a worker has loaded, and how it comes to have what is deployed: one step at a time, over and over.

    read Redis -> list what changed -> load what is live -> publish the plan -> load one that stands by -> again

Duty: hold deployments and versions (of the store, the directory of the start, the snapshot) against what is loaded
here, and close the gap. Loading is `loading.py`'s, serving `serving.py`'s, changes come from `changes.py`.
Strategy: nothing is told to replicas, each polls. A plan is published only when all versions that may answer are loaded
and warm; until then the one before serves. Then come shadows, then versions without a role, the most recently pushed
ones first.
Promise: whatever fails here (Redis away, a version that does not load) is reported, and what is served goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Sequence

import structlog
from msgspec.structs import replace

from policies.deployment import Deployment
from policies.errors import AuditBroken, BundleError, BundlesAway, StoreAway, SurefootError
from policies.store import Store, StoredPolicy, difference
from safety.halt import KillSwitch
from service.absence import Absence
from service.audit_log import SYSTEM, AuditLog, by_itself
from service.clock import Clock
from service.control import UNREADABLE, Control, Snapshot
from service.loading import Loading
from service.metrics import Metrics
from service.plan import LoadedVersion, Plan
from service.rolling import after_trips
from service.safeguards import document_of
from service.serving import plan_of
from service.standing import Document, Failure, Known, PolicyState, SafetySide, standby, watching

POLL_S = 0.5
# A store may change without a change of `rev` (a crash between the two), or be shared with another deployment.
RELIST_S = 60.0
RETRY_S = 30.0  # before a version that failed to load is tried again

AWAY = (StoreAway, BundlesAway)
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
    ) -> None:
        self.states = {seed.name: PolicyState(seed.name, seed, document_of(seed)) for seed in seeds}
        self.store, self.control, self.loading = store, control, loading
        self._snapshot = snapshot
        self._publish = publish
        self._guard = guard
        self._trips = trips
        self._metrics = metrics
        self._clock = clock
        self._max_loaded = max_loaded
        self._audit = audit
        self._turn = asyncio.Lock()
        self._read_s: float | None = None  # when Redis last told what is deployed
        self._shared_s = float("-inf")  # when the store last told which policies it has
        self._saved: dict[str, Known] = {}
        self.absence = Absence(self.states, lambda: self._read_s is not None)

    # For the rest of the service

    async def start(self) -> None:
        """Load and publish what is live. Raises BundleError when a version that only the directory deploys fails."""
        try:
            await self._read()
        except AWAY as error:
            log.warning("deployments_from_snapshot", reason=error.detail)
            for name, known in (await self.loading.aside(self._snapshot.read)).items():
                self._state(name).known = known
                self._state(name).cached = True
        for state in self.states.values():
            self._safeguard(state)
            await self._advance(state)
            if state.served is None and state.seeded is not None:
                await self._serve_seed(state, state.seeded)

    async def run(self) -> None:
        """Poll for ever, and load what stands by in between."""
        while True:
            await self.converge()
            if not await self.fill():
                await asyncio.sleep(POLL_S)

    async def converge(self) -> None:
        """Read what is deployed, and serve it. Does not raise for what may work later."""
        async with self._turn:
            there = True
            try:
                await self._read()
            except AWAY as error:
                there = False
                log.debug("deployments_not_read", reason=error.detail)
            await self._take_trips()
            for state in self.states.values():
                if there:
                    await self._agree(state)
                self._safeguard(state)
                await self._advance(state)
            known = {name: state.known for name, state in self.states.items() if state.known != Known()}
            if known != self._saved:
                self._saved = known
                await self.loading.aside(self._snapshot.write, known)
                await self.loading.prune({e.digest for each in known.values() for e in each.versions.values()})

    async def fill(self) -> bool:
        """Unload what is too much and load one version that stands by. Return whether one was loaded."""
        wanted = [*watching(self.states.values()), *standby(self.states.values(), self._max_loaded)]
        async with self._turn:
            for state in self.states.values():
                self._unload(state, {label for label in state.loaded if (state.name, label) not in wanted} - state.live)
        for name, label in wanted:
            state = self.states[name]
            if not state.has(label) and self._worth_a_try(state, label):
                try:
                    await self.require(state, label)
                except SurefootError:
                    continue
                return True
        return False

    async def require(self, state: PolicyState, label: str) -> None:
        """Have a version loaded. Raises BundleError, ConfigError, StoreAway or BundlesAway."""
        if state.has(label):
            return
        version = await self._load(state, label)  # outside of our turn: promotions do not wait for it
        async with self._turn:
            if version.bundle.digest == state.digest(label):
                state.loaded[label] = version
                self._renew(state)

    def halt_here(self, state: PolicyState, switches: Collection[KillSwitch]) -> None:
        """Throw kill switches on this worker at once; the others are told by `changes.py`, or when Redis is back."""
        state.halted_here = state.halted_here | frozenset(switches)
        self._safeguard(state)

    async def refresh(self, name: str) -> PolicyState:
        """Give a policy's state as it is this moment. Raises StoreAway or BundlesAway."""
        async with self._turn:
            state = self._state(name)
            rev, document = (await self.control.read()).get(name, (0, None))
            if (rev, document) == UNREADABLE:
                raise StoreAway(f"{name}: its deployment in Redis is not one that this version of the service can read")
            await self._list(state, rev, document)
            return state

    @property
    def age_s(self) -> float | None:
        """Seconds since Redis last told what is deployed; None: it never has."""
        return None if self._read_s is None else self._clock.monotonic_s() - self._read_s

    # Reading

    async def _read(self) -> None:
        now_s = self._clock.monotonic_s()
        found = await self.control.read()
        names = found.keys() | {state.name for state in self.states.values() if state.known != Known()}
        if now_s - self._shared_s >= RELIST_S:
            names |= await self.store.policies()
            self._shared_s = now_s
        for name in sorted(names):
            state = self._state(name)
            rev, document = found.get(name, (0, None))
            state.unreadable = (rev, document) == UNREADABLE
            if state.unreadable:
                continue  # what is served goes on
            if rev < state.known.rev and not state.cached:
                await self._remind(state)
            elif rev != state.known.rev or now_s - state.listed_s >= RELIST_S:
                await self._list(state, rev, document)
        self._read_s = now_s

    async def _list(self, state: PolicyState, rev: int, document: Document | None) -> None:
        versions = await self.store.versions(state.name)
        if rev != state.known.rev:
            state.failures.clear()  # something has changed: worth another try
        state.known = Known(rev, document, versions)
        state.listed_s, state.cached = self._clock.monotonic_s(), False
        self._unload(state, {label for label in state.loaded if not state.has(label)} - state.live)

    async def _remind(self, state: PolicyState) -> None:
        """Redis has forgotten what it said a moment ago (flushed, or restored from a backup): tell it."""
        log.error("redis_lost_deployments", policy=state.name, rev=state.known.rev)
        standing = await self.store.versions(state.name)
        for label, entry in state.known.versions.items():
            if label not in standing:
                await self.store.put(entry, await self.loading.files(entry))
        await self.control.remind(state.name, state.known)

    def _state(self, name: str) -> PolicyState:
        return self.states.setdefault(name, PolicyState(name))

    # Serving

    async def _advance(self, state: PolicyState) -> None:
        """Load what may answer and publish it; with anything missing, what is served stays. Shadows can wait."""
        if state.document is not None:
            for label in state.document.deployment.deciding:
                if not state.has(label) and self._worth_a_try(state, label):
                    try:
                        state.loaded[label] = await self._load(state, label)
                    except SurefootError:
                        break
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
        if state.side != (now := state.safety_side):
            self._guard(state.name, now, state.generation)
            log.info("safety", policy=state.name, halts=sorted(now.halts), tripped=sorted(now.tripped))
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
        """Publish a plan when what is deployed, or what is loaded, has changed."""
        document = state.document
        if document is None or not all(map(state.has, document.deployment.deciding)):
            document = state.served
        if document is not None and (document != state.served or state.published != state.digests):
            self._serve(state, document)

    def _serve(self, state: PolicyState, document: Document) -> None:
        deployment = document.deployment
        self._publish(plan_of(state.name, document, state.loaded), deployment)
        if document != state.served:
            log.info("deployed", policy=state.name, generation=document.generation, champion=deployment.champion)
        state.served, state.published = document, state.digests

    def _unload(self, state: PolicyState, labels: set[str]) -> None:
        for label in labels:
            del state.loaded[label]
            log.info("version_unloaded", policy=state.name, version=label)
        if labels:
            self._renew(state)

    # Loading one version

    async def _load(self, state: PolicyState, label: str) -> LoadedVersion:
        """Load one version, and keep the reason when it fails."""
        try:
            version = await self._open(state, label)
            _check_alike(state, version)
        except AWAY as error:
            state.failures[label] = Failure(error.detail, None, float("-inf"))
            raise
        except SurefootError as error:
            self._failed(state, label, error)
            raise
        except Exception as error:
            log.exception("load_failed", policy=state.name, version=label)
            wrapped = BundleError(f"{state.name}/{label} does not load: {error}", None, "load")
            self._failed(state, label, wrapped)
            raise wrapped from error
        state.failures.pop(label, None)
        return version

    async def _open(self, state: PolicyState, label: str) -> LoadedVersion:
        entry = state.known.versions.get(label)
        if entry is not None:
            return await self.loading.load(entry)
        if state.seed is None or label not in state.seed.bundles:
            raise BundleError(
                f"{state.name}/{label} is deployed, but neither store nor directory has it", None, "files"
            )
        return await self.loading.load_bundle(state.seed.bundles[label])

    def _failed(self, state: PolicyState, label: str, error: SurefootError) -> None:
        check = error.check if isinstance(error, BundleError) else None
        state.failures[label] = Failure(error.detail, check, self._clock.monotonic_s())
        self._metrics.load_failures.labels(state.name).inc()
        log.error("version_not_loaded", policy=state.name, version=label, check=check, reason=error.detail)

    def _worth_a_try(self, state: PolicyState, label: str) -> bool:
        failure = state.failures.get(label)
        return failure is None or self._clock.monotonic_s() - failure.at_s >= RETRY_S


def _check_alike(state: PolicyState, version: LoadedVersion) -> None:
    champion = state.champion
    found = None if champion is None else difference(version.bundle, champion)
    if found:
        raise BundleError(found[1], found[0], "spec")
