"""Bounds on a difference that hold at all times, the verdicts made of them, and the ratio of the sample."""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np
import pytest

from policies.types import Floats
from shadow.capital import STAKE, bound, gains, log_weights, tilts, wealth
from shadow.guards import Guard, Measure, value
from shadow.ratio import Ratio
from shadow.sequential import Difference, Outside, Predictions
from shadow.units import Unit
from shadow.verdicts import Account, Alpha, Reading, Verdict, portion, read, verdict
from tests.shadow import simulate_rollouts as simulated
from tests.shadow.rivals import arms, betting, howard, ours

WEIGHTS = (0.001, 0.01, 0.05, 0.25, 0.5, 0.9)


def unit(**changes: object) -> Unit:
    plain = Unit(
        start_ms=0, order="a", assigned="v2", challenger=True, weight=0.1, value=0.5, decisions=4, overridden=0,
        fallback=0, errors=0, slow=0, defaulted=0, quarantined=0, void=0, ended=True,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def seen(weight: float, *, n: int = 400, effect: float = 0.0, seed: int = 0) -> Difference:
    """A difference after units whose values, but for the effect, depend on nothing."""
    rng = np.random.default_rng(seed)
    assigned = rng.random(n) < weight
    return Difference.fresh(0.0, 1.0, weight).add_many(assigned, 0.3 + 0.4 * rng.random(n) + effect * assigned)


# The bets


@pytest.mark.parametrize("weight", WEIGHTS)
def test_no_stake_gains_on_average_whatever_was_predicted_and_whatever_the_two_values_are(weight: float) -> None:
    rng = np.random.default_rng(1)
    ends = np.array([0.0, 1.0])
    for _ in range(10):
        predicted, values = np.append(ends, rng.random(2)), np.append(ends, rng.random(2))
        for f1, f0, y1, y0 in itertools.product(predicted, predicted, values, values):
            both = np.array([True, False])
            logs = gains(both, np.array([y1, y0]), np.full(2, f1), np.full(2, f0), weight)
            fair = logs - tilts(weight) * (y1 - y0)
            expected = weight * np.exp(fair[0]) + (1.0 - weight) * np.exp(fair[1])
            assert (expected <= 1.0 + 1e-12).all()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_no_unit_takes_more_than_the_stake(weight: float) -> None:
    corners = np.array(list(itertools.product((0.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.5, 1.0), (0.0, 1.0))))
    assigned, f1, f0, y = corners.T
    logs = gains(assigned > 0.5, y, f1, f0, weight)
    f1s = np.minimum(f1[:, None], STAKE * weight / tilts(weight))
    f0s = np.maximum(f0[:, None], 1.0 - STAKE * (1.0 - weight) / tilts(weight))
    left = np.exp(logs - tilts(weight) * (f1s - f0s))
    assert left.min() >= 1.0 - STAKE - 1e-9


@pytest.mark.parametrize("weight", WEIGHTS)
def test_stakes_reach_from_tiny_to_one_and_their_weights_add_up_to_one(weight: float) -> None:
    stakes = tilts(weight)
    assert stakes[0] < weight / 1_000.0
    assert 0.5 < stakes[-1] <= 1.0
    assert np.exp(log_weights(weight)).sum() == pytest.approx(1.0)
    assert stakes[np.argmax(log_weights(weight))] == pytest.approx(weight * (1.0 - weight))


def test_wealth_is_one_at_the_beginning_and_gives_no_bound() -> None:
    nothing = np.zeros(len(tilts(0.1)))
    assert wealth(nothing, 0, 0.3, 0.1) == pytest.approx(0.0)
    assert bound(nothing, 0, 0.01, 0.1) == -1.0


# Differences


@pytest.mark.parametrize("weight", [0.2, 0.5])
def test_the_estimate_is_right_on_average_over_all_assignments(weight: float) -> None:
    ones, zeros = np.array([0.9, 0.1, 0.4, 0.4, 1.0, 0.0]), np.array([0.2, 0.3, 0.1, 0.9, 0.6, 0.5])
    average = 0.0
    for tosses in itertools.product((True, False), repeat=len(ones)):
        assigned = np.array(tosses)
        chance = np.where(assigned, weight, 1.0 - weight).prod()
        state = Difference.fresh(0.0, 1.0, weight).add_many(assigned, np.where(assigned, ones, zeros))
        average += chance * state.estimate
    assert average == pytest.approx((ones - zeros).mean())


@pytest.mark.parametrize("weight", [0.01, 0.3])
def test_units_one_by_one_and_in_any_portions_give_the_same_state(weight: float) -> None:
    rng = np.random.default_rng(3)
    assigned, values = rng.random(300) < weight, rng.random(300)
    at_once = Difference.fresh(0.0, 1.0, weight).add_many(assigned, values)
    single = portions = Difference.fresh(0.0, 1.0, weight)
    for a, v in zip(assigned.tolist(), values.tolist(), strict=True):
        single = single.add(a, v)
    for cut in (slice(0, 7), slice(7, 7), slice(7, 120), slice(120, 300)):
        portions = portions.add_many(assigned[cut], values[cut])
    for other in (single, portions):
        assert np.allclose(np.frombuffer(other.over), np.frombuffer(at_once.over))
        assert np.allclose(np.frombuffer(other.under), np.frombuffer(at_once.under))
        assert other.total == pytest.approx(at_once.total)
        assert other.predictions == at_once.predictions
    assert at_once.units == 300


def test_watching_says_after_each_unit_what_the_evidence_was() -> None:
    rng = np.random.default_rng(4)
    assigned, values = rng.random(60) < 0.3, rng.random(60)
    state = Difference.fresh(0.0, 1.0, 0.3).add_many(assigned[:20], values[:20])
    whole, above, below = state.watch(assigned[20:], values[20:], -0.1)
    for i in range(20, 60):
        state = state.add(bool(assigned[i]), float(values[i]))
        assert state.evidence(-0.1) == pytest.approx((above[i - 20], below[i - 20]))
    assert whole.units == 60


@pytest.mark.parametrize("weight", [0.05, 0.5])
@pytest.mark.parametrize("effect", [-0.25, 0.0, 0.25])
def test_a_bound_is_where_the_evidence_is_just_enough(weight: float, effect: float) -> None:
    state = seen(weight, n=3_000, effect=effect)
    for alpha in (0.01, 0.0003):
        enough = -math.log(alpha)
        lower, upper = state.lower(alpha), state.upper(alpha)
        assert lower < state.estimate < upper
        assert state.evidence(lower - 1e-6)[0] > enough > state.evidence(lower + 1e-6)[0]
        assert state.evidence(upper + 1e-6)[1] > enough > state.evidence(upper - 1e-6)[1]
        assert state.lower(alpha / 10.0) < lower


@pytest.mark.parametrize("weight", [0.05, 0.5])
def test_turning_the_values_round_turns_the_bounds_round(weight: float) -> None:
    rng = np.random.default_rng(5)
    assigned, values = rng.random(2_000) < weight, rng.random(2_000) ** 2
    state = Difference.fresh(0.0, 1.0, weight).add_many(assigned, values)
    turned = Difference.fresh(-1.0, 0.0, weight).add_many(assigned, -values)
    assert turned.lower(0.01) == pytest.approx(-state.upper(0.01))
    assert turned.estimate == pytest.approx(-state.estimate)


def test_the_unit_of_the_values_does_not_matter() -> None:
    rng = np.random.default_rng(6)
    assigned, values = rng.random(2_000) < 0.2, rng.random(2_000)
    small = Difference.fresh(0.0, 1.0, 0.2).add_many(assigned, values)
    large = Difference.fresh(-100.0, 300.0, 0.2).add_many(assigned, 400.0 * values - 100.0)
    assert large.lower(0.01) == pytest.approx(400.0 * small.lower(0.01))
    assert large.upper(0.01) == pytest.approx(400.0 * small.upper(0.01))
    assert large.estimate == pytest.approx(400.0 * small.estimate)
    assert large.evidence(-20.0) == pytest.approx(small.evidence(-0.05))


def test_a_state_survives_its_codec() -> None:
    state = seen(0.05)
    encoded = msgspec.msgpack.encode(state)
    assert msgspec.msgpack.decode(encoded, type=Difference) == state
    assert len(encoded) < 1_000
    assert msgspec.json.decode(msgspec.json.encode(state), type=Difference) == state


def test_gains_beyond_the_range_are_cut_and_losses_beyond_it_are_told() -> None:
    assigned = np.array([False, True, False, True, False, True, True])
    values = np.array([2.0, math.inf, -0.1, -math.inf, math.nan, math.nan, 1.0])
    state = Difference.fresh(0.0, 1.0, 0.5).add_many(assigned, values)
    assert state.outside == Outside(cut_champion=1, cut_challenger=1, lost_champion=2, lost_challenger=2)
    clipped = Difference.fresh(0.0, 1.0, 0.5).add_many(assigned, np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]))
    assert msgspec.structs.replace(state, outside=Outside()) == clipped


@pytest.mark.parametrize(
    ("low", "high", "weight"),
    [(0.0, 0.0, 0.1), (1.0, 0.0, 0.1), (0.0, math.inf, 0.1), (math.nan, 1.0, 0.1), (0.0, 1.0, 0.0), (0.0, 1.0, 1.0)],
)
def test_there_is_no_comparison_without_a_range_or_with_one_version(low: float, high: float, weight: float) -> None:
    with pytest.raises(ValueError, match=r"range|compared"):
        Difference.fresh(low, high, weight)


def test_predictions_follow_a_level_that_both_versions_share() -> None:
    known = Predictions()
    for i in range(4_000):
        known = known.after(i % 20 == 0, 0.9 if i % 20 else 0.8)
    assert known.champion == pytest.approx(0.9, abs=0.001)
    assert known.difference == pytest.approx(-0.1, abs=0.01)
    for i in range(1_500):
        known = known.after(i % 20 == 0, 0.4 if i % 20 else 0.3)
    assert known.champion == pytest.approx(0.4, abs=0.05)


# What α covers


def test_shares_of_alpha_never_come_to_more_than_all_of_it() -> None:
    alpha = Alpha(guards=4, steps=5)
    planned = sum(alpha.rollback(guard, step) for guard in range(4) for step in range(5))
    assert planned == pytest.approx(0.01 * 0.81)
    total = sum(portion(place, 5) for place in range(100_000))
    assert 0.9999 < total < 1.0
    assert sum(portion(place, 0) for place in range(1_000)) < 1.0
    assert alpha.advance == 0.01


def reading(**changes: object) -> Reading:
    plain = Reading(
        estimate=0.0, lower=-0.1, upper=0.1, margin=0.05, action="rollback", must_prove=True, worse=False,
        proven=False, superior=False, lost=0,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def test_a_reading_holds_each_bound_against_the_margin() -> None:
    bad = read(seen(0.5, n=3_000, effect=-0.2), margin=0.1, rollback_alpha=0.001, advance_alpha=0.01)
    assert (bad.worse, bad.proven, bad.superior) == (True, False, False)
    good = read(seen(0.5, n=3_000), margin=0.1, rollback_alpha=0.001, advance_alpha=0.01)
    assert (good.worse, good.proven, good.superior) == (False, True, False)
    better = read(seen(0.5, n=3_000, effect=0.2), margin=0.0, rollback_alpha=0.001, advance_alpha=0.01)
    assert (better.worse, better.proven, better.superior) == (False, True, True)
    unknown = read(seen(0.5, n=3), margin=0.1, rollback_alpha=0.001, advance_alpha=0.01, action="pause")
    assert (unknown.worse, unknown.proven, unknown.action) == (False, False, "pause")


def test_nothing_is_proven_of_a_challenger_that_lost_more_than_the_range_can_tell() -> None:
    state = seen(0.5, n=3_000, effect=0.2)
    for assigned, proven in ((False, True), (True, False)):
        found = read(state.add(assigned, -5.0), margin=0.1, rollback_alpha=0.001, advance_alpha=0.01)
        assert (found.proven, found.superior, found.lost) == (proven, proven, int(assigned))


def test_the_worst_guard_decides_and_all_that_must_prove_do() -> None:
    proven, worse = reading(proven=True), reading(worse=True)
    assert verdict([proven, worse, reading(worse=True, action="pause")]) is Verdict.ROLLBACK
    assert verdict([proven, reading(worse=True, action="pause", must_prove=False)]) is Verdict.PAUSE
    assert verdict([proven, reading(worse=True, action="inform", must_prove=False)]) is Verdict.ADVANCE
    assert verdict([proven, reading()]) is Verdict.HOLD
    assert verdict([proven, proven, reading(must_prove=False)]) is Verdict.ADVANCE
    assert verdict([reading(must_prove=False)]) is Verdict.HOLD
    assert verdict([]) is Verdict.HOLD


def test_promotions_on_non_inferiority_add_up_until_one_shows_superiority() -> None:
    account = Account(margin=0.05)
    account = account.promoted(-0.02).promoted(-0.02)
    assert account.left == pytest.approx(0.01)
    assert account.promoted(-0.01).left == pytest.approx(0.0)
    assert account.promoted(-0.2).left == 0.0
    assert account.promoted(0.0).left == pytest.approx(0.01)
    assert account.promoted(0.001) == Account(margin=0.05)


# Guards


@pytest.mark.parametrize(
    ("measure", "changes", "worth"),
    [
        ("return", {"value": 7.0}, 7.0),
        ("override", {"overridden": 1}, -0.25),
        ("fallback", {"fallback": 2}, -0.5),
        ("error", {"errors": 3}, -0.75),
        ("latency", {"slow": 4}, -1.0),
        ("default", {"defaulted": 1}, -0.25),
        ("quarantine", {"quarantined": 1}, -0.25),
        ("void", {}, 0.0),
    ],
)
def test_a_guard_compares_one_number_for_each_unit(measure: Measure, changes: dict[str, int], worth: float) -> None:
    assert value(measure, unit(**changes)) == worth


def test_a_guard_of_a_rate_is_the_test_of_its_negative_share() -> None:
    rng = np.random.default_rng(7)
    units = [
        unit(challenger=bool(c), overridden=int(o), value=0.5)
        for c, o in zip(rng.random(800) < 0.5, rng.integers(0, 2, 800), strict=True)
    ]
    units += [unit(challenger=bool(c), overridden=4 * int(c)) for c in rng.random(800) < 0.5]
    rate = Guard(measure="override", margin=0.01, action="pause")
    found = rate.read(rate.add(rate.fresh(0.5), units), Alpha(guards=2, steps=5), 1, 0)
    assert (found.worse, found.action, found.must_prove, found.margin) == (True, "pause", False, 0.01)
    returns = Guard(measure="return", margin=0.2, must_prove=True, return_range=(0.0, 10.0))
    state = returns.add(returns.fresh(0.5), units)
    assert (state.low, state.high) == (0.0, 10.0)
    assert returns.read(state, Alpha(guards=2, steps=5), 0, 0).proven
    assert not returns.read(state, Alpha(guards=2, steps=5), 0, 0, margin=0.0).proven
    assert returns.add(state, []) == state


# The ratio


@pytest.mark.parametrize("weight", [0.01, 0.3, 0.5])
def test_the_ratios_evidence_is_a_fair_game_if_the_weight_is_true(weight: float) -> None:
    for n in (1, 2, 7):
        average = 0.0
        for tosses in itertools.product((True, False), repeat=n):
            state = Ratio(weight)
            for toss in tosses:
                state = state.add(toss)
            average += math.exp(state.evidence) * weight ** sum(tosses) * (1.0 - weight) ** (n - sum(tosses))
        assert average == pytest.approx(1.0)


def test_a_ratio_that_is_off_is_found_and_a_true_one_is_not() -> None:
    assert Ratio(0.1).share == 0.1
    assert not Ratio(0.1).mismatched(0.01)
    true = Ratio(0.1).add_many(1_010, 8_990)
    assert true.share == 0.101
    assert not true.mismatched(0.01)
    assert Ratio(0.1, 800, 8_990).mismatched(0.001)
    assert Ratio(0.1, 1_250, 8_990).mismatched(0.001)


# Whole rollouts, in short; `python -m tests.shadow.simulate_rollouts` has the figures


def test_nothing_against_itself_is_hardly_ever_rolled_back_and_something_worse_hardly_ever_advanced() -> None:
    happened = [
        simulated.share_of(40, 1, lambda rng: simulated.rolled_back_by_episode(rng, 300))[0],
        simulated.share_of(40, 2, lambda rng: simulated.rolled_back_by_key(rng, 400))[0],
        simulated.share_of(40, 3, lambda rng: simulated.advanced_wrongly(rng, 800, 0.1))[0],
    ]
    assert max(happened) <= 2  # three or more of 40 have probability 0.7 % at a true 1 %


def test_what_is_much_worse_is_found_and_what_is_as_good_gets_through() -> None:
    rng = np.random.default_rng(8)
    assert simulated.units_to_roll_back(rng, 0.25, -0.3, 4_000) < 4_000
    assert simulated.units_to_advance(rng, 0.25, 0.2, 4_000) < 4_000
    assert simulated.units_in_a_range(rng, 0.25, 2.0, 4_000) < 4_000
    assert simulated.units_of_overrides(rng, 0.25, 0.5, 4_000) < 4_000
    assert simulated.units_of_mismatch(rng, 0.25, 0.6, 4_000) < 4_000
    assert simulated.units_of_mismatch(rng, 0.25, 0.0, 400) == simulated.NEVER
    assert simulated.median_of(3, 0, 50, lambda rng, cap: simulated.NEVER) == "> 50"
    assert simulated.median_of(3, 0, 5_000, lambda rng, cap: 1_234) == "1,200"
    assert simulated.cap_for(0.01, 0.01) == 300_000


def test_naive_ways_roll_back_what_is_not_worse() -> None:
    ways = (simulated.rows_of_sticky_keys, simulated.as_rewards_arrive, simulated.as_episodes_end)
    for way in ways:
        assert sum(way(np.random.default_rng(seed), 3_000) for seed in range(25)) >= 2, way.__name__
    assert all(simulated.pooled_ramp(np.random.default_rng(seed), 4_000) for seed in range(3))


def test_this_test_needs_no_more_units_than_its_rivals() -> None:
    needed: dict[str, list[int]] = {"ours": [], "howard": [], "arms": []}
    for seed in range(5):
        rng = np.random.default_rng(seed)
        assigned, values = rng.random(6_000) < 0.1, 0.3 + 0.4 * rng.random(6_000)
        enough = math.log(100.0)
        needed["ours"].append(simulated.first(ours(assigned, values, -0.05, 0.1) >= enough))
        needed["howard"].append(simulated.first(howard(assigned, values, -0.05, 0.1) >= enough))
        needed["arms"].append(simulated.first(arms(assigned, values, -0.05, 0.01)))
    assert np.median(needed["ours"]) < min(np.median(needed["howard"]), np.median(needed["arms"])) < simulated.NEVER


def test_the_betting_rival_stops_where_nothing_more_is_reached() -> None:
    low: Floats = betting(np.full(300, 0.8), 0.01)
    assert 0.7 < low[-1] < 0.8
