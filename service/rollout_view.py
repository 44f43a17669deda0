"""A rollout as the admin API tells it, read back: what the terminal shows. Pure.

Duty: shapes and defaults. It knows no words for people and no statistics.
Strategy: lenient where the service's own structs are strict: fields that are not known are left aside, numbers that are
not known are None, and a stage is text, so that an older terminal can watch a newer service.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct


class GuardPlan(Struct, frozen=True):
    """What is planned of one guard; None: as the service has it where nothing is said."""

    margin: float | None = None
    action: str | None = None
    must_prove: bool | None = None


class Plan(Struct, frozen=True):
    """How versions of the policy are rolled out; see `shadow.rollout_plan.RolloutPlan`."""

    objective: str = "step"
    return_range: tuple[float | None, float | None] | None = None
    steps: tuple[float, ...] = ()
    shadow: bool = True
    gate: str = "required"
    mode: str = "auto"
    begin: str = "by_hand"
    hold_s: float = 0.0
    min_units: int = 0
    max_duration_s: float = 0.0
    unit_time_s: float = 0.0
    unit_decisions: int = 0
    alpha: float | None = None
    guards: dict[str, GuardPlan] = {}


class Standing(Struct, frozen=True):
    """Where the rollout under way stands, or the last one. champion: what it is held against. plan: that it goes by."""

    id: str
    version: str
    stage: str
    champion: str = ""
    plan: Plan | None = None
    step: int = 0
    weight: float = 0.0
    since_ms: int = 0
    paused: str = ""
    proposal: str | None = None
    reason: str = ""

    @property
    def under_way(self) -> bool:
        return self.stage in ("shadow", "canary")


class Mark(Struct, frozen=True):
    """What stands against a version."""

    stage: str
    reason: str = ""
    since_ms: int = 0


class Units(Struct, frozen=True):
    challenger: int = 0
    champion: int = 0
    open: int = 0
    left_out: dict[str, int] = {}


class Ratio(Struct, frozen=True):
    share: float | None = None
    meant: float | None = None
    challengers: int = 0
    champions: int = 0
    mismatched: bool = False


class Guard(Struct, frozen=True):
    """One guard's numbers, challenger minus champion; see `shadow.verdicts.Reading`."""

    estimate: float | None = None
    lower: float | None = None
    upper: float | None = None
    margin: float | None = None
    action: str = ""
    must_prove: bool = False
    worse: bool = False
    proven: bool = False
    superior: bool = False
    lost: int = 0


class Evidence(Struct, frozen=True):
    """What is known of the step under way. through_ms: the time through which everything that happened is in it."""

    at_ms: int = 0
    through_ms: int = 0
    units: Units = Units()
    ratio: Ratio | None = None
    guards: dict[str, Guard] = {}
    verdict: str | None = None
    warnings: tuple[str, ...] = ()


class Gate(Struct, frozen=True):
    outcome: str
    reasons: tuple[str, ...] = ()


class Support(Struct, frozen=True):
    """What the log knows of a version; see `shadow.estimate.Support`."""

    left_out: int = 0
    outside: int = 0
    effective_n: float | None = None
    mean_weight: float | None = None
    mean_weight_low: float | None = None
    mean_weight_high: float | None = None
    unsupported: float | None = None
    disagreements: int = 0
    matched: int = 0


class Estimate(Struct, frozen=True):
    """A version's value by one method; see `shadow.estimate.Estimate`."""

    method: str
    support: Support
    value: float | None = None
    lower: float | None = None
    upper: float | None = None


class Estimates(Struct, frozen=True):
    objective: str = "step"
    methods: tuple[Estimate, ...] = ()


class View(Struct, frozen=True):
    """All that is told of a policy's rollout. plan: that the next one goes by."""

    policy: str
    generation: int = 0
    champion: str | None = None
    plan: Plan | None = None
    standing: Standing | None = None
    marks: dict[str, Mark] = {}
    next: str = ""
    evidence: Evidence | None = None
    gate: Gate | None = None
    estimates: dict[str, Estimates] = {}


def read_view(answer: object) -> View:
    """Read an answer's JSON. Raises ValueError naming the field that is something else."""
    return msgspec.convert(answer, View)
