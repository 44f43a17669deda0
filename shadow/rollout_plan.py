"""How versions of a policy are rolled out: steps, times, guards and margins; `rollout.yaml`. Pure.

Duty: the plan's fields, its defaults, and the guards that it comes to. It knows no stage and no evidence.
Strategy: guards that a plan does not name stand with their defaults, so that naming the return's margin does not take
away what notices a version that fails. A plan is copied into a rollout when that begins (`rollout.Standing`): margins
that change while somebody looks at the numbers are no margins.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from shadow.guards import Guard, Measure
from shadow.verdicts import Action, Alpha

MEASURES: tuple[Measure, ...] = get_args(Measure)
Share = Annotated[float, Meta(gt=0, lt=1)]
Seconds = Annotated[float, Meta(ge=0)]
Mode = Literal["auto", "manual"]
RETURN_MARGIN = 0.05  # of the range, where the plan names none


class GuardPlan(Struct, forbid_unknown_fields=True, frozen=True):
    """One guard: how much worse a version may be, and what happens when it is worse than that.

    margin: in the measure's unit, of a share 0.01 is one decision in a hundred. null: as `DEFAULTS` has it.
    """

    margin: Annotated[float, Meta(ge=0)] | None = None
    action: Action | None = None
    must_prove: bool | None = None


# measure -> margin (the return's is a share of its range), what happens, whether it must be shown to be no worse
DEFAULTS: dict[Measure, tuple[float, Action, bool]] = {
    "return": (RETURN_MARGIN, "rollback", True),
    "override": (0.05, "rollback", False),
    "fallback": (0.02, "rollback", False),
    "error": (0.01, "rollback", False),
    "latency": (0.05, "rollback", False),
    "default": (0.10, "pause", False),
    "quarantine": (0.01, "pause", False),
    "void": (0.05, "inform", False),
}


class RolloutPlan(Struct, forbid_unknown_fields=True, frozen=True):
    """How versions of a policy are rolled out. Defaults: the design's steps and α; an hour for each step."""

    objective: Literal["episode", "step"] = "step"
    return_range: tuple[float, float] | None = None  # of a unit's value; null: with `step`, the rewards' range
    steps: Annotated[tuple[Share, ...], Meta(min_length=1, max_length=32)] = (0.01, 0.05, 0.1, 0.25, 0.5)
    shadow: bool = True  # watch first
    gate: Literal["required", "advisory"] = "required"  # advisory: no evidence does not hold it, what refutes it does
    mode: Mode = "auto"
    begin: Literal["by_hand", "pushed"] = "by_hand"  # pushed: the version that was pushed last, by itself
    hold_s: Seconds = 3_600.0  # a step lasts this long at least: less would not see a day's hours
    min_units: Annotated[int, Meta(ge=1)] = 30  # of the challenger, in each step
    max_duration_s: Seconds = 7 * 86_400.0  # of a step: then it waits for a person
    unit_time_s: Annotated[float, Meta(gt=0, le=30 * 86_400)] = 600.0  # so long the stream is kept
    unit_decisions: Annotated[int, Meta(ge=1)] = 100
    alpha: Share = 0.01
    guards: dict[Measure, GuardPlan] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.return_range is not None:
            low, high = self.return_range
            if not (low < high and math.isfinite(low) and math.isfinite(high)):
                raise ValueError("rollout.return_range: low must be below high, both finite")
        if any(one >= two for one, two in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError("rollout.steps must rise")
        if self.max_duration_s < self.hold_s:
            raise ValueError("rollout.max_duration_s is below rollout.hold_s")

    def margin(self, returns: tuple[float, float]) -> float:
        """How much worse a unit's value may be. returns: the range of it."""
        named = self.guards.get("return")
        if named is not None and named.margin is not None:
            return named.margin
        return RETURN_MARGIN * (returns[1] - returns[0])

    def measured(self, returns: tuple[float, float], margin: float) -> tuple[Guard, ...]:
        """The guards, in the order of `MEASURES`. margin: of the return; what is left of the plan's."""
        return tuple(self._guard(measure, returns, margin) for measure in MEASURES)

    @property
    def budget(self) -> Alpha:
        """How α is cut."""
        return Alpha(total=self.alpha, guards=len(MEASURES), steps=len(self.steps))

    def _guard(self, measure: Measure, returns: tuple[float, float], margin: float) -> Guard:
        default, action, must_prove = DEFAULTS[measure]
        named = self.guards.get(measure, GuardPlan())
        return Guard(
            measure=measure,
            margin=margin if measure == "return" else default if named.margin is None else named.margin,
            action=named.action or action,
            must_prove=must_prove if named.must_prove is None else named.must_prove,
            return_range=returns,
        )
