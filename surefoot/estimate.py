"""What another policy would have earned, from logged decisions: inverse-propensity estimates. Pure; numpy alone.

Duty: value and confidence interval of a target policy, one step at a time, and what no log can tell about it. It fits
no model and knows no streams.
Strategy: with w = π(a)/b(a), E[w·r] is the target's value wherever b has mass, and E[w] is one. What the logging policy
gave no chance (masked, or the budget was exhausted) is not guessed: its share u = Σ π(a)·1[b(a) = 0] is `unsupported`,
and `Estimate.bounds` gives it the worst and the best reward. E[w + u] is one always, so both are self-normalised alike.
Sources: Horvitz and Thompson 1952 (IPS); Hájek 1971, Swaminathan and Joachims 2015 (SNIPS); Maurer and Pontil 2009,
theorem 4 (empirical Bernstein); Efron and Stein 1981 (jackknife); Ionides 2008 (clipped weights).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from surefoot.batch import Batch, Bools, Floats

Method = Literal["ips", "snips"]
_TOLERANCE = 1e-6  # how far a target row may be from a sum of one


@dataclass(frozen=True, eq=False)
class Estimate:
    """The target's value on what the log supports.

    value, low, high: at `level`; NaN and infinite where nothing is known. n: decisions used. effective_n: (Σw)²/Σw²,
    as many decisions as the target itself would have had to make to know as much; below about 100 the normal interval
    is too narrow. mean_weight: must be near 1 - unsupported, else propensities or target are wrong. unsupported: share
    of the target's mass that had no chance. clipped: share of its mass that `clip` cut off. left_out: decisions without
    a propensity or a reward (check failed, voided).
    """

    method: Method
    value: float
    low: float
    high: float
    level: float
    n: int
    effective_n: float
    mean_weight: float
    unsupported: float
    clipped: float
    left_out: int
    _rows: _Rows = field(repr=False)
    _form: _Form = field(repr=False)

    def bounds(self, worst_reward: float, best_reward: float) -> tuple[float, float]:
        """Give an interval that covers the target's whole value, at `level`: all that was cut off or had no chance
        earned `worst_reward` at its low end and `best_reward` at its high end.
        """
        if not worst_reward <= best_reward:
            raise ValueError("the worst reward must not be above the best")
        rows, missing = self._rows, self._rows.missing
        if not rows.weights.size:
            return worst_reward, best_reward
        ends = []
        for which, reward in ((1, worst_reward), (2, best_reward)):
            form = self._form
            if form.largest is not None:
                form = replace(form, largest=form.largest + abs(reward))
            ends.append(_interval(form, rows.weights * rows.rewards + missing * reward, rows.weights + missing)[which])
        return max(ends[0], worst_reward), min(ends[1], best_reward)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The decisions used, [n] each."""

    weights: Floats
    rewards: Floats
    missing: Floats


@dataclass(frozen=True, slots=True)
class _Form:
    """How an interval is made. clusters: 0..k - 1, [n]; largest: what no earned value exceeds."""

    method: Method
    level: float
    clusters: npt.NDArray[np.intp] | None
    largest: float | None


def evaluate(batch: Batch, target: npt.ArrayLike, **options: object) -> Estimate:
    """Estimate the value of a policy over choices. target: [B, N], its probabilities, factors side by side.

    Give what the policy would do behind the same rules: `behind_masks`. Mass on actions that the log's mask forbade is
    unsupported otherwise, which is right for a policy that would come with other rules. Options are `estimate`'s.
    Raises ValueError for points (see `surefoot.log_prob` and `estimate`), for n-step transitions, and for rows that are
    no distributions. With several factors π and b are products; support is judged factor by factor.
    """
    if batch.rewards.ndim != 1:
        raise ValueError("these are n-step transitions: estimate from those of one step")
    probabilities = np.asarray(target, np.float64)
    parts = _parts(batch, probabilities)
    rows, chosen, supported = np.arange(len(batch)), np.ones(len(batch)), np.ones(len(batch))
    actions = batch.actions.reshape(len(batch), len(parts))
    for factor, part in enumerate(parts):
        pi, b = probabilities[:, part], batch.behaviour[:, part]
        if not ((pi >= 0.0).all() and (np.abs(pi.sum(axis=1) - 1.0) <= _TOLERANCE).all()):
            raise ValueError("each row of the target must be a distribution")
        chosen *= pi[rows, actions[:, factor]]
        supported *= np.where(b > 0.0, pi, 0.0).sum(axis=1)
    with np.errstate(divide="ignore"):
        log_target = np.log(chosen)
    return estimate(
        batch.rewards,
        log_target,
        batch.log_propensities,
        unsupported=np.clip(1.0 - supported, 0.0, 1.0),
        **options,  # type: ignore[arg-type]
    )


def behind_masks(batch: Batch, target: npt.ArrayLike) -> Floats:
    """Give the target as it would have acted behind the logged masks, [B, N]: π_M ∝ π · 1[M], by factor.

    Where nothing was allowed the fallback answered, as it would for any policy: such rows have all mass on it. A row
    without target mass on M raises ValueError: only its owner knows what the policy does then.
    """
    probabilities = np.asarray(target, np.float64)
    fallen = batch.fallbacks == "nothing_allowed"
    masked = np.where(batch.masks, probabilities, 0.0)
    actions = batch.actions.reshape(len(batch), -1)
    for factor, part in enumerate(_parts(batch, probabilities)):
        masked[fallen, part] = 0.0
        masked[fallen, part.start + actions[fallen, factor]] = 1.0
        mass = masked[:, part].sum(axis=1)
        if not (mass > 0.0).all():
            raise ValueError(f"the target of row {int(np.argmin(mass))} has no mass on what was allowed")
        masked[:, part] /= mass[:, None]
    return masked


def estimate(
    rewards: npt.ArrayLike,
    log_target: npt.ArrayLike,
    log_propensities: npt.ArrayLike,
    *,
    unsupported: npt.ArrayLike = 0.0,
    method: Method = "snips",
    level: float = 0.95,
    clip: float | None = None,
    clusters: npt.ArrayLike | None = None,
    largest: float | None = None,
) -> Estimate:
    """Estimate a policy's value from columns [B].

    log_target: log of the executed action's probability, or density, under the target; -inf where it would never take
    it. log_propensities: the logged ones, NaN where not known. rewards: NaN where there is none. unsupported: for each
    decision, target mass on what had no chance.
    method: `snips` divides by the weights' sum: a little biased (by 1/effective_n), mostly far narrower, and moves with
    a shift of the rewards. `ips` divides by n: unbiased. level: of the interval, two-sided.
    clip: weights above it are cut, and the mass cut off counts as missing in `bounds`; low and high are then about what
    is left. clusters: labels; rows of one label (an episode, a key) may depend on each other, labels not.
    largest: an upper bound of |weight · reward| known beforehand, such as max|r|·|M|/ε: the interval is then an
    empirical Bernstein bound, valid at any n for independent decisions; for `ips` without clip or clusters. Without
    it intervals are normal, valid as n grows.
    Raises ValueError for options that do not go together, and where a row is above `largest`.
    """
    if largest is not None and (method != "ips" or clusters is not None or clip is not None):
        raise ValueError("`largest` is for ips without clip or clusters: other means have no such bound")
    if not 0.0 < level < 1.0:
        raise ValueError("level must lie between 0 and 1")
    columns = [np.asarray(each, np.float64) for each in (rewards, log_target, log_propensities, unsupported)]
    reward, wanted, logged, missing = np.broadcast_arrays(*columns)
    known: Bools = np.asarray(np.isfinite(reward) & ~np.isnan(wanted) & np.isfinite(logged))
    weights = np.exp(wanted[known] - logged[known])
    cut = np.zeros(weights.shape) if clip is None else np.maximum(weights - clip, 0.0)
    groups = None if clusters is None else np.unique(np.asarray(clusters)[known], return_inverse=True)[1]
    rows = _Rows(weights - cut, reward[known], missing[known] + cut)
    earned = rows.weights * rows.rewards
    if largest is not None and (np.abs(earned) > largest).any():
        raise ValueError("some |weight · reward| is above `largest`")
    form = _Form(method, level, clusters=groups, largest=largest)
    value, low, high = _interval(form, earned, rows.weights)
    squares = float(np.square(rows.weights).sum())
    return Estimate(
        method=method,
        value=value,
        low=low,
        high=high,
        level=level,
        n=len(weights),
        effective_n=float(rows.weights.sum()) ** 2 / squares if squares else 0.0,
        mean_weight=_mean(rows.weights),
        unsupported=_mean(missing[known]),
        clipped=_mean(cut),
        left_out=int((~known).sum()),
        _rows=rows,
        _form=form,
    )


def _interval(form: _Form, earned: Floats, mass: Floats) -> tuple[float, float, float]:
    """Mean of `earned`, over n for ips, over the mean of `mass` for snips, with its ends."""
    n = len(earned)
    share = float(mass.mean()) if n and form.method == "snips" else 1.0
    if n < 2 or share == 0.0:
        return math.nan, -math.inf, math.inf
    value = float(earned.mean()) / share
    if form.largest is not None:
        log_term = math.log(4.0 / (1.0 - form.level))  # two sides, two events each
        range_term = 7.0 * 2.0 * form.largest * log_term / (3.0 * (n - 1))
        width = math.sqrt(2.0 * float(earned.var(ddof=1)) * log_term / n) + range_term
        return value, value - width, value + width
    part = mass / (n * share) if form.method == "snips" else np.full(n, 1.0 / n)
    width = NormalDist().inv_cdf(0.5 + form.level / 2.0) * _deviation(earned / (n * share), part, value, form.clusters)
    return value, value - width, value + width


def _deviation(earned: Floats, part: Floats, value: float, clusters: npt.NDArray[np.intp] | None) -> float:
    """Standard deviation of value = Σ earned, with Σ part = 1, by leaving out one row, or cluster, after the other: a
    row with a large part pulls the value towards itself, and its residual alone would not show it.
    """
    residual = earned - value * part
    if clusters is not None:
        part, residual = (np.bincount(clusters, weights=each).astype(np.float64) for each in (part, residual))
    left = 1.0 - part
    if not (left > 1e-12).all():
        return math.inf  # one row has all the weight
    return float(np.sqrt(np.square(residual / left).sum()))


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else 0.0


def _parts(batch: Batch, target: Floats) -> list[slice]:
    """Where each factor's columns lie."""
    if batch.action_kind == "continuous":
        raise ValueError("actions are continuous: use surefoot.log_prob and estimate")
    if target.shape != batch.behaviour.shape:
        raise ValueError(f"a target of shape {target.shape}, {batch.behaviour.shape} expected")
    ends = np.cumsum(batch.nvec).tolist()
    return [slice(end - n, end) for end, n in zip(ends, batch.nvec, strict=True)]
