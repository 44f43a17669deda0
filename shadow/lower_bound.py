"""A lower bound, valid at all times at once, for the mean of values that have a floor and a heavy upper tail. Pure.

Duty: sums over units in the order in which they started, and the bound that they give. It knows no policy: a unit k
brings a total S_k ≥ -debt of its N_k rows (an episode is one), and the bound is one of ΣE[S_k]/ΣE[N_k].
Strategy: importance-weighted gains w·(r - worst) are at least 0 and have a mean within the range, whereas their largest
value is that of the largest weight, which nobody knows before. A bound from below needs no ceiling: with a prediction ŝ
made before the unit was seen, and a stake λ with 1 + λ(S - ŝ) > 0 always,

    E[1 + λ(S - ŝ)] = 1 + λ(σ - ŝ) ≤ exp(λ(σ - ŝ)),    so that    Π (1 + λ(S_k - ŝ_k)) · exp(λ Σ(ŝ_k - σ_k))

is a nonnegative supermartingale that starts at one, however the means σ_k change: Mineiro 2022, "A lower confidence
sequence for the changing mean of non-negative right heavy-tailed observations with bounded mean". Stake by stake it is
above the empirical Bernstein process of Howard, Ramdas, McAuliffe, Sekhon 2021, "Time-uniform, nonparametric,
nonasymptotic confidence sequences", Theorem 4, which Waudby-Smith, Wu, Ramdas, Karampatziakis, Mineiro 2024,
"Anytime-valid off-policy inference for contextual bandits", build on: log(1 + λx) ≥ λx + (log(1 - λ) + λ)·x² for
x ≥ -1 (Fan, Grama, Liu 2015). One huge value adds its logarithm, and does not take away its square: no weight needs to
be cut. A mixture over a fixed grid of λ is such a process too, and by Ville's inequality it ever reaches 1/α with
probability α at most. For N_k rows take S - θN in place of S, which has mean zero at the true ratio θ. Then

    log(1 + a - b) = log(1 + a) + log(1 - x) ≥ log(1 + a) - x - x²,   a = λ(S - ŝ), b = λθ(N - n̂), x = b/(1 + a),

for |x| ≤ ½, which makes the evidence quadratic in θ: three sums for each stake are all that has to be kept.
Promise: the bound is above the truth at any time ever with probability α at most. For episodes the truth may drift, and
is then the average so far; for rows of several to a unit it is one ratio.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from policies.types import Floats

STAKE = 0.9  # most of the wealth that one unit can take
_STAKE_OF_MANY = 0.6  # where units have several rows, whose number takes a part too
_STEPS = np.arange(-4, 12)  # stakes are 2^-j of the natural one; the first are for values that hardly leave their floor
_WORTH = 1.0 / (2.0 + np.abs(_STEPS - 3.0)) ** 2  # most of it where importance-weighted gains need it
_LOG_WEIGHTS: Floats = np.log(_WORTH / _WORTH.sum())
_ROUNDS, _POINTS = 6, np.linspace(0.0, 1.0, 33)  # 32^-6 of the span is a billionth


class LowerBound(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known, of bounded size.

    span: the mean of S/N lies in [0, span]. debt: S ≥ -debt. most: 1 ≤ N ≤ most. table: float64 [3, K], the
    coefficients of 1, θ and θ² in the evidence of each stake.
    """

    span: float
    debt: float
    most: int
    table: bytes
    units: int = 0
    total: float = 0.0
    size: float = 0.0

    @classmethod
    def fresh(cls, *, span: float, debt: float = 0.0, most: int = 1) -> LowerBound:
        """Of nothing yet. Raises ValueError for an empty span, a negative debt, or units without rows."""
        if not (0.0 < span < math.inf and 0.0 <= debt < math.inf and most >= 1):
            raise ValueError("a bound needs a finite span above 0, a debt of 0 or more, and units of at least one row")
        return cls(span=span, debt=debt, most=most, table=np.zeros((3, len(_STEPS))).tobytes())

    def add(self, totals: Floats, sizes: Floats) -> LowerBound:
        """Add units in their order: their S and N, float64 [k] each. As many calls one by one would, up to rounding.

        What breaks the promised floor would make the wealth negative, and is a mistake of the caller: ValueError.
        """
        if (totals < -self.debt - 1e-9 * self.span).any() or ((sizes > self.most) | (sizes < 1.0)).any():
            raise ValueError("a total below its floor, or a unit without rows or with too many")
        before_total = self.total + np.concatenate([[0.0], np.cumsum(totals)])
        before_size = self.size + np.concatenate([[0.0], np.cumsum(sizes)])
        count = self.units + np.arange(1.0, len(totals) + 1.0)  # with one unit before all, of one row at half the span
        n_hat = (1.0 + before_size[:-1]) / count
        s_hat = np.clip((0.5 * self.span + before_total[:-1]) / count, 0.0, self.span * n_hat)
        grown = np.frombuffer(self.table).reshape(3, -1) + self._evidence(totals, sizes, s_hat, n_hat)
        return msgspec.structs.replace(
            self,
            table=grown.tobytes(),
            units=self.units + len(totals),
            total=float(before_total[-1]),
            size=float(before_size[-1]),
        )

    def value(self, alpha: float) -> float:
        """The bound, in [0, span]: all means below it are refuted at level `alpha`."""
        low, high, needed = 0.0, self.span, math.log(1.0 / alpha)
        for _ in range(_ROUNDS):
            grid = low + (high - low) * _POINTS
            holds = self.evidence(grid) < needed
            if not holds.any():
                return high
            first = int(holds.argmax())
            if first == 0:
                return low
            low, high = float(grid[first - 1]), float(grid[first])
        return low

    def evidence(self, thetas: Floats) -> Floats:
        """Log of the wealth against "the mean is θ or less", in nats, for each θ."""
        table = np.frombuffer(self.table).reshape(3, -1)
        theta = thetas[:, None]
        return np.asarray(np.logaddexp.reduce(_LOG_WEIGHTS + table[0] + table[1] * theta + table[2] * theta**2, axis=1))

    @property
    def _stake(self) -> float:
        return STAKE if self.most == 1 else _STAKE_OF_MANY

    def _stakes(self) -> Floats:
        """λ, float64 [K]: so small that λ·debt leaves a fifth of the stake for the prediction, which is lowered to what
        is left, so that a ≥ -stake. Units of several rows: |b| ≤ (1 - stake)/2, so that |x| ≤ ½.
        """
        stake, natural = self._stake, STAKE / (self.span + self.debt) * 2.0**-_STEPS
        largest = stake / (1.25 * self.debt) if self.debt else math.inf
        if self.most > 1:
            largest = min(largest, 0.5 * (1.0 - stake) / (self.span * self.most))
        return np.asarray(np.minimum(natural, largest))

    def _evidence(self, totals: Floats, sizes: Floats, s_hat: Floats, n_hat: Floats) -> Floats:
        """What units add to the table, float64 [3, K]."""
        stakes = self._stakes()
        lowered = np.minimum(s_hat[:, None], self._stake / stakes - self.debt)
        rest = np.maximum(1.0 + stakes * (totals[:, None] - lowered), 1.0 - self._stake)  # equal but for rounding
        excess = (sizes - n_hat)[:, None] / rest
        linear = excess + n_hat[:, None]
        return np.stack(
            [
                (np.log(rest) + stakes * lowered).sum(axis=0),
                -stakes * linear.sum(axis=0),
                -(stakes**2) * np.square(excess).sum(axis=0),
            ]
        )
