"""The calibration monitor: honest logs stay quiet under continuous peeking, false ones are found, sums merge."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import continuous
from policies.continuous import Transform
from policies.draw import draw
from policies.explore import behave
from policies.heads import target
from policies.types import Floats, HeadKind
from safety.calibration import LOG_WEIGHTS, TILTS, Bin, Calibration, Report, Sums, Tosses, evidence, fresh, merge
from safety.calibration_choices import TRACKED, WARM_UP, Choices, Tracked, bins, toss
from safety.calibration_points import BINS, Points
from safety.calibration_points import toss as toss_points
from tests.safety.calibrating import (
    DECISIONS,
    EVERYTHING,
    first_alarm,
    logged,
    normal_mixture_crossing,
    tossed,
)

COINS = (Bin("coin", "one"), Bin("coin", "two"))


def coins(probabilities: list[float], hits: list[bool]) -> Tosses:
    """The same toss in both bins."""
    return Tosses(np.array([probabilities] * 2).T, np.array([hits] * 2).T)


def taken(choices: Choices, rows: slice) -> Choices:
    return Choices(
        choices.behaviour[rows],
        choices.actions[rows],
        choices.epsilons[rows],
        choices.explored[rows],
        choices.propensities[rows],
        choices.nvec,
    )


def watched(choices: Choices, batch: int = 1_000) -> Report:
    n = choices.behaviour.shape[1]
    tracked = Tracked.of(n)
    monitor = Calibration(bins(tracked, n))
    for start in range(0, len(choices.behaviour), batch):
        tosses, tracked = toss(taken(choices, slice(start, start + batch)), tracked)
        monitor.observe(tosses)
    return Calibration(bins(tracked, n), sums=monitor.sums).report()


# -- the statistic


@given(st.floats(1e-6, 1.0 - 1e-6))
def test_each_step_of_the_martingale_has_mean_one(p: float) -> None:
    for tilt in TILTS:
        log_norm = np.log1p(p * np.expm1(tilt))
        mean = p * math.exp(tilt - log_norm) + (1.0 - p) * math.exp(-log_norm)
        assert mean == pytest.approx(1.0, abs=1e-12)
    assert np.exp(LOG_WEIGHTS).sum() == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.booleans()), min_size=1, max_size=30), st.integers(1, 5))
def test_sums_over_batches_are_the_definition(told: list[tuple[float, bool]], batch: int) -> None:
    monitor = Calibration(COINS)
    for start in range(0, len(told), batch):
        part = told[start : start + batch]
        monitor.observe(coins([p for p, _ in part], [hit for _, hit in part]))
    (line, *_) = monitor.report().lines
    mixture = 0.0
    for weight, tilt in zip(np.exp(LOG_WEIGHTS), TILTS, strict=True):
        factors = [math.exp(tilt * hit) / (1.0 - p + p * math.exp(tilt)) for p, hit in told]
        mixture += weight * math.prod(factors)
    assert line.evidence == pytest.approx(math.log(mixture), abs=1e-9)
    assert line.s == pytest.approx(sum(hit - p for p, hit in told))
    assert line.v == pytest.approx(sum(p * (1.0 - p) for p, _ in told))
    assert (line.tosses, line.hits) == (len(told), sum(hit for _, hit in told))


def test_alpha_is_split_over_scopes_groups_bins_and_windows() -> None:
    monitor = Calibration((*COINS, Bin("die", "six")), alpha=0.04, window=2)
    spent = 0.0
    for started in range(1, 400):
        lines = monitor.report().lines
        spent += sum(math.exp(-line.threshold) for line in lines if line.scope == "recent")
        if started == 1:
            assert sum(math.exp(-line.threshold) for line in lines if line.scope == "ever") == pytest.approx(0.02)
            assert {line.bin.name: math.exp(-line.threshold) for line in lines if line.scope == "ever"} == {
                "one": pytest.approx(0.005),
                "two": pytest.approx(0.005),
                "six": pytest.approx(0.01),
            }
        monitor.observe(Tosses(np.full((2, 3), 0.5), np.eye(2, 3, dtype=np.bool_)))
        monitor.observe(Tosses(np.zeros((0, 3)), np.zeros((0, 3), np.bool_)))
    assert 0.0199 < spent < 0.02


def test_what_cannot_be_alarms_at_once() -> None:
    for p, hit in ((0.0, True), (1.0, False)):
        monitor = Calibration(COINS)
        monitor.observe(coins([p], [hit]))
        assert not monitor.report().calibrated
        assert monitor.report().alarms[0].impossible == 1
    monitor.observe(coins([0.0, 1.0], [False, True]))
    assert monitor.report().alarms[0].impossible == 1


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=20), st.data())
def test_replicas_merge_into_what_one_would_have_seen(told: list[tuple[float, bool]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(told) - 1))
    whole, one, two = Calibration(COINS), Calibration(COINS), Calibration(COINS)
    for monitor, part in ((whole, told), (one, told[:cut]), (two, told[cut:])):
        monitor.observe(coins([p for p, _ in part], [hit for _, hit in part]))
    kept = msgspec.msgpack.decode(msgspec.msgpack.encode(one.sums), type=Sums)
    merged = Calibration(COINS, sums=merge(kept, two.sums)).report()
    for line, other in zip(merged.lines, whole.report().lines, strict=True):
        assert (line.tosses, line.hits, line.impossible) == (other.tosses, other.hits, other.impossible)
        assert line.evidence == pytest.approx(other.evidence, abs=1e-9)
    assert merged.decisions == len(told)


def test_sums_of_other_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="different"):
        merge(fresh(COINS), fresh(COINS[:1]))
    with pytest.raises(ValueError, match="other bins"):
        Calibration(COINS, sums=fresh(COINS[:1]))
    for bad in ({"alpha": 0.0}, {"alpha": 1.0}, {"window": 0}):
        with pytest.raises(ValueError, match="needs"):
            Calibration(COINS, **bad)
    with pytest.raises(ValueError, match="needs"):
        Calibration(())


def test_a_fault_that_begins_late_is_found_by_the_window() -> None:
    rng = np.random.default_rng(4)
    monitor, tracked = Calibration(bins(Tracked.of(4), 4)), Tracked.of(4)
    found = []
    for factor in [1.0] * 20 + [2.0] * 2:
        tosses, tracked = toss(logged(rng, 4, 0.05, factor), tracked)
        monitor.observe(tosses)
        found.append({line.scope for line in monitor.report().alarms})
    assert found[:20] == [set()] * 20
    assert "recent" in found[20]


# -- choices


@pytest.mark.parametrize("head", ["q_values", "logits"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_doubled_epsilon_is_found_within_5000_decisions(head: HeadKind, n: int) -> None:
    rng = np.random.default_rng([n, 1])
    for _ in range(10):
        wrong = logged(rng, n, 0.05, 2.0, head)
        assert first_alarm(*tossed(wrong), EVERYTHING) is not None
        if head == "q_values":
            assert first_alarm(*tossed(wrong), EVERYTHING[1:]) is not None, "also where `explored` tells nothing"
    assert watched(wrong).alarms


def test_a_halved_epsilon_is_found_too() -> None:
    assert watched(logged(np.random.default_rng(5), 4, 0.1, 0.5)).alarms


@pytest.mark.parametrize(
    ("head", "n", "epsilon", "runs"),
    [("q_values", 2, 0.05, 40), ("logits", 4, 0.05, 20), ("q_values", 3, 0.01, 40), ("q_values", 100, 0.01, 8)],
)
def test_honest_runs_stay_quiet_under_continuous_peeking(head: HeadKind, n: int, epsilon: float, runs: int) -> None:
    rng = np.random.default_rng([n, runs])
    alarmed = sum(first_alarm(*tossed(logged(rng, n, epsilon, 1.0, head)), EVERYTHING) is not None for _ in range(runs))
    assert alarmed <= 0.05 * runs


def test_an_honest_coin_crosses_no_more_often_than_its_alpha_whatever_its_probability() -> None:
    """One bin with all of α: the worst case of the split, and of tiny probabilities."""
    rng = np.random.default_rng(6)
    for p, count in ((0.001, 4_000), (0.02, 2_000), (0.5, 1_000), (0.995, 2_000)):
        hits = rng.random((200, count, 1)) < p
        masses = np.full((count, 1), p)
        crossed = sum(first_alarm(Tosses(masses, each), [Bin("coin", "x")], ["coin"], 0.2) is not None for each in hits)
        assert crossed <= 0.1 * 200, f"p = {p}: {crossed} of 200 at α = 0.1"


def test_the_normal_mixture_is_no_bound_for_rare_events() -> None:
    """Why the monitor has another statistic than the design's: see docs/calibration.md."""
    assert normal_mixture_crossing(0.001, 0.1, 0.0005, 5_000) > 10 * 0.0005


def test_the_monitor_alarms_when_the_definition_does() -> None:
    wrong = logged(np.random.default_rng(8), 4, 0.05, 2.0)
    at = first_alarm(*tossed(wrong), EVERYTHING)
    assert at is not None
    assert watched(taken(wrong, slice(0, at)), batch=7).alarms
    assert not watched(taken(wrong, slice(0, at - 1)), batch=7).alarms


def test_bins_hold_the_mass_of_their_actions() -> None:
    choices = Choices(
        np.array([[0.975, 0.025, 0.0, 0.0], [0.025, 0.95, 0.025, 0.0]]),
        np.array([[1], [1]]),
        np.array([0.05, 0.1]),
        np.array([True, False]),
        np.array([0.025, 0.95]),
        (4,),
    )
    tosses, tracked = toss(choices, Tracked.of(4))
    named = dict(zip([each.name for each in bins(tracked, 4)], tosses.masses.T.tolist(), strict=True))
    happened = dict(zip([each.name for each in bins(tracked, 4)], tosses.hits.T.tolist(), strict=True))
    assert (named["explored"], happened["explored"]) == ([0.05, 0.1], [True, False])
    assert (named["p in (0.01, 0.03]"], happened["p in (0.01, 0.03]"]) == ([0.025, 0.05], [True, False])
    assert (named["p in (0.97, 0.99]"], named["p in (0.9, 0.97]"]) == ([0.975, 0.0], [0.0, 0.95])
    assert (named["p = 0"], happened["p = 0"]) == ([0.0, 0.0], [False, False])
    assert (named["action 1"], happened["action 1"]) == ([0.025, 0.95], [True, True])
    assert named["other actions"] == [0.0, 0.0]


def test_an_executed_action_of_probability_zero_alarms_at_once() -> None:
    choices = Choices(np.eye(3)[:1], np.array([[2]]), np.zeros(1), np.zeros(1, np.bool_), np.zeros(1), (3,))
    report = watched(choices)
    assert {line.bin.name for line in report.alarms} >= {"p = 0", "action 2"}


def test_decisions_without_a_propensity_are_left_out_and_contradictions_counted() -> None:
    behaviour = np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.6], [1.5, -0.5], [0.5, 0.5], [0.5, 0.5], [np.nan, 1.0]])
    propensities = np.array([0.5, np.nan, 0.5, 1.5, 0.5 + 1e-5, 0.5, 0.5])
    epsilons = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 1.5, 0.1])
    choices = Choices(behaviour, np.zeros((7, 1), np.int64), epsilons, np.zeros(7, np.bool_), propensities, (2,))
    report = watched(choices)
    assert (report.decisions, report.unknown, report.broken) == (1, 1, 5)
    assert not report.alarms
    assert not report.calibrated
    outside = Choices(behaviour[:1], np.array([[2]]), epsilons[:1], np.zeros(1, np.bool_), propensities[:1], (2,))
    assert watched(outside).broken == 1


def test_many_actions_share_64_bins_of_their_own() -> None:
    n, rng = 200, np.random.default_rng(9)
    choices = logged(rng, n, 0.5, masked=False)
    tracked = Tracked.of(n)
    early, tracked = toss(taken(choices, slice(0, WARM_UP - 1)), tracked)
    assert tracked.columns == ()
    assert not early.masses[:, 14:].any()
    assert early.masses.shape[1] == len(bins(tracked, n))
    _, tracked = toss(taken(choices, slice(WARM_UP - 1, WARM_UP)), tracked)
    assert len(tracked.columns) == TRACKED
    assert tracked.seen == b""
    most = np.argsort(-choices.behaviour[:WARM_UP].sum(axis=0), kind="stable")[:TRACKED]
    assert set(tracked.columns) == set(most.tolist())
    late, after = toss(taken(choices, slice(WARM_UP, DECISIONS)), tracked)
    assert after.columns == tracked.columns
    np.testing.assert_allclose(late.masses[:, 14:].sum(axis=1), 1.0)
    np.testing.assert_array_equal(late.hits[:, 14:].sum(axis=1), 1)


def several(rng: np.random.Generator, factor: float) -> Choices:
    nvec = (3, 2)
    wanted = target(rng.normal(size=(DECISIONS, 5)), "q_values", nvec=nvec)
    mask, fallback = np.ones((DECISIONS, 5), np.bool_), np.zeros((DECISIONS, 2), np.int64)
    recorded = behave(wanted, mask, np.full(DECISIONS, 0.05), fallback)
    drawn = draw(behave(wanted, mask, np.full(DECISIONS, 0.05 * factor), fallback), rng.random((DECISIONS, 3)))
    return Choices(
        recorded.probabilities, drawn.actions, recorded.epsilon, drawn.explored, np.full(DECISIONS, 0.5), nvec
    )


def test_several_factors_are_looked_at_in_turn() -> None:
    rng = np.random.default_rng(10)
    honest = several(rng, 1.0)
    tosses, tracked = toss(honest, Tracked.of(5))
    np.testing.assert_allclose(tosses.masses[:, 1:14].sum(axis=1), 1.0)
    np.testing.assert_array_equal(tosses.hits[:, 1:14].sum(axis=1), 1)
    assert tracked.decisions == DECISIONS
    likely, unlikely = 0.95 + 0.05 / 2, 0.05 / 2  # of the factor of two choices, whose turn comes second
    held = [set(row[row > 0.0].tolist()) for row in tosses.masses[:2, 1:14]]
    assert sorted(held[1]) == pytest.approx([unlikely, likely])
    assert sorted(held[0]) != pytest.approx([unlikely, likely])
    assert not watched(honest).alarms
    for _ in range(10):
        assert first_alarm(*tossed(several(rng, 2.0)), EVERYTHING[1:]) is not None


# -- points


def points(
    seed: int, *, head: HeadKind = "gaussian", sigma: float = 1.0, epsilon: float = 1.0, spread: float = 1.0
) -> Points:
    """Points recorded as drawn with ε = 0.1, σ = 0.4, but drawn with multiples of those."""
    rng, count = np.random.default_rng(seed), DECISIONS
    outputs = np.concatenate([rng.normal(size=(count, 2)), np.full((count, 2), -0.7)], axis=1)
    if head == "action":
        outputs = outputs[:, :2]
    transform = Transform("unscale", np.array([-1.0, 0.0]), np.array([1.0, 4.0]))
    low, high = np.tile(transform.low, (count, 1)), np.tile(transform.high, (count, 1))
    high[::7, 1] = 0.0  # a side without width
    fallback, said = np.zeros((count, 2)), np.full(count, 0.1)
    recorded = continuous.gaussian(outputs, head)
    true = continuous.Gaussian(recorded.mean, recorded.std * spread, recorded.faulty)
    noise = np.array([0.4, 0.4])
    drawn = continuous.draw(
        continuous.behave(true, transform, (low, high), said * epsilon, noise * sigma, fallback), rng.random((count, 3))
    )
    return Points(
        target=recorded.distribution,
        boxes=np.stack([low, high], axis=1),
        sigmas=np.tile(noise, (count, 1)),
        raw_actions=drawn.raw,
        at_bound=drawn.at_bound,
        epsilons=said,
        log_propensities=drawn.log_propensity,
        explored=drawn.explored,
        fallback=np.arange(count) % 50 == 0,
        transform=transform,
    )


def seen(points: Points) -> Report:
    monitor = Calibration(BINS)
    monitor.observe(toss_points(points, 0))
    return monitor.report()


@pytest.mark.parametrize("head", ["gaussian", "action"])
def test_honest_points_stay_quiet(head: HeadKind) -> None:
    for seed in range(15):
        assert first_alarm(toss_points(points(seed, head=head), 0), BINS, ("explored", "end", "own", "noise")) is None
    report = seen(points(1, head=head))
    assert report.calibrated
    ends = {line.bin.name: line for line in report.lines if line.scope == "ever"}
    assert min(ends["low end"].hits, ends["high end"].hits) > 100


@pytest.mark.parametrize(
    ("wrong", "group"), [({"epsilon": 2.0}, "explored"), ({"sigma": 2.0}, "noise"), ({"spread": 1.2}, "own")]
)
def test_wrong_points_are_found(wrong: dict[str, float], group: str) -> None:
    assert group in {line.bin.group for line in seen(points(2, **wrong)).alarms}  # type: ignore[arg-type]


def test_the_ends_have_the_mass_that_projection_gathers() -> None:
    honest = points(3)
    tosses = toss_points(honest, 0)
    wider = Points(**{**{f: getattr(honest, f) for f in Points.__slots__}, "boxes": honest.boxes * 1.2})
    assert "end" in {line.bin.group for line in seen(wider).alarms}
    frequency: Floats = tosses.hits[:, 1:3].mean(axis=0)
    np.testing.assert_allclose(frequency, tosses.masses[:, 1:3].mean(axis=0), atol=0.01)


def test_points_without_a_propensity_or_a_head_are_left_out() -> None:
    honest = points(4)
    honest.log_propensities[0], honest.target[1, 0], honest.epsilons[2] = np.nan, np.nan, 2.0
    tosses = toss_points(honest, 0)
    fallen = int(honest.fallback[3:].sum())
    assert (len(tosses.masses), tosses.unknown, tosses.broken) == (DECISIONS - 3 - fallen, 1, 2)


def test_evidence_of_nothing_is_nothing() -> None:
    assert evidence(np.zeros((1, 5 + len(TILTS))))[0] == pytest.approx(0.0)


def test_memory_is_bounded() -> None:
    sums = fresh(bins(Tracked.of(10_000), 10_000))
    assert len(msgspec.msgpack.encode(sums)) < 50_000
