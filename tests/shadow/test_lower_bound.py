"""The lower bound: below the mean at all times at once, whatever the tail, the drift, and the rows of a unit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from policies.types import Floats
from shadow.lower_bound import LowerBound
from tests.shadow.logs import Rng

ALPHA, RUNS = 0.1, 300
MOST = ALPHA + 3.0 * math.sqrt(ALPHA * (1.0 - ALPHA) / RUNS)
ONE = LowerBound.fresh(span=1.0)
Draw = Callable[[Rng, int], tuple[Floats, Floats]]  # totals and sizes


def weighted(rng: Rng, n: int) -> tuple[Floats, Floats]:
    return np.where(rng.random(n) < 0.0125, 40.0, 0.0), np.ones(n)


def heavy(rng: Rng, n: int) -> tuple[Floats, Floats]:
    return 0.5 * rng.pareto(1.5, n) * 0.5, np.ones(n)  # of infinite variance, mean ½


def indebted(rng: Rng, n: int) -> tuple[Floats, Floats]:
    return np.where(rng.random(n) < 0.25, -2.0, 4.0 / 3.0), np.ones(n)


def drifting(rng: Rng, n: int) -> tuple[Floats, Floats]:
    means = 0.5 + 0.5 * np.sin(np.arange(n) / 40.0)
    return (rng.random(n) < means).astype(np.float64), np.ones(n)


def many(rng: Rng, n: int) -> tuple[Floats, Floats]:
    """Units of 1 to 6 rows; the longer ones are worth more, all of a unit is alike."""
    sizes = rng.integers(1, 7, n)
    return np.where(rng.random(n) < sizes / 8.0, sizes, 0.0), sizes.astype(np.float64)


def averages(draw: Draw, n: int) -> Floats:
    """The true mean of the first 1..n units."""
    if draw is drifting:
        return np.asarray(np.cumsum(0.5 + 0.5 * np.sin(np.arange(n) / 40.0)) / np.arange(1.0, n + 1.0))
    return np.full(n, (91.0 / 48.0) / 3.5 if draw is many else 0.5)


@pytest.mark.parametrize(
    ("draw", "fresh"),
    [
        (weighted, ONE),
        (heavy, ONE),
        (indebted, LowerBound.fresh(span=1.0, debt=2.0)),
        (drifting, ONE),
        (many, LowerBound.fresh(span=1.0, most=6)),
    ],
)
def test_it_is_above_the_mean_at_any_of_many_looks_as_rarely_as_promised(draw: Draw, fresh: LowerBound) -> None:
    rng, step, n = np.random.default_rng(11), 20, 400
    truth, failures, last = averages(draw, n), 0, []
    for _ in range(RUNS):
        totals, sizes = draw(rng, n)
        bound, failed = fresh, False
        for start in range(0, n, step):
            bound = bound.add(totals[start : start + step], sizes[start : start + step])
            failed = failed or bound.value(ALPHA) > truth[start + step - 1]
        failures += failed
        last.append(bound.value(ALPHA))
    assert failures / RUNS <= MOST
    assert np.mean(last) > 0.2 * truth[-1]  # and it is not for free


def test_it_comes_near_the_mean() -> None:
    rng = np.random.default_rng(1)
    for draw, fresh in ((weighted, ONE), (many, LowerBound.fresh(span=1.0, most=6)), (drifting, ONE)):
        totals, sizes = draw(rng, 20_000)
        error = np.std(totals - averages(draw, 20_000)[-1] * sizes) / sizes.mean() / math.sqrt(20_000)
        found = fresh.add(totals, sizes).value(0.01)
        assert averages(draw, 20_000)[-1] - 6.0 * error < found


def test_one_huge_value_does_not_spoil_it() -> None:
    rng = np.random.default_rng(2)
    values = (rng.random(2_000) < 0.5).astype(np.float64)
    before = ONE.add(values, np.ones(2_000))
    assert before.add(np.array([1e6]), np.ones(1)).value(0.01) >= before.value(0.01)


def test_batches_do_not_matter_and_it_can_be_kept() -> None:
    totals, sizes = many(np.random.default_rng(3), 500)
    fresh = LowerBound.fresh(span=1.0, debt=0.5, most=6)
    whole, parts = fresh.add(totals, sizes), fresh
    for start, stop in ((0, 1), (1, 1), (1, 100), (100, 500)):
        parts = parts.add(totals[start:stop], sizes[start:stop])
        parts = msgspec.msgpack.decode(msgspec.msgpack.encode(parts), type=LowerBound)
    assert (parts.units, parts.size) == (whole.units, whole.size)
    assert parts.value(0.05) == pytest.approx(whole.value(0.05))
    assert whole.value(0.5) > whole.value(0.05) > whole.value(0.0001)


def test_by_hand_one_unit_of_one_row() -> None:
    """ŝ = ½; the wealth of stake λ at θ is (1 + λ(1 - ŝ'))·exp(λ(ŝ' - θ)), ŝ' being at most 0.9/λ."""
    found = ONE.add(np.array([1.0]), np.ones(1)).evidence(np.array([0.25]))[0]
    steps = np.arange(-4, 12)
    worth, stakes = 1.0 / (2.0 + np.abs(steps - 3.0)) ** 2, 0.9 * 2.0**-steps
    lowered = np.minimum(0.5, 0.9 / stakes)
    wealth = (1.0 + stakes * (1.0 - lowered)) * np.exp(stakes * (lowered - 0.25))
    assert found == pytest.approx(math.log((worth * wealth).sum() / worth.sum()))


def test_by_hand_one_unit_of_several_rows() -> None:
    """N = 3 where n̂ = 1 was expected: log(1 + a - b) is replaced by what never exceeds it, quadratic in θ."""
    theta, fresh = 0.25, LowerBound.fresh(span=1.0, most=4)
    found = fresh.add(np.array([2.0]), np.array([3.0])).evidence(np.array([theta]))[0]
    steps = np.arange(-4, 12)
    worth = 1.0 / (2.0 + np.abs(steps - 3.0)) ** 2
    stakes = np.minimum(0.9 * 2.0**-steps, 0.2 / 4.0)
    lowered = np.minimum(0.5, 0.6 / stakes)
    a, b = stakes * (2.0 - lowered), stakes * theta * (3.0 - 1.0)
    x = b / (1.0 + a)
    logs = np.log(1.0 + a) - x - x**2 + stakes * lowered - stakes * theta * 1.0
    assert found == pytest.approx(math.log((worth * np.exp(logs)).sum() / worth.sum()))
    assert (logs <= np.log(1.0 + a - b) + stakes * (lowered - theta)).all()


@pytest.mark.parametrize(
    ("fresh", "outcomes"),
    [
        (ONE, [(0.9, 0.0, 1.0), (0.1, 7.0, 1.0)]),
        (ONE, [(0.2, 0.0, 1.0), (0.8, 1.0, 1.0)]),
        (LowerBound.fresh(span=1.0, debt=2.0), [(0.3, -2.0, 1.0), (0.5, 0.5, 1.0), (0.2, 4.0, 1.0)]),
        (LowerBound.fresh(span=1.0, most=4), [(0.5, 0.0, 1.0), (0.3, 4.0, 4.0), (0.2, 5.0, 2.0)]),
        (LowerBound.fresh(span=1.0, debt=1.0, most=4), [(0.4, -1.0, 4.0), (0.3, 4.0, 1.0), (0.3, 2.0, 3.0)]),
    ],
)
def test_no_wealth_is_won_on_average_at_the_true_mean(fresh: LowerBound, outcomes: list[tuple[float, ...]]) -> None:
    """All sequences of five units, by enumeration: the expected wealth at the true ratio is one at most."""
    chances, totals, sizes = np.array(outcomes).T
    theta = np.array([(chances @ totals) / (chances @ sizes)])
    for count in (1, 2, 5):
        expected = 0.0
        for sequence in itertools.product(range(len(outcomes)), repeat=count):
            each = list(sequence)
            bound = fresh.add(totals[each], sizes[each])
            expected += float(chances[each].prod()) * math.exp(bound.evidence(theta)[0])
        assert 0.7 < expected <= 1.0 + 1e-12


def test_the_bound_is_where_the_evidence_reaches_its_level() -> None:
    for draw, fresh in ((weighted, ONE), (many, LowerBound.fresh(span=1.0, most=6))):
        bound = fresh.add(*draw(np.random.default_rng(4), 800))
        for alpha in (0.2, 0.01):
            assert bound.evidence(np.array([bound.value(alpha)]))[0] == pytest.approx(math.log(1.0 / alpha), abs=1e-4)


def test_ends_of_the_range() -> None:
    assert ONE.value(0.01) == 0.0
    assert ONE.add(np.full(100, 9.0), np.ones(100)).value(0.01) == 1.0


@pytest.mark.parametrize(
    "options", [{"span": 0.0}, {"span": math.inf}, {"span": 1.0, "debt": -1.0}, {"span": 1.0, "most": 0}]
)
def test_what_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a bound needs"):
        LowerBound.fresh(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("total", "size"), [(-0.1, 1.0), (1.0, 2.0), (1.0, 0.0)])
def test_what_breaks_the_promise_of_the_floor_is_refused(total: float, size: float) -> None:
    with pytest.raises(ValueError, match="a total below its floor"):
        ONE.add(np.array([total]), np.array([size]))
