"""Shadows around the pipelines of `pipelines.py`: real networks that behave, and some that do not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from policies.deployment import Deployment
from policies.draw import uniforms
from service.clock import SystemClock
from service.metrics import SECONDS, Metrics
from service.plan import LoadedVersion, Plan, Row, Safeguards, Settled
from service.redis_streams import RedisStreams, connect
from service.shadow_metrics import ShadowMetrics
from service.shadow_rows import shown
from service.shadow_stream import ShadowStream
from service.shadows import Shadows
from service.wire import encode
from shadow.runner import Runner
from shadow.scores import Score, decode_score
from shadow.shown import Rows
from shadow.waiting import Waiting
from tests.policies.growing import loop, product
from tests.policies.networks import indexer, linear, logarithm
from tests.service.pipelines import KEYS, decider, version

METRICS = Metrics(CollectorRegistry())
NOWHERE = "unix:///nowhere/redis.sock"
TURNS = float(1 << 23)  # of `loop`'s loop: a second or more


def honest(label: str = "s", swapped: bool = True, **changes: Any) -> LoadedVersion:
    """A shadow whose values are the state's two numbers, exchanged."""
    outputs = [[1.0, 0.0], [0.0, 1.0]] if swapped else [[0.0, 1.0], [1.0, 0.0]]
    weights = [[0, 1], [1, 0]] if swapped else [[1, 0], [0, 1]]
    return version(METRICS, label, linear(weights), golden_outputs=outputs, **changes)


def crashing() -> LoadedVersion:
    """Fails at run time where a state's first number is no index of its two rows."""
    return version(METRICS, "s", indexer(), golden_outputs=[[1.0, 0.0], [0.0, 1.0]])


def odd() -> LoadedVersion:
    """Answers NaN or infinity where a number is not above zero."""
    return version(METRICS, "s", logarithm(), golden_states=[[1.0, 1.0]] * 2, golden_outputs=[[0.0, 0.0]] * 2)


def sleeping() -> LoadedVersion:
    """Takes as many turns of a loop as the largest number of its states says."""
    return version(METRICS, "s", loop())


def deaf() -> LoadedVersion:
    """Spends its time in one kernel, which nothing interrupts: as long as the largest number cubed says."""
    return version(METRICS, "s", product())


def shadows_of(share: float = 1.0, limit_s: float = 0.2) -> tuple[Shadows, ShadowStream]:
    """Shadows whose scores stay in memory: nobody writes them."""
    metrics = ShadowMetrics(CollectorRegistry(), SECONDS)
    stream = ShadowStream(RedisStreams(connect(NOWHERE)), metrics, 100)
    return Shadows(KEYS, SystemClock(), metrics, stream, limit_s, share), stream


def deployed(*labels: str) -> Deployment:
    return Deployment(schema=1, policy="toy", champion="v1", shadows=list(labels))


def decided(
    in_force: Plan,
    batches: Sequence[Sequence[Row]],
    safeguards: Safeguards | None = None,
    shadows: Shadows | None = None,
    until_drained: bool = True,
) -> tuple[list[bytes], list[bytes]]:
    """Every answer's bytes and every recorded blob, of batches that come at once, with these shadows looking on."""

    async def work() -> tuple[list[bytes], list[bytes]]:
        with decider(in_force) as (pipeline, ledger, clock):
            if safeguards is not None:
                pipeline.safeguards = safeguards
            if shadows is not None:
                assert shadows.follow(in_force, deployed("s"))
                pipeline.onlooker = lambda seen: shadows.show("toy", seen)
            answers: list[bytes] = []
            for batch in batches:
                outcomes = await pipeline.decide(batch)
                clock.advance(7)
                # A refusal has no bytes of its own here: what it says is what it is.
                answers += [repr(each).encode() if isinstance(each, Exception) else encode(each) for each in outcomes]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if shadows is not None and until_drained:
                await drained(shadows)
            return answers, [row.blob for row in ledger.register("toy").window]

    return asyncio.run(work())


async def drained(shadows: Shadows, seconds: float = 60.0) -> None:
    """Wait until no shadow has anything left to do."""
    deadline = time.monotonic() + seconds
    while any(each["waiting"] or each["in_hand"] for each in shadows.view("toy")):
        assert time.monotonic() < deadline, shadows.view("toy")
        await asyncio.sleep(0.005)


def settled(in_force: Plan, batch: Sequence[Row], safeguards: Safeguards | None = None) -> list[Settled]:
    """What a pipeline shows of a batch."""
    found: list[Settled] = []

    async def work() -> None:
        with decider(in_force) as (pipeline, _, _):
            if safeguards is not None:
                pipeline.safeguards = safeguards
            pipeline.onlooker = found.extend
            await pipeline.decide(batch)
            while not found:
                await asyncio.sleep(0)

    asyncio.run(work())
    return found


def rows_of(in_force: Plan, batch: Sequence[Row], safeguards: Safeguards | None = None) -> Rows:
    """The same as shadows see it; for batches of one group."""
    (only,) = settled(in_force, batch, safeguards)
    return shown(only, 0.0)


def many(count: int, prefix: str = "d", **columns: Any) -> Rows:
    """Decisions that were made elsewhere, many at once: for queues."""
    from shadow.shown import ChoiceRows

    zeros, one_hot = np.zeros((count, 1), dtype=np.int64), np.tile([1.0, 0.0], (count, 1))
    mask = np.ones((count, 2), dtype=np.bool_)
    logged = ChoiceRows((2,), (), mask, None, one_hot, np.zeros(count, np.bool_), zeros, np.ones(count), None)
    ids = [f"{prefix}{i}" for i in range(count)]
    fields: dict[str, Any] = {
        "version": "v1",
        "ids": ids,
        "episodes": [None] * count,
        "steps": [None] * count,
        "states": np.zeros((count, 2), dtype=np.float32),
        "asked": None,
        "logged": logged,
        "offered_s": np.zeros(count),
        "share": np.ones(count),
    }
    return Rows(**fields | columns)


class Scorekeeper:
    """A runner without a thread of its own, and what it has said."""

    def __init__(self, version_: LoadedVersion, limit_s: float = 0.2, waiting: Waiting | None = None) -> None:
        self.scores: list[Score] = []
        self.calls_s: list[float] = []
        self.runner = Runner(
            lambda: version_.engine,
            lambda ids, count: uniforms(KEYS.signing.draw, ids, count),
            self._take,
            self.calls_s.append,
            limit_s=limit_s,
            cpu_share=1.0,
            waiting=waiting,
        )

    def _take(self, entries: list[tuple[str, bytes]]) -> None:
        found = [decode_score(raw) for _, raw in entries]
        assert [score.decision_id for score in found] == [name for name, _ in entries]
        self.scores += found

    def shown(self, rows: Rows) -> list[Score]:
        """What is said of rows, all of them."""
        before = len(self.scores)
        self.runner.offer_nowait(rows)
        while self.runner.run_once():
            continue
        return self.scores[before:]


Loads = Callable[[], LoadedVersion]
