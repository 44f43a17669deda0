"""Whether a rule fits a policy, and leaves its declared fallback alone. Pure.

Duty: say what is wrong with one rule for one policy, at which field, and what to write instead. It knows no YAML.
Strategy: a rule fits where its evaluator can be built, so each is built, and thrown away; what is added here is what
the evaluator need not know, the fallback above all.
Promise 1: the fallback is declared safe, so a rule that may forbid it is refused unless it says `except_fallback`. A
limit on the fallback's own action may, `max_step` always may, `bounds` may where the fallback lies outside, whatever
their `when`; `forbid` is tried on sample states. Rules that monitor forbid nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from policies.errors import SafetyError
from policies.types import ActionSpec, Bools, Box, Choices, ObservationSpec
from safety.evaluate import Evaluator, evaluator
from safety.factor import chosen
from safety.facts import Boxed, Facts, Masked, MaskedJointly, Verdict
from safety.limits import bind as bind_limits
from safety.rules import Bounds, Choice, Cooldown, Cost, Forbid, MaxStep, Rate, Rule


@dataclass(frozen=True, slots=True)
class Fitting:
    """A policy as rules are held against it. states: [S, *shape], in which a `forbid` is tried on the fallback."""

    action: ActionSpec
    observation: ObservationSpec
    fallback: tuple[float, ...] | None
    states: npt.NDArray[np.floating]

    def kept_from(self, rule: Rule) -> tuple[float, ...] | None:
        """Give the fallback, if this rule must not forbid it."""
        return None if rule.mode == "monitor" or rule.except_fallback else self.fallback

    def forbidden(self, how: str, fallback: tuple[float, ...], field: str) -> SafetyError:
        label: object = self.action.label(fallback) or list(fallback)
        remedy = "change the rule, or say `except_fallback: true`: the fallback is then executed all the same"
        return SafetyError(f"{how} the declared fallback {label}; {remedy}", field)


def check(rule: Rule, policy: Fitting) -> None:
    """Check that a rule fits. Raises SafetyError naming the field below the rule."""
    match rule:
        case Rate():
            _counted(rule, rule.actions, policy, "actions")
        case Cooldown():
            _cooldown(rule, policy)
        case Cost():
            _cost(rule, policy)
        case _:
            _spares_fallback(rule, evaluator(rule, policy.action, policy.observation), policy)


def nearest_to_zero(observation: ObservationSpec) -> npt.NDArray[np.floating]:
    """Make a state to try rules in where none is given: zeros, moved into the features' range, [1, *shape]."""
    state = np.zeros(observation.shape)
    if observation.features:
        low = [-np.inf if each.low is None else each.low for each in observation.features]
        high = [np.inf if each.high is None else each.high for each in observation.features]
        state = np.clip(state, low, high)
    return state[None].astype(observation.dtype)


def _spares_fallback(rule: Rule, built: Evaluator, policy: Fitting) -> None:
    match rule:
        case Forbid():
            _tried_on_fallback(rule, built, policy)
        case Bounds() if isinstance(policy.action, Box):
            for side, ends, space in (("low", rule.low, policy.action.high), ("high", rule.high, policy.action.low)):
                _end(rule, side, ends or (), space, policy)
        case MaxStep() if (fallback := policy.kept_from(rule)) is not None:
            raise policy.forbidden("after an action further away, this forbids", fallback, "limit")


def _tried_on_fallback(rule: Forbid, built: Evaluator, policy: Fitting) -> None:
    fallback = policy.kept_from(rule)
    if fallback is None:
        return
    allowed = _allowed(built.judge(_facts(policy.states)), policy.action, fallback)
    if not allowed.all():
        how = f"in sample state {int(np.argmin(allowed))}, with an empty context, this forbids (or fails on)"
        raise policy.forbidden(how, fallback, "when")


def _facts(states: npt.NDArray[np.floating]) -> Facts:
    """Make rows of states of which nothing else is known."""
    rows = len(states)
    nothing = np.zeros(rows, dtype=np.bool_)
    return Facts(states, [None] * rows, [None] * rows, [None] * rows, nothing, None, greedy=False, faulty=nothing)


def _allowed(verdict: Verdict | None, action: ActionSpec, point: tuple[float, ...]) -> Bools:
    """Say in which rows a verdict allows an action, bool [B]."""
    if isinstance(verdict, Boxed):
        return np.asarray(((verdict.low <= point) & (point <= verdict.high)).all(axis=1))
    if not isinstance(action, Choices) or not isinstance(verdict, Masked | MaskedJointly):
        return np.ones(1, dtype=np.bool_)  # nothing is forbidden in any
    choices = [int(choice) for choice in point]
    if isinstance(verdict, MaskedJointly):
        return np.asarray(verdict.allowed[:, np.ravel_multi_index(choices, action.nvec)])
    return np.asarray(verdict.allowed[:, np.add(action.starts, choices)].all(axis=1))


def _end(rule: Bounds, side: str, ends: Sequence[float | None], space: tuple[float, ...], policy: Fitting) -> None:
    """Check the low or the high ends. space: the action space's ends on the other side."""
    sign = 1 if side == "low" else -1
    fallback = policy.kept_from(rule)
    for d, end in enumerate(ends):
        if end is not None and sign * end > sign * space[d]:
            raise SafetyError(f"the action space ends at {space[d]:g}: this leaves nothing of it", f"{side}[{d}]")
        if end is not None and fallback is not None and sign * end > sign * fallback[d]:
            raise policy.forbidden("this forbids", fallback, f"{side}[{d}]")


def _cooldown(rule: Cooldown, policy: Fitting) -> None:
    try:
        chosen(rule.after or [], rule.factor, policy.action)
    except SafetyError as error:
        raise SafetyError(error.detail, (error.field or "").replace("actions", "after")) from None
    _counted(rule, rule.actions, policy, "actions")


def _cost(rule: Cost, policy: Fitting) -> None:
    for name in rule.costs:
        try:
            chosen([name], rule.factor, policy.action)
        except SafetyError as error:
            raise SafetyError(error.detail, (error.field or "").replace("actions[0]", f"costs.{name}")) from None
    _counted(rule, [name for name, cost in rule.costs.items() if cost > 0], policy, "costs")


def _counted(rule: Rate | Cooldown | Cost, actions: Sequence[Choice], policy: Fitting, field: str) -> None:
    """Check what is counted; refuse a limit on the very choice that the fallback makes."""
    among, part = chosen(actions, rule.factor, policy.action)
    try:
        bind_limits([rule], policy.action)
    except OverflowError:
        raise SafetyError("these numbers are too large to be counted exactly; use a larger unit", field) from None
    fallback = policy.kept_from(rule)
    assert isinstance(policy.action, Choices)
    factor = policy.action.starts.index(part.start)
    if fallback is not None and among[part.start + int(fallback[factor])]:
        raise policy.forbidden("this limit may forbid", fallback, field)
