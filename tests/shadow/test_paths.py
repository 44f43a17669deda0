"""One path: the recursion by hand, what is certain step by step, cuts, ranges and what lies outside of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from shadow.paths import Range, walk
from shadow.rows import Choices, Rows
from tests.shadow.logs import CANDIDATE, DRIVER, PAY, WANDERER, Log, exploring, mdp

BOUNDED = Range(low=0.0, high=4.1, gamma=0.9, rewards=(0.0, 1.0), horizon=5)


def log_of(lengths: list[int], rng: np.random.Generator, **known: Any) -> Log:
    """Random episodes over two actions, everything supported."""
    n = sum(lengths)
    targets, behaviours = (rng.dirichlet([1.0, 1.0], n) for _ in range(2))
    choices = Choices(rng.integers(0, 2, n), targets, behaviours, np.zeros((n, 0)))
    starts = np.cumsum([0, *lengths])[:-1]
    names = [f"episode-{i}" for i in range(len(lengths))]
    return Log(names, starts, rng.normal(size=n), choices, np.full(n, -1), behaviours, behaviours, **known)


def test_the_walk_is_the_recursion_of_jiang_and_li() -> None:
    """V_t = V̂(s_t) + w_t·(r_t + γ·V_{t+1} - Q̂(s_t, a_t)), from the end; and without a model per-decision IS."""
    rng, gamma, lengths = np.random.default_rng(1), 0.8, [3, 1, 5, 2]
    rows = log_of(lengths, rng).rows()
    q = rng.normal(size=(len(rows.rewards), 2))
    wide = Range(low=-1e6, high=1e6, gamma=gamma)
    found = walk(rows, wide, chained=True, predicted=q).value
    plain = walk(rows, wide, chained=True).value
    assert rows.choices is not None
    w = rows.targets / rows.propensities
    for unit, (start, length) in enumerate(zip(rows.starts, lengths, strict=True)):
        value, weighted = 0.0, 0.0
        for t in range(start + length - 1, start - 1, -1):
            v_hat = float(rows.choices.targets[t] @ q[t])
            value = v_hat + w[t] * (rows.rewards[t] + gamma * value - q[t, rows.choices.actions[t]])
        for t in range(length):
            weighted += gamma**t * np.prod(w[start : start + t + 1]) * rows.rewards[start + t]
        assert found[unit] == pytest.approx(value)
        assert plain[unit] == pytest.approx(weighted)


@pytest.mark.parametrize("shift", [0.0, -1.0], ids=["rewards", "costs"])
@pytest.mark.parametrize("bounded", [True, False], ids=["rewards declared", "returns declared"])
def test_means_are_exact_over_every_episode_that_can_happen(shift: float, bounded: bool) -> None:
    """Two versions log, one state is masked; q is anything at all. No chance is left: nothing is approximate."""
    world = mdp(horizon=3, low=np.full((3, 3), shift), high=PAY + shift, gamma=0.8)
    log, chances = world.paths(CANDIDATE)
    truth, rows = world.value(CANDIDATE), log.rows()
    assert chances.sum() == pytest.approx(1.0)
    worst, best = (sum(0.8**t * (end + shift) for t in range(3)) for end in (0.0, 1.0))
    low, high = min(worst, 0.0), max(best, 0.0)
    declared = (shift, 1.0 + shift) if bounded else None
    returns = Range(low=low, high=high, gamma=0.8, rewards=declared, horizon=3 if bounded else None)
    states = rows.choices.features.argmax(axis=1) + rows.choices.features.sum(axis=1) if rows.choices else np.zeros(0)
    table = np.random.default_rng(3).normal(size=(3, 3))
    for predicted in (None, table[states.astype(int)], 9.0 * table[states.astype(int)]):
        found = walk(rows, returns, chained=True, predicted=predicted, debt=1.0)
        assert chances @ found.value == pytest.approx(truth)
        assert chances @ found.gain == pytest.approx(truth - low)
        assert chances @ found.loss == pytest.approx(high - truth)
        assert chances @ (found.weight + found.unsupported) == pytest.approx(1.0)
        assert min(found.gain.min(), found.loss.min()) >= (0.0 if predicted is None else -1.0)
        assert not found.outside.any()


def test_means_are_exact_where_the_log_could_not_go() -> None:
    """Neither version ever takes action 1 in state 0, which the candidate does: from there on it gets nothing."""
    shut = mdp(horizon=3).masks.copy()
    shut[0, 1] = False

    def within(policy: Any) -> Any:
        return lambda states, masks: policy(states, masks & shut[states])

    loggers = (within(exploring(DRIVER, 0.4)), within(exploring(WANDERER, 0.2)))
    world = mdp(horizon=3, loggers=loggers)
    high, ends = world.high.copy(), world.ends.copy()
    high[0, 1], ends[0, 1] = 0.0, 1.0
    log, chances = world.paths(CANDIDATE)
    rows, worst, truth = log.rows(), mdp(horizon=3, high=high, ends=ends).value(CANDIDATE), world.value(CANDIDATE)
    predicted = np.random.default_rng(4).normal(size=(len(rows.rewards), 1)) * np.ones(3)
    for q in (None, np.broadcast_to(predicted.mean(axis=0), (len(rows.rewards), 3))):
        found = walk(rows, BOUNDED, chained=True, predicted=q, debt=2.0)
        assert chances @ found.value == pytest.approx(worst)
        assert chances @ found.gain == pytest.approx(worst)
        assert BOUNDED.high - chances @ found.loss > truth
        assert chances @ (found.weight + found.unsupported) == pytest.approx(1.0)
        assert chances @ found.unsupported > 0.1


def test_bounds_take_what_is_certain_step_by_step() -> None:
    """Rewards of 0 or 1 in at most 3 steps, γ = 1: after a 1 the return is at least 1, and at most 3."""
    returns = Range(low=0.0, high=3.0, rewards=(0.0, 1.0), horizon=3)
    rows = Rows(
        names=("a",),
        starts=np.array([0]),
        targets=np.array([0.5, 1.0]),
        propensities=np.array([1.0, 0.5]),
        rewards=np.array([1.0, 0.0]),
        unsupported=np.array([0.25, 0.0]),
        disagrees=np.zeros(2, np.bool_),
        matched=np.zeros(2, np.bool_),
        known=np.array([True]),
    )
    found = walk(rows, returns, chained=True)
    assert found.gain.tolist() == [0.5 * 1.0 + 1.0 * 0.0]
    assert found.loss.tolist() == [0.5 * 0.0 + 1.0 * (3.0 - 1.0)]  # what may have come is given up at the end
    cut = walk(Rows(**{**fields(rows), "known": np.array([False])}), returns, chained=True)
    assert cut.gain.tolist() == [0.5]
    assert cut.loss.tolist() == [0.5 * 0.0 + 1.0 * 1.0]  # the second step earned nothing, the third may earn 1
    long = mdp().log(np.random.default_rng(1), 9, CANDIDATE).rows()
    for returns in (BOUNDED, Range(low=-5.0, high=5.0, rewards=(-1.0, 1.0), horizon=9)):
        alone = [walk(unknown(long.part(i, i + 1)), returns, chained=True) for i in range(9)]
        beside = walk(unknown(long), returns, chained=True)  # filled up to the longest
        assert beside.gain == pytest.approx([each.gain[0] for each in alone])
        assert beside.loss == pytest.approx([each.loss[0] for each in alone])
    blind = walk(rows, Range(low=0.0, high=3.0), chained=True)
    assert blind.gain.tolist() == [1.0]  # only the end tells the return, so that the last weight counts
    assert blind.loss.tolist() == [2.0]


def unknown(rows: Rows) -> Rows:
    return Rows(**{**fields(rows), "known": np.zeros(len(rows.names), np.bool_)})


def fields(rows: Rows) -> dict[str, Any]:
    return {name: getattr(rows, name) for name in Rows.__slots__}


@pytest.mark.parametrize(
    ("returns", "least", "most"),
    [
        (Range(low=-9.0, high=9.0), [-math.inf] * 3, [math.inf] * 3),
        (Range(low=-9.0, high=9.0, rewards=(-1.0, 0.0)), [-math.inf] * 3, [0.0] * 3),
        (Range(low=-9.0, high=9.0, rewards=(-1.0, 2.0), gamma=0.5), [-2.0, -1.0, -0.5], [4.0, 2.0, 1.0]),
        (Range(low=-9.0, high=9.0, rewards=(-1.0, -0.5), horizon=1), [-1.0, 0.0, 0.0], [0.0] * 3),
        (Range(low=-9.0, high=9.0, rewards=(1.0, 2.0), gamma=0.5, horizon=2), [0.0] * 3, [3.0, 1.0, 0.0]),
    ],
)
def test_what_may_still_come(returns: Range, least: list[float], most: list[float]) -> None:
    found = returns.rest(2)
    assert found[0].tolist() == least
    assert found[1].tolist() == most


@pytest.mark.parametrize(
    "changes",
    [
        {"low": 1.0, "high": 1.0},
        {"high": math.inf},
        {"rewards": (1.0, 0.0)},
        {"rewards": (math.nan, 0.0)},
        {"gamma": 0.0},
        {"gamma": 1.1},
        {"horizon": 0},
    ],
)
def test_ranges_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a range needs|γ lies in"):
        Range(**{"low": 0.0, "high": 1.0, **changes})


def test_what_lies_outside_is_counted() -> None:
    rng = np.random.default_rng(2)
    rows = log_of([2, 2, 2, 2], rng).rows()
    paid = Rows(**{**fields(rows), "rewards": np.array([0.5, 0.5, 5.0, 0.0, -0.1, 0.3, 1.2, 0.0])})
    assert walk(paid, Range(low=0.0, high=3.0), chained=True).outside.tolist() == [0, 1, 0, 0]
    assert walk(paid, Range(low=0.0, high=9.0, rewards=(0.0, 1.0)), chained=True).outside.tolist() == [0, 1, 1, 1]
    assert walk(paid, Range(low=0.0, high=9.0, horizon=1), chained=True).outside.tolist() == [1, 1, 1, 1]
