"""`max_step`: how far an action may be from the key's last executed one. Pure, total.

Duty: a box around the last point, or a mask of the choices whose values lie near that of the last choice. It is told
the last action, and whether the past could be read at all; a row whose past is unknown is denied.
Promise: |a - last| <= limit as float64 arithmetic evaluates it, for every action that is left, with no tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from policies.errors import SafetyError, UnknownAction
from policies.types import ActionSpec, Box, Choices, Floats, columns
from safety.factor import the_factor
from safety.facts import Boxed, Facts, Masked
from safety.rules import Choice, MaxStep

Last = tuple[float, ...] | None


class StepOverChoices:
    """One `max_step` rule over the choices of one factor, each worth a number."""

    joint = False

    def __init__(self, rule: MaxStep, space: Choices) -> None:
        """Bind. Raises SafetyError naming the field."""
        self._name = rule.name
        self._factor = the_factor(rule.factor, space)
        self._part = columns(space.nvec)[self._factor]
        self._size, self._factors = space.size, len(space.nvec)
        self._limit = _one_limit(rule.limit)
        self._values = np.array(_values(rule.values, space.names[self._factor]))
        self._initial = _initial_choice(rule.initial, space, self._factor)
        with np.errstate(over="ignore"):
            self._near = np.abs(self._values[:, None] - self._values[None, :]) <= self._limit  # [last, next]

    def judge(self, facts: Facts) -> Masked:
        allowed = np.ones((len(facts.states), self._size), dtype=np.bool_)
        for row, (last, known) in enumerate(zip(facts.previous, facts.past.tolist(), strict=True)):
            choice = self._initial if last is None else self._choice(last)
            allowed[row, self._part] = False if choice is None or not known else self._near[choice]
        return Masked(self._name, allowed)

    def _choice(self, last: tuple[float, ...]) -> int | None:
        """The last choice, None where it is none of this space."""
        if len(last) != self._factors:
            return None
        choice = last[self._factor]
        return int(choice) if choice in range(len(self._values)) else None


class StepInBox:
    """One `max_step` rule over the coordinates of a point."""

    joint = False

    def __init__(self, rule: MaxStep, space: Box) -> None:
        """Bind. Raises SafetyError naming the field."""
        if rule.factor is not None or rule.values is not None:
            detail = "factor and values are for choices; the action is continuous"
            raise SafetyError(detail, "factor" if rule.factor is not None else "values")
        self._name = rule.name
        self._size = space.size
        self._limit = _limits(rule.limit, space.size)
        self._initial = _initial_point(rule.initial, space.size)

    def judge(self, facts: Facts) -> Boxed:
        known = zip(facts.previous, facts.past.tolist(), strict=True)
        last = np.array([self._point(point, past) for point, past in known]).reshape(-1, self._size)
        low, high = around(last, self._limit)
        unknown = ~np.isfinite(last)
        return Boxed(self._name, np.where(unknown, np.inf, low), np.where(unknown, -np.inf, high))

    def _point(self, last: Last, known: bool) -> Sequence[float]:
        """The last point; NaN where it is not known."""
        point = self._initial if last is None else last
        return point if known and point is not None and len(point) == self._size else (math.nan,) * self._size


def around(last: Floats, limit: Floats) -> tuple[Floats, Floats]:
    """The widest ends that a point may have, float64 [B, D] each.

    `last ± limit` is rounded, perhaps outward; then one step inward is within the exact sum, and since rounding keeps
    order, so is the difference of every point of the box.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = last - limit, last + limit
        low = np.where(last - low > limit, np.nextafter(low, np.inf), low)
        return low, np.where(high - last > limit, np.nextafter(high, -np.inf), high)


def step_evaluator(rule: MaxStep, action: ActionSpec) -> StepOverChoices | StepInBox:
    """Bind a rule. Raises SafetyError naming the field."""
    return StepInBox(rule, action) if isinstance(action, Box) else StepOverChoices(rule, action)


def _one_limit(limit: float | list[float]) -> float:
    if isinstance(limit, list):
        raise SafetyError("for choices the limit is one number", "limit")
    return limit


def _limits(limit: float | list[float], size: int) -> Floats:
    if isinstance(limit, list) and len(limit) != size:
        raise SafetyError(f"the action has {size} coordinates, here are {len(limit)} limits", "limit")
    return np.broadcast_to(np.array(limit, dtype=np.float64), (size,))


def _values(declared: Mapping[str, float] | Sequence[float] | None, names: Sequence[str]) -> list[float]:
    """What each choice is worth, in order."""
    if declared is None:
        raise SafetyError("say what each choice is worth, by name or in order", "values")
    if isinstance(declared, Mapping):
        wrong = sorted(set(declared) ^ set(names))
        if wrong:
            said = "has no value" if wrong[0] in names else "is no action"
            raise SafetyError(f"{wrong[0]!r} {said}; values are for {', '.join(names[:16])}", "values")
        values = [float(declared[name]) for name in names]
    else:
        values = [float(value) for value in declared]
    if len(values) != len(names):
        raise SafetyError(f"there are {len(names)} choices, here are {len(values)} values", "values")
    if not all(map(math.isfinite, values)):
        raise SafetyError("values are finite numbers", "values")
    return values


def _initial_choice(initial: Choice | float | list[float] | None, space: Choices, factor: int) -> int | None:
    if initial is None:
        return None
    try:
        return space.index(initial, "initial", factor)
    except UnknownAction as error:
        raise SafetyError(error.detail, "initial") from None


def _initial_point(initial: Choice | float | list[float] | None, size: int) -> tuple[float, ...] | None:
    if initial is None:
        return None
    point = initial if isinstance(initial, list) else [initial]
    if isinstance(initial, str) or len(point) != size or not all(map(math.isfinite, cast(list[float], point))):
        raise SafetyError(f"initial is {size} finite numbers", "initial")
    return tuple(float(value) for value in point)
