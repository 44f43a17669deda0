"""Estimates of another policy's value: right by hand, and their intervals cover the truth as often as they say.

The bandit: three contexts, four actions, rules that mask some of them at random, ε paced against a budget, and two
versions that share the traffic; everything is drawn by the service's own functions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from policies.draw import draw
from policies.explore import behave
from policies.heads import softmax, target
from surefoot import Batch
from surefoot.estimate import Estimate, Method, behind_masks, estimate, evaluate
from tests.surefoot.stream_entries import MULTI, POINT
from tests.surefoot.test_entries import batch_of

Floats = npt.NDArray[np.float64]

MEANS = np.array([[0.2, 0.5, 0.8, 0.4], [0.7, 0.3, 0.1, 0.6], [0.5, 0.9, 0.4, 0.2]])  # of rewards 0 or 1
WANTED = np.array([[0.0, 0.5, 1.5, 0.2], [1.0, 0.0, -1.0, 0.8], [0.0, 1.2, 0.3, 0.0]])  # the target's logits
GREEDY = np.array([[0.0, 1.0, 0.5, 0.2], [0.3, 0.0, 0.1, 0.9], [0.0, 0.2, 0.7, 0.1]])
SOFT = np.array([[0.5, 0.5, 0.5, 0.5], [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
ALLOWED = 0.8  # each action but the first, which always is
COUNT, STRETCH = 1_500, 150
RUNS = 300
LEAST = 0.95 - 3.0 * math.sqrt(0.95 * 0.05 / RUNS)


@dataclass(frozen=True)
class Log:
    behaviour: Floats
    actions: npt.NDArray[np.int64]
    propensities: Floats
    rewards: Floats
    wanted: Floats  # the target behind the masks

    def columns(self) -> tuple[Floats, Floats, Floats]:
        chosen = self.wanted[np.arange(len(self.actions)), self.actions]
        return self.rewards, np.log(chosen), np.log(self.propensities)

    @property
    def unsupported(self) -> Floats:
        return np.asarray((self.wanted * (self.behaviour == 0.0)).sum(axis=1))

    def estimate(self, **options: Any) -> Estimate:
        return estimate(*self.columns(), unsupported=self.unsupported, **options)


def behind(logits: Floats, masks: npt.NDArray[np.bool_]) -> Floats:
    return softmax(np.where(masks, logits, -np.inf))


def truth() -> float:
    """The target's value behind the rules, over contexts and masks."""
    value = 0.0
    for rest in itertools.product([False, True], repeat=3):
        masks = np.array([[True, *rest]] * 3)
        chance = math.prod(ALLOWED if each else 1.0 - ALLOWED for each in rest)
        value += chance * float((behind(WANTED, masks) * MEANS).sum(axis=1).mean())
    return value


TRUTH = truth()


def play(rng: np.random.Generator, budget: float, count: int = COUNT) -> Log:
    """`count` decisions; at most about `budget` of them explore."""
    parts, left = [], budget
    for start in range(0, count, STRETCH):
        contexts = rng.integers(0, 3, STRETCH)
        masks = rng.random((STRETCH, 4)) < ALLOWED
        masks[:, 0] = True
        epsilon = min(0.2, max(left, 0.0) / (count - start)) if budget >= count * 0.1 else 0.2 * (left > 0.0)
        second = rng.random(STRETCH) < 0.3
        strength, fallback = np.full(STRETCH, epsilon), np.zeros(STRETCH, np.int64)
        first_version = behave(target(GREEDY[contexts], "q_values"), masks, strength, fallback)
        second_version = behave(target(SOFT[contexts], "logits", 0.5), masks, strength, fallback)
        u = rng.random((STRETCH, 2))
        one, two = draw(first_version, u), draw(second_version, u)
        actions = np.where(second, two.actions[:, 0], one.actions[:, 0])
        parts.append(
            Log(
                np.where(second[:, None], second_version.probabilities, first_version.probabilities),
                actions,
                np.where(second, two.propensity, one.propensity),
                (rng.random(STRETCH) < MEANS[contexts, actions]).astype(np.float64),
                behind(WANTED[contexts], masks),
            )
        )
        left -= float(np.where(second, two.explored, one.explored).sum())
    names = [each.name for each in dataclasses.fields(Log)]
    return Log(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def runs(seed: int, budget: float, count: int = COUNT) -> list[Log]:
    rng = np.random.default_rng(seed)
    return [play(rng, budget, count) for _ in range(RUNS)]


def coverage(intervals: list[tuple[float, float]]) -> float:
    return float(np.mean([low <= TRUTH <= high for low, high in intervals]))


# -- coverage


@pytest.mark.parametrize("method", ["ips", "snips"])
def test_intervals_cover_the_truth_under_masks_paced_exploration_and_two_versions(method: Any) -> None:
    estimates = [log.estimate(method=method) for log in runs(2, 0.15 * COUNT)]
    assert coverage([(each.low, each.high) for each in estimates]) >= LEAST
    values = np.array([each.value for each in estimates])
    assert abs(values.mean() - TRUTH) < 5.0 * values.std() / math.sqrt(RUNS)
    assert np.mean([each.mean_weight for each in estimates]) == pytest.approx(1.0, abs=0.01)
    assert max(each.unsupported for each in estimates) < 1e-12
    assert min(each.effective_n for each in estimates) > 100


def test_self_normalised_intervals_are_narrower() -> None:
    log = play(np.random.default_rng(2), 0.15 * COUNT)
    ips, snips = log.estimate(method="ips"), log.estimate()
    assert snips.high - snips.low < ips.high - ips.low


def test_with_an_exhausted_budget_the_bounds_cover_and_the_share_is_told() -> None:
    logs = runs(3, 0.05 * COUNT)
    for method in ("ips", "snips"):
        estimates = [log.estimate(method=method) for log in logs]
        assert min(each.unsupported for each in estimates) > 0.1
        np.testing.assert_allclose([each.mean_weight + each.unsupported for each in estimates], 1.0, atol=0.2)
        bounds = [each.bounds(0.0, 1.0) for each in estimates]
        assert coverage(bounds) >= LEAST
        assert np.mean([high - low for low, high in bounds]) < 0.6, "they still say something"
    ignored = [log.estimate(method="ips") for log in logs]
    assert coverage([(each.low, each.high) for each in ignored]) < 0.5, "the value on the supported part is another one"


def test_the_bernstein_interval_holds_for_few_decisions() -> None:
    largest = 4.0 / 0.2  # max|r| · |M| / ε
    logs = runs(4, math.inf, STRETCH)
    bernstein = [log.estimate(method="ips", largest=largest) for log in logs]
    assert coverage([(each.low, each.high) for each in bernstein]) >= 0.95
    assert coverage([each.bounds(0.0, 1.0) for each in bernstein]) >= 0.95
    normal = [log.estimate(method="ips") for log in logs]
    assert all(wide.low < narrow.low for wide, narrow in zip(bernstein, normal, strict=True))


def test_clusters_widen_an_interval_of_dependent_decisions() -> None:
    rng, means = np.random.default_rng(5), []
    for _ in range(RUNS):
        level = rng.normal(size=60)  # of an episode of 20 steps
        rewards = np.repeat(level, 20) + rng.normal(size=1_200) * 0.1
        found = estimate(rewards, np.zeros(1_200), np.zeros(1_200), clusters=np.repeat(np.arange(60), 20))
        alone = estimate(rewards, np.zeros(1_200), np.zeros(1_200))
        means.append((found.low <= 0.0 <= found.high, alone.low <= 0.0 <= alone.high))
    together, apart = np.mean(means, axis=0)
    assert together >= LEAST - 0.02  # 60 clusters: a normal quantile where Student's would be due
    assert apart < 0.5


def test_clipped_mass_goes_to_the_bounds() -> None:
    logs = runs(6, 0.15 * COUNT)
    clipped = [log.estimate(clip=2.0) for log in logs]
    assert min(each.clipped for each in clipped) > 0.05
    assert coverage([each.bounds(0.0, 1.0) for each in clipped]) >= LEAST
    assert all(cut.effective_n > log.estimate().effective_n for cut, log in zip(clipped, logs[:20], strict=False))


# -- by hand


def test_a_few_decisions_by_hand() -> None:
    rewards, chosen, propensities = [1.0, 0.0, 2.0], [0.5, 0.25, 0.5], [0.25, 0.5, 0.5]  # w = 2, 1/2, 1
    ips = estimate(rewards, np.log(chosen), np.log(propensities), method="ips")
    assert ips.value == pytest.approx((2.0 + 0.0 + 2.0) / 3)
    snips = estimate(rewards, np.log(chosen), np.log(propensities))
    assert snips.value == pytest.approx(4.0 / 3.5)
    assert snips.effective_n == pytest.approx(3.5**2 / (4.0 + 0.25 + 1.0))
    assert snips.mean_weight == pytest.approx(3.5 / 3)
    assert (snips.n, snips.left_out, snips.unsupported, snips.clipped) == (3, 0, 0.0, 0.0)


def test_an_interval_by_hand() -> None:
    """The jackknife: the estimate without each decision in turn; w = 2, 1/2, 1."""
    weights, rewards = np.array([2.0, 0.5, 1.0]), np.array([1.0, 0.0, 2.0])
    found = estimate(rewards, np.log(weights), np.zeros(3), level=0.6826894921370859)  # one standard deviation
    without = [np.average(np.delete(rewards, i), weights=np.delete(weights, i)) for i in range(3)]
    assert found.high - found.value == pytest.approx(math.sqrt(np.square(np.array(without) - found.value).sum()))
    assert found.value - found.low == pytest.approx(found.high - found.value)
    mean = estimate(rewards, np.log(weights), np.zeros(3), method="ips", level=0.6826894921370859)
    assert mean.high - mean.value == pytest.approx(
        math.sqrt((weights * rewards).var() / 3) * 1.5  # n / (n - 1)
    )


def test_bounds_by_hand() -> None:
    """Half of the target's mass had no chance: the value lies halfway between what is known and what may be."""
    found = estimate(np.ones(400), np.log(np.full(400, 0.5)), np.zeros(400), unsupported=0.5)
    assert found.value == found.low == found.high == 1.0
    assert found.bounds(0.0, 1.0) == pytest.approx((0.5, 1.0))
    assert found.bounds(-1.0, 3.0) == pytest.approx((0.0, 2.0))
    with pytest.raises(ValueError, match="worst"):
        found.bounds(1.0, 0.0)


def test_unknown_propensities_and_rewards_are_left_out_and_counted() -> None:
    rewards = [1.0, math.nan, 1.0, 1.0]
    found = estimate(rewards, [0.0, 0.0, 0.0, -math.inf], [0.0, 0.0, math.nan, 0.0])
    assert (found.n, found.left_out) == (2, 2)
    assert found.value == 1.0
    assert found.mean_weight == 0.5


@pytest.mark.parametrize("rewards", [[], [1.0], [math.nan, math.nan]])
def test_too_little_is_nothing_known(rewards: list[float]) -> None:
    nothing = np.zeros(len(rewards))
    methods: tuple[Method, ...] = ("ips", "snips")
    for method in methods:
        found = estimate(rewards, nothing, nothing, method=method)
        assert math.isnan(found.value)
        assert (found.low, found.high) == (-math.inf, math.inf)
        assert found.bounds(-2.0, 3.0) == (-2.0, 3.0)


def test_a_target_that_the_log_never_took_is_not_valued() -> None:
    found = estimate(np.ones(5), np.full(5, -np.inf), np.zeros(5), unsupported=1.0)
    assert math.isnan(found.value)
    assert found.effective_n == 0.0
    assert found.bounds(0.0, 2.0) == (0.0, 2.0)
    one = estimate(np.ones(5), np.zeros(5), np.zeros(5), clusters=["a"] * 5)
    assert (one.value, one.low, one.high) == (1.0, -math.inf, math.inf)


def test_options_that_do_not_go_together_are_refused() -> None:
    column = np.zeros(3)
    refused: list[dict[str, Any]] = [{"method": "snips"}, {"clusters": [1, 2, 3]}, {"clip": 2.0}]
    for options in refused:
        with pytest.raises(ValueError, match="largest"):
            estimate(column, column, column, **{"method": "ips", "largest": 1.0, **options})
    with pytest.raises(ValueError, match="level"):
        estimate(column, column, column, level=1.0)
    with pytest.raises(ValueError, match="above"):
        estimate(column + 3.0, column, column, method="ips", largest=2.0)


@given(
    hnp.arrays(np.float64, 20, elements=st.floats(-5, 5)),
    hnp.arrays(np.float64, 20, elements=st.floats(0.05, 1)),
    st.floats(-10, 10),
    st.floats(0, 1),
)
def test_snips_moves_with_the_rewards_and_stays_in_their_range(
    rewards: Floats, propensities: Floats, shift: float, missing: float
) -> None:
    columns = np.zeros(20), np.log(propensities)
    found, moved = (estimate(each, *columns, unsupported=missing) for each in (rewards, rewards + shift))
    assert moved.value == pytest.approx(found.value + shift, abs=1e-9)
    assert rewards.min() - 1e-9 <= found.value <= rewards.max() + 1e-9
    assert found.low <= found.value <= found.high
    low, high = found.bounds(-6.0, 6.0)
    assert -6.0 <= low <= high <= 6.0


# -- batches


def batch(log: Log) -> Batch:
    """A trainer's batch of these decisions."""
    count = len(log.actions)
    return dataclasses.replace(
        batch_of({}),
        nvec=(4,),
        actions=log.actions,
        rewards=log.rewards,
        behaviour=log.behaviour,
        masks=log.wanted > 0.0,
        log_propensities=np.log(log.propensities),
        fallbacks=np.array([""] * count, np.object_),
    )


def test_a_batch_is_evaluated_as_its_columns() -> None:
    log = play(np.random.default_rng(7), 0.05 * COUNT)
    whole = batch(log)
    found, expected = evaluate(whole, log.wanted, method="ips", level=0.9), log.estimate(method="ips", level=0.9)
    for name in ("value", "low", "high", "effective_n", "unsupported", "n"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name))
    assert found.bounds(0.0, 1.0) == pytest.approx(expected.bounds(0.0, 1.0))


def test_mass_on_masked_actions_is_unsupported_unless_the_target_goes_behind_the_masks() -> None:
    log = play(np.random.default_rng(8), 0.15 * COUNT)
    whole = batch(log)
    everywhere = np.full((COUNT, 4), 0.25)
    assert evaluate(whole, everywhere).unsupported == pytest.approx(0.25 * (~whole.masks).sum(axis=1).mean())
    masked = behind_masks(whole, everywhere)
    np.testing.assert_allclose(masked, whole.masks / whole.masks.sum(axis=1, keepdims=True))
    assert evaluate(whole, masked).unsupported == pytest.approx(0.0, abs=1e-12)


def test_where_nothing_was_allowed_every_policy_falls_back() -> None:
    log = play(np.random.default_rng(9), 0.15 * COUNT)
    whole = batch(log)
    whole.masks[:2], whole.fallbacks[0] = False, "nothing_allowed"
    with pytest.raises(ValueError, match="row 1 has no mass"):
        behind_masks(whole, np.full((COUNT, 4), 0.25))
    whole.masks[1] = True
    masked = behind_masks(whole, np.full((COUNT, 4), 0.25))
    assert masked[0].tolist() == np.eye(4)[log.actions[0]].tolist()
    assert masked[1].tolist() == [0.25] * 4


def test_several_factors_are_a_product() -> None:
    found = evaluate(batch_of(*[MULTI] * 3), [[0.25, 0.25, 0.5, 0.5, 0.5]] * 3, method="ips")
    assert found.mean_weight == pytest.approx(0.5 * 0.5 / 0.9802)
    assert found.unsupported == pytest.approx(0.25)  # the middle choice of the first factor


def test_targets_that_do_not_fit_are_refused() -> None:
    whole = batch_of({}, {})
    for wrong in ([[0.5, 0.6]] * 2, [[1.5, -0.5]] * 2):
        with pytest.raises(ValueError, match="distribution"):
            evaluate(whole, wrong)
    with pytest.raises(ValueError, match="shape"):
        evaluate(whole, [[1.0, 0.0]])
    with pytest.raises(ValueError, match="continuous"):
        evaluate(batch_of(POINT), [[1.0, 0.0]])
