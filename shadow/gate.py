"""Whether a version may leave the shadow for the canary: `passes`, `no_evidence`, or `fails`. Pure.

Duty: a verdict on one estimate, with its reasons. It knows no rollout; who acts on the verdict is not its business.
Strategy: first whether the numbers can be trusted at all, then whether they refute the version, then whether there is
evidence for it. What is not known holds: only `passes` opens the gate.
Promise: a version whose value is not above `champion_value - margin` passes with probability α of the estimate's terms
at most, however often one looks, if the log's propensities are true, whatever the version's network believes of itself.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shadow.estimate import Estimate, Support

Outcome = Literal["passes", "no_evidence", "fails"]
_ROUNDING = 1e-9


class GateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a version. margin: in the value's unit; how much worse than the champion is still good enough.

    most_unsupported: share of its paths that the log could not follow. least_matched: rows where it would do another
    thing than the champion, and the log did it. most_left_out: share of units of which a part is missing.
    """

    margin: float = 0.0
    most_unsupported: float = 0.01
    least_matched: int = 50
    most_left_out: float = 0.05

    def __post_init__(self) -> None:
        """Raise ValueError for what is no margin, share or number."""
        if not (self.margin >= 0.0 and self.least_matched >= 0):
            raise ValueError("a margin and a number of rows are at least 0")
        if not (0.0 <= self.most_unsupported <= 1.0 and 0.0 <= self.most_left_out <= 1.0):
            raise ValueError("shares lie between 0 and 1")


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """outcome: only `passes` opens the gate. reasons: what speaks against it, in words; empty where nothing does."""

    outcome: Outcome
    reasons: tuple[str, ...] = ()


def gate(estimate: Estimate, champion_value: float, config: GateConfig) -> Verdict:
    """Judge a version by one of its estimates.

    1. `no_evidence`: the log contradicts itself (weights, bounds, or what lies outside the declared range).
    2. `fails`: even the upper bound is below champion_value - margin.
    3. `no_evidence`: support, matched rows, left out units, or the lower bound are not enough; all that apply are told.
    4. `passes`.
    """
    wanted = champion_value - config.margin
    broken = _contradictions(estimate)
    if broken:
        return Verdict(outcome="no_evidence", reasons=tuple(broken))
    if estimate.upper < wanted:
        return Verdict(outcome="fails", reasons=(f"the upper bound {estimate.upper:.4g} is below {wanted:.4g}",))
    missing = _missing(estimate.support, config)
    if not estimate.lower > wanted:
        missing.append(f"the lower bound {estimate.lower:.4g} is not above {wanted:.4g}")
    return Verdict(outcome="no_evidence", reasons=tuple(missing)) if missing else Verdict(outcome="passes")


def _contradictions(estimate: Estimate) -> list[str]:
    """What makes every number of the estimate doubtful."""
    found, support = [], estimate.support
    if estimate.lower > estimate.upper:
        found.append(f"the lower bound {estimate.lower:.4g} is above the upper bound {estimate.upper:.4g}")
    if support.outside:
        found.append(f"{support.outside} returns, rewards or lengths lie outside what was declared")
    low, high = support.mean_weight_low, support.mean_weight_high
    if low is None or high is None:
        found.append("there are fewer than two units")
    elif not low - _ROUNDING <= 1.0 <= high + _ROUNDING:
        found.append(f"the mean weight lies in [{low:.4g}, {high:.4g}], which does not cover 1")
    return found


def _missing(support: Support, config: GateConfig) -> list[str]:
    """What there is too little of, or too much."""
    found = []
    if support.unsupported is None or support.unsupported > config.most_unsupported:
        share = "an unknown share" if support.unsupported is None else f"{support.unsupported:.2%}"
        found.append(f"{share} of its paths is unsupported, more than {config.most_unsupported:.2%}")
    if support.matched < config.least_matched:
        found.append(f"{support.matched} matched disagreements, {config.least_matched} needed")
    if support.left_out > config.most_left_out * support.units:
        found.append(f"{support.left_out} of {support.units} units are not wholly known")
    return found
