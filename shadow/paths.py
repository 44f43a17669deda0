"""What each logged path says about another policy's return: importance-weighted, with and without a model. Pure.

Duty: for every unit the estimates that are later averaged, and the gains that bounds are made of. A path is an episode;
or one row, where the objective is the single step. It knows no average and no interval.
Strategy: one walk over time for all paths at once. With w_t = π(a_t)/b(a_t) and ρ_t = Π_{s≤t} w_s, a path is followed
with the probability that the target would have followed it. Where the target would have gone and the log could not
(b = 0), the share ρ_{t-1}·u_t leaves the path, and no model fills it in: at worst the return is then `floor_t`, what is
certain given what was earned so far, and at best `ceiling_t`. The same holds for what comes after a cut.
Sources: per-decision importance sampling, Precup, Sutton and Singh 2000; the recursive doubly robust estimator, Jiang
and Li 2016, eq. 10, unrolled as Thomas and Brunskill 2016 do; for one step Dudík, Langford and Li 2011.
Bounds: gains ρ_t·(floor_t - floor_{t-1}) are never negative, for what is certain only grows, so a bound from below
needs no largest weight. A model takes part as a control variate of mean zero that is lowered just so far that no unit
ever owes more than `debt` (for one step: Waudby-Smith, Wu, Ramdas, Karampatziakis, Mineiro 2024, whose k is our debt).
Promise: over what the log's versions draw, the mean of `value` is the target's mean return, its share
beyond the support at its worst, for any model that has not seen the path; `gain` and `loss` are at least -debt.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from policies.types import Bools, Floats, Ints
from shadow.rows import Choices, Rows

_HUGE = 1e100  # a weight whose square can still be summed; 500 steps of weight 40 would be beyond every float


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """Between what returns lie. low, high: of a path. rewards: of one step, if declared: returns are then known in part
    before their end. horizon: most steps of a path, if declared: without it negative rewards could go on for ever.
    """

    low: float
    high: float
    gamma: float = 1.0
    rewards: tuple[float, float] | None = None
    horizon: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for ranges that are empty or endless, and a γ outside (0, 1]."""
        ends = (self.low, self.high, *(self.rewards or ()))
        if not (np.isfinite(ends).all() and self.low < self.high and (not self.rewards or ends[2] <= ends[3])):
            raise ValueError("a range needs a low end below its high end, both finite")
        if not 0.0 < self.gamma <= 1.0 or (self.horizon is not None and self.horizon < 1):
            raise ValueError("γ lies in (0, 1], and a horizon is at least one step")

    @property
    def span(self) -> float:
        return self.high - self.low

    def rest(self, steps: int) -> tuple[Floats, Floats]:
        """The least and the most that may still be earned after each of 0..steps steps, float64 [steps + 1] each.

        In values of the beginning. A path may end at any time, so the least is never above 0, nor the most below.
        """
        if self.rewards is None:
            return np.full(steps + 1, -np.inf), np.full(steps + 1, np.inf)
        least, most = min(self.rewards[0], 0.0), max(self.rewards[1], 0.0)
        left = self._left(steps)
        return tuple(end * left if end else np.zeros(steps + 1) for end in (least, most))  # type: ignore[return-value]

    def _left(self, steps: int) -> Floats:
        """Σ γ^s over the steps that may still come, float64 [steps + 1]."""
        if self.horizon is not None:
            worth = np.zeros(max(self.horizon, steps) + 1)
            worth[: self.horizon] = self.gamma ** np.arange(self.horizon)
            return np.asarray(np.cumsum(worth[::-1])[::-1][: steps + 1])
        if self.gamma == 1.0:
            return np.full(steps + 1, np.inf)
        return np.asarray(self.gamma ** np.arange(steps + 1.0) / (1.0 - self.gamma))


@dataclass(frozen=True, eq=False, slots=True)
class Grid:
    """k units of up to T rows, filled up with steps at which nothing happens.

    rows: int64 [k, T], the row of each step. real: bool [k, T], it is a row. known: bool [k], nothing follows the last.
    """

    rows: Ints
    real: Bools
    known: Bools

    @classmethod
    def of(cls, rows: Rows) -> Grid:
        """Lay units out by step."""
        lengths = rows.lengths
        steps = np.arange(max(int(lengths.max(initial=0)), 1))
        real = steps < lengths[:, None]
        return cls(np.where(real, rows.starts[:, None] + steps, 0), real, rows.known)

    def fill(self, column: Floats, filling: float) -> Floats:
        """A column of rows over the grid, [k, T, ...]."""
        if not column.size:
            return np.full(self.rows.shape + column.shape[1:], filling)
        real = self.real.reshape(self.real.shape + (1,) * (column.ndim - 1))
        return np.where(real, column[self.rows], filling)


@dataclass(frozen=True, eq=False, slots=True)
class Paths:
    """What k units say, float64 [k] each; sums over rows where each row is a path.

    size: paths. value: an estimate of their return, doubly robust where there is a model, the target's mass beyond the
    support at its worst; it means nothing for an episode that is not known. gain: an estimate of no more than
    return - low, at least -debt; loss: of no more than high - return. weight: ρ at the end. unsupported: the share that
    left the path; weight + unsupported has mean one. squares: Σ weight². outside: int64 [k], returns, rewards and
    lengths beyond what was declared. earned, mass: float64 [k, T], what each step adds to the value without a model,
    and the share of the target's paths that this is about; paths that ended keep theirs. to_go, least: float64 [k, T],
    the logged return from each step on, and what was certain of it.
    """

    size: Floats
    value: Floats
    gain: Floats
    loss: Floats
    weight: Floats
    unsupported: Floats
    squares: Floats
    outside: Ints
    earned: Floats
    mass: Floats
    to_go: Floats
    least: Floats


@dataclass(frozen=True, eq=False, slots=True)
class _Returns:
    """What a path has earned, at least and at most gets, before and after each step, float64 [k, T, 3]."""

    before: Floats
    after: Floats
    outside: Ints


def walk(rows: Rows, bounds: Range, *, chained: bool, predicted: Floats | None = None, debt: float = 0.0) -> Paths:
    """Follow all paths: each unit is one (`chained`), or each row.

    predicted: float64 [n, A], the return from each row on by action; it must not have seen the unit. None: no model.
    debt: what a unit may owe at any time for the sake of the control variate.
    """
    grid = Grid.of(rows)
    rewards = grid.fill(rows.rewards, 0.0)
    returns = (_chained if chained else _single)(grid, rewards, bounds)
    ratios, exits = grid.fill(rows.targets / rows.propensities, 1.0), grid.fill(rows.unsupported, 0.0)
    control = None if predicted is None or rows.choices is None else _Control(rows.choices, predicted, grid)
    count, steps = grid.real.shape
    gain, loss = _certain(returns, bounds) if chained else np.zeros((2, count))
    rho, left, doubly = np.ones(count), *np.zeros((2, count))
    earned, mass = np.zeros((2, count, steps))
    for t in range(steps):
        before = rho if chained else np.ones(count)
        (partial, floor, ceiling), after = returns.before[:, t].T, returns.after[:, t].T
        rho = np.minimum(before * ratios[:, t], _HUGE)
        if control is not None:
            ahead = partial[:, None] + bounds.gamma**t * control.predicted[:, t]
            total = np.clip(ahead, floor[:, None], ceiling[:, None])
            doubly += control.at(t, total - partial[:, None], before, rho, None)
            gain += control.at(t, total - floor[:, None], before, rho, gain + debt)
            loss += control.at(t, ceiling[:, None] - total, before, rho, loss + debt)
            gain, loss = np.maximum(gain, -debt), np.maximum(loss, -debt)  # equal but for rounding, after a huge weight
        gain += rho * (after[1] - floor)
        loss += rho * (ceiling - after[2])
        share = before * exits[:, t]
        earned[:, t] = rho * (after[0] - partial) + share * (floor - partial)
        left = left + share if chained else share
        mass[:, t] = rho + left
    weights = rho[:, None] if chained else (mass - exits) * grid.real
    return Paths(
        size=np.ones(count) if chained else grid.real.sum(axis=1).astype(np.float64),
        value=earned.sum(axis=1) + doubly,
        gain=gain,
        loss=loss,
        weight=weights.sum(axis=1),
        unsupported=left if chained else exits.sum(axis=1),
        squares=np.square(weights).sum(axis=1),
        outside=returns.outside,
        earned=earned,
        mass=mass,
        to_go=_to_go(rewards, bounds.gamma),
        least=(returns.before[:, :, 1] - returns.before[:, :, 0]) / _worth(bounds, steps),
    )


def by_row(rows: Rows, table: Floats) -> Floats:
    """What a table [k, T] says about each row, [n]."""
    return np.asarray(table[Grid.of(rows).real])


def _single(grid: Grid, rewards: Floats, bounds: Range) -> _Returns:
    """Each step is a path: nothing is certain before it, and all after it."""
    nothing = np.broadcast_to([0.0, bounds.low, bounds.high], (*rewards.shape, 3))
    sure = np.clip(rewards, bounds.low, bounds.high)
    after = np.where(grid.real[:, :, None], np.stack([rewards, sure, sure], axis=2), nothing)
    return _Returns(nothing, after, (grid.real & _beyond(rewards, (bounds.low, bounds.high))).sum(axis=1))


def _chained(grid: Grid, rewards: Floats, bounds: Range) -> _Returns:
    """Accumulate rewards, and what is certain. A return beyond its range is cut, and told."""
    count, steps = rewards.shape
    partial = np.zeros((count, steps + 1))
    partial[:, 1:] = np.cumsum(rewards * bounds.gamma ** np.arange(steps), axis=1)
    least, most = bounds.rest(steps)
    lengths = grid.real.sum(axis=1)
    at = np.minimum(np.arange(steps + 1), lengths[:, None])  # what may follow a cut is what might have come there
    over = grid.known[:, None] & (at == lengths[:, None])
    floor = np.clip(np.where(over, partial, partial + least[at]), bounds.low, bounds.high)
    ceiling = np.clip(np.where(over, partial, partial + most[at]), bounds.low, bounds.high)
    outside = grid.known & _beyond(partial[:, -1], (bounds.low, bounds.high))
    if bounds.rewards is not None:
        outside = outside | (grid.real & _beyond(rewards, bounds.rewards)).any(axis=1)
    if bounds.horizon is not None:
        outside = outside | (lengths > bounds.horizon)
    floor, ceiling = np.maximum.accumulate(floor, axis=1), np.minimum.accumulate(ceiling, axis=1)
    table = np.stack([partial, floor, np.maximum(ceiling, floor)], axis=2)
    return _Returns(table[:, :-1], table[:, 1:], outside.astype(np.int64))


def _certain(returns: _Returns, bounds: Range) -> tuple[Floats, Floats]:
    """What every path gains, and loses, before its first step."""
    return returns.before[:, 0, 1] - bounds.low, bounds.high - returns.before[:, 0, 2]


def _beyond(values: Floats, ends: tuple[float, float]) -> Bools:
    slack = 1e-9 * (ends[1] - ends[0])
    return np.asarray((values < ends[0] - slack) | (values > ends[1] + slack))


def _worth(bounds: Range, steps: int) -> Floats:
    """γ^t, kept above zero."""
    return np.maximum(bounds.gamma ** np.arange(float(steps)), 1e-300)


def _to_go(rewards: Floats, gamma: float) -> Floats:
    """Σ_{s≥t} γ^(s-t)·r_s, [k, T]."""
    to_go = np.array(rewards)
    for t in range(rewards.shape[1] - 2, -1, -1):
        to_go[:, t] += gamma * to_go[:, t + 1]
    return to_go


class _Control:
    """The model as a control variate of mean zero: Σ_a π(a)·q(a) over what the log could do, less w·q(a_t)."""

    def __init__(self, choices: Choices, predicted: Floats, grid: Grid) -> None:
        supported = choices.behaviours > 0.0
        self.predicted = grid.fill(predicted, 0.0)
        wanted = np.where(supported, choices.targets, 0.0)
        self._wanted = grid.fill(wanted, 0.0)
        self._ratio = grid.fill(wanted / np.where(supported, choices.behaviours, 1.0), 0.0)
        self._action = grid.fill(choices.actions.astype(np.float64), 0.0).astype(np.int64)
        self._real = grid.real

    def at(self, t: int, q: Floats, before: Floats, rho: Floats, credit: Floats | None) -> Floats:
        """What step t adds, [k]. q: float64 [k, A]. credit: [k], no action may cost more; None: whatever it costs."""
        if credit is not None:
            reach = before[:, None] * self._ratio[:, t]
            q = np.where(reach > 0.0, np.minimum(q, credit[:, None] / np.where(reach > 0.0, reach, 1.0)), q)
        taken = np.take_along_axis(q, self._action[:, t, None], axis=1)[:, 0]
        return np.asarray(np.where(self._real[:, t], before * (self._wanted[:, t] * q).sum(axis=1) - rho * taken, 0.0))
