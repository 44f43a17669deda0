"""What is said of a version's value: numbers with their errors, and what tells whether to trust them. Pure.

Duty: the words that the admin API, the terminal and the gate share; docs/estimates.md explains each. It computes
nothing, and knows no sums.
Strategy: what a log can say about the version is one `Support` for all methods, so that no method looks better for
leaving out what speaks against it.
Promise: a number that is not known is None, never a guess; bounds that know nothing are the ends of the range.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Method = Literal["ips", "snips", "dr", "pdis", "wpdis", "recursive_dr"]


class Support(msgspec.Struct, frozen=True, kw_only=True):
    """What the log knows of the version.

    units, rows: taken in. left_out: units of which a part is missing; no point estimate counts such an episode, every
    bound does, its rest at the worst. outside: returns, rewards or lengths beyond what was declared: no bound holds.
    effective_n: as many paths (rows, or episodes) as the version itself would have had to walk to know as much.
    mean_weight: with what is unsupported; 1 but for chance, or propensities or targets are wrong. None where unknown.
    disagreements: rows where the version would do another thing than the champion; matched: and the log did it.
    unsupported: share of the version's paths on which it does what the log never could; None where unknown.
    """

    units: int
    rows: int
    left_out: int
    outside: int
    effective_n: float
    mean_weight: float | None
    mean_weight_low: float | None
    mean_weight_high: float | None
    unsupported: float | None
    disagreements: int
    matched: int


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The version's value by one method: per row (`step`), or per episode.

    value, error, low, high: None for fewer than two units, or too few effective ones. error: standard, over units. low,
    high: at the terms' level, for one look, as units become many. lower, upper: each beyond the truth at any time ever
    with probability α at most. units: that the value is over.
    """

    method: Method
    value: float | None
    error: float | None
    low: float | None
    high: float | None
    lower: float
    upper: float
    units: int
    support: Support


class OneStepAdvantage(msgspec.Struct, frozen=True, kw_only=True):
    """What one step of the version, within the log's episodes, adds to the return from there on; no value of a policy.

    The mean over rows of Σ_a π(a)·Q(s, a) - V(s), Q and V being those of what decided: the policy advantage of Kakade
    and Langford 2002.
    """

    value: float
    error: float
    low: float
    high: float


class Estimates(msgspec.Struct, frozen=True, kw_only=True):
    """All methods that follow the objective. one_step_advantage: only where the objective is the episode."""

    objective: Literal["step", "episode"]
    methods: tuple[Estimate, ...]
    support: Support
    one_step_advantage: OneStepAdvantage | None = None

    def by(self, method: Method) -> Estimate:
        """The estimate by one method. Raises KeyError where it was not made: it is for another objective, or needs a
        model.
        """
        for each in self.methods:
            if each.method == method:
                return each
        raise KeyError(method)
