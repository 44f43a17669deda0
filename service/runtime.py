"""The composition root of a worker: builds every part in order, runs the loops, closes in reverse.

No module has a singleton; whoever needs a part is given it here. What is loaded at start (policies, engines, keys) is
built before the first request; a part that cannot be built stops the start with an error that names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog
from prometheus_client import CollectorRegistry

from policies.bundle_cache import BundleCache
from policies.deployment import DEPLOYMENT
from policies.errors import ConfigError, InvalidField, NotReady
from policies.folder_store import FolderStore
from policies.store import BUNDLED, StoredPolicy, read_directory
from policies.trial_template import Template
from safety.breaker import Faults, Latency
from service.absence import Absence
from service.admission import Admission, admit
from service.burning import Burning
from service.calibration import Calibrations
from service.callers import Callers
from service.catalog import Catalog
from service.changes import Changes
from service.clock import SystemClock
from service.control import Control, Snapshot
from service.estimate_plans import plans
from service.estimating import Estimating
from service.gate import Gate
from service.guarding import Guarding
from service.hot import HotRoutes
from service.idempotency import Idempotency
from service.ids import Keyring
from service.keys import obtain_keyring
from service.leader import Leader
from service.leases import Leases
from service.ledger import Ledger
from service.loading import Loading
from service.metrics import Metrics
from service.overload import Overload
from service.questions import Served
from service.redis_store import RedisStore
from service.redis_streams import JoinConfig, RedisStreams, connect
from service.rehearsal import Rehearsal
from service.rewards import Rewards
from service.roll import Roll
from service.rollout_changes import RolloutChanges
from service.rollout_store import RolloutStore
from service.rollouts import Rollouts
from service.scalar import Scalar
from service.serving import Serving
from service.settings import Settings
from service.shadow_stream import ShadowStream
from service.shadows import Shadows
from service.shipper import Shipper
from service.slots import take_slot
from service.store_watch import StoreWatch
from service.team import Team
from service.tracing import Tracing
from service.trimming import Rules, Trimming

log = structlog.get_logger(__name__)

PROBE_S = 2.0
KEYRING_WAIT_S = 30.0


@dataclass
class Runtime:
    """Everything a running worker consists of."""

    settings: Settings
    metrics: Metrics
    ledger: Ledger
    streams: RedisStreams
    shipper: Shipper
    keyring: Keyring
    policies: dict[str, Served]
    rewards: Rewards
    hot: HotRoutes
    catalog: Catalog
    changes: Changes
    leases: Leases
    guarding: Guarding
    rehearsal: Rehearsal
    calibrations: Calibrations
    burning: Burning
    trimming: Trimming
    watch: StoreWatch
    shadows: Shadows
    overload: Overload
    estimating: Estimating
    clock: SystemClock
    admission: Admission
    roll: Roll
    rollouts: Rollouts
    rollout_changes: RolloutChanges
    team: Team
    draining: bool = False
    dead: set[str] = field(default_factory=set)  # background loops that have raised and wait for their restart

    def reasons(self) -> list[str]:
        """Why this worker should get no traffic; empty when it should."""
        found = ["draining"] if self.draining else []
        if not self.ledger.accepting:
            found.append("ledger_not_accepting")
        return found + [f"loop_died:{name}" for name in sorted(self.dead)]

    async def refresh_store(self) -> None:
        """Ask Redis what it is, and remember the answer for readiness and metrics."""
        await self.watch.refresh()

    def refresh_metrics(self) -> None:
        """Set the gauges that are read, not counted."""
        now = self.ledger.statistics()
        self.metrics.unshipped.set(now.unshipped_events)
        oldest_ms = now.oldest_unshipped_ms
        self.metrics.oldest.set(max(0.0, time.time() - oldest_ms / 1000) if oldest_ms else 0.0)
        self.metrics.ledger_bytes.set(now.held_bytes)
        self.metrics.lost.set(now.lost_events)
        self.metrics.corrupt.set(now.corrupt_rows)
        self.metrics.corrupt_files.set(now.corrupt_files)
        self.metrics.rejected.set(now.rejected_events)
        self.metrics.unconfirmed.set(now.unconfirmed_events)
        self.metrics.discarded.set(now.discarded_files)
        for policy in self.policies:
            self.metrics.recording.labels(policy).set(self.ledger.recording(policy))
        for policy, served in self.policies.items():
            for version, counts in served.coalescer.decider.breakers.view().items():
                self.metrics.breaker_open.labels(policy, version, "faults").set(counts.faults is Faults.OPEN)
                self.metrics.breaker_open.labels(policy, version, "latency").set(counts.latency is Latency.OPEN)
        self.guarding.refresh_metrics(self.metrics)
        self.shadows.refresh_metrics()
        self.overload.refresh_metrics()
        self.roll.refresh_metrics()
        self.metrics.control_age.set(self.catalog.age_s)


@contextlib.asynccontextmanager
async def running(
    settings: Settings, redis_url: str, registry: CollectorRegistry, team: Team
) -> AsyncIterator[Runtime]:
    """Build a worker, run its loops, and on leaving flush, ship and close."""
    async with contextlib.AsyncExitStack() as stack:
        clock = SystemClock()
        metrics = Metrics(registry)
        gate = Gate(settings.data_dir / "trials", settings.bundle_key)
        seeds = read_seeds(settings, gate)
        configs: dict[str, JoinConfig] = {}
        unknown = JoinConfig()  # a policy that is no longer loaded, whose spool is still being shipped
        streams = RedisStreams(connect(redis_url), lambda name: configs.get(name, unknown), metrics.count_join)
        stack.push_async_callback(streams.aclose)
        device = ThreadPoolExecutor(1, thread_name_prefix="inference")
        stack.callback(device.shutdown)
        store = RedisStore(streams) if settings.store is None else FolderStore(settings.store)
        loading = Loading(store, BundleCache(settings.data_dir / "bundles"), gate, metrics, settings.device)
        stack.callback(loading.close)
        keyring = await _wait_for_keyring(settings, streams)
        slot = take_slot(settings.data_dir) if settings.durability != "memory" else None
        ledger = Ledger(
            slot,
            clock,
            tier=settings.durability,
            max_buffer_bytes=settings.ledger_buffer_bytes,
            min_free_bytes=settings.spool_min_free_bytes,
            confirm=settings.confirm,
        )
        stack.push_async_callback(ledger.aclose)
        calibrations = Calibrations(streams, clock, metrics)
        stack.push_async_callback(calibrations.aclose)
        shipper = Shipper(ledger, streams, clock)
        shipper.on_shipped = calibrations.offer
        shipper.on_failure = metrics.count_ship_failure
        stack.push_async_callback(shipper.drain, settings.grace_s)
        tracing = Tracing.from_environment(settings.trace_sample)
        stack.callback(tracing.close)
        leases = Leases(streams, clock, lambda: uuid.uuid4().hex)
        stack.push_async_callback(leases.aclose)
        admission = await admit(settings, streams, clock, metrics, stack)
        guarding = Guarding(streams, clock, leases)
        stack.push_async_callback(guarding.aclose)
        scores = ShadowStream(streams, metrics.shadows, settings.shadow_stream_keep)
        shadows = Shadows(
            keyring, clock, metrics.shadows, scores, settings.inference_timeout_s, settings.shadow_cpu_share
        )
        stack.push_async_callback(shadows.aclose)
        serving = Serving(
            settings, ledger, shipper, streams, keyring, clock, metrics, device, guarding, shadows, configs
        )
        stack.push_async_callback(serving.aclose)
        catalog = Catalog(
            seeds,
            store,
            Control(streams, admission.audit),
            Snapshot(settings.data_dir),
            loading,
            serving.publish,
            serving.safeguard,
            serving.trips,
            metrics,
            clock,
            settings.max_loaded,
            admission.audit,
            settings.max_stale_s,
        )
        await catalog.start()
        roll = Roll(streams, catalog.states, metrics, clock, ledger.producer)
        catalog.on_served = roll.wake
        stack.push_async_callback(roll.aclose)
        rewards = _rewards(serving, catalog.absence)
        idempotency = Idempotency(streams, settings.idempotency_ttl_s)
        stack.push_async_callback(idempotency.aclose)
        overload = Overload(
            clock,
            metrics,
            lambda: sum(served.away() for served in serving.policies.values()),
            deadline_s=settings.deadline_s,
            max_deadline_s=settings.max_deadline_s,
            most=settings.max_concurrency,
        )
        shadows.pressed = overload.pressed
        hot = _hot_routes(serving, catalog.absence, rewards, idempotency, tracing, overload, admission.callers)
        changes = Changes(catalog, clock)
        leader = Leader(streams)
        estimating = Estimating(streams, leader, clock, metrics.estimates)
        runtime = Runtime(
            settings,
            metrics,
            ledger,
            streams,
            shipper,
            keyring,
            serving.policies,
            rewards,
            hot,
            catalog,
            changes,
            leases,
            guarding,
            Rehearsal(streams, clock),
            calibrations,
            Burning(streams, leases, metrics),
            Trimming(streams, metrics, Rules.of(settings)),
            StoreWatch(streams, metrics, settings.durability, ledger.confirm),
            shadows,
            overload,
            estimating,
            clock,
            admission,
            roll,
            Rollouts(
                RolloutStore(streams),
                leader,
                catalog,
                changes,
                clock,
                estimating.gate_of,
                shadows.fault_of,
                metrics.rollouts,
            ),
            RolloutChanges(changes, clock),
            team,
        )
        async with _loops(runtime):
            await runtime.refresh_store()
            yield runtime


def read_seeds(settings: Settings, gate: Gate) -> list[StoredPolicy]:
    """Read the directory of the start. What ships with the package is trusted as the program is: it is not tried."""
    if settings.policies is None:
        return read_directory(BUNDLED)
    with Template() as template:
        found = read_directory(settings.policies, lambda files: gate.check(files, template.run))
    for seed in found:
        try:
            Scalar.read(seed.deployment.reward.expression or "reward")
        except InvalidField as error:
            raise ConfigError(f"{seed.name}/{DEPLOYMENT}: {error.detail}", error.field) from None
    return found


async def _wait_for_keyring(settings: Settings, streams: RedisStreams) -> Keyring:
    """Get the signing keys; Redis may still be loading its file. Raises NotReady when there are none to be had."""
    setting = settings.keys.get_secret_value() if settings.keys else None
    deadline = time.monotonic() + KEYRING_WAIT_S
    while True:
        keyring = await obtain_keyring(setting, streams, settings.data_dir)
        if keyring is not None:
            return keyring
        if time.monotonic() > deadline:
            raise NotReady("Redis is away, and there is neither SUREFOOT_KEYS nor a keyring kept from an earlier run")
        await asyncio.sleep(0.2)


def _rewards(serving: Serving, absence: Absence) -> Rewards:
    return Rewards(
        serving.rewarded,
        absence,
        serving.ledger,
        serving.shipper,
        serving.keyring,
        serving.clock,
        serving.metrics,
        record_ttl_ms=int(serving.settings.record_ttl_s * 1000),
        verdict_wait_s=serving.settings.verdict_wait_s,
    )


def _hot_routes(
    serving: Serving,
    absence: Absence,
    rewards: Rewards,
    idempotency: Idempotency,
    tracing: Tracing,
    overload: Overload,
    callers: Callers,
) -> HotRoutes:
    settings = serving.settings
    return HotRoutes(
        serving.policies,
        absence,
        rewards,
        idempotency,
        serving.metrics,
        tracing,
        serving.clock,
        overload,
        callers=callers,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
        max_batch=settings.max_batch,
    )


@contextlib.asynccontextmanager
async def _loops(runtime: Runtime) -> AsyncIterator[None]:
    """Run the background loops, restarting one that dies."""

    async def probe() -> None:
        while True:
            await runtime.refresh_store()
            await asyncio.sleep(PROBE_S)

    tasks = [
        asyncio.create_task(_supervise(runtime, name, loop), name=name)
        for name, loop in (
            ("shipper", runtime.shipper.run),
            ("probe", probe),
            ("catalog", runtime.catalog.run),
            ("roll", runtime.roll.run),
            ("tokens", runtime.admission.follow_tokens),
            ("audit", runtime.admission.chain.run),
            ("leases", runtime.leases.run),
            ("limits", runtime.guarding.run),
            ("calibration", lambda: runtime.calibrations.run(runtime.policies)),
            ("burning", lambda: runtime.burning.run(runtime.guarding.burn_limits)),
            ("shadows", runtime.shadows.stream.run),
            ("rollouts", runtime.rollouts.run),
            ("estimating", lambda: runtime.estimating.run(lambda: plans(runtime.catalog.states.values()))),
            ("trimming", lambda: runtime.trimming.run(runtime.policies)),
            ("metrics", lambda: runtime.team.refresh(runtime.refresh_metrics)),
        )
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _supervise(runtime: Runtime, name: str, loop: Callable[[], Awaitable[None]]) -> None:
    """Run a loop for ever; when it raises, turn readiness red, wait a second, start it again."""
    while True:
        try:
            await loop()
        except Exception:
            log.exception("loop_died", loop=name)
            runtime.dead.add(name)
            await asyncio.sleep(1.0)
            runtime.dead.discard(name)
