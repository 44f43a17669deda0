"""Nothing that a rule forbids is ever executed: random decisions, held against an account of the rules of its own.

100,000 decisions by default; SUREFOOT_MANY=1000000 for as many as the promise is about. Networks answer with numbers,
NaN and infinities, or raise. Rules that count are kept in memory, where a test can move the clock.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from safety.document import read_rules
from service.limits import Limits
from service.metrics import Metrics
from service.plan import LoadedVersion, Plan, Row, Safeguards
from service.redis_streams import RedisStreams, connect
from service.ruling import Ruling
from service.wire import ActResponse
from tests.policies.networks import indexer, linear, logarithm
from tests.service.pipelines import decider, plan, version

MANY = int(os.environ.get("SUREFOOT_MANY", "100000"))
WORLDS, ROWS, ACTIONS = 20, 250, 4
METRICS = Metrics(CollectorRegistry())
WORTH = (0.0, 1.0, 2.5, 5.0)  # of the actions, for max_step
NAMES = [f"a{i}" for i in range(ACTIONS)]
FALLBACK = 0
CONFIDENT = 0.2


@dataclass
class Key:
    """What one key has executed: times and actions, as far as any rule looks back."""

    done: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=400))

    def since(self, moment_s: float, actions: set[int]) -> int:
        return sum(at > moment_s and action in actions for at, action in self.done)


@dataclass(frozen=True)
class Seen:
    """One answered row."""

    state: list[float]
    context: dict[str, Any] | None
    key: str
    now_s: float
    stands_in: bool


Broken = Callable[[Seen, Key, int], bool]


def rules_of(rng: np.random.Generator) -> tuple[str, dict[str, Broken]]:
    """A random document, and for each of its rules what it forbids."""
    t, u, k, other = float(rng.normal()), float(rng.normal()), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    limit, window, rest, cap, step = int(rng.integers(1, 4)), 7.0, 3.0, 6.0, 2.0
    then = str(rng.choice(["baseline", "fallback"]))

    def forbids_hour(seen: Seen, key: Key, action: int) -> bool:
        hour = (seen.context or {}).get(
            "hour", np.inf
        )  # missing: the expression fails, but for actions it is not about
        return bool(hour > 20.0 and action == other)

    def spent(seen: Seen, key: Key, action: int) -> bool:
        costs = {k: 2.0, other: 3.0}
        window_s = seen.now_s - window
        return sum(costs.get(a, 0.0) for at, a in key.done if at > window_s) + costs.get(action, 0.0) > cap

    def steps(seen: Seen, key: Key, action: int) -> bool:
        last = key.done[-1][1] if key.done else 1
        return abs(WORTH[action] - WORTH[last]) > step

    costs = f"{{a{k}: 2.0, a{other}: 3.0}}" if k != other else f"{{a{other}: 3.0}}"
    possible: list[tuple[str, Broken]] = [
        (f"kind: forbid, when: 'state.x > {t} && action.index == {k}'", lambda s, _, a: s.state[0] > t and a == k),
        (f"kind: forbid, when: 'state.y < {u - 2}', except_fallback: true", lambda s, _, a: s.state[1] < u - 2),
        (
            f"kind: forbid, when: 'context.hour > 20.0 && action.index == {other}', except_fallback: true",
            forbids_hour,
        ),
        (
            f"kind: support, then: {then}",
            lambda s, _, a: not (then == "baseline" and s.stands_in) and not all(-3.0 <= v <= 3.0 for v in s.state[:2]),
        ),
        (
            f"kind: rate, actions: [a{k}], limit: {limit}, window_s: {window}, scope: local",
            lambda s, key, a: a == k and key.since(s.now_s - window, {k}) + 1 > limit,
        ),
        (
            f"kind: cooldown, actions: [a{k}], after: [a{other}], seconds: {rest}, scope: local",
            lambda s, key, a: a == k and key.since(s.now_s - rest, {other}) > 0,
        ),
        (f"kind: cost, costs: {costs}, cap: {cap}, window_s: {window}, scope: local", spent),
        (
            f"kind: max_step, limit: {step}, values: {list(WORTH)}, initial: a1, scope: local, except_fallback: true",
            steps,
        ),
    ]
    chosen = rng.choice(len(possible), size=int(rng.integers(2, 6)), replace=False)
    text = "".join(f"- {{name: r{i}, {possible[i][0]}}}\n" for i in chosen)
    return f"schema: 1\npolicy: toy\nrules:\n{text}", {f"r{i}": possible[i][1] for i in chosen}


def network(rng: np.random.Generator, label: str, kind: str, **changes: Any) -> LoadedVersion:
    """A version over four features, of which two are known to lie within -3 to 3, and four actions."""
    weights = rng.normal(size=(ACTIONS, ACTIONS)).tolist()
    proto, state, output = {
        "linear": (linear(weights), [0.0, 1.0, 0.0, 0.0], weights[1]),  # infinite for huge states
        "logarithm": (logarithm(ACTIONS), [1.0] * 4, [0.0] * 4),  # NaN for negative ones
        "indexer": (
            indexer(ACTIONS),
            [1.0, 0.0, 0.0, 0.0],
            [0.0, 1.0, 0.0, 0.0],
        ),  # raises for a batch with a large one
    }[kind]
    features = [{"name": name, "low": -3.0, "high": 3.0} for name in ("x", "y")] + [{"name": "z"}, {"name": "w"}]
    return version(
        METRICS,
        label,
        proto,
        golden_states=[state],
        golden_outputs=[output],
        observation={"shape": [4], "dtype": "float32", "features": features},
        action={"kind": "discrete", "n": ACTIONS, "names": NAMES},
        fallback=NAMES[FALLBACK],
        exploration={"epsilon": float(rng.choice([0.0, 0.1, 1.0]))},
        latency_budget_ms=10_000,
        **changes,
    )


def plan_of(rng: np.random.Generator, world: int) -> Plan:
    kind = ("linear", "logarithm", "linear", "indexer")[world % 4]
    head = str(rng.choice(["q_values", "logits"]))
    return plan({"v1": network(rng, "v1", kind, head=head), "v0": network(rng, "v0", "linear")}, baseline="v0")


def rows_of(rng: np.random.Generator) -> list[Row]:
    """States as callers send them, far out of range now and then; keys repeat within a batch."""
    states = rng.normal(scale=2.0, size=(ROWS, 4)).astype(np.float32)
    states[:, 0] = np.abs(states[:, 0]) if rng.random() < 0.9 else states[:, 0]
    states[:, 0] = np.minimum(states[:, 0], 3.5)
    huge = rng.random(ROWS) < 0.002
    numbers = np.where(huge[:, None], np.copysign(3e38, states), states.astype(np.float64))
    rows = []
    for state in numbers.tolist():
        allowed = tuple(np.flatnonzero(rng.random(ACTIONS) < 0.8).tolist()) if rng.random() < 0.2 else None
        context: dict[str, object] | None = None if rng.random() < 0.1 else {"hour": float(rng.uniform(0, 24))}
        rows.append(Row(state=state, key=f"k{rng.integers(40)}", allowed=allowed, context=context))
    return rows


def violations(
    in_force: Plan, document: str, broken: dict[str, Broken], rng: np.random.Generator, count: int
) -> list[Any]:
    """Decide `count` times; gives every decision that should not have been."""
    ruling = Ruling.fitting(read_rules(document.encode()), in_force.versions["v1"].bundle)
    found: list[Any] = []
    keys: defaultdict[str, Key] = defaultdict(Key)

    async def work() -> None:
        with decider(in_force) as (pipeline, _, clock):
            limits = Limits(RedisStreams(connect("redis://127.0.0.1:1")), "toy", clock)  # never asked: all is local
            limits.configure(ruling.limits)
            pipeline.safeguards = Safeguards(ruling=ruling, limits=limits if ruling.counts else None)
            for _ in range(count // ROWS):
                rows = rows_of(rng)
                now_s = clock.monotonic_s()
                for row, answer in zip(rows, await pipeline.decide(rows), strict=True):
                    assert isinstance(answer, ActResponse)
                    look(row, answer, now_s)
                clock.advance(int(rng.integers(0, 4000)))

    def look(row: Row, answer: ActResponse, now_s: float) -> None:
        key, action = keys[str(row.key)], int(answer.action)  # type: ignore[arg-type]
        stands_in = answer.version == "v0"
        seen = Seen([float(v) for v in row.state], row.context, str(row.key), now_s, stands_in)  # type: ignore[arg-type]
        if answer.fallback is not None:
            wrong = [] if action == FALLBACK and answer.fallback != "check_failed" else ["fallback"]
        else:
            wrong = [name for name, breaks in broken.items() if breaks(seen, key, action)]
            wrong += ["request"] if row.allowed is not None and action not in row.allowed else []
        if wrong:
            found.append((wrong, seen, action, answer))
        key.done.append((now_s, action))

    asyncio.run(work())
    return found


@pytest.mark.parametrize("world", range(WORLDS))
def test_no_rule_is_ever_broken(world: int) -> None:
    rng = np.random.default_rng(world)
    document, broken = rules_of(rng)
    assert violations(plan_of(rng, world), document, broken, rng, MANY // WORLDS) == [], document
