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
from concurrent.futures import Executor

import numpy as np
import structlog

from policies.draw import draw, invert, uniforms
from policies.errors import LedgerBroken, LedgerFull
from policies.explore import behave, masked_mass
from policies.heads import target
from policies.route import Assignment, assign, unit_of
from policies.types import Floats, Ints, Target
from safety.chain import check, constrain
from service.clock import Clock
from service.ids import RANDOM_BYTES, Keyring
from service.ledger import Ledger
from service.metrics import Metrics
from service.pins import Pins
from service.plan import Group, Outcome, Plan, Row, Settled
from service.record import Answers, answer, as_unlogged, last_resort
from service.wire import ActResponse

# Above this predicted duration a call leaves the event loop: a thread hop costs 30 to 60 µs itself.
INLINE_S = 500e-6

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
        device: Executor,
        random: Callable[[int], bytes] = os.urandom,
        timeout_s: float = 1.0,
    ) -> None:
        self.plan = plan
        self._ledger = ledger
        self._keyring = keyring
        self._clock = clock
        self._metrics = metrics
        self._device = device
        self._random = random
        self._timeout_s = timeout_s
        self.pins = Pins()

    async def decide(self, rows: Sequence[Row]) -> list[Outcome]:
        """Decide on rows of this policy. Gives one outcome per row, in their order; never raises on data."""
        return await self.settle(await self.infer(rows))

    async def infer(self, rows: Sequence[Row]) -> list[Group]:
        """Route the rows and run each version's network once."""
        groups = self._route(self.plan, rows)
        for group in groups:
            await self._infer(group)
        return groups

    async def settle(self, groups: list[Group]) -> list[Outcome]:
        """Constrain, explore, draw, check, record and answer."""
        try:
            answers = self._answer([self._settle(group) for group in groups])
        except Exception:  # a bug: the promise of a safe answer holds all the same
            log.exception("pipeline_failed", policy=self.plan.policy)
            return self._count(last_resort(self.plan, groups))
        return await self._record(answers)

    def _route(self, plan: Plan, rows: Sequence[Row]) -> list[Group]:
        ids = self._keyring.mint(self._clock.event_ms(), plan.digest, self._random(RANDOM_BYTES * len(rows)))
        members: dict[str, list[int]] = {}
        assignments, switched = [], []
        for index, row in enumerate(rows):
            assignment, switch = self._assign(plan, row, ids[index])
            assignments.append(assignment)
            switched.append(switch)
            members.setdefault(assignment.version, []).append(index)
        states = plan.observation.array([row.state for row in rows])
        return [
            Group(
                plan.versions[label],
                index,
                [rows[i] for i in index],
                [ids[i] for i in index],
                [assignments[i] for i in index],
                [switched[i] for i in index],
                states if len(index) == len(rows) else states[index],
            )
            for label, index in members.items()
        ]

    def _assign(self, plan: Plan, row: Row, decision_id: str) -> tuple[Assignment, bool]:
        """Give a row's assignment, and whether its episode ran on another version the step before."""
        if row.episode is None:
            return assign(plan.routes, unit_of(plan.routes.route_by, row.key, None, decision_id)), False
        pin = self.pins.get(row.episode)
        if pin is not None and pin.version in plan.versions:
            return pin, False
        assignment = assign(plan.routes, unit_of(plan.routes.route_by, row.key, row.episode, decision_id))
        self.pins.put(row.episode, assignment)
        return assignment, pin is not None

    async def _infer(self, group: Group) -> None:
        engine, started = group.version.engine, self._clock.monotonic_s()
        try:
            if engine.device == "cpu" and engine.predicted_s(len(group.rows)) <= INLINE_S:
                group.outputs = engine.run(group.states)
            else:
                loop = asyncio.get_running_loop()
                async with asyncio.timeout(self._timeout_s):
                    group.outputs = await loop.run_in_executor(self._device, engine.run, group.states)
        except TimeoutError:
            group.failure = "inference_timeout"
        except Exception as error:
            group.failure = "inference_failed"
            log.error("inference_failed", policy=self.plan.policy, version=engine.bundle.version, error=str(error))
        group.infer_s = self._clock.monotonic_s() - started
        group.version.metrics.inference.observe(group.infer_s)

    def _settle(self, group: Group) -> Settled:
        bundle, rows = group.version.bundle, group.rows
        n = bundle.action.n
        outputs = group.outputs if group.outputs is not None else np.full((len(rows), n), np.nan)
        wanted = target(outputs, bundle.head, bundle.temperature)
        allowed = [row.allowed for row in rows]
        constraint = constrain(allowed, n)
        fallback = np.full(len(rows), bundle.fallback or 0, dtype=np.int64)
        behaviour = behave(wanted, constraint.mask, self._epsilon(group), fallback)
        u = uniforms(self._keyring.signing.draw, group.ids)
        drawn = draw(behaviour, u)
        passed = check(drawn.actions.tolist(), behaviour.fallback.tolist(), allowed, n)
        return Settled(
            group=group,
            target=wanted,
            constraint=constraint,
            behaviour=behaviour,
            proposed=propose(wanted, u),
            masked_mass=masked_mass(wanted, constraint.mask),
            actions=np.where(passed, drawn.actions, fallback),
            explored=drawn.explored,
            propensity=drawn.propensity,
            passed=passed,
        )

    def _epsilon(self, group: Group) -> Floats:
        """The exploration strength in force now: none where the caller forbids it, none when nothing is recorded."""
        strength = group.version.bundle.epsilon if self._ledger.accepting else 0.0
        return np.array([strength if row.explore else 0.0 for row in group.rows])

    def _answer(self, settled: list[Settled]) -> Answers:
        return answer(self.plan, settled, self._clock.event_ms(), self._keyring.signing.kid)

    async def _record(self, answers: Answers) -> list[Outcome]:
        try:
            if answers.count:
                appended = self._ledger.append_nowait(self.plan.policy, answers.count, answers.blob, answers.at_ms)
                await appended.committed
        except (LedgerFull, LedgerBroken) as error:
            log.warning("decisions_not_logged", policy=self.plan.policy, count=answers.count, reason=error.code)
            self._metrics.unlogged.labels(self.plan.policy).inc(answers.count)
            return self._count(as_unlogged(answers.outcomes))
        return self._count(answers.outcomes)

    def _count(self, outcomes: list[Outcome]) -> list[Outcome]:
        self._metrics.batch_rows.labels(self.plan.policy).observe(len(outcomes))
        for outcome in outcomes:
            if isinstance(outcome, ActResponse):
                self.plan.versions[outcome.version].metrics.count(outcome)
                for rule in outcome.safety.rules:
                    self._metrics.overrides.labels(outcome.policy, rule).inc()
            else:
                self._metrics.refusals.labels(self.plan.policy).inc()
        return outcomes


def propose(wanted: Target, u: Floats) -> Ints:
    """What the version would have done without a mask: the best action, or the same uniform through its own target."""
    if wanted.greedy:
        return np.asarray(wanted.scores.argmax(axis=1), dtype=np.int64)
    return invert(wanted.scores, u[:, 1])
