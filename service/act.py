"""HOT PATH: one batch of rows, from states to recorded decisions. Read it top to bottom.

    route -> infer -> constrain -> explore -> draw -> check -> record -> answer

Duty: call the pure steps in this order, on arrays with a leading batch axis, one group of rows for each version.
It knows nothing of HTTP, SQLite or Redis.
Strategy: the policy side (plan) is taken hold of before inference, the safety side is read after it, so that a halt
thrown meanwhile wins. Between inference and the record nothing is awaited: event times are in the order of the ledger.
Promise: every row is answered, whatever raises; an answer that says `logged` leaves after its commit.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

import numpy as np
import structlog
from prometheus_client import Counter

from policies.errors import LedgerBroken, LedgerFull, Unconfirmed
from policies.route import Assignment, assign, unit_of
from safety.halt import combined
from service.allowance import Strength, Terms
from service.arrivals import Arrivals
from service.breakers import Breakers
from service.clock import Clock
from service.holding import Held, reserve, waves
from service.ids import RANDOM_BYTES, Keyring
from service.inference import Inference
from service.judge import Judged, hand_rows_over, judge
from service.ledger import Ledger
from service.metrics import Metrics
from service.pins import Pins
from service.plan import Group, Outcome, Plan, Row, Safeguards, Settled
from service.record import Answers, answer, as_unlogged, executed, last_resort, unrecorded
from service.settle import settle
from service.wire import ActResponse

log = structlog.get_logger(__name__)


class Decider:
    """The pipeline of one policy."""

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        keyring: Keyring,
        clock: Clock,
        metrics: Metrics,
        inference: Inference,
        breakers: Breakers,
        arrivals: Arrivals | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.plan = plan  # replaced whole when versions come and go; a batch keeps the one it began with
        self._policy = plan.policy
        self._ledger = ledger
        self._keyring = keyring
        self._clock = clock
        self._metrics = metrics
        self._overrides: dict[str, Counter] = {}  # by rule
        self._batch_rows = metrics.batch_rows.labels(plan.policy)
        self._inference = inference
        self._random = random
        self._arrivals = arrivals  # None: episodes are this worker's own
        self.onlooker: Callable[[Sequence[Settled]], None] | None = None  # shown what was recorded, once it is answered
        self.breakers = breakers
        self._safeguards = Safeguards()
        self.memories = inference.memories
        self.pins = Pins()

    async def decide(self, rows: Sequence[Row]) -> list[Outcome]:
        """Decide on rows of this policy. Gives one outcome per row, in their order; never raises on data."""
        return await self.settle(await self.infer(rows))

    async def infer(self, rows: Sequence[Row]) -> list[Group]:
        """Route the rows and run each version's network once."""
        if self._arrivals is not None:
            await self._arrivals.meet(self.plan, rows, self.pins)
        groups = self._route(self.plan, rows)
        for group in groups:
            await self._ask(group)
        return groups

    async def settle(self, groups: list[Group]) -> list[Outcome]:
        """Constrain, explore, draw, check, record and answer."""
        seen: list[Settled] = []
        settled = [(wave, await self._settle(wave, seen)) for wave in waves(groups, self.safeguards)]
        self._show(seen)
        if len(settled) == 1:  # it has the whole batch, in its order
            return settled[0][1]
        outcomes: dict[int, Outcome] = {}
        for wave, answered in settled:
            outcomes.update(zip(sorted(index for group in wave for index in group.index), answered, strict=True))
        return [outcomes[index] for index in range(len(outcomes))]

    def _show(self, seen: list[Settled]) -> None:
        """Show shadows what was recorded, two turns of the event loop from now: the answers have left by then."""
        if self.onlooker is not None and seen:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self.onlooker, seen)

    async def _settle(self, groups: list[Group], seen: list[Settled]) -> list[Outcome]:
        """Settle rows of which no two wait for each other. Gives outcomes in the order of the batch.

        seen: what was recorded goes there.
        """
        held = None
        try:
            held = await reserve(groups, self.safeguards)
            judged = await self._judge(groups, held)
            for group, _ in judged:
                self._mark_switches(group)
            draw_key = self._keyring.signing.draw
            settled = [settle(group, verdict, self._terms(group), draw_key) for group, verdict in judged]
            answers = answer(settled, self._clock.event_ms(), self._keyring.signing.kid)
        except Exception:  # a bug: the promise of a safe answer holds all the same
            log.exception("pipeline_failed", policy=self._policy)
            if held is not None:
                held.settle({i: group.version.bundle.fallback for group in groups for i in group.index})
            return self._count(last_resort(groups))
        if held is not None:
            held.settle(executed(settled, answers.outcomes))
        self._watch(settled)
        return await self._record(answers, settled, seen)

    def renew(self, plan: Plan, safeguards: Safeguards) -> None:
        """Decide by another plan from the next batch on, and by safeguards that fit it."""
        self.safeguards = safeguards
        self.plan = plan
        self.breakers.keep(plan.versions.values())

    @property
    def safeguards(self) -> Safeguards:
        """What operators say of safety; replaced whole, read after inference."""
        return self._safeguards

    @safeguards.setter
    def safeguards(self, now: Safeguards) -> None:
        self._safeguards = now
        self.breakers.follow(now.tripped)

    async def _ask(self, group: Group) -> None:
        """Run a group's network, if its breaker lets it."""
        if not self.breakers.admits(group.version):
            group.failure = "breaker_open"
            return
        await self._inference.run(group)
        if self.breakers.observe(group) and group.plan.baseline is not None:
            self._inference.time(group, group.plan.versions[group.plan.baseline], self.breakers.observe_baseline)

    async def _judge(self, groups: list[Group], held: Held | None) -> list[tuple[Group, Judged]]:
        """Hold groups against the safety side as it is now; what the baseline must answer it is asked first."""
        for hand_over in (True, True, False):  # a kill switch may be thrown while the baseline is asked
            judged = [(group, self._verdict(group, held, hand_over)) for group in groups]
            if not any(verdict.handed_over for _, verdict in judged):
                break
            groups = [part for group, verdict in judged for part in hand_rows_over(group, verdict)]
            for group in groups:
                if group.stand_in and group.outputs is None and group.failure is None:
                    await self._ask(group)
        return judged

    def _verdict(self, group: Group, held: Held | None, hand_over: bool) -> Judged:
        past = None if held is None else held.past(group, self._clock.monotonic_s())
        return judge(group, self.safeguards, self._instead(group, hand_over), past)

    def _instead(self, group: Group, hand_over: bool) -> str | None:
        """The version that answers where a group's own may not; None: the fallback does."""
        plan, label = group.plan, group.version.bundle.version
        if not hand_over or label == plan.baseline:
            return None
        if label == plan.routes.challenger and self.breakers.able(plan, plan.routes.champion):
            return plan.routes.champion
        return plan.baseline

    def _route(self, plan: Plan, rows: Sequence[Row]) -> list[Group]:
        ids = self._keyring.mint(self._clock.event_ms(), plan.digest, self._random(RANDOM_BYTES * len(rows)))
        assignments = [self._assign(plan, row, decision_id) for row, decision_id in zip(rows, ids, strict=True)]
        members: dict[str, list[int]] = {}
        for index, assignment in enumerate(assignments):
            members.setdefault(assignment.version, []).append(index)
        states = plan.observation.array([row.state for row in rows])
        return [
            Group(
                plan,
                plan.versions[label],
                index,
                [rows[i] for i in index],
                [ids[i] for i in index],
                [assignments[i] for i in index],
                [False] * len(index),
                states if len(index) == len(rows) else states[index],
                [False] * len(index),
            )
            for label, index in members.items()
        ]

    def _assign(self, plan: Plan, row: Row, decision_id: str) -> Assignment:
        """Route a row; an episode stays with the version that it began on while that may decide."""
        if row.episode is None:
            if plan.routes.challenger is None:
                return plan.routes.to_champion
            return assign(plan.routes, unit_of(plan.routes.route_by, row.key, None, decision_id))
        pin = self.pins.get(row.episode)
        if pin is None or not plan.keeps(pin.version):
            pin = assign(plan.routes, unit_of(plan.routes.route_by, row.key, row.episode, decision_id))
            self.pins.put(row.episode, pin)
        return pin

    def _mark_switches(self, group: Group) -> None:
        """Say of each step whether another version decided the one before: the episode is cut there for learning."""
        version = group.version.bundle.version
        for i, row in enumerate(group.rows):
            group.switched[i] = row.episode is not None and self.pins.decided(row.episode, version)

    def _terms(self, group: Group) -> Terms:
        """On what terms a group explores now: not at all where the caller or an operator forbids it, where another
        version stands in, and when nothing is recorded.
        """
        own, allowance = group.version.bundle.epsilon, self.safeguards.allowance
        strength = Strength(own) if allowance is None else allowance.strength(own)
        halts = combined(self.safeguards.halts)
        open_to = halts.explores and group.stand_in is None and self._ledger.recording(self._policy)
        wanted = np.array([strength.epsilon if open_to and row.explore else 0.0 for row in group.rows])
        return Terms(wanted, strength, allowance)

    def _watch(self, settled: Sequence[Settled]) -> None:
        """Count what rules did beside the answer, and say what must never happen: an action that failed its check."""
        for each in settled:
            for rule in each.judged.failed:
                self._metrics.rule_failures.labels(self._policy, rule).inc()
            for i in [] if each.passed.all() else np.flatnonzero(~each.passed).tolist():
                log.error("check_failed", policy=self._policy, decision=each.group.ids[i])
            if each.judged.constraint.monitored:
                for rules in each.judged.constraint.monitors_against_all(each.actions):
                    for rule in rules:
                        self._metrics.monitored.labels(self._policy, rule).inc()

    async def _record(self, answers: Answers, settled: list[Settled], seen: list[Settled]) -> list[Outcome]:
        try:
            if answers.count:
                appended = self._ledger.append_nowait(self._policy, answers.count, answers.blob, answers.at_ms)
                await appended.committed
        except (LedgerFull, LedgerBroken) as error:
            log.warning("decisions_not_logged", policy=self._policy, count=answers.count, reason=error.code)
            self._metrics.unlogged.labels(self._policy).inc(answers.count)
            if isinstance(error, Unconfirmed):  # kept here, and on its way: another answer would belie the record
                return self._count(as_unlogged(answers.outcomes))
            return self._count(unrecorded(answers.outcomes, settled))
        seen += settled
        return self._count(answers.outcomes)

    def _count(self, outcomes: list[Outcome]) -> list[Outcome]:
        self._batch_rows.observe(len(outcomes))
        answered: dict[tuple[str, str], int] = {}
        for outcome in outcomes:
            if not isinstance(outcome, ActResponse):
                self._metrics.refusals.labels(self._policy).inc()
                continue
            who = outcome.version, outcome.role
            answered[who] = answered.get(who, 0) + 1
            if outcome.explored or outcome.fallback is not None or outcome.safety.rules or outcome.safety.stand_in:
                self._count_rare(outcome)
        for (version, role), count in answered.items():
            self._metrics.version(self._policy, version).decisions[role].inc(count)
        return outcomes

    def _count_rare(self, outcome: ActResponse) -> None:
        """Count what most answers have nothing of."""
        self._metrics.version(outcome.policy, outcome.version).count_rare(outcome)
        for rule in outcome.safety.rules:
            counter = self._overrides.get(rule)
            if counter is None:
                counter = self._overrides[rule] = self._metrics.overrides.labels(self._policy, rule)
            counter.inc()
        if outcome.safety.stand_in is not None:
            reason = outcome.safety.stand_in.partition(":")[0]
            self._metrics.stand_ins.labels(outcome.policy, reason).inc()
