"""Settled rows to what is recorded and what is answered. Pure.

Duty: build the ledger's events and the callers' answers from the same arrays, so that they cannot differ.
It knows nothing of the ledger, HTTP or time (`at_ms` is given).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt

from policies.errors import NoSafeAction
from safety.fallback import reason
from service.decision import DecisionEvent, Event, Record, encode_events, encode_record
from service.plan import Group, Outcome, Plan, Settled
from service.wire import INTERNAL, ActResponse, Exploration, Safety


@dataclass(frozen=True, slots=True)
class Answers:
    """One outcome per row of the batch, and the blob of events to record before they leave."""

    outcomes: list[Outcome]
    blob: bytes
    count: int
    at_ms: int


def answer(plan: Plan, settled: list[Settled], at_ms: int, kid: int) -> Answers:
    """Build outcomes and events. Rows that may not be answered (`fallback: none`) are refused and not recorded."""
    placed: dict[int, Outcome] = {}
    events: list[Event] = []
    for part in settled:
        rows = _Rows(plan, part, at_ms, kid)
        for i, index in enumerate(part.group.index):
            if rows.refused(i):
                placed[index] = NoSafeAction("no action is allowed for this state")
                continue
            record = rows.record(i)
            events.append(rows.event(i, record))
            placed[index] = rows.response(i, record)
    outcomes = [placed[index] for index in range(len(placed))]
    return Answers(outcomes, encode_events(events), len(events), at_ms)


def as_unlogged(outcomes: list[Outcome]) -> list[Outcome]:
    """The same answers, saying that they were not recorded."""
    return [
        msgspec.structs.replace(outcome, logged=False) if isinstance(outcome, ActResponse) else outcome
        for outcome in outcomes
    ]


def last_resort(plan: Plan, groups: list[Group]) -> list[Outcome]:
    """Answer with the declared fallback when the pipeline itself has failed; nothing is known, nothing is recorded."""
    placed: dict[int, Outcome] = {}
    for group in groups:
        fallback = group.version.bundle.fallback
        for index, decision_id, assigned in zip(group.index, group.ids, group.assignments, strict=True):
            if fallback is None:
                placed[index] = NoSafeAction("the decision failed and the policy declares no fallback")
                continue
            name = plan.action.names[fallback]
            placed[index] = ActResponse(
                decision_id=decision_id,
                policy=plan.policy,
                assigned_version=assigned.version,
                version=assigned.version,
                role=assigned.role,
                generation=plan.generation,
                action=fallback,
                action_name=name,
                propensity=None,
                propensity_reason=INTERNAL,
                explored=False,
                exploration=Exploration(0.0),
                safety=Safety(False, name, ()),
                fallback=INTERNAL,
                logged=False,
            )
    return [placed[index] for index in range(len(placed))]


class _Rows:
    """Row-wise access to a settled group, with every array turned to Python values or bytes once."""

    def __init__(self, plan: Plan, settled: Settled, at_ms: int, kid: int) -> None:
        self._plan = plan
        self._settled = settled
        self._group = settled.group
        self._bundle = settled.group.version.bundle
        self._at_ms = at_ms
        self._kid = kid
        outputs = settled.group.outputs
        behaviour = settled.behaviour
        self._states = _Slices(settled.group.states)
        self._masks = _Slices(settled.constraint.mask)
        self._outputs = _Slices(outputs) if outputs is not None else None
        self._outputs_dtype = outputs.dtype.str if outputs is not None else "<f8"
        self._targets = _Slices(settled.target.distribution())
        self._behaviours = _Slices(behaviour.probabilities)
        self._actions = settled.actions.tolist()
        self._propensity = settled.propensity.tolist()
        self._explored = settled.explored.tolist()
        self._epsilon = behaviour.epsilon.tolist()
        self._fallen = behaviour.fallback.tolist()
        self._passed = settled.passed.tolist()
        self._proposed = settled.proposed.tolist()
        self._masked = settled.masked_mass.tolist()

    def refused(self, i: int) -> bool:
        return self._bundle.fallback is None and (self._fallen[i] or not self._passed[i])

    def record(self, i: int) -> Record:
        group, row, assigned = self._group, self._group.rows[i], self._group.assignments[i]
        rules = self._settled.constraint.rules_against(i, self._proposed[i])
        fallback = self._fallback(i)
        return Record(
            policy=self._plan.policy,
            assigned_version=assigned.version,
            version=self._bundle.version,
            digest=self._bundle.digest,
            role=assigned.role,
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
            proposed=self._proposed[i],
            action_name=self._plan.action.names[self._actions[i]],
            propensity=self._propensity[i] if self._passed[i] else None,
            key_id=self._kid,
            temperature=self._bundle.temperature,
            propensity_reason=None if self._passed[i] else "check_failed",
            overridden=bool(rules),
            rules=rules,
            masked_mass=self._masked[i],
            fallback=fallback,
            fallback_action=-1 if self._bundle.fallback is None else self._bundle.fallback,
            weight=assigned.weight,
            switched=group.switched[i],
            key=row.key,
            context=row.context,
            traceparent=row.traceparent,
        )

    def event(self, i: int, record: Record) -> DecisionEvent:
        row = self._group.rows[i]
        return DecisionEvent(
            id=self._group.ids[i],
            episode=row.episode or "",
            step=-1 if row.step is None else row.step,
            due_ms=self._at_ms + self._plan.window_ms,
            at_ms=self._at_ms,
            action=self._actions[i],
            state=self._states[i],
            mask=self._masks[i],
            record=encode_record(record),
        )

    def response(self, i: int, record: Record) -> ActResponse:
        include = self._group.rows[i].include
        return ActResponse(
            decision_id=self._group.ids[i],
            policy=record.policy,
            assigned_version=record.assigned_version,
            version=record.version,
            role=record.role,
            generation=record.generation,
            action=self._actions[i],
            action_name=record.action_name,
            propensity=record.propensity,
            propensity_reason=record.propensity_reason,
            explored=record.explored,
            exploration=Exploration(record.epsilon),
            safety=Safety(record.overridden, self._plan.action.names[record.proposed], record.rules),
            fallback=record.fallback,
            logged=True,
            switched=record.switched,
            values=self._values(i) if "values" in include else None,
            distribution=self._settled.behaviour.probabilities[i].tolist() if "distribution" in include else None,
        )

    def _values(self, i: int) -> list[float] | None:
        """The network's outputs, where they are numbers that JSON can carry."""
        if self._settled.target.faulty[i]:
            return None
        return cast(list[float], cast(npt.NDArray[np.floating], self._group.outputs)[i].tolist())

    def _fallback(self, i: int) -> str | None:
        if not self._passed[i]:
            return "check_failed"
        if not self._fallen[i]:
            return None
        return reason(
            failure=self._group.failure,
            finite=not self._settled.target.faulty[i],
            allowed=int(self._settled.constraint.mask[i].sum()),
        )


class _Slices:
    """Row i of an array [B, …] as little-endian bytes, made by one copy of the whole."""

    def __init__(self, array: npt.NDArray[np.generic]) -> None:
        self._whole = array.tobytes()
        self._stride = len(self._whole) // len(array)

    def __getitem__(self, i: int) -> bytes:
        return self._whole[i * self._stride : (i + 1) * self._stride]
