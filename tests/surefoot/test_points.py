"""Importance weights over points: right against what the service's own pipeline drew, logged and would have drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surefoot
from surefoot import Batch, log_prob
from surefoot.entries import Row
from tests.surefoot.recorded import Gauss
from tests.surefoot.test_entries import raw_fields

BOX = {"kind": "continuous", "low": [-1.0, -0.5], "high": [1.0, 2.0]}
OPEN = {"kind": "continuous", "low": [-1.0, None], "high": [1.0, None]}
SPACES: dict[str, dict[str, Any]] = {
    "gaussian": {"action": OPEN, "head": "gaussian"},
    "unscaled": {"action": BOX, "head": "gaussian", "action_transform": "unscale"},
    "squashed": {"action": BOX, "head": "squashed_gaussian"},
}
OLD = [[0.8, -0.4], [0.1, 0.6]]
NEW = [[0.5, -0.1], [0.2, 0.9]]
OLD_STD, NEW_STD = [-0.5, -0.25], [-0.75, -0.5]
ALLOWED = ((-0.75, 0.0), (0.5, 0.75))  # cuts off tails on both sides
EXPLORE = {"epsilon": 0.3, "sigma": [0.4, 0.5]}
COUNT = 6_000

# The documentation's own function.
DOCS = (Path(surefoot.__file__).parent.parent / "docs" / "client.md").read_text()
SHOWN: dict[str, Any] = {}
exec(next(block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "def raw_weights" in block), SHOWN)


def states(count: int) -> Any:
    return np.tile([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]], (count // 3, 1))


def agree(values: Any, others: Any) -> bool:
    """Whether the means of two samples [B, ...] are within five standard errors. The draws are the same in each run."""
    error = np.sqrt(values.var(axis=0) / len(values) + others.var(axis=0) / len(others))
    return bool((np.abs(values.mean(axis=0) - others.mean(axis=0)) < 5.0 * error).all())


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("allowed", [None, ALLOWED, ((0.25, 0.0), (0.25, 0.75))], ids=["all", "box", "flat side"])
def test_without_exploration_the_policy_itself_has_the_logged_propensity(kind: str, allowed: Any) -> None:
    policy = Gauss(OLD, OLD_STD, exploration={"epsilon": 0.0}, **SPACES[kind])
    batch = policy.batch(states(300), allowed=allowed)
    found = log_prob(batch, policy.mean(states(300)), np.exp(policy.log_std))
    np.testing.assert_allclose(found, batch.log_propensities, rtol=0, atol=1e-9)
    assert (np.abs(batch.at_bound).any() and "mixed" in batch.propensity_kinds) == (
        allowed is not None or kind != "squashed"
    )


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["all", "box"])
def test_both_ways_of_weighing_find_what_another_policy_does(kind: str, allowed: Any) -> None:
    """Old rows, weighed, have the mean action that the new policy has in the service itself; weights average to one."""
    old = Gauss(OLD, OLD_STD, exploration=EXPLORE, **SPACES[kind])
    new = Gauss(NEW, NEW_STD, exploration={"epsilon": 0.0}, **SPACES[kind])
    batch = old.batch(states(COUNT), allowed=allowed)
    wanted = new.batch(states(COUNT), allowed=allowed).actions
    mean = new.mean(states(COUNT))
    assert 0.25 < batch.explored.mean() < 0.35
    through_box = np.exp(log_prob(batch, mean, np.exp(new.log_std)) - batch.log_propensities)
    raw = SHOWN["raw_weights"](batch, mean, new.log_std)
    for weights in (through_box, raw):
        assert agree(weights, np.ones(1))
        assert agree(weights[:, None] * batch.actions, wanted)
    assert through_box.var() < raw.var()  # the box gathers tails, and explored rows count


def test_mixing_both_sides_is_wrong() -> None:
    """Why the docs insist: a raw density over a propensity through the box is no weight."""
    policy = Gauss(OLD, OLD_STD, exploration={"epsilon": 0.0}, **SPACES["gaussian"])
    batch = policy.batch(states(COUNT), allowed=ALLOWED)
    assert not agree(np.exp(batch.raw_log_probs - batch.log_propensities), np.ones(1))


@settings(max_examples=30)
@given(st.floats(-30.0, 30.0), st.floats(-3.0, 3.0), st.sampled_from(sorted(SPACES)))
def test_far_out_nothing_is_nan(far: float, spread: float, kind: str) -> None:
    policy = Gauss([[far, -far], [0.0, far]], [spread, -spread], exploration={"epsilon": 0.0}, **SPACES[kind])
    batch = policy.batch(states(6), allowed=ALLOWED)
    found = log_prob(batch, policy.mean(states(6)), np.exp(policy.log_std))
    np.testing.assert_allclose(found, batch.log_propensities, rtol=1e-9, atol=1e-6)
    assert not np.isnan(log_prob(batch, 0.0, 1.0)).any()


def test_a_fallback_is_no_policys_choice() -> None:
    policy = Gauss(OLD, OLD_STD, exploration={"epsilon": 0.0}, **SPACES["gaussian"])
    batch = policy.batch(states(3), allowed=((0.5, 0.0), (-0.5, 1.0)))
    assert set(batch.fallbacks) != {""}
    np.testing.assert_array_equal(batch.log_propensities, 0.0)
    assert np.isnan(log_prob(batch, 0.0, 1.0)).all()
    assert not SHOWN["raw_weights"](batch, policy.mean(states(3)), policy.log_std).any()


def test_only_points_with_a_deviation_have_densities() -> None:
    choices = Batch.of("p", [Row.read(b"1-0", raw_fields({}))], lambda batch: None)
    with pytest.raises(ValueError, match="discrete"):
        log_prob(choices, 0.0, 1.0)
    batch = Gauss(OLD, OLD_STD, exploration={"epsilon": 0.0}, **SPACES["gaussian"]).batch(states(3))
    with pytest.raises(ValueError, match="positive"):
        log_prob(batch, 0.0, [1.0, 0.0])
    with pytest.raises(ValueError, match="broadcast"):
        log_prob(batch, [0.0] * 3, 1.0)
