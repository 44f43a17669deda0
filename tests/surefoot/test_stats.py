"""What `transitions_stats` says of a real stream, and that its sketches hold what they promise."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import redis

from surefoot.export import ExportError
from surefoot.sketch import Moments, Quantiles
from surefoot.stats import Tally, transitions_stats
from tests.surefoot.stream_entries import MULTI, POINT, add, key
from tests.surefoot.valkey import Valkey

END: dict[str, Any] = {"x": "terminated", "b": 0, "n": b"", "nm": b"", "ni": "", "tf": 1}


def stats(valkey: Valkey, policy: str, **options: Any) -> dict[str, Any]:
    found = transitions_stats(policy, redis_url=valkey.url, **options)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_everything_is_counted(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(4))
    add(store, policy, [4], j="defaulted", r="-2", at="", record={"version": "v1", "role": "baseline"})
    add(store, policy, [5], j="void", r="", at="", x="lost", o="", record={"fallback": "not_finite"})
    add(store, policy, [6], j="of the future", r="100", record={"explored": True, "overridden": True})
    add(store, policy, [7], **END)
    found = stats(valkey, policy)
    assert found["transitions"] == 8
    assert found["by"]["join"] == {"joined": 5, "defaulted": 1, "void": 1, "of the future": 1}
    assert found["by"]["end"] == {"none": 6, "lost": 1, "terminated": 1}
    assert found["by"]["version"] == {"v2": 7, "v1": 1}
    assert found["by"]["role"] == {"champion": 7, "baseline": 1}
    assert found["by"]["order"] == {"step": 7, "none": 1}
    rewards = [0, 1, 2, 3, -2, 7]
    assert found["reward"]["mean"] == pytest.approx(np.mean(rewards))
    assert found["reward"]["std"] == pytest.approx(np.std(rewards, ddof=1))
    assert (found["reward"]["count"], found["reward"]["min"], found["reward"]["max"]) == (6, -2, 7)
    assert found["reward_delay_ms"]["count"] == 6
    assert found["reward_delay_ms"]["p50"] == pytest.approx(50, rel=0.01)
    assert found["share"] == {"explored": 1 / 8, "fallback": 1 / 8, "overridden": 1 / 8, "switched": 0.0}
    assert found["decided_ms"] == {"first": 1_000, "last": 1_007}
    assert found["episodes"]["ended"] == 1
    assert found["episodes"]["return"]["mean"] == pytest.approx(sum(rewards))
    assert found["episodes"]["length"]["mean"] == 8


def test_streams_groups_and_losses_are_told(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, [0, 1, 1])
    base = key(policy).removesuffix("transitions")
    store.xadd(base + "late", {"w": "late"})
    store.xgroup_create(key(policy), "trainers", "0")
    store.xreadgroup("trainers", "one", {key(policy): ">"}, count=2)
    store.hset(base + "lost", mapping={"w0:1": 3, "w1:1": 4})
    found = stats(valkey, policy)
    empty = {"nstep": 0, "correction": 0, "quarantined": 0, "orphan": 0}
    assert found["streams"] == {"transitions": 3, "late": 1, **empty}
    (group,) = found["groups"]
    assert (group["name"], group["consumers"], group["pending"], group["lag"]) == ("trainers", 1, 2, 1)
    assert (found["lost"], found["copies"], found["transitions"]) == (7, 1, 2)


def test_a_stretch_can_be_described(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    ids = add(store, policy, range(6))
    found = stats(valkey, policy, from_=ids[2].decode(), until=ids[4].decode())
    assert (found["transitions"], found["reward"]["min"], found["reward"]["max"]) == (3, 2, 4)
    assert stats(valkey, policy, from_="2100-01-01")["reward"]["mean"] is None
    with pytest.raises(ExportError, match="no transitions of policy 'unheard-of'"):
        stats(valkey, "unheard-of")


def drawn(store: redis.Redis, policy: str, logged: float) -> None:
    """2,000 draws with ε = 0.2 over three allowed actions of four; what is logged of a greedy one is given."""
    chance = random.Random(11)
    pipe = []
    for n in range(2_000):
        favourite = chance.choice([0, 1, 3])
        behaviour = [0.2 / 3 + 0.8 * (each == favourite) if each != 2 else 0.0 for each in range(4)]
        (action,) = chance.choices(range(4), behaviour)
        mass = logged if action == favourite else behaviour[action]
        record = {
            "target": np.eye(4)[favourite].tobytes(),
            "behaviour": np.array(behaviour).tobytes(),
            "propensity": mass,
        }
        pipe.append((n, action, record))
    for n, action, record in pipe:
        add(store, policy, [n], a=action, m=b"\1\1\0\1", nm=b"", record=record)


def test_true_propensities_pass_the_checks(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    drawn(store, policy, logged=0.8 + 0.2 / 3)
    found = stats(valkey, policy)
    inverse, weight = found["checks"]["inverse_propensity"], found["checks"]["importance_weight"]
    assert (inverse["count"], inverse["expected"]) == (2_000, 3.0)
    assert (weight["count"], weight["expected"]) == (2_000, 1.0)
    assert abs(inverse["z"]) < 4
    assert abs(weight["z"]) < 4
    assert found["checks"]["propensity_not_of_distribution"] == 0
    assert found["propensity"]["min"] == pytest.approx(0.2 / 3)
    assert found["propensity"]["p50"] == pytest.approx(0.8 + 0.2 / 3, rel=0.01)


def test_propensities_of_the_branch_and_not_of_the_action_are_found(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    drawn(store, policy, logged=0.6)
    found = stats(valkey, policy)
    assert found["checks"]["importance_weight"]["z"] > 10
    assert found["checks"]["propensity_not_of_distribution"] > 1_000


def test_voids_fallbacks_and_other_kinds_stay_out_of_the_checks(
    valkey: Valkey, store: redis.Redis, policy: str
) -> None:
    add(store, policy, [0], j="void", r="")
    add(store, policy, [1], record={"fallback": "not_finite"})
    add(store, policy, [2], **MULTI)
    add(store, policy, [3], **POINT)
    add(store, policy, [4], record={"propensity": None, "propensity_reason": "check_failed"})
    add(store, policy, [5], record={"target": np.array([0.0, 1.0]).tobytes()}, m=b"\1\0")
    found = stats(valkey, policy)
    assert found["checks"]["inverse_propensity"]["count"] == 1
    assert found["checks"]["importance_weight"]["count"] == 0  # no target mass on what was allowed
    assert (found["propensity"]["count"], found["propensity"]["unknown"]) == (3, 1)
    assert found["by"]["propensity_kind"] == {"mass": 5, "mixed": 1}


def test_memory_is_bounded_and_what_that_costs_is_told(
    valkey: Valkey, store: redis.Redis, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surefoot.stats._EPISODES", 3)
    monkeypatch.setattr("surefoot.stats._NAMES", 2)
    for n in range(5):
        add(store, policy, [n], ep=f"e{n}", record={"version": f"v{n}"}, **END)
    found = stats(valkey, policy)
    assert (found["episodes"]["ended"], found["episodes"]["dropped"]) == (5, 2)
    assert found["by"]["version"] == {"others": 3, "v0": 1, "v1": 1}


@pytest.mark.parametrize("draw", [random.Random(1).expovariate, lambda _: random.Random(2).gauss(0, 1), lambda _: 0.0])
def test_a_quantile_is_within_a_hundredth(draw: Any) -> None:
    numbers = [draw(0.01) for _ in range(5_000)] + [-3.0, 0.0, 1e-9, 1e9]
    sketch = Quantiles()
    for each in numbers:
        sketch.add(each)
    for share in (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0):
        exact = sorted(numbers)[math.floor(share * (len(numbers) - 1))]
        assert sketch.at(share) == pytest.approx(exact, rel=0.0101)


def test_of_nothing_nothing_is_said() -> None:
    assert Quantiles().plain(0.5) == {"p50": None}
    assert Moments().plain() == {"count": 0, "mean": None, "std": None, "min": None, "max": None}
    one = Moments()
    one.add(2.0)
    assert one.plain() == {"count": 1, "mean": 2.0, "std": None, "min": 2.0, "max": 2.0}
    assert Tally().plain()["share"]["explored"] is None
