"""Streams for the readers of live estimates, written by hand: decisions with true records, scores, and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import redis
from prometheus_client import CollectorRegistry

from policies.deployment import RewardPolicy
from policies.types import Choices, ObservationSpec
from service.clock import ManualClock
from service.decision import Record, encode_record
from service.estimate_metrics import EstimateMetrics
from service.estimate_tallies import Watched
from service.estimating import Estimating
from service.leader import Leader
from service.redis_streams import RedisStreams, base
from shadow.rollout_plan import RolloutPlan
from shadow.scores import Score, encode_score

CHAMPION, SHADOW = "v1", "v2"


def watched(objective: str = "step", **changes: Any) -> Watched:
    """Two features, two actions; the champion decides, one shadow watches."""
    plan: dict[str, Any] = {"objective": objective, "return_range": (0.0, 1.0), "unit_time_s": 2.0, "unit_decisions": 5}
    found: dict[str, Any] = {
        "plan": msgspec.convert(plan | changes.pop("plan", {}), RolloutPlan),
        "champion": CHAMPION,
        "live": {CHAMPION: "d1"},
        "shadows": {SHADOW: "d2"},
        "reward": RewardPolicy(window_s=1.0, range=(0.0, 1.0)),
        "route_by": None,
        "observation": ObservationSpec((2,)),
        "action": Choices((("a", "b"),)),
    }
    return Watched(**found | changes)


def record(epsilon: float = 0.2, own: tuple[float, ...] = (1.0, 0.0), action: int = 0, **changes: Any) -> Record:
    """What is recorded of a decision that explores uniformly over everything."""
    behaviour = (1.0 - epsilon) * np.array(own) + epsilon / len(own)
    fields: dict[str, Any] = {
        "policy": "p",
        "assigned_version": CHAMPION,
        "version": CHAMPION,
        "digest": "d1",
        "role": "champion",
        "generation": 1,
        "dtype": "<f4",
        "shape": (2,),
        "head": "q_values",
        "outputs_dtype": "<f4",
        "outputs": b"",
        "target": np.array(own).tobytes(),
        "behaviour": behaviour.tobytes(),
        "epsilon": epsilon,
        "explored": False,
        "proposed": 0,
        "action_name": None,
        "propensity": float(behaviour[action]),
        "key_id": 1,
    }
    return Record(**fields | changes)


def entry(
    name: str, at_ms: int, recorded: Record, action: int = 0, reward: float | None = 0.5, **changes: Any
) -> dict[str, Any]:
    """An entry of `transitions`, as far as anybody reads it here."""
    fields: dict[str, Any] = {
        "v": 1,
        "i": name,
        "p": "w",
        "e": 1,
        "q": 1,
        "ep": "",
        "st": -1,
        "t": at_ms,
        "a": str(action),
        "s": np.array([0.25, float(action)], np.float32).tobytes(),
        "m": b"\1\1",
        "d": encode_record(recorded),
        "r": "" if reward is None else repr(reward),
        "j": "joined",
        "x": "single",
        "tf": 0,
    }
    return fields | changes


def score(name: str, action: int, target: tuple[float, ...] = (0.0, 1.0), **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "decision_id": name,
        "version": SHADOW,
        "digest": "d2",
        "decided": CHAMPION,
        "share": 1.0,
        "propensity": None,
        "log_propensity": None,
        "kind": "mass",
        "log_probability": None,
        "probability": target[action],
        "target": np.array(target).tobytes(),
        "proposed": int(np.argmax(target)),
        "unmasked": int(np.argmax(target)),
    }
    return encode_score(Score(**fields | changes))


@dataclass
class Worker:
    """A replica's reader, and whom it competes with by its lease."""

    estimating: Estimating
    streams: RedisStreams
    leader: Leader
    registry: CollectorRegistry

    async def turn(self, policy: str, question: Watched | None) -> None:
        await self.estimating.run_once({policy: question})

    async def close(self) -> None:
        await self.streams.aclose()


def worker(streams: RedisStreams, name: str | None = None, **settings: Any) -> Worker:
    leader, registry = Leader(streams, name), CollectorRegistry()
    found = {"patience_ms": 0, "save_s": 0.0} | settings
    estimating = Estimating(streams, leader, ManualClock(), EstimateMetrics(registry), **found)
    return Worker(estimating, streams, leader, registry)


def add(store: redis.Redis, policy: str, fields: dict[str, Any]) -> None:
    store.xadd(f"{base(policy)}:transitions", fields)  # type: ignore[arg-type]


def add_score(store: redis.Redis, policy: str, name: str, raw: bytes, label: str = SHADOW) -> None:
    store.xadd(f"{base(policy)}:shadow:{label}", {"id": name, "d": raw})


def closed(store: redis.Redis, policy: str, through_ms: int) -> None:
    """Say, as the join does, that all decisions that were due are closed."""
    store.set(f"{base(policy)}:horizon", str(through_ms))
