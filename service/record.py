"""Settled rows to what is recorded and what is answered. Pure.

Duty: build the ledger's events and the callers' answers from the same arrays, so that they cannot differ.
It knows nothing of the ledger, HTTP or time (`at_ms` is given).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from policies.errors import NoSafeAction
from service.decision import encode_columns
from service.plan import Group, Outcome, Settled
from service.settled_rows import SettledRows
from service.wire import INTERNAL, UNRECORDED, ActResponse, Exploration, Safety


@dataclass(frozen=True, slots=True)
class Answers:
    """One outcome per row in the order of the batch, and the blob of events to record before they leave."""

    outcomes: list[Outcome]
    blob: bytes
    count: int
    at_ms: int


def answer(settled: list[Settled], at_ms: int, kid: int) -> Answers:
    """Build outcomes and events. Rows that may not be answered (`fallback: none`) are refused and not recorded."""
    placed: dict[int, Outcome] = {}
    events: list[tuple[object, ...]] = []
    for part in settled:
        rows = SettledRows(part, at_ms, kid)
        may_refuse = part.group.version.bundle.fallback is None
        for i, index in enumerate(part.group.index):
            if may_refuse and rows.refused(i):
                placed[index] = NoSafeAction("no action is allowed for this state")
                continue
            event, placed[index] = rows.both(i)
            events.append(event)
    # One group has its rows in the order of the batch.
    outcomes = list(placed.values()) if len(settled) == 1 else _in_order(placed)
    return Answers(outcomes, encode_columns(events), len(events), at_ms)


def executed(settled: Sequence[Settled], outcomes: Sequence[Outcome]) -> dict[int, tuple[float, ...] | None]:
    """What each row executed, by its place in the batch; None: it was refused. outcomes: of `answer`."""
    actions = {i: action for part in settled for i, action in zip(part.group.index, part.actions.tolist(), strict=True)}
    order = zip(sorted(actions), outcomes, strict=True)
    return {i: tuple(actions[i]) if isinstance(outcome, ActResponse) else None for i, outcome in order}


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
