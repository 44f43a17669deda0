"""What stands between a policy's networks and its answers, composed from the control state and the loaded versions.

Duty: for each policy one `Safeguards`: kill switches, trips, rules bound to every version, limits, an allowance. The
pipeline reads it; where its parts come from is known here.
Promise: rules that cannot be bound are never left out: then the declared fallback answers everything.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Final, get_args

import structlog

from policies.errors import SurefootError
from safety.burn import BurnLimit
from safety.document import read_rules
from safety.exploration import MICRO
from safety.halt import KillSwitch
from safety.limits import LimitSet
from service.allowance import Allowance
from service.clock import Clock
from service.leases import Leases
from service.limits import Limits
from service.metrics import Metrics
from service.plan import Plan, Safeguards
from service.redis_streams import RedisStreams
from service.ruling import Ruling
from service.standing import SafetySide

LIMITS_S = 0.25  # how often portions of limits are renewed, and what Redis was not told is told again
FROZEN: Final[frozenset[KillSwitch]] = frozenset({"freeze_exploration"})
log = structlog.get_logger(__name__)


@dataclass
class Guarding:
    """The safeguards of all policies of a worker. Use from the event loop's thread only."""

    streams: RedisStreams
    clock: Clock
    leases: Leases
    _sides: dict[str, SafetySide] = field(default_factory=dict)
    _plans: dict[str, Plan] = field(default_factory=dict)
    _rulings: dict[str, tuple[str, Ruling]] = field(default_factory=dict)
    _limits: dict[str, Limits] = field(default_factory=dict)
    _allowances: dict[str, Allowance] = field(default_factory=dict)
    _closing: set[asyncio.Task[None]] = field(default_factory=set)

    def follow(self, policy: str, side: SafetySide, generation: int) -> Safeguards:
        """Do as the control state says."""
        self._sides[policy] = side
        if side.exploration is not None:
            holder = self.leases.open(policy, side.exploration, generation)
            self._allowances[policy] = Allowance(side.exploration, holder, self.clock.monotonic_s)
        elif self._allowances.pop(policy, None) is not None:
            task = asyncio.get_running_loop().create_task(self.leases.close(policy))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        return self._compose(policy)

    def fit(self, plan: Plan) -> Safeguards:
        """Bind what holds to a plan's versions, before any of them decides."""
        self._plans[plan.policy] = plan
        return self._compose(plan.policy)

    async def run(self) -> None:
        """Renew limits for ever."""
        while True:
            await asyncio.gather(*(limits.run_once() for limits in self._limits.values()))
            await asyncio.sleep(LIMITS_S)

    def burn_limits(self) -> dict[str, BurnLimit]:
        """When exploration halts, of the policies that say so."""
        declared = {policy: side.exploration for policy, side in self._sides.items()}
        return {policy: each.burn for policy, each in declared.items() if each is not None and each.burn is not None}

    def refresh_metrics(self, metrics: Metrics) -> None:
        """Set the gauges that are read, not counted."""
        leases = self.leases.statistics()
        metrics.lease_failures.set(leases.failures)
        for policy, standing in leases.standing.items():
            metrics.lease_held.labels(policy).set(standing.explores)
            metrics.exploration_halted.labels(policy).set(not standing.burn.explores)
            for cap in self._allowances[policy].exploration.caps if policy in self._allowances else ():
                left = getattr(standing.left, cap.kind)
                metrics.budget_left.labels(policy, cap.kind).set(left / MICRO if cap.kind == "regret" else left)
        for policy, limits in self._limits.items():
            metrics.limit_denials.labels(policy).set(limits.statistics().calls.denied)
        for policy, side in self._sides.items():
            metrics.control_stale.labels(policy, "exploration").set(side.stale)
            for switch in get_args(KillSwitch):
                metrics.halts.labels(policy, switch).set(switch in side.halts)

    async def aclose(self) -> None:
        """Give back what is leased."""
        await asyncio.gather(*(limits.close() for limits in self._limits.values()))

    def _compose(self, policy: str) -> Safeguards:
        side = self._sides.get(policy, SafetySide())
        # Without Redis nobody could halt exploration here: what an operator has not frozen is frozen all the same.
        halts = side.halts | FROZEN if side.stale else side.halts
        found = Safeguards(halts, side.tripped, allowance=self._allowances.get(policy))
        plan = self._plans.get(policy)
        if not side.safety and policy in self._limits:
            self._limits[policy].configure(LimitSet())  # what is leased goes back
        if not side.safety or plan is None:
            return found
        try:
            ruling = self._ruling(policy, side.safety, plan)
        except SurefootError as error:
            log.error("rules_not_bound", policy=policy, field=error.field, reason=error.detail)
            return replace(found, halts=found.halts | {"fallback_only"})
        limits = self._limits.setdefault(policy, Limits(self.streams, policy, self.clock))
        limits.configure(ruling.limits)
        return replace(found, ruling=ruling, limits=limits if ruling.counts else None)

    def _ruling(self, policy: str, source: str, plan: Plan) -> Ruling:
        standing, ruling = self._rulings.get(policy, ("", None))
        if ruling is None or standing != source:
            ruling = Ruling.fitting(read_rules(source.encode()), plan.versions[plan.routes.champion].bundle)
            self._rulings[policy] = source, ruling
        for label, version in plan.versions.items():
            ruling.bind(version.bundle, label == plan.baseline)
        return ruling
