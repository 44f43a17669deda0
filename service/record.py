"""Settled rows to what is recorded and what is answered. Pure.

Duty: build the ledger's events and the callers' answers from the same arrays, so that they cannot differ.
It knows nothing of the ledger, HTTP or time (`at_ms` is given).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from policies.bundle import PolicyBundle
from policies.draw import Drawn
from policies.errors import NoSafeAction
from policies.explore import Behaviour
from policies.types import Box, Choices, Role, columns
from safety.fallback import reason
from safety.joint import marginals
from safety.types import Constraint, FallbackReason
from service.decision import DecisionEvent, DecisionFlags, Event, Record, action_text, encode_events, encode_record
from service.plan import Group, Outcome, Settled
from service.wire import INTERNAL, UNRECORDED, ActResponse, Exploration, PointDistribution, Safety

if TYPE_CHECKING:
    from policies.continuous import DrawnPoints, PointBehaviour


@dataclass(frozen=True, slots=True)
class Answers:
    """One outcome per row in the order of the batch, and the blob of events to record before they leave."""

    outcomes: list[Outcome]
    blob: bytes
    count: int
    at_ms: int
    executed: dict[int, tuple[float, ...] | None]  # by place in the batch; None: refused


def answer(settled: list[Settled], at_ms: int, kid: int) -> Answers:
    """Build outcomes and events. Rows that may not be answered (`fallback: none`) are refused and not recorded."""
    placed: dict[int, Outcome] = {}
    events: list[Event] = []
    executed: dict[int, tuple[float, ...] | None] = {}
    for part in settled:
        rows = _Rows(part, at_ms, kid)
        for i, index in enumerate(part.group.index):
            executed[index] = None if rows.refused(i) else rows.executed(i)
            if rows.refused(i):
                placed[index] = NoSafeAction("no action is allowed for this state")
                continue
            record = rows.record(i)
            events.append(rows.event(i, record))
            placed[index] = rows.response(i, record)
    return Answers(_in_order(placed), encode_events(events), len(events), at_ms, executed)


def _in_order(placed: dict[int, Outcome]) -> list[Outcome]:
    return [placed[index] for index in sorted(placed)]


def as_unlogged(outcomes: list[Outcome]) -> list[Outcome]:
    """The same answers, saying that they were not recorded."""
    return [
        msgspec.structs.replace(outcome, logged=False) if isinstance(outcome, ActResponse) else outcome
        for outcome in outcomes
    ]


def unrecorded(outcomes: list[Outcome], settled: Sequence[Settled]) -> list[Outcome]:
    """The same answers where nothing was kept: what was explored is not answered, the fallback is."""
    order = sorted(index for each in settled for index in each.group.index)
    placed = dict(zip(order, as_unlogged(outcomes), strict=True))
    explored = {i for i, outcome in placed.items() if isinstance(outcome, ActResponse) and outcome.explored}
    parts = [(each.group, [k for k, i in enumerate(each.group.index) if i in explored]) for each in settled]
    instead = last_resort([group.some(rows) for group, rows in parts if rows], UNRECORDED)
    return _in_order(placed | dict(zip(sorted(explored), instead, strict=True)))


def last_resort(groups: list[Group], reason: str = INTERNAL) -> list[Outcome]:
    """Answer with the declared fallback when the pipeline itself has failed; nothing is known, nothing is recorded."""
    placed: dict[int, Outcome] = {}
    for group in groups:
        plan, bundle = group.plan, group.version.bundle
        for index, decision_id, assigned in zip(group.index, group.ids, group.assignments, strict=True):
            if bundle.fallback is None:
                placed[index] = NoSafeAction("the decision failed and the policy declares no fallback")
                continue
            action, name = bundle.action.wire(bundle.fallback), bundle.action.label(bundle.fallback)
            placed[index] = ActResponse(
                decision_id=decision_id,
                policy=plan.policy,
                assigned_version=assigned.version,
                version=assigned.version,
                role=assigned.role,
                generation=plan.generation,
                action=action,
                action_name=name,
                propensity=None,
                propensity_reason=reason,
                explored=False,
                exploration=Exploration(0.0),
                safety=Safety(False, cast(Any, action if name is None else name), ()),
                fallback=reason,
                logged=False,
            )
    return _in_order(placed)


class _Rows:
    """Row-wise access to a settled group, with every array turned to Python values or bytes once."""

    def __init__(self, settled: Settled, at_ms: int, kid: int) -> None:
        self._settled = settled
        self._group = settled.group
        self._plan = settled.group.plan
        self._bundle = settled.group.version.bundle
        self._space = self._bundle.action
        self._at_ms = at_ms
        self._kid = kid
        outputs = settled.group.outputs
        self._states = _Slices(settled.group.states)
        recorded = settled.judged.constraint.recorded()
        probabilities = settled.target.distribution(), settled.behaviour.probabilities
        self._joint = None
        if isinstance(settled.judged.constraint, Constraint) and (factors := settled.judged.constraint.factors):
            self._joint = _Slices(recorded)
            recorded = marginals(recorded.astype(np.float64), factors) > 0.0
            probabilities = marginals(probabilities[0], factors), marginals(probabilities[1], factors)
        self._masks = _Slices(recorded)
        self._outputs = _Slices(outputs) if outputs is not None else None
        self._outputs_dtype = outputs.dtype.str if outputs is not None else "<f8"
        self._targets, self._behaviours = (_Slices(each) for each in probabilities)
        self._actions = settled.actions.tolist()
        self._propensity = settled.drawn.propensity.tolist()
        self._explored = settled.drawn.explored.tolist()
        self._epsilon = settled.behaviour.epsilon.tolist()
        self._fallen = settled.behaviour.fallback.tolist()
        self._passed = settled.passed.tolist()
        self._proposed = settled.proposed.tolist()
        self._masked = settled.masked_mass.tolist()
        self._exploring = None if settled.exploring is None else _Slices(settled.exploring)
        self._frozen = None if settled.frozen is None else settled.frozen.tolist()
        self._paid = settled.paid.tolist()
        self._left = settled.left
        declared = self._bundle.fallback
        self._fallback_action = None if declared is None else self._space.wire(declared)
        self._nvec = self._space.nvec if isinstance(self._space, Choices) and self._space.factors else ()
        self._points = (
            None
            if isinstance(settled.drawn, Drawn)
            else _Points(settled.drawn, cast("PointBehaviour", settled.behaviour), self._bundle)
        )

    def refused(self, i: int) -> bool:
        return self._bundle.fallback is None and (self._fallen[i] or not self._passed[i])

    def executed(self, i: int) -> tuple[float, ...]:
        return tuple(self._actions[i])

    def record(self, i: int) -> Record:
        group, row, assigned = self._group, self._group.rows[i], self._group.assignments[i]
        rules = self._settled.judged.constraint.rules_against(i, self._proposed[i])
        passed = self._passed[i]
        return Record(
            policy=self._plan.policy,
            assigned_version=assigned.version,
            version=self._bundle.version,
            digest=self._bundle.digest,
            role=self._role(assigned.role),
            stand_in=group.stand_in[i] if group.stand_in else None,
            generation=self._plan.generation,
            dtype=self._bundle.observation.wire_dtype,
            shape=self._bundle.observation.shape,
            head=self._bundle.head,
            outputs_dtype=self._outputs_dtype,
            outputs=self._outputs[i] if self._outputs else b"",
            target=self._targets[i],
            behaviour=self._behaviours[i],
            epsilon=self._epsilon[i],
            explored=self._explored[i],
            proposed=self._space.wire(self._proposed[i]),
            action_name=self._space.label(self._actions[i]),
            propensity=known(self._propensity[i]) if passed else None,
            key_id=self._kid,
            temperature=self._bundle.temperature,
            propensity_reason=None if passed else "check_failed",
            overridden=bool(rules),
            rules=rules,
            masked_mass=self._masked[i],
            fallback=self._fallback(i),
            fallback_action=self._fallback_action,
            weight=assigned.weight,
            switched=group.switched[i],
            key=row.key,
            context=row.context,
            traceparent=row.traceparent,
            action_kind=self._space.kind,
            nvec=self._nvec,
            state_reset=group.state_reset[i],
            exploring=self._exploring[i] if self._exploring else b"",
            joint_mask=self._joint[i] if self._joint else b"",
            rules_digest=self._settled.judged.rules_digest,
            monitored=self._settled.judged.constraint.monitors_against(i, self._actions[i]),
            frozen=self._frozen is not None and self._frozen[i],
            window=self._settled.windows if self._explored[i] else "",
            price=self._paid[i] if self._explored[i] else 0.0,
            pinned=assigned.generation if assigned.generation != self._plan.generation else 0,
            slow=group.infer_s * 1000 > self._bundle.latency_budget_ms,
            **(self._points.of(i, passed) if self._points else {}),
        )

    def _role(self, assigned: Role) -> Role:
        if self._group.stand_in is None:
            return assigned
        return "champion" if self._bundle.version == self._plan.routes.champion else "baseline"

    def event(self, i: int, record: Record) -> DecisionEvent:
        row = self._group.rows[i]
        return DecisionEvent(
            id=self._group.ids[i],
            episode=row.episode or "",
            step=-1 if row.step is None else row.step,
            due_ms=self._at_ms + self._plan.window_ms,
            at_ms=self._at_ms,
            action=action_text(self._actions[i]),
            state=self._states[i],
            mask=self._masks[i],
            record=encode_record(record),
            log_propensity=_log_propensity(record),
            flags=int(DecisionFlags.SWITCHED) if record.switched else 0,
        )

    def response(self, i: int, record: Record) -> ActResponse:
        include = self._group.rows[i].include
        proposed = self._space.label(self._proposed[i])
        return ActResponse(
            decision_id=self._group.ids[i],
            policy=record.policy,
            assigned_version=record.assigned_version,
            version=record.version,
            role=record.role,
            generation=record.generation,
            action=self._space.wire(self._actions[i]),
            action_name=record.action_name,
            propensity=record.propensity,
            propensity_reason=record.propensity_reason,
            explored=record.explored,
            exploration=Exploration(record.epsilon, self._left),
            safety=Safety(
                record.overridden,
                cast(Any, record.proposed if proposed is None else proposed),
                record.rules,
                record.stand_in,
            ),
            fallback=record.fallback,
            logged=True,
            switched=record.switched,
            state_reset=record.state_reset,
            propensity_kind=record.propensity_kind,
            log_propensity=record.log_propensity,
            values=self._values(i) if "values" in include else None,
            distribution=_distribution(self._settled, i) if "distribution" in include else None,
        )

    def _values(self, i: int) -> list[float] | None:
        """The network's outputs, where they are numbers that JSON can carry."""
        if self._settled.target.faulty[i]:
            return None
        return cast(list[float], cast(npt.NDArray[np.floating], self._group.outputs)[i].tolist())

    def _fallback(self, i: int) -> FallbackReason | None:
        if not self._passed[i]:
            return "check_failed"
        if not self._fallen[i]:
            return None
        return reason(
            failure=self._settled.judged.denied[i] or self._group.failure,
            finite=not self._settled.target.faulty[i],
            nothing_left=self._settled.judged.constraint.nothing_left(i),
        )


class _Points:
    """What is recorded of a drawn point besides what every decision has."""

    def __init__(self, drawn: DrawnPoints, behaviour: PointBehaviour, bundle: PolicyBundle) -> None:
        space = cast(Box, bundle.action)
        self._kinds = drawn.kinds
        self._log_propensity = drawn.log_propensity.tolist()
        self._raw = _Slices(drawn.raw)
        self._raw_log_prob = drawn.raw_log_prob.tolist()
        self._at_bound = drawn.at_bound.tolist()
        self._bounds = np.concatenate(space.bounds).tobytes()
        self._sigma = b"" if behaviour.sigma is None else behaviour.sigma.tobytes()
        self._transform = "tanh" if bundle.head == "squashed_gaussian" else bundle.transform

    def of(self, i: int, passed: bool) -> dict[str, Any]:
        return {
            "propensity_kind": self._kinds[i],
            "log_propensity": known(self._log_propensity[i]) if passed else None,
            "transform": self._transform,
            "bounds": self._bounds,
            "sigma": self._sigma,
            "raw_action": self._raw[i],
            "raw_log_prob": known(self._raw_log_prob[i]),
            "at_bound": tuple(self._at_bound[i]),
        }


def _log_propensity(record: Record) -> str:
    """As the event's head has it: "" where it is not known."""
    if record.log_propensity is not None:
        return repr(record.log_propensity)
    return repr(math.log(record.propensity)) if record.propensity else ""


def known(number: float) -> float | None:
    """A number that JSON can carry, or None."""
    return number if math.isfinite(number) else None


def _distribution(settled: Settled, i: int) -> list[float | list[float]] | PointDistribution:
    """What row i was drawn from, as answers hold it."""
    behaviour = settled.behaviour
    if isinstance(behaviour, Behaviour):
        row = behaviour.probabilities[i].tolist()
        return row if len(behaviour.nvec) == 1 else [row[part] for part in columns(behaviour.nvec)]
    return PointDistribution(
        mean=behaviour.target.mean[i].tolist(),
        std=behaviour.target.std[i].tolist(),
        low=[known(end) for end in behaviour.low[i].tolist()],
        high=[known(end) for end in behaviour.high[i].tolist()],
        epsilon=float(behaviour.epsilon[i]),
        sigma=None if behaviour.sigma is None else behaviour.sigma.tolist(),
    )


class _Slices:
    """Row i of an array [B, …] as little-endian bytes, made by one copy of the whole."""

    def __init__(self, array: npt.NDArray[np.generic]) -> None:
        self._whole = array.tobytes()
        self._stride = len(self._whole) // len(array)

    def __getitem__(self, i: int) -> bytes:
        return self._whole[i * self._stride : (i + 1) * self._stride]
