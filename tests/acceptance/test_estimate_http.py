"""A policy's value, estimated from decisions that another made over HTTP, covers the truth as often as it says.

A bandit with contexts on a grid and a known table of rewards. The log comes from two versions behind a rule, with ε
paced by a budget; what is asked is the value of a third policy behind the same rule. 50,000 decisions by default;
SUREFOOT_MANY=100000 for twice as many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

import surefoot
from tests.policies.networks import bundle_files, linear
from tests.service.admins import Admin, serving
from tests.waiting import until

RUNS, ROWS = 20, 500
DECISIONS = min(int(os.environ.get("SUREFOOT_MANY", "50000")), 100_000) // RUNS  # of each run
GRID = np.array([[x, y] for x in (0.0, 0.25, 0.5, 0.75, 1.0) for y in (0.0, 0.5, 1.0)])
RULE = """schema: 1
policy: {policy}
rules:
- {{kind: forbid, name: not-here, when: 'state.x > 0.6 && action.index == 2'}}
"""
LEVEL = 0.95

Floats = npt.NDArray[np.float64]


def allowed(states: Floats) -> npt.NDArray[np.bool_]:
    """The rule, once more: bool [B, 3]."""
    mask = np.ones((len(states), 3), dtype=np.bool_)
    mask[states[:, 0] > 0.6, 2] = False
    return mask


def mean_rewards(states: Floats) -> Floats:
    """The table: float64 [B, 3]."""
    x, y = states[:, 0], states[:, 1]
    return np.stack([0.2 + 0.3 * x, 0.7 - 0.4 * x + 0.1 * y, 0.4 + 0.2 * y], axis=1)


def wanted(states: Floats) -> Floats:
    """The policy that is asked about: a softmax over scores of its own, float64 [B, 3]."""
    scores = np.exp(np.stack([2.0 * states[:, 0], 1.0 - states[:, 1], 1.5 * states[:, 1]], axis=1))
    return np.asarray(scores / scores.sum(axis=1, keepdims=True))


def behind(probabilities: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    masked = probabilities * mask
    return np.asarray(masked / masked.sum(axis=1, keepdims=True))


TRUTH = float((behind(wanted(GRID), allowed(GRID)) * mean_rewards(GRID)).sum(axis=1).mean())


def pushed(admin: Admin, policy: str, label: str, weights: list[list[float]]) -> None:
    states = GRID[:3].tolist()
    outputs = (GRID[:3] @ np.array(weights)).tolist()
    features = [{"name": "x"}, {"name": "y"}]
    files = bundle_files(
        linear(weights),
        states,
        outputs,
        policy=policy,
        version=label,
        observation={"shape": [2], "dtype": "float32", "features": features},
        head="q_values" if label == "v1" else "logits",
        exploration=None,
    )
    answer = admin.push(files, policy)
    assert answer.status_code == 201, answer.text


def put(admin: Admin, policy: str, what: str, **body: Any) -> None:
    tag = admin.http.get(f"/admin/policies/{policy}/{what}").headers["etag"]
    answer = admin.http.put(f"/admin/policies/{policy}/{what}", headers={"If-Match": tag}, **body)
    assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("estimate")) as mine:
        yield mine


def deployed(admin: Admin, policy: str, **exploration: Any) -> None:
    pushed(admin, policy, "v1", [[1.0, 0.0, 0.3], [0.0, 0.8, 0.1]])
    pushed(admin, policy, "v2", [[0.5, 1.0, 0.0], [0.2, 0.0, 1.5]])
    deployment = {
        "schema": 1,
        "policy": policy,
        "champion": "v1",
        "challengers": [{"version": "v2", "weight": 0.4}],
        "route_by": "decision",
    }
    put(admin, policy, "deployment", json=deployment)
    put(admin, policy, "safety", content=RULE.format(policy=policy))
    put(admin, policy, "exploration", json=exploration)


def logged(admin: Admin, policy: str, rng: np.random.Generator, count: int) -> None:
    """Make decisions and reward them, in batches."""
    for _ in range(count // ROWS):
        states = GRID[rng.integers(len(GRID), size=ROWS)]
        answer = admin.http.post("/v1/act/batch", json={"policy": policy, "states": states.tolist()})
        assert answer.status_code == 200, answer.text
        made = answer.json()
        chosen = mean_rewards(states)[np.arange(ROWS), made["action"]]
        earned = (rng.random(ROWS) < chosen).astype(float).tolist()
        rewards = [{"decision_id": i, "reward": r} for i, r in zip(made["decision_id"], earned, strict=True)]
        told: httpx.Response = admin.http.post("/v1/reward/batch", json={"rewards": rewards})
        assert told.status_code == 202, told.text


def read(admin: Admin, policy: str, count: int) -> list[surefoot.Batch]:
    """The transitions of `count` decisions, in batches of one run each."""
    found: list[surefoot.Batch] = []
    options: dict[str, Any] = {"batch_size": min(DECISIONS, count), "block_s": 30.0, "max_wait_s": 60.0}
    batches = surefoot.transitions(policy, "readers", "one", redis_url=admin.server.redis_url, **options)
    for batch in batches:
        found.append(batch)
        if sum(map(len, found)) >= count:
            break
    assert sum(map(len, found)) == count
    return found


def test_estimates_cover_the_truth_as_often_as_they_say(admin: Admin, policy: str) -> None:
    deployed(admin, policy, epsilon=0.6, rate={"limit": 40_000, "window_s": 600}, start="now")
    until(lambda: admin.act(policy, state=[0.0, 0.0])["exploration"]["epsilon"] > 0.0, "a lease")
    logged(admin, policy, np.random.default_rng(5), RUNS * DECISIONS)
    batches = read(admin, policy, RUNS * DECISIONS)
    assert len({strength for batch in batches for strength in batch.epsilons.tolist()}) > 10  # it was paced
    assert {version for batch in batches for version in batch.versions} == {"v1", "v2"}
    assert not any(batch.actions[(batch.states[:, 0] > 0.6)].max() == 2 for batch in batches)
    found = []
    for batch in batches:
        target = surefoot.behind_masks(batch, wanted(batch.states.astype(np.float64)))
        found.append(surefoot.evaluate(batch, target, level=LEVEL))
    covered = sum(each.low <= TRUTH <= each.high for each in found)
    # Of 20 intervals at 95 % fewer than 16 cover once in 400 logs.
    assert covered >= stats.binom.ppf(1 / 400, len(found), LEVEL), found
    assert max(each.unsupported for each in found) < 0.05
    assert np.mean([each.value for each in found]) == pytest.approx(TRUTH, abs=0.02)


def test_what_no_log_can_tell_is_said(admin: Admin, policy: str) -> None:
    deployed(admin, policy, epsilon=0.6, rate={"limit": 0, "window_s": 600}, start="now")
    logged(admin, policy, np.random.default_rng(6), 4 * ROWS)
    for batch in read(admin, policy, 4 * ROWS):
        greedy = batch.versions == "v1"
        found = surefoot.evaluate(batch, surefoot.behind_masks(batch, wanted(batch.states.astype(np.float64))))
        assert batch.explored.sum() == 0
        assert 0.2 < found.unsupported < greedy.mean()
        low, high = found.bounds(0.0, 1.0)
        assert low <= TRUTH <= high
