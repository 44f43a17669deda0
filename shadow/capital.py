"""What a bettor against "the challenger is no better than this" would own, whatever drifts meanwhile. Pure.

Duty: the wealth, in nats, of a mixture of fixed bets on the difference of two means, and the bound it inverts to. It
knows a fraction of a range for each unit and which version it was assigned to, and nothing of policies.
Strategy: units i = 1, 2, … are assigned at random, to the challenger with probability w (A = 1), and have values Y in
[0, 1]. With predictions f1, f0 of the two versions' values, made before the unit was seen,

    X = (f1 - f0) + ξ,    ξ = A/w · (Y - f1) - (1 - A)/(1 - w) · (Y - f0)

has mean Δ, the unit's own effect, given everything before (augmented inverse probability weighting; Howard, Ramdas,
McAuliffe, Sekhon 2021, section 4.2 on the Neyman-Rubin model). For a stake λ with 1 + λξ > 0 always,

    E[1 + λξ] = 1 + λ(Δ - f1 + f0) ≤ exp(λ(Δ - f1 + f0)),    so that    Π (1 + λξ) · exp(λ Σ(f1 - f0) - λ ΣΔ)

is a nonnegative supermartingale that starts at one, however Δ and the values' distribution change (Mineiro 2022,
"A lower confidence sequence for the changing mean of non-negative right heavy-tailed observations with bounded mean",
where it is shown to dominate Howard et al.'s empirical Bernstein, Theorem 4, stake by stake). So is a mixture over a
fixed grid of λ, and by Ville's inequality it ever reaches 1/α with probability α at most.
A stake above w would be ruined by one bad unit of the challenger if f1 were high: f1 is lowered, and f0 raised, just
so far that no unit takes more than `STAKE` of the wealth (Waudby-Smith, Wu, Ramdas, Karampatziakis, Mineiro 2024,
"Anytime-valid off-policy inference for contextual bandits", truncate the predictor of their lower doubly robust
pseudo-outcomes in the same way). Any prediction is valid; a good one has more power.
Promise: `wealth` and `bound` are valid at every time at once, for the running average of Δ, from one table of sums.
"""

from __future__ import annotations

import math

import numpy as np

from policies.types import Bools, Floats

STAKE = 0.9  # most of the wealth that one unit can take; 0.8 and 0.95 change the median of units needed by 10 % at most
HALVINGS = 12  # stakes down to 2^-12 of w(1 - w): for differences that are a thousandth of the values' variance


def tilts(weight: float) -> Floats:
    """Stakes λ for a share `weight` of units, float64 [K]: w(1 - w) · 2^j, up to 1.

    With w(1 - w) a challenger's worst unit takes most of the wealth, wherever the prediction is. The larger ones are
    for values that are nearly always at one end, whose predictions need not be moved far.
    """
    natural = weight * (1.0 - weight)
    return np.asarray(natural * 2.0 ** np.arange(-HALVINGS, math.floor(-math.log2(natural)) + 1))


def log_weights(weight: float) -> Floats:
    """Log of the mixture's weights, float64 [K]: most on w(1 - w), for gaps as large as the variance."""
    distance = np.abs(np.log2(tilts(weight) / (weight * (1.0 - weight))))
    worth = 1.0 / (1.0 + distance) ** 2
    return np.asarray(np.log(worth / worth.sum()))


def gains(assigned: Bools, values: Floats, ones: Floats, zeros: Floats, weight: float) -> Floats:
    """Log of what each unit multiplies each stake's wealth by, but for the factor exp(-λΔ), float64 [N, K].

    values, ones, zeros: float64 [N] in [0, 1], the units' values and the predictions f1, f0 for them.
    """
    stakes = tilts(weight)
    f1 = np.minimum(ones[:, None], STAKE * weight / stakes)
    f0 = np.maximum(zeros[:, None], 1.0 - STAKE * (1.0 - weight) / stakes)
    y = values[:, None]
    xi = np.where(assigned[:, None], (y - f1) / weight, (f0 - y) / (1.0 - weight))
    return np.asarray(np.log1p(stakes * xi) + stakes * (f1 - f0))


def wealth(sums: Floats, units: int | Floats, delta: float, weight: float) -> Floats:
    """Log of the mixture's wealth, had the average of Δ been `delta`, [...]; sums: [..., K], `gains` added up.

    The probability that it is ever log(1/α) or more, at a time when the average of Δ is `delta` or less, is α at most.
    """
    exponents = log_weights(weight) + sums - np.multiply.outer(np.asarray(units, float) * delta, tilts(weight))
    largest = exponents.max(axis=-1)
    return np.asarray(largest + np.log(np.exp(exponents - largest[..., None]).sum(axis=-1)))


def bound(sums: Floats, units: int, alpha: float, weight: float) -> float:
    """The largest average of Δ, in [-1, 1], at which the wealth is 1/α or more: a lower bound; -1 if there is none.

    `wealth` falls with `delta`, so it is halved towards; 50 halvings are more digits than a float shows here.
    """
    low, high, needed = -1.0, 1.0, math.log(1.0 / alpha)
    for _ in range(50):
        middle = (low + high) / 2.0
        if float(wealth(sums, units, middle, weight)) >= needed:
            low = middle
        else:
            high = middle
    return low
