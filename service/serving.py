"""The pipelines of a worker: a policy gets one when it is first published, and a new plan whenever something changes.

Duty: everything that has to know of a policy learns of it here, in one step of the event loop: hot routes, rewards, the
join's configuration, shipper, shadows, metrics. It does not know where versions come from: `catalog.py` says what is
published.
Promise: a request sees a policy wholly as it was or wholly as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial

from policies.deployment import Deployment
from policies.route import Routes
from service.act import Decider
from service.arrivals import Arrivals, Outcome, remembers
from service.breakers import Breakers
from service.clock import Clock
from service.coalesce import Coalescer
from service.guarding import Guarding
from service.ids import Keyring, policy_digest
from service.inference import Inference
from service.ledger import Ledger
from service.memory import Memories
from service.memory_store import MemoryStore
from service.metrics import Metrics
from service.plan import LoadedVersion, Plan
from service.questions import Served
from service.redis_streams import JoinConfig, RedisStreams
from service.reward_events import Rewarded
from service.rolling import barred, salt_of
from service.scalar import Scalar
from service.settings import Settings
from service.shadows import Shadows
from service.shipper import Shipper
from service.standing import Document, SafetySide
from service.states import StateReader

DAY_MS = 86_400_000
STANDBY = "standby"  # loaded and ready, but without a role


@dataclass
class Serving:
    """The policies that this worker serves. The three mappings are read by others while they change here."""

    settings: Settings
    ledger: Ledger
    shipper: Shipper
    streams: RedisStreams
    keyring: Keyring
    clock: Clock
    metrics: Metrics
    device: Executor
    guarding: Guarding
    shadows: Shadows
    configs: dict[str, JoinConfig]
    policies: dict[str, Served] = field(default_factory=dict)
    rewarded: dict[bytes, Rewarded] = field(default_factory=dict)
    trips: list[tuple[str, str]] = field(default_factory=list)  # versions that tripped here; `catalog.py` takes them
    _stores: list[MemoryStore] = field(default_factory=list)
    _listed: dict[str, dict[str, tuple[str, str, str, str]]] = field(default_factory=dict)

    def publish(self, plan: Plan, deployment: Deployment) -> None:
        """Serve a policy by this plan from the next batch on."""
        name, settings, (low, high) = plan.policy, self.settings, deployment.reward.range
        self.configs[name] = JoinConfig(
            max_lag_ms=int(settings.max_lag_s * 1000),
            record_ttl_ms=int(settings.record_ttl_s * 1000),
            # A successor's state must be there when its predecessor closes, however late its producer ships.
            successor_ttl_ms=int((deployment.reward.window_s + settings.max_lag_s) * 1000) + DAY_MS,
            # A whole episode's reward comes within the window after its last decision, and may be given late.
            episode_ttl_ms=int((deployment.reward.window_s + 2 * settings.max_lag_s) * 1000),
            default_reward=repr(deployment.reward.default),
            aggregation=deployment.reward.aggregation,
            low="-inf" if low is None else repr(low),
            high="inf" if high is None else repr(high),
            n_step=deployment.reward.n_step,
        )
        served = self.policies.get(name)
        if served is None:
            served = self._open(plan)
        else:
            served.coalescer.decider.renew(plan, self.guarding.fit(plan))
        watched = self.shadows.follow(plan, deployment)
        served.coalescer.decider.onlooker = partial(self.shadows.show, name) if watched else None
        self.rewarded[plan.digest] = Rewarded(
            name,
            plan.observation,
            plan.action,
            served.states,
            plan.window_ms,
            served.coalescer.decider.memories.ended if remembers(plan) else lambda decision_id: None,
            None if deployment.reward.expression is None else Scalar.read(deployment.reward.expression),
        )
        self.policies[name] = served
        self._list(plan, deployment)

    def safeguard(self, policy: str, side: SafetySide, generation: int) -> None:
        """Put a policy's safety side in force, from the next draw on, also of rows that are being inferred."""
        safeguards = self.guarding.follow(policy, side, generation)
        if policy in self.policies:
            self.policies[policy].coalescer.decider.safeguards = safeguards

    async def aclose(self) -> None:
        """Wait until every row that was submitted has its outcome, and what is remembered of episodes is in Redis."""
        for served in self.policies.values():
            await served.coalescer.aclose()
        await asyncio.gather(*(store.aclose() for store in self._stores))

    def _open(self, plan: Plan) -> Served:
        settings = self.settings
        self.shipper.register(plan.policy)
        store = MemoryStore(self.streams, plan.policy, settings.recurrent_ttl_s, self.metrics)
        self._stores.append(store)
        memories = Memories(settings.recurrent_memory_bytes, settings.recurrent_ttl_s, store)
        arrivals = Arrivals(memories, store, self.clock, partial(self._count_lookups, plan.policy))
        inference = Inference(self.device, self.clock, settings.inference_timeout_s, memories)
        breakers = Breakers(self.clock, lambda policy, label: self.trips.append((policy, label)))
        decider = Decider(plan, self.ledger, self.keyring, self.clock, self.metrics, inference, breakers, arrivals)
        decider.safeguards = self.guarding.fit(plan)
        coalescer = Coalescer(decider, settings.max_batch)
        return Served(plan.policy, plan.observation, plan.action, StateReader(plan.observation), coalescer)

    def _count_lookups(self, policy: str, outcome: Outcome, episodes: int) -> None:
        self.metrics.memory_lookups.labels(policy, outcome).inc(episodes)

    def _list(self, plan: Plan, deployment: Deployment) -> None:
        """Tell the metrics what is loaded, in which role; series of versions that are not loaded any more go."""
        before, name = self._listed.get(plan.policy, {}), plan.policy
        now = {
            label: (name, label, version.bundle.digest, deployment.role_of(label) or STANDBY)
            for label, version in plan.versions.items()
        }
        for label, labels in before.items():
            if now.get(label) != labels:
                self.metrics.info.remove(*labels)
            if label not in now:
                self.metrics.forget(name, label)
        for labels in now.values():
            self.metrics.info.labels(*labels).set(1)
        self.metrics.loaded.labels(name).set(len(now))
        self._listed[name] = now


def plan_of(policy: str, document: Document, versions: Mapping[str, LoadedVersion], *, alone: bool = False) -> Plan:
    """Build the plan for a document whose versions are all among those that are loaded.

    alone: the champion alone decides, whatever the deployment says of others, also episodes that began on them.
    """
    deployment = document.deployment
    challenger = deployment.challengers[0] if deployment.challengers and not alone else None
    champion = versions[deployment.champion].bundle
    return Plan(
        policy=policy,
        digest=policy_digest(policy),
        generation=document.generation,
        routes=Routes(
            salt=salt_of(document, policy_digest(policy)),
            champion=deployment.champion,
            challenger=challenger.version if challenger else None,
            weight=challenger.weight if challenger else 0.0,
            route_by=deployment.route_by,
            generation=document.generation,
        ),
        versions=dict(versions),
        window_ms=int(deployment.reward.window_s * 1000),
        observation=champion.observation,
        action=champion.action,
        baseline=deployment.baseline,
        barred=barred(document),
        alone=alone,
    )
