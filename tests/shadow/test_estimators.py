"""Estimates of one step's value: right by hand, unbiased, covered as often as they say, valid while someone watches."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from shadow.estimate import Estimates
from shadow.estimators import ModelTerms, Tally, Terms
from shadow.mixture import single
from shadow.paths import Range
from shadow.rows import Choices, Rows
from tests.shadow.logs import BEST, NEW, OLD, OTHER, Log, bandit, exploring
from tests.shadow.replicas import Replicas, mean_weights, z_score

UNIT = Range(low=0.0, high=1.0)
MODEL = ModelTerms(actions=4, features=2)
KEYS = {"rows": (1, 2, 6), "shift": 0.1}


def terms(**changes: Any) -> Terms:
    settings: dict[str, Any] = {"objective": "step", "returns": UNIT, "least_effective": 0.0}
    return Terms(**{**settings, **changes})


def estimates(rows: Rows, **changes: Any) -> Estimates:
    return Tally.fresh(terms(**changes)).add(rows).estimates()


def rows_of(targets: list[float], propensities: list[float], rewards: list[float], **changes: Any) -> Rows:
    n = len(rewards)
    columns: dict[str, Any] = {
        "names": tuple(f"key-{i}" for i in range(n)),
        "starts": np.arange(n),
        "targets": np.array(targets),
        "propensities": np.array(propensities),
        "rewards": np.array(rewards),
        "unsupported": np.zeros(n),
        "disagrees": np.zeros(n, np.bool_),
        "matched": np.zeros(n, np.bool_),
        "known": np.ones(n, np.bool_),
    }
    return Rows(**{**columns, **changes})


# -- by hand


def test_ips_and_snips_by_hand() -> None:
    """w = 2, 0.5, 0; w·r = 2, 0, 0."""
    found = estimates(rows_of([1.0, 0.25, 0.0], [0.5, 0.5, 0.5], [1.0, 0.0, 1.0]))
    ips, snips = found.by("ips"), found.by("snips")
    assert ips.value == pytest.approx(2.0 / 3.0)
    assert ips.error == pytest.approx(np.std([2.0, 0.0, 0.0], ddof=1) / math.sqrt(3.0))
    assert snips.value == pytest.approx(2.0 / 2.5)
    residuals = np.array([2.0 - 0.8 * 2.0, -0.8 * 0.5, 0.0])
    assert snips.error == pytest.approx(math.sqrt(1.5 * np.square(residuals).sum()) / 2.5)
    assert found.support.effective_n == pytest.approx(2.5**2 / 4.25)
    assert found.support.mean_weight == pytest.approx(2.5 / 3.0)
    one = Replicas.of([found], "ips")
    assert one.highs - one.values == pytest.approx(4.302653 * one.errors)  # t, two degrees of freedom
    assert one.values - one.lows == pytest.approx(one.highs - one.values)


def test_what_has_no_support_earns_the_worst() -> None:
    """Rewards are costs: leaving out what is not supported would look like a gain."""
    wide = Range(low=-10.0, high=0.0)
    rows = rows_of([1.0, 0.5], [1.0, 1.0], [-1.0, -1.0], unsupported=np.array([0.0, 0.5]))
    found = estimates(rows, returns=wide)
    assert found.by("ips").value == pytest.approx((-1.0 - 0.5 - 5.0) / 2.0)
    assert found.by("snips").value == pytest.approx((-1.0 - 0.5 - 5.0) / 2.0)
    assert (found.support.unsupported, found.support.mean_weight) == (0.25, 1.0)


def test_errors_are_over_keys_not_rows() -> None:
    """Four rows of two keys, alike within a key: two observations, not four."""
    rows = rows_of(
        [0.5] * 4,
        [0.5] * 4,
        [1.0, 1.0, 0.0, 0.0],
        names=("a", "b"),
        starts=np.array([0, 2]),
        known=np.ones(2, np.bool_),
    )
    found = estimates(rows, most_rows=2).by("ips")
    assert (found.value, found.units) == (0.5, 2)
    assert found.error == pytest.approx(0.5)


def test_dr_by_hand() -> None:
    """The model has learned that every reward is 0.5 (folds without an error to make), then sees one row."""
    shares = np.tile([0.5, 0.5], (41, 1))
    choices = Choices(np.zeros(41, np.int64), np.tile([0.2, 0.8], (41, 1)), shares, np.zeros((41, 0)))
    rewards = np.full(41, 0.5)
    rewards[40] = 1.0
    log = Log([f"key-{i}" for i in range(41)], np.arange(41), rewards, choices, np.full(41, -1), shares, shares)
    rows = log.rows()
    asked = terms(model=ModelTerms(actions=2, features=0, warm=20))
    tally = Tally.fresh(asked).add(rows.part(0, 40))
    before, after = tally.doubly, tally.add(rows.part(40, 41)).doubly
    assert after.total(0) - before.total(0) == pytest.approx(0.2 * 0.5 + 0.8 * 0.5 + 0.4 * (1.0 - 0.5))


def test_nothing_is_known_of_nothing() -> None:
    found = estimates(rows_of([], [], []))
    each = found.by("ips")
    assert (each.value, each.error, each.low, each.high, each.lower, each.upper) == (None, None, None, None, 0.0, 1.0)
    assert (found.support.mean_weight, found.support.unsupported, found.support.effective_n) == (None, None, 0.0)
    assert found.one_step_advantage is None
    with pytest.raises(KeyError, match="dr"):
        found.by("dr")


def test_a_value_needs_some_effective_rows() -> None:
    """Bounds say what is known, and nothing is guessed."""
    log = bandit(loggers=(exploring(OLD, 0.1),), weights=(1.0,)).log(np.random.default_rng(18), 400, BEST)
    support = estimates(log.rows()).support
    few = estimates(log.rows(), least_effective=support.effective_n + 1.0, model=MODEL)
    enough = estimates(log.rows(), least_effective=support.effective_n - 1.0, model=MODEL)
    for one, other in zip(few.methods, enough.methods, strict=True):
        assert (one.value, one.error, one.low, one.high) == (None, None, None, None)
        assert other.value is not None
        assert (one.lower, one.upper) == (other.lower, other.upper)


# -- against the truth


def replicate(runs: int, keys: int, seed: int, policy: Any, world: Any, **changes: Any) -> list[Estimates]:
    rng = np.random.default_rng(seed)
    return [estimates(world.log(rng, keys, policy, OLD).rows(), **changes) for _ in range(runs)]


@pytest.mark.parametrize("policy", [NEW, BEST], ids=["stochastic", "greedy"])
def test_two_loggers_with_masks_and_exploration(policy: Any) -> None:
    """Unbiased where promised; intervals cover; the mean weight is one; bounds are beyond the truth almost never."""
    world, runs = bandit(**KEYS), 120
    truth = world.value(policy)
    found = replicate(runs, 600, 5, policy, world, most_rows=6, model=MODEL)
    ips, snips, dr = (Replicas.of(found, method) for method in ("ips", "snips", "dr"))
    for each in (ips, snips, dr):
        assert abs(each.z(truth)) < 3.5 if each is not snips else abs(each.values.mean() - truth) < 0.01
        assert each.covered(truth) > 0.95 - 3.5 * math.sqrt(0.95 * 0.05 / runs)
        assert each.crossed(truth) <= 0.04
    assert abs(z_score(mean_weights(found), 1.0)) < 3.5
    assert dr.errors.mean() < 0.8 * ips.errors.mean()


def test_the_error_is_that_of_many_logs() -> None:
    found = replicate(150, 400, 6, NEW, bandit(rows=(6,), shift=0.2), most_rows=6, model=MODEL)
    for each in (Replicas.of(found, "ips"), Replicas.of(found, "snips"), Replicas.of(found, "dr")):
        assert each.errors.mean() == pytest.approx(each.spread, rel=0.2)


@pytest.mark.parametrize("method", ["ips", "dr"])
def test_bounds_hold_for_one_who_watches_all_the_time(method: Any) -> None:
    world, runs, alpha = bandit(loggers=(exploring(OLD, 0.1),), weights=(1.0,)), 80, 0.1
    truth, rng, failures = world.value(BEST), np.random.default_rng(8), 0
    for _ in range(runs):
        rows, failed = world.log(rng, 800, BEST).rows(), False
        tally = Tally.fresh(terms(alpha=alpha, model=MODEL))
        for start in range(0, 800, 40):
            tally = tally.add(rows.part(start, start + 40))
            each = tally.estimates().by(method)
            failed = failed or not each.lower <= truth <= each.upper
        failures += failed
    assert failures / runs <= 2.0 * alpha + 3.0 * math.sqrt(2.0 * alpha / runs)


def test_keys_that_leave_after_a_bad_reward_do_not_bias_a_mean_over_rows() -> None:
    world = bandit(rows=(8,), churn=0.7)
    found = replicate(100, 500, 9, BEST, world, most_rows=8, model=MODEL)
    truth = world.value(BEST)
    assert abs(Replicas.of(found, "ips").z(truth)) < 3.5
    assert abs(z_score(mean_weights(found), 1.0)) < 3.5
    assert Replicas.of(found, "dr").crossed(truth) <= 0.04


def test_a_log_that_could_not_go_there_is_told_by_its_share() -> None:
    """Without exploration, what the version does otherwise is unsupported, and bounds take the worst and the best."""
    world = bandit(loggers=(OLD,), weights=(1.0,))
    truth = world.value(BEST)
    found = estimates(world.log(np.random.default_rng(10), 4_000, BEST, OLD).rows(), model=MODEL)
    share = (
        sum(
            chance
            * float((BEST(np.arange(3), np.tile(mask, (3, 1))) * (OLD(np.arange(3), np.tile(mask, (3, 1))) == 0)).sum())
            for mask, chance in world.masks()
        )
        / 3.0
    )
    assert found.support.unsupported == pytest.approx(share, abs=0.03)
    assert found.support.matched == 0
    for each in found.methods:
        assert each.value == pytest.approx(truth - share * 0.73, abs=0.08)  # what is missing earned the worst, 0
        assert each.lower <= truth - 0.5 * share
        assert each.upper >= truth


def test_a_wrong_propensity_moves_the_mean_weight() -> None:
    """The famous mistake: 1 - ε for the greedy action, which is drawn with 1 - ε + ε/|M|."""
    world = bandit(loggers=(exploring(OLD, 0.4),), weights=(1.0,), allowed=0.5)
    rows = world.log(np.random.default_rng(12), 5_000, OLD).rows()
    wrong = msgspec_replace(rows, propensities=np.where(rows.targets > 0.0, 0.6, rows.propensities), choices=None)
    support = estimates(wrong).support
    assert support.mean_weight_low is not None
    assert support.mean_weight_low > 1.0


def msgspec_replace(rows: Rows, **changes: Any) -> Rows:
    columns = {name: getattr(rows, name) for name in Rows.__slots__}
    return Rows(**{**columns, **changes})


def test_a_mixture_is_right_too_and_its_weights_are_smaller() -> None:
    world, rng, found = bandit(), np.random.default_rng(13), []
    for _ in range(150):
        log = world.log(rng, 400, OTHER)
        drawn = single(log.choices.behaviours, log.scored, log.weights)
        mixed = Choices(log.choices.actions, log.choices.targets, drawn, log.choices.features)
        own, other = (
            log.rows(),
            Log(log.names, log.starts, log.rewards, mixed, log.champion, log.scored, log.weights).rows(),
        )
        found.append([estimates(each).by("ips").value for each in (own, other)])
    values = np.array(found)
    assert abs(z_score(values[:, 1], world.value(OTHER))) < 3.5
    assert values[:, 1].std() < 0.8 * values[:, 0].std()


# -- kept sums


def test_batches_do_not_matter_without_a_model_and_the_tally_can_be_kept() -> None:
    rows = bandit(**KEYS).log(np.random.default_rng(14), 300, NEW, OLD).rows()
    whole, parts = Tally.fresh(terms(most_rows=6)).add(rows), Tally.fresh(terms(most_rows=6))
    for first, last in ((0, 1), (1, 1), (1, 200), (200, 300)):
        parts = msgspec.msgpack.decode(msgspec.msgpack.encode(parts.add(rows.part(first, last))), type=Tally)
    one, other = msgspec.to_builtins(whole.estimates()), msgspec.to_builtins(parts.estimates())
    assert flat(one) == pytest.approx(flat(other))


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [each for one in value for each in flat(one)]
    return [float(value)] if isinstance(value, int | float) else []


def test_a_model_never_learns_from_what_comes_later_nor_from_its_own_fold() -> None:
    rows = bandit(**KEYS).log(np.random.default_rng(15), 400, NEW, OLD).rows()
    changed = msgspec_replace(rows, rewards=np.where(rows.units < 300, rows.rewards, 1.0 - rows.rewards))
    tallies = [Tally.fresh(terms(most_rows=6, model=MODEL)).add(each.part(0, 300)) for each in (rows, changed)]
    assert tallies[0] == tallies[1]


def test_a_model_that_has_seen_too_little_only_learns() -> None:
    rows = bandit().log(np.random.default_rng(19), 300, NEW).rows()
    tally = Tally.fresh(terms(model=MODEL)).add(rows.part(0, 49))
    assert (tally.estimates().by("dr").units, tally.estimates().by("dr").lower) == (0, 0.0)
    assert 0 < tally.add(rows.part(49, 300)).estimates().by("dr").units < 251


def test_the_state_does_not_grow() -> None:
    world, rng = bandit(**KEYS), np.random.default_rng(16)
    tally = Tally.fresh(terms(most_rows=6, model=MODEL))
    sizes = []
    for _ in range(3):
        tally = tally.add(world.log(rng, 500, NEW).rows())
        sizes.append(len(msgspec.msgpack.encode(tally)))
    assert max(sizes) - min(sizes) < 64


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha and level"):
        terms(alpha=0.0)
    with pytest.raises(ValueError, match="alpha and level"):
        terms(level=1.0)
    with pytest.raises(ValueError, match="needs choices"):
        estimates(rows_of([1.0], [1.0], [1.0]), model=MODEL)
    rows = bandit(rows=(3,)).log(np.random.default_rng(17), 5, NEW).rows()
    with pytest.raises(ValueError, match="too many"):
        estimates(rows, most_rows=2)


def test_rewards_outside_the_range_are_counted() -> None:
    found = estimates(rows_of([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [2.0, -1.0, 0.5]))
    assert found.support.outside == 2
