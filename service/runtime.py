"""The composition root of a worker: builds every part in order, runs the loops, closes in reverse.

No module has a singleton; whoever needs a part is given it here. What is loaded at start (policies, engines, keys) is
built before the first request; a part that cannot be built stops the start with an error that names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog
from prometheus_client import CollectorRegistry

from policies.deployment import Deployment
from policies.engine import Engine
from policies.errors import NotReady, StoreAway
from policies.route import Routes
from policies.store import BUNDLED, StoredPolicy, read_directory
from policies.types import Role
from service.act import Decider
from service.clock import Clock, SystemClock
from service.coalesce import Coalescer
from service.hot import HotRoutes, Served
from service.idempotency import Idempotency
from service.ids import Keyring, policy_digest
from service.keys import obtain_keyring
from service.ledger import Ledger
from service.metrics import Metrics
from service.plan import LoadedVersion, Plan
from service.redis_streams import JoinConfig, RedisStreams, StoreFacts, connect
from service.rewards import Rewarded, Rewards
from service.settings import Settings
from service.shipper import Shipper
from service.slots import take_slot
from service.states import StateReader
from service.tracing import Tracing

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
    draining: bool = False
    store: StoreFacts | None = None
    dead: set[str] = field(default_factory=set)  # background loops that have raised and wait for their restart

    def reasons(self) -> list[str]:
        """Why this worker should get no traffic; empty when it should."""
        found = ["draining"] if self.draining else []
        if not self.ledger.accepting:
            found.append("ledger_not_accepting")
        return found + [f"loop_died:{name}" for name in sorted(self.dead)]

    async def refresh_store(self) -> None:
        """Ask Redis what it is, and remember the answer for readiness and metrics."""
        try:
            self.store = await self.streams.probe()
        except StoreAway:
            self.store = None
        self.metrics.store_up.set(self.store is not None)

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
        self.metrics.ship_failures.set(self.shipper.statistics().failures)


@contextlib.asynccontextmanager
async def running(settings: Settings, redis_url: str, registry: CollectorRegistry) -> AsyncIterator[Runtime]:
    """Build a worker, run its loops, and on leaving flush, ship and close."""
    async with contextlib.AsyncExitStack() as stack:
        clock = SystemClock()
        metrics = Metrics(registry)
        stored = read_directory(settings.policies or BUNDLED)
        streams = RedisStreams(connect(redis_url), _join_configs(stored, settings), metrics.count_join)
        stack.push_async_callback(streams.aclose)
        device = ThreadPoolExecutor(1, thread_name_prefix="inference")
        stack.callback(device.shutdown)
        plans = {each.name: load_plan(each, settings, metrics) for each in stored}
        keyring = await _wait_for_keyring(settings, streams)
        slot = take_slot(settings.data_dir) if settings.durability != "memory" else None
        ledger = Ledger(
            slot,
            clock,
            tier=settings.durability,
            max_buffer_bytes=settings.ledger_buffer_bytes,
            min_free_bytes=settings.spool_min_free_bytes,
        )
        stack.push_async_callback(ledger.aclose)
        shipper = Shipper(ledger, streams, clock)
        stack.push_async_callback(shipper.drain, settings.grace_s)
        tracing = Tracing.from_environment(settings.trace_sample)
        stack.callback(tracing.close)
        policies = {}
        for name, plan in plans.items():
            shipper.register(name)
            decider = Decider(plan, ledger, keyring, clock, metrics, device, timeout_s=settings.inference_timeout_s)
            coalescer = Coalescer(decider, settings.max_batch)
            stack.push_async_callback(coalescer.aclose)
            policies[name] = Served(name, plan.observation, plan.action, StateReader(plan.observation), coalescer)
        rewards = _rewards(plans, policies, ledger, shipper, keyring, clock, metrics, settings)
        idempotency = Idempotency(streams, settings.idempotency_ttl_s)
        stack.push_async_callback(idempotency.aclose)
        hot = _hot_routes(policies, rewards, idempotency, metrics, tracing, clock, settings)
        runtime = Runtime(settings, metrics, ledger, streams, shipper, keyring, policies, rewards, hot)
        async with _loops(runtime):
            await runtime.refresh_store()
            yield runtime


def load_plan(stored: StoredPolicy, settings: Settings, metrics: Metrics) -> Plan:
    """Load the versions that a policy's deployment names. Raises BundleError or ConfigError."""
    deployment = stored.deployment
    versions = {}
    for label in sorted(deployment.versions):
        engine = Engine(stored.bundles[label], settings.device)
        versions[label] = LoadedVersion(engine.bundle, engine, metrics.version(stored.name, label))
        metrics.info.labels(stored.name, label, engine.bundle.digest, _role(deployment, label)).set(1)
        log.info("version_loaded", policy=stored.name, version=label, device=engine.device)
    challenger = deployment.challengers[0] if deployment.challengers else None
    champion = stored.bundles[deployment.champion]
    return Plan(
        policy=stored.name,
        digest=policy_digest(stored.name),
        generation=1,
        routes=Routes(
            salt=policy_digest(stored.name),
            champion=deployment.champion,
            challenger=challenger.version if challenger else None,
            weight=challenger.weight if challenger else 0.0,
            route_by=deployment.route_by,
        ),
        versions=versions,
        window_ms=int(deployment.reward.window_s * 1000),
        observation=champion.observation,
        action=champion.action,
    )


def _role(deployment: Deployment, label: str) -> Role:
    if label == deployment.champion:
        return "champion"
    return "baseline" if label == deployment.baseline else "challenger"


def _join_configs(stored: list[StoredPolicy], settings: Settings) -> Callable[[str], JoinConfig]:
    configs = {
        each.name: JoinConfig(
            max_lag_ms=int(settings.max_lag_s * 1000),
            record_ttl_ms=int(settings.record_ttl_s * 1000),
            # A successor's state must be there when its predecessor closes, however late its producer ships.
            successor_ttl_ms=int(each.deployment.reward.window_s * 1000 + settings.max_lag_s * 1000 + 86_400_000),
            default_reward=repr(each.deployment.reward.default),
        )
        for each in stored
    }
    fallback = JoinConfig()  # a policy that is no longer loaded, whose spool is still being shipped
    return lambda policy: configs.get(policy, fallback)


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


def _rewards(
    plans: dict[str, Plan],
    policies: dict[str, Served],
    ledger: Ledger,
    shipper: Shipper,
    keyring: Keyring,
    clock: Clock,
    metrics: Metrics,
    settings: Settings,
) -> Rewards:
    rewarded = {
        plan.digest: Rewarded(name, plan.observation, plan.action, policies[name].states, plan.window_ms)
        for name, plan in plans.items()
    }
    return Rewards(
        rewarded,
        ledger,
        shipper,
        keyring,
        clock,
        metrics,
        record_ttl_ms=int(settings.record_ttl_s * 1000),
        verdict_wait_s=settings.verdict_wait_s,
    )


def _hot_routes(
    policies: dict[str, Served],
    rewards: Rewards,
    idempotency: Idempotency,
    metrics: Metrics,
    tracing: Tracing,
    clock: Clock,
    settings: Settings,
) -> HotRoutes:
    return HotRoutes(
        policies,
        rewards,
        idempotency,
        metrics,
        tracing,
        clock,
        token=settings.client_token.get_secret_value() if settings.client_token else None,
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
        for name, loop in (("shipper", runtime.shipper.run), ("probe", probe))
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
