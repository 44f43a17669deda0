"""Other tests of the same question, for the comparison in docs/sequential-tests.md: Howard's empirical Bernstein on the
same increments, and one betting confidence sequence for each version. Both give the evidence of a lower bound.
"""

from __future__ import annotations

import numpy as np
from scipy.special import gammainc, gammaln

from policies.types import Bools, Floats
from shadow.sequential import Difference, Predictions

GRID = np.linspace(0.0, 1.0, 401)


def howard(assigned: Bools, values: Floats, delta: float, weight: float) -> Floats:
    """Evidence that the average difference of values in [0, 1] is above `delta` after each unit, in nats, float64 [N].

    Howard, Ramdas, McAuliffe and Sekhon 2021, Theorem 4 with the gamma-exponential mixture of Proposition 9: X - Δ is
    sub-exponential with scale c, the width below, and variance process Σ(X - f)². It is tuned for about the units that
    it needs, with values of variance 0.04.
    """
    ones, zeros = predicted(assigned, values)
    residual = np.where(assigned, (values - ones) / weight, (zeros - values) / (1.0 - weight))
    width = 1.0 / min(weight, 1.0 - weight)
    sums, variance = np.cumsum(ones - zeros + residual - delta), np.cumsum(residual**2)
    rho = 200.0 * 0.04 / (weight * (1.0 - weight)) ** 2 / 8.0
    return gamma_exponential(sums, variance, rho, width)


def gamma_exponential(sums: Floats, variance: Floats, rho: float, width: float) -> Floats:
    """Log of the gamma-exponential mixture m(s, v), Howard et al. 2021, Proposition 9; 0 where it is not defined."""
    r, v = rho / width**2, variance / width**2
    s = np.maximum(sums / width, -0.999 * (r + v))
    log_m = r * np.log(r) - gammaln(r) - np.log(gammainc(r, r))
    log_m = log_m + gammaln(v + r) + np.log(np.maximum(gammainc(v + r, s + v + r), 1e-300))
    return np.asarray(log_m - (v + r) * np.log(s + v + r) + s + v)


def arms(assigned: Bools, values: Floats, delta: float, alpha: float) -> Bools:
    """Whether, after each unit, the challenger's lower bound is more than `delta` above the champion's upper one, [N].

    Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", Theorem 3: the capital of
    a bet on each version's own mean, each at α/2.
    """
    low = betting(values[assigned], alpha / 2.0)
    high = 1.0 - betting(1.0 - values[~assigned], alpha / 2.0)
    challengers = np.cumsum(assigned)
    champions = np.arange(1, len(values) + 1) - challengers
    return np.asarray(np.append(0.0, low)[challengers] - np.append(1.0, high)[champions] > delta)


def betting(values: Floats, alpha: float) -> Floats:
    """Lower bound of the mean after each value, float64 [N], to a grid: bets of their equation (26), at most 1/(2m)."""
    n = len(values)
    counts = np.arange(1.0, n + 1.0)
    means = (0.5 + np.cumsum(values)) / (counts + 1.0)
    variances = (0.25 + np.cumsum((values - means) ** 2)) / (counts + 1.0)
    before = np.append(0.25, variances[:-1])
    bets = np.sqrt(2.0 * np.log(1.0 / alpha) / (before * counts * np.log1p(counts)))
    with np.errstate(divide="ignore"):
        most = 0.5 / GRID
    best = np.zeros(n)
    for m, cap in zip(GRID, most, strict=True):
        capital = np.cumsum(np.log1p(np.minimum(bets, cap) * (values - m)))
        reached = np.maximum.accumulate(capital) >= np.log(1.0 / alpha)
        if not reached.any():
            break
        best = np.where(reached, m, best)
    return best


def predicted(assigned: Bools, values: Floats) -> tuple[Floats, Floats]:
    """The predictions that `Difference` makes, float64 [N] twice."""
    known, ones, zeros = Predictions(), np.empty(len(values)), np.empty(len(values))
    for i, (is_challenger, value) in enumerate(zip(assigned.tolist(), values.tolist(), strict=True)):
        ones[i], zeros[i] = min(max(known.champion + known.difference, 0.0), 1.0), known.champion
        known = known.after(is_challenger, value)
    return ones, zeros


def ours(assigned: Bools, values: Floats, delta: float, weight: float) -> Floats:
    """Evidence of the test that the service uses, float64 [N]."""
    return Difference.fresh(0.0, 1.0, weight).watch(assigned, values, delta)[1]
