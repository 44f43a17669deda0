"""What exploring costs, and which rows may: settled before the draw. Pure, total, vectorised over the batch.

Duty: prices of actions, and `allot`: the ε in force for each row, given what is left and how it is paced.
It knows nothing of Redis, windows or leases: what is left is an argument.
Strategy: whether a row explores is known from its first uniform alone (u_0 < ε), before any action is drawn. So the
rows of a batch are settled in order, each after what the rows before it took at most, and no row is denied for what an
earlier one might have taken. ε of a row depends on what was read before its draw, never on its own uniforms: its
propensity stays exact. Amounts are whole numbers (decisions, millionths of a price, rounded up): sums are exact.
Promise: whatever the uniforms are, and whatever is drawn, rows of one batch never take more than was left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from policies.types import Bools, Floats, Ints, columns
from safety.exploration import MICRO

CHEAPEST: Final = 0.01  # the price of the most harmless exploration: nothing is explored for nothing
UNLIMITED: Final = 1 << 53


@dataclass(frozen=True, slots=True)
class Left:
    """What may still be taken: explored decisions by rate and by share, millionths of regret."""

    rate: int = UNLIMITED
    share: int = UNLIMITED
    regret: int = UNLIMITED


@dataclass(frozen=True, slots=True)
class Pace:
    """What one decision may take on average so that the budget lasts to the window's end: the same three, as rates."""

    rate: float = np.inf
    share: float = np.inf
    regret: float = np.inf


NOTHING: Final = Left(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Allotted:
    """The outcome of `allot` for B rows.

    epsilon: float64 [B], in force. reserved: bool [B], rows that explore if their network answers. price: int64 [B],
    what each of them takes at most, in millionths; zeros where regret is not limited.
    """

    epsilon: Floats
    reserved: Bools
    price: Ints

    @property
    def count(self) -> int:
        """How many rows explore at most."""
        return int(self.reserved.sum())

    @property
    def regret(self) -> int:
        """What they cost at most, in millionths."""
        return int(self.price[self.reserved].sum())


def allot(wanted: Floats, u0: Floats, worst: Floats, expected: Floats, left: Left, pace: Pace) -> Allotted:
    """Settle which ε is in force for each of B rows, in their order.

    wanted: float64 [B], ε before any budget. u0: float64 [B], each row's first uniform. worst: float64 [B], the price
    of the worst action that the row could explore. expected: float64 [B], the mean price of its exploring draw.
    """
    count = min(left.rate, left.share)
    if count < 1 or left.regret < 1:
        return Allotted(np.zeros(len(wanted)), np.zeros(len(wanted), np.bool_), np.zeros(len(wanted), np.int64))
    most: Floats | float = min(_strength(pace.rate), _strength(pace.share))
    price = np.zeros(len(wanted), np.int64)
    if left.regret < UNLIMITED or pace.regret < np.inf:
        most = np.minimum(most, pace.regret / (MICRO * np.fmax(np.fmin(expected, 1.0), CHEAPEST)))
        price = millionths(worst)
    epsilon = np.fmin(np.fmax(np.minimum(wanted, most), 0.0), 1.0)  # what is not a number becomes zero
    reserved = u0 < epsilon
    if np.count_nonzero(reserved) >= count or price[reserved].sum() + price.max(initial=0) > left.regret:
        epsilon = _one_by_one(epsilon, u0, price, count, left.regret)
        reserved = u0 < epsilon
    return Allotted(epsilon, reserved, price)


def _strength(pace: float) -> float:
    return pace if pace > 0.0 else 0.0


def _one_by_one(epsilon: Floats, u0: Floats, price: Ints, count: int, regret: int) -> Floats:
    """The end of a budget: a row that does not fit does not explore, and takes nothing from the ones behind it."""
    granted = np.zeros(len(epsilon))
    rows = zip(epsilon.tolist(), u0.tolist(), price.tolist(), strict=True)
    for row, (strength, uniform, most) in enumerate(rows):
        if count >= 1 and regret >= most:
            granted[row] = strength
            if uniform < strength:
                count, regret = count - 1, regret - most
    return granted


# Prices


def prices(scores: Floats, mask: Bools, scale: float | None, greedy: bool, nvec: Sequence[int] | None = None) -> Floats:
    """Price every choice if it were explored, float64 [B, N], each between 0.01 and 1.

    scores, mask: [B, N], the target's scores and what the rules allow. greedy: scores are values: the price is
    (max_M q - q(a)) / scale; without a usable scale it is 1. Otherwise they are probabilities: max_M π - π(a).
    """
    prices = np.ones(scores.shape)
    if greedy and not (scale is not None and np.isfinite(scale) and scale > 0.0):
        return prices
    divisor = scale if greedy and scale is not None else 1.0
    for part in columns(tuple(nvec or (scores.shape[1],))):
        with np.errstate(invalid="ignore", over="ignore"):
            best = np.where(mask[:, part], scores[:, part], -np.inf).max(axis=1, keepdims=True)
            prices[:, part] = (best - scores[:, part]) / divisor
    return np.clip(_number(prices, 1.0), CHEAPEST, 1.0)


def worst_price(prices: Floats, may: Bools, nvec: Sequence[int] | None = None) -> Floats:
    """The price of the worst action that may be explored, float64 [B]. may: bool [B, N], M within `explore_only`."""
    return _summed([np.where(may[:, part], prices[:, part], 0.0).max(axis=1) for part in _parts(prices, nvec)])


def expected_price(prices: Floats, uniform: Floats, nvec: Sequence[int] | None = None) -> Floats:
    """The mean price of an exploring draw, float64 [B]. uniform: float64 [B, N], what it draws from."""
    return _summed([(prices[:, part] * uniform[:, part]).sum(axis=1) for part in _parts(prices, nvec)])


def paid_price(prices: Floats, actions: Ints, nvec: Sequence[int] | None = None) -> Floats:
    """The prices of drawn actions, float64 [B]. actions: int64 [B, F], one choice for each factor."""
    rows = np.arange(len(prices))
    return _summed([prices[rows, part.start + actions[:, f]] for f, part in enumerate(_parts(prices, nvec))])


def _parts(prices: Floats, nvec: Sequence[int] | None) -> list[slice]:
    return columns(tuple(nvec or (prices.shape[1],)))


def _summed(factors: list[Floats]) -> Floats:
    """Factors add up, to 1 at most: no exploration costs more than the worst of a single choice."""
    return np.asarray(np.clip(np.sum(factors, axis=0), CHEAPEST, 1.0), dtype=np.float64)


def point_prices(points: Floats, centre: Floats, low: Floats, high: Floats) -> Floats:
    """Price points by their distance from what the version would do without chance, float64 [B], 0.01 to 1.

    points, centre: float64 [B, D]. low, high: float64 [D], the action space. The mean over coordinates of the distance
    as a part of the side; a side without end prices every point 1, one without width nothing.
    """
    width = np.broadcast_to(np.asarray(high - low, dtype=np.float64), points.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(width > 0.0, np.abs(points - centre) / width, 0.0)
    parts = np.where(np.isfinite(width), parts, 1.0)
    return np.clip(_number(parts.mean(axis=1), 1.0), CHEAPEST, 1.0)


def worst_point_price(centre: Floats, box: tuple[Floats, Floats], low: Floats, high: Floats) -> Floats:
    """The price of the point of each row's box [B, D] that is farthest from the centre, float64 [B]."""
    ends = [np.clip(np.where(np.isfinite(end), end, centre), low, high) for end in box]
    far = np.where(np.abs(ends[0] - centre) > np.abs(ends[1] - centre), ends[0], ends[1])
    return point_prices(far, centre, low, high)


def expected_point_price(centre: Floats, sigma: Floats, worst: Floats, low: Floats, high: Floats) -> Floats:
    """The mean price of Gaussian noise around the centre, float64 [B]: E|N(0, σ²)| = σ·√(2/π), never above `worst`."""
    return np.minimum(worst, point_prices(centre + sigma * np.sqrt(2.0 / np.pi), centre, low, high))


def millionths(price: Floats) -> Ints:
    """Prices as whole millionths, rounded up, int64. What is no price costs 1, and nothing less than the cheapest."""
    return np.ceil(np.fmax(np.fmin(price, 1.0), CHEAPEST) * MICRO - 1e-6).astype(np.int64)


def _number(values: Floats, otherwise: float) -> Floats:
    return np.where(np.isnan(values), otherwise, values)
