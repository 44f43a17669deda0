"""The gate before the canary: what is not known holds, what boasts does not pass, what is better passes in the end."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from shadow.estimate import Estimate, Support
from shadow.estimators import ModelTerms, Tally, Terms
from shadow.gate import GateConfig, Verdict, gate
from shadow.paths import Range
from tests.shadow.logs import BEST, CANDIDATE, DRIVER, MEANS, OLD, PAY, WORST, bandit, exploring, mdp

UNIT = Range(low=0.0, high=1.0)
CONFIG = GateConfig()


def support(**changes: Any) -> Support:
    settings: dict[str, Any] = {
        "units": 1_000,
        "rows": 1_000,
        "left_out": 0,
        "outside": 0,
        "effective_n": 300.0,
        "mean_weight": 1.0,
        "mean_weight_low": 0.9,
        "mean_weight_high": 1.1,
        "unsupported": 0.0,
        "disagreements": 400,
        "matched": 100,
    }
    return Support(**{**settings, **changes})


def estimate(lower: float = 0.6, upper: float = 0.8, **changes: Any) -> Estimate:
    return Estimate(
        method="dr",
        value=0.7,
        error=0.02,
        low=0.66,
        high=0.74,
        lower=lower,
        upper=upper,
        units=1_000,
        support=support(**changes),
    )


@pytest.mark.parametrize(
    ("found", "config", "outcome", "reasons"),
    [
        (estimate(), CONFIG, "passes", []),
        (estimate(lower=0.5), CONFIG, "no_evidence", ["the lower bound 0.5 is not above 0.5"]),
        (estimate(lower=0.46), GateConfig(margin=0.05), "passes", []),
        (estimate(lower=0.45), GateConfig(margin=0.05), "no_evidence", ["the lower bound 0.45 is not above 0.45"]),
        (estimate(lower=0.1, upper=0.49), CONFIG, "fails", ["the upper bound 0.49 is below 0.5"]),
        (estimate(lower=0.1, upper=0.49, matched=0, unsupported=0.5), CONFIG, "fails", ["the upper bound"]),
        (estimate(lower=0.1, upper=0.5), CONFIG, "no_evidence", ["the lower bound"]),
        (estimate(unsupported=0.01), CONFIG, "passes", []),
        (estimate(unsupported=0.011), CONFIG, "no_evidence", ["1.10% of its paths is unsupported, more than 1.00%"]),
        (estimate(unsupported=None), CONFIG, "no_evidence", ["an unknown share"]),
        (estimate(unsupported=0.1), GateConfig(most_unsupported=0.1), "passes", []),
        (estimate(matched=50), CONFIG, "passes", []),
        (estimate(matched=49), CONFIG, "no_evidence", ["49 matched disagreements, 50 needed"]),
        (estimate(matched=9), GateConfig(least_matched=9), "passes", []),
        (estimate(left_out=50), CONFIG, "passes", []),
        (estimate(left_out=51), CONFIG, "no_evidence", ["51 of 1000 units are not wholly known"]),
        (estimate(lower=0.1, matched=1), CONFIG, "no_evidence", ["1 matched", "the lower bound 0.1"]),
        (estimate(mean_weight_high=0.99), CONFIG, "no_evidence", ["the mean weight lies in [0.9, 0.99]"]),
        (estimate(mean_weight_low=1.01), CONFIG, "no_evidence", ["the mean weight lies in [1.01, 1.1]"]),
        (estimate(mean_weight_low=1.0, mean_weight_high=1.0), CONFIG, "passes", []),
        (estimate(mean_weight_low=None, mean_weight_high=None), CONFIG, "no_evidence", ["fewer than two units"]),
        (estimate(upper=0.1, lower=0.0, outside=1), CONFIG, "no_evidence", ["1 returns, rewards or lengths lie"]),
        (estimate(lower=0.9, upper=0.8), CONFIG, "no_evidence", ["the lower bound 0.9 is above the upper bound 0.8"]),
    ],
)
def test_verdicts(found: Estimate, config: GateConfig, outcome: str, reasons: list[str]) -> None:
    verdict = gate(found, 0.5, config)
    assert verdict.outcome == outcome
    assert len(verdict.reasons) == len(reasons)
    for told, expected in zip(verdict.reasons, reasons, strict=True):
        assert expected in told


@pytest.mark.parametrize(
    "options", [{"margin": -0.1}, {"least_matched": -1}, {"most_unsupported": 1.1}, {"most_left_out": -0.1}]
)
def test_configurations_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"margin|shares"):
        GateConfig(**options)  # type: ignore[arg-type]


def test_a_verdict_can_be_sent() -> None:
    verdict = gate(estimate(matched=1), 0.5, CONFIG)
    assert msgspec.json.decode(msgspec.json.encode(verdict), type=Verdict) == verdict


# -- versions before the gate


def judged(
    world: Any,
    policy: Any,
    keys: int,
    seed: int,
    champion: Any = OLD,
    looks: int = 5,
    config: GateConfig = CONFIG,
    **changes: Any,
) -> list[Any]:
    """The verdicts on a version, at several looks, by its doubly robust estimate."""
    settings: dict[str, Any] = {
        "objective": "step",
        "returns": UNIT,
        "model": ModelTerms(actions=4, features=2, own_values=world.values is not None),
    }
    tally, rng = Tally.fresh(Terms(**{**settings, **changes})), np.random.default_rng(seed)
    value, verdicts = world.value(world.loggers[0]), []
    for _ in range(looks):
        tally = tally.add(world.log(rng, keys // looks, policy, champion).rows())
        verdicts.append(gate(tally.estimates().by("dr"), value, config))
    return verdicts


def test_a_better_version_passes_with_enough_data_and_holds_before() -> None:
    world = bandit(loggers=(exploring(OLD, 0.1),), weights=(1.0,))
    assert world.value(BEST) > world.value(OLD) + 0.15
    verdicts = judged(world, BEST, 20_000, seed=1, looks=20)
    outcomes = [each.outcome for each in verdicts]
    assert outcomes[0] == "no_evidence"
    assert outcomes[-1] == "passes"
    assert set(outcomes) == {"no_evidence", "passes"}


def test_a_worse_version_fails() -> None:
    verdicts = judged(bandit(loggers=(exploring(OLD, 0.1),), weights=(1.0,)), WORST, 10_000, seed=2)
    assert verdicts[-1].outcome == "fails"


def test_a_network_that_overestimates_does_not_pass() -> None:
    """It promises ten times the best reward for what is worst; its word counts as a regressor and no more."""
    boast = 10.0 - 9.0 * MEANS
    world = bandit(loggers=(exploring(OLD, 0.1),), weights=(1.0,), values=boast)
    assert boast.max(axis=1).mean() > 5.0 * world.value(OLD)
    for seed in range(10):
        assert all(each.outcome != "passes" for each in judged(world, WORST, 4_000, seed=seed))


def test_a_network_as_good_as_the_champion_passes_as_rarely_as_promised() -> None:
    """The champion itself, with another version's boasts as regressor, under twenty looks."""
    world = bandit(loggers=(exploring(OLD, 0.1),), weights=(1.0,), values=100.0 * MEANS)
    lenient, passed = GateConfig(least_matched=0), 0
    for seed in range(40):
        verdicts = judged(world, world.loggers[0], 1_000, seed=seed, looks=10, config=lenient, alpha=0.05)
        passed += any(each.outcome == "passes" for each in verdicts)
    assert passed <= 6  # 2 expected at most; 7 has a probability below 1 %


def test_a_version_whose_actions_the_log_does_not_support_does_not_pass() -> None:
    world = bandit(loggers=(OLD,), weights=(1.0,), means=np.where(MEANS > 0.6, 1.0, 0.0))
    verdict = judged(world, BEST, 10_000, seed=3)[-1]
    assert verdict.outcome == "no_evidence"
    assert "unsupported" in verdict.reasons[0]
    assert "0 matched disagreements" in verdict.reasons[1]


def test_episodes_a_better_version_passes_and_a_worse_one_fails() -> None:
    """Two steps at most: over many steps no log of another version's episodes has the evidence."""
    world = mdp(loggers=(exploring(DRIVER, 0.4),), weights=(1.0,), horizon=2, gamma=1.0, high=2.0 * PAY - PAY.mean())
    worth = {each: world.value(each) for each in (CANDIDATE, DRIVER)}
    champion = world.value(world.loggers[0])
    assert worth[CANDIDATE] > champion
    rng = np.random.default_rng(4)
    rewards = (min(0.0, float(world.high.min())), float(world.high.max()))
    terms = Terms(
        objective="episode",
        returns=Range(low=2.0 * rewards[0], high=2.0 * rewards[1], rewards=rewards, horizon=2),
        model=ModelTerms(actions=3, features=2),
    )
    for policy, expected in ((CANDIDATE, "passes"), (DRIVER, "fails")):
        tally = Tally.fresh(terms)
        for _ in range(8):
            tally = tally.add(world.log(rng, 2_000, policy, DRIVER).rows())
        found = gate(tally.estimates().by("recursive_dr"), champion, GateConfig(least_matched=0))
        assert found.outcome == expected, (worth[policy], champion, found, tally.estimates().by("recursive_dr"))
