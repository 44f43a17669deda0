"""Estimates of an episode's value, with dynamic programming as the truth; cuts, bounds, one step, kept sums."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest

from policies.types import Floats
from shadow.estimate import Estimates
from shadow.estimators import ModelTerms, Tally, Terms
from shadow.mixture import episode
from shadow.moments import ByStep
from shadow.paths import Range
from shadow.rows import Choices, Rows
from tests.shadow.logs import CANDIDATE, DRIVER, PAY, WANDERER, Log, exploring, mdp
from tests.shadow.replicas import Replicas, mean_weights, z_score

RETURNS = Range(low=0.0, high=4.1, gamma=0.9, rewards=(0.0, 1.0), horizon=5)
MODEL = ModelTerms(actions=3, features=2)


def terms(**changes: Any) -> Terms:
    settings: dict[str, Any] = {"objective": "episode", "returns": RETURNS, "least_effective": 0.0}
    return Terms(**{**settings, **changes})


def estimates(rows: Rows, **changes: Any) -> Estimates:
    return Tally.fresh(terms(**changes)).add(rows).estimates()


# -- by hand


def test_weighted_pdis_by_hand_with_episodes_of_unequal_length() -> None:
    """An episode that has ended keeps its weight: it earns nothing any more, under any version."""
    rows = Rows(
        names=("a", "b"),
        starts=np.array([0, 2]),
        targets=np.array([1.0, 1.0, 0.5]),
        propensities=np.array([0.5, 0.25, 1.0]),
        rewards=np.array([1.0, 2.0, 3.0]),
        unsupported=np.zeros(3),
        disagrees=np.zeros(3, np.bool_),
        matched=np.zeros(3, np.bool_),
        known=np.ones(2, np.bool_),
    )
    found = estimates(rows, returns=Range(low=0.0, high=10.0, gamma=0.5)).by("wpdis")
    first, second = (2.0 * 1.0 + 0.5 * 3.0) / 2.5, 0.5 * (8.0 * 2.0) / (8.0 + 0.5)
    assert found.value == pytest.approx(first + second)
    left_out = [3.0, 1.0 + 0.5 * 2.0]  # without the first, without the second
    assert found.error == pytest.approx(math.sqrt(0.5 * sum((each - first - second) ** 2 for each in left_out)))


# -- against dynamic programming


@pytest.mark.parametrize("policy", [CANDIDATE, DRIVER], ids=["stochastic", "greedy"])
def test_two_loggers_masks_exploration_discount_and_unequal_lengths(policy: Any) -> None:
    loggers = (exploring(DRIVER, 0.6), exploring(WANDERER, 0.5))
    world, runs, rng = mdp(loggers=loggers), 100, np.random.default_rng(3)
    truth = world.value(policy)
    found = [estimates(world.log(rng, 1_000, policy).rows(), model=MODEL) for _ in range(runs)]
    pdis, wpdis, dr = (Replicas.of(found, method) for method in ("pdis", "wpdis", "recursive_dr"))
    for each in (pdis, wpdis, dr):
        noise = 3.5 * each.spread / math.sqrt(runs)
        assert abs(each.values.mean() - truth) < noise + (0.01 if each is wpdis else 0.0)
        assert each.covered(truth) > 0.86  # weights are heavy: 95 % as n grows
        assert each.errors.mean() == pytest.approx(each.spread, rel=0.3)
        assert each.crossed(truth) <= 0.04
    assert dr.spread < pdis.spread
    assert abs(z_score(mean_weights(found), 1.0)) < 3.5


def test_intervals_cover_where_weights_are_mild() -> None:
    world, runs, rng = mdp(loggers=(exploring(CANDIDATE, 0.5),), weights=(1.0,)), 300, np.random.default_rng(4)
    truth = world.value(CANDIDATE)
    found = [estimates(world.log(rng, 300, CANDIDATE).rows(), model=MODEL) for _ in range(runs)]
    for each in (Replicas.of(found, "pdis"), Replicas.of(found, "wpdis"), Replicas.of(found, "recursive_dr")):
        assert abs(each.covered(truth) - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / runs)


@pytest.mark.parametrize("cost", [False, True], ids=["rewards", "costs"])
def test_bounds_hold_for_one_who_watches_all_the_time(cost: bool) -> None:
    """Costs too: nothing but the declared ranges makes gains what cannot be negative."""
    shift, runs, alpha = -float(cost), 100, 0.1
    world = mdp(low=np.full((3, 3), shift), high=PAY + shift, gamma=1.0)
    returns = Range(low=5.0 * shift, high=5.0 + 5.0 * shift, rewards=(shift, 1.0 + shift), horizon=5)
    truth, rng, failures = world.value(CANDIDATE), np.random.default_rng(5), {"pdis": 0, "recursive_dr": 0}
    for _ in range(runs):
        rows = world.log(rng, 600, CANDIDATE).rows()
        tally, failed = Tally.fresh(terms(returns=returns, alpha=alpha, model=MODEL)), set()
        for start in range(0, 600, 60):
            tally = tally.add(rows.part(start, start + 60))
            for each in tally.estimates().methods:
                if not each.lower <= truth <= each.upper:
                    failed.add(each.method)
        for method in failed & failures.keys():
            failures[method] += 1
    for count in failures.values():
        assert count / runs <= 2.0 * alpha + 3.0 * math.sqrt(2.0 * alpha / runs)


def test_what_has_no_support_leaves_the_path_at_its_worst() -> None:
    """The log never does what the version does in state 1: from there on it gets nothing, by exact enumeration."""
    world = mdp(loggers=(exploring(DRIVER, 0.0),), weights=(1.0,))

    def candidate(states: Any, masks: Any) -> Floats:
        return np.eye(3)[np.where(states == 1, 0, DRIVER(states, masks).argmax(axis=1))]

    stranded = mdp(low=np.array([[0.0] * 3, [0.0] * 3, [0.0] * 3]), high=np.where(np.eye(3)[1][:, None] > 0, 0.0, PAY))
    stranded = mdp(high=stranded.high, ends=np.where(np.eye(3)[1][:, None] > 0, 1.0, world.ends))
    assert DRIVER(np.array([1]), world.masks[[1]]).argmax() == 2
    truth, rng = world.value(candidate), np.random.default_rng(6)
    found = [estimates(world.log(rng, 400, candidate).rows(), model=MODEL) for _ in range(60)]
    for each in (Replicas.of(found, "pdis"), Replicas.of(found, "recursive_dr")):
        assert abs(each.z(stranded.value(candidate))) < 3.5
        assert each.crossed(truth) == 0.0
    assert np.array([one.support.unsupported for one in found], np.float64).mean() > 0.1
    assert mean_weights(found) == pytest.approx(1.0)


def test_an_episodes_mixture_is_that_of_its_whole_path() -> None:
    """Σ_v w_v·Π b_v and not Π Σ_v w_v·b_v: the second is biased, for an episode keeps its version."""
    world = mdp(loggers=(exploring(DRIVER, 0.2), exploring(WANDERER, 0.1)), weights=(0.5, 0.5))
    truth, rng, found = world.value(CANDIDATE), np.random.default_rng(7), []
    for _ in range(150):
        log = world.log(rng, 500, CANDIDATE)
        ends, drawn = np.append(log.starts, len(log.rewards)), log.choices.behaviours.copy()
        for first, last in pairwise(ends):
            some = slice(first, last)
            drawn[some] = episode(drawn[some], log.scored[some], log.weights[first], log.choices.actions[some])
        naive = np.einsum("nv,nva->na", log.weights, log.scored)
        values = []
        for behaviours in (log.choices.behaviours, drawn, naive):
            choices = Choices(log.choices.actions, log.choices.targets, behaviours, log.choices.features)
            rows = Log(log.names, log.starts, log.rewards, choices, log.champion, log.scored, log.weights).rows()
            one = estimates(rows)
            values.append([one.by("pdis").value, one.support.mean_weight])
        found.append(values)
    own, mixed, wrong = np.array(found)[:, :, 0].T
    assert abs(z_score(own, truth)) < 3.5
    assert abs(z_score(mixed, truth)) < 3.5
    assert abs(z_score(np.array(found)[:, 1, 1], 1.0)) < 3.5
    assert abs(z_score(wrong, truth)) > 5.0
    assert mixed.std() < 0.8 * own.std()


def test_cuts_that_depend_on_rewards_bias_the_mean_but_no_bound() -> None:
    """Episodes are cut after a bad reward: those that are left are the good ones."""
    world, rng, found = mdp(loggers=(exploring(CANDIDATE, 0.3),), weights=(1.0,)), np.random.default_rng(8), []
    truth = world.value(CANDIDATE)
    for _ in range(60):
        log = world.log(rng, 1_000, CANDIDATE)
        whole = log.rows()
        bad = (whole.rewards == 0.0) & (rng.random(len(whole.rewards)) < 0.8)
        cuts = np.cumsum(bad) - bad
        kept = cuts == cuts[whole.starts][whole.units]
        known = ~np.bincount(whole.units, bad, len(log.names)).astype(np.bool_)
        choices = log.choices.part(kept)
        starts = np.searchsorted(whole.units[kept], np.arange(len(log.names)))
        rows = Log(
            log.names, starts, log.rewards[kept], choices, log.champion[kept], log.scored, log.weights, known
        ).rows()
        found.append(estimates(rows, model=MODEL))
    pdis = Replicas.of(found, "pdis")
    assert pdis.z(truth) > 5.0
    assert pdis.crossed(truth) == Replicas.of(found, "recursive_dr").crossed(truth) == 0.0
    assert found[0].support.left_out > 300


def test_drift_is_averaged() -> None:
    """Values that fall to a half over time: the bound is about the average so far."""
    rng, runs, failed = np.random.default_rng(9), 60, 0
    falling = [
        mdp(high=PAY * scale, loggers=(exploring(CANDIDATE, 0.3),), weights=(1.0,)) for scale in (1.0, 0.75, 0.5)
    ]
    truths = np.cumsum([world.value(CANDIDATE) for world in falling]) / np.arange(1, 4)
    for _ in range(runs):
        tally, wrong = Tally.fresh(terms(alpha=0.1, model=MODEL)), False
        for world, truth in zip(falling, truths, strict=True):
            tally = tally.add(world.log(rng, 300, CANDIDATE).rows())
            wrong = wrong or any(not one.lower <= truth <= one.upper for one in tally.estimates().methods)
        failed += wrong
    assert failed / runs <= 0.2 + 3.0 * math.sqrt(0.2 / runs)


def test_the_one_step_advantage_is_that_of_one_step() -> None:
    world = mdp(loggers=(exploring(DRIVER, 0.4),), weights=(1.0,))
    truth, rng = world.advantage(CANDIDATE), np.random.default_rng(10)
    found = [estimates(world.log(rng, 500, CANDIDATE).rows()).one_step_advantage for _ in range(200)]
    values = np.array([each.value for each in found if each])
    assert len(values) == 200
    assert abs(z_score(values, truth)) < 3.5
    assert np.mean([each.low <= truth <= each.high for each in found if each]) > 0.89
    assert np.mean([each.error for each in found if each]) == pytest.approx(values.std(ddof=1), rel=0.15)


def test_an_episodic_objective_has_no_one_step_values() -> None:
    found = estimates(mdp().log(np.random.default_rng(11), 20, CANDIDATE).rows(), model=MODEL)
    assert [each.method for each in found.methods] == ["pdis", "wpdis", "recursive_dr"]
    assert found.one_step_advantage is not None


# -- kept sums


def test_episodes_one_at_a_time_are_all_at_once() -> None:
    rows = mdp().log(np.random.default_rng(12), 45, CANDIDATE, DRIVER).rows()
    whole, parts = Tally.fresh(terms()).add(rows), Tally.fresh(terms())
    for first in range(45):
        parts = parts.add(rows.part(first, first + 1))
    parts = msgspec.json.decode(msgspec.json.encode(parts), type=Tally)
    one, other = whole.estimates(), parts.estimates()
    for each, same in zip(one.methods, other.methods, strict=True):
        assert (each.value, each.error, each.lower) == pytest.approx((same.value, same.error, same.lower))
    assert msgspec.structs.asdict(one.support) == pytest.approx(msgspec.structs.asdict(other.support))


def test_weights_beyond_every_float_stay_numbers() -> None:
    """Fifty episodes of 400 steps, of which the version would have done each with a hundred times the probability."""
    rng, n = np.random.default_rng(13), 20_000
    actions = (rng.random(n) < 0.002).astype(np.int64)
    choices = Choices(actions, np.tile([1.0, 0.0], (n, 1)), np.tile([0.01, 0.99], (n, 1)), rng.normal(size=(n, 2)))
    names = [f"episode-{i}" for i in range(50)]
    rows = Rows.chosen(names, np.arange(50) * 400, np.ones(n), choices, champion=np.full(n, -1))
    returns = Range(low=0.0, high=500.0, rewards=(0.0, 1.0), horizon=500)
    found = estimates(rows, returns=returns, model=ModelTerms(actions=2, features=2, warm=5))
    for each in found.methods:
        assert each.value is not None
        assert math.isfinite(each.value)
        assert 0.0 <= each.lower <= 500.0
        assert 0.0 <= each.upper <= 500.0
    assert 0.0 < found.support.effective_n < 50.0


def test_episodes_of_which_nothing_is_known_count_as_the_worst() -> None:
    rows = mdp(loggers=(CANDIDATE,), weights=(1.0,)).log(np.random.default_rng(13), 200, CANDIDATE).rows()
    nothing = Rows(
        names=tuple(f"lost-{i}" for i in range(200)),
        starts=np.zeros(200, np.int64),
        **{name: getattr(rows, name)[:0] for name in ("targets", "propensities", "rewards", "unsupported")},
        disagrees=np.zeros(0, np.bool_),
        matched=np.zeros(0, np.bool_),
        known=np.zeros(200, np.bool_),
    )
    tally = Tally.fresh(terms()).add(rows)
    lost = tally.add(nothing).estimates()
    assert lost.by("pdis").value == tally.estimates().by("pdis").value
    assert lost.support.left_out == 200
    assert lost.by("pdis").lower < 0.6 * tally.estimates().by("pdis").lower


def test_no_mass_gives_no_weighted_value() -> None:
    nothing = np.zeros((3, 2))
    assert ByStep().figure() is None
    assert ByStep().add(nothing, nothing).figure() is None
    one = ByStep().add(np.array([[1.0], [1.0]]), np.array([[1.0], [1.0]]))
    found = one.add(np.array([[0.0, 5.0]]), np.array([[1.0, 0.0]])).figure()
    assert found is not None
    assert found.value == pytest.approx(2.0 / 3.0 + 5.0 / 2.0)
