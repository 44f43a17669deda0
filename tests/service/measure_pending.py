"""What pending decisions take: prints the tables of docs/memory.md.

    python -m tests.service.measure_pending [10000 100000 1000000]

Starts a Valkey of its own for each kind and size. Decisions are made by the pipeline, with its records, and joined by
the join's own script; sizes are Redis's `used_memory`, times its processor's, so that no client is in them.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import redis
from prometheus_client import CollectorRegistry

from service.decision import DecisionEvent, Event, RewardEvent, RewardFlags, RewardRecord, encode_events, encode_record
from service.join import JoinConfig
from service.metrics import Metrics
from service.plan import Row
from service.redis_streams import SCRIPT, base, script_arguments
from service.shipcall import ShipCall
from tests.policies.networks import linear
from tests.service.pipelines import decider, plan, recorded, version
from tests.surefoot.valkey import Valkey

SIZES = (10_000, 100_000, 1_000_000)
BATCH = 64  # what the shipper sends at once
TEMPLATES = 512
STEPS = 200  # of an episode
AT_MS, WINDOW_MS = 1_800_000_000_000, 60_000
REWARD = encode_record(RewardRecord())


@dataclass(frozen=True, slots=True)
class Kind:
    """What a policy's decisions look like."""

    name: str
    features: int
    actions: int
    episodes: bool


KINDS = (
    Kind("4 features, no episodes", 4, 2, False),
    Kind("4 features, episodes", 4, 2, True),
    Kind("64 features, no episodes", 64, 4, False),
    Kind("64 features, episodes", 64, 4, True),
)


async def templates(kind: Kind, count: int = TEMPLATES) -> list[DecisionEvent]:
    """Have the pipeline decide so many rows, and give what it recorded."""
    chance = np.random.default_rng(7)
    weights = chance.normal(size=(kind.features, kind.actions)).astype("<f4")
    golden = np.eye(kind.features, dtype="<f4")[:2]
    metrics = Metrics(CollectorRegistry())
    loaded = version(
        metrics,
        "v1",
        linear(weights.tolist()),
        golden_states=golden.tolist(),
        golden_outputs=(golden @ weights).tolist(),
    )
    with decider(plan({"v1": loaded}), metrics) as (pipeline, ledger, _):
        states = chance.normal(size=(count, kind.features)).astype("<f4")
        await pipeline.decide([Row(state=state.tolist(), key=f"user-{n}") for n, state in enumerate(states)])
        return recorded(ledger)


def decisions(kind: Kind, made: Sequence[DecisionEvent], count: int, after: int = 0) -> Iterator[DecisionEvent]:
    """Repeat recorded decisions under ids of the same length, ten in a millisecond."""
    for n in range(after, after + count):
        each = made[n % len(made)]
        at_ms = AT_MS + n // 10
        episode, step = (f"2026-11-21T10:{n // STEPS:010}", n % STEPS) if kind.episodes else ("", -1)
        name = f"{n:0{len(each.id)}x}"
        yield msgspec.structs.replace(each, id=name, episode=episode, step=step, at_ms=at_ms, due_ms=at_ms + WINDOW_MS)


class Filled:
    """A Valkey that joins, and what it says of its memory and time."""

    def __init__(self, store: redis.Redis, kind: Kind, made: Sequence[DecisionEvent], config: JoinConfig) -> None:
        self._store, self._kind, self._made, self._config = store, kind, made, config
        self._script = store.register_script(SCRIPT)
        self._seq = 1
        self.ship(())  # the script's own part comes with the first call
        self.empty_bytes = self.used_bytes

    @property
    def used_bytes(self) -> int:
        info: Any = self._store.info("memory")
        return int(info["used_memory"])

    def ship(self, events: Sequence[Event], through_ms: int = 0) -> int:
        """Make one call; gives how many are pending after it."""
        blobs = (encode_events(list(events)),) if events else ()  # rows that were recorded together
        now_ms = max(through_ms, AT_MS)
        call = ShipCall("p", "w", 1, self._seq, len(events), through_ms, now_ms, blobs=blobs)
        arguments = script_arguments(call, self._config, now_ms)
        reply: Any = self._script([base("p")], arguments)
        self._seq += len(events)
        return int(reply[4])

    def fill(self, count: int, after: int = 0) -> float:
        """Join so many decisions; gives µs for each of the last tenth."""
        coming = decisions(self._kind, self._made, count, after)
        last = max(BATCH, count // 10)
        self._join(islice(coming, count - last))
        before_us = self.cpu_us
        self._join(coming)
        return (self.cpu_us - before_us) / last

    def reward(self, count: int) -> float:
        """Reward the first so many, each for good; gives µs for each."""
        rewards = [reward(each.id) for each in decisions(self._kind, self._made, count)]
        before_us = self.cpu_us
        self._join(iter(rewards))
        return (self.cpu_us - before_us) / count

    def sweep(self) -> tuple[int, int, float, float]:
        """Let all deadlines pass, by calls of a heartbeat; gives calls, defaulted, CPU seconds, longest call in ms."""
        through_ms = AT_MS + 100 * WINDOW_MS
        calls, longest_s, began_us = 0, 0.0, self.cpu_us
        pending = before = int(self._store.zcard(f"{base('p')}:due"))
        while pending:
            call_s = time.perf_counter()
            pending = self.ship((), through_ms)
            longest_s = max(longest_s, time.perf_counter() - call_s)
            calls += 1
        return calls, before, (self.cpu_us - began_us) / 1e6, 1000 * longest_s

    def _join(self, events: Iterator[Event]) -> None:
        while batch := list(islice(events, BATCH)):
            self.ship(batch)

    @property
    def cpu_us(self) -> float:
        """What its only busy thread has used, whatever else the machine does."""
        info: Any = self._store.info("cpu")
        return 1e6 * float(info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"])

    @property
    def commands(self) -> int:
        """How many commands it has run, those of scripts among them."""
        info: Any = self._store.info("commandstats")
        return sum(int(each["calls"]) for name, each in info.items() if name not in ("cmdstat_info", "cmdstat_dbsize"))


def reward(decision_id: str) -> RewardEvent:
    """A reward that ends its decision at once."""
    flags = int(RewardFlags.TERMINATED)
    return RewardEvent(decision_id, "", "d" * 32, AT_MS, AT_MS + WINDOW_MS, flags, "", b"", "1.0", REWARD)


def measure(kind: Kind, count: int) -> str:
    made = asyncio.run(templates(kind))
    with tempfile.TemporaryDirectory(prefix="sf-") as folder, Valkey(Path(folder)) as server, server.client() as store:
        filled = Filled(store, kind, made, JoinConfig())
        join_us = filled.fill(count)
        pending_bytes = (filled.used_bytes - filled.empty_bytes) / count
        reward_us = filled.reward(min(1_024, count // 10))
        calls, swept, took_s, longest_ms = filled.sweep()
        closed_bytes = (filled.used_bytes - filled.empty_bytes) / count
        stream: Any = store.memory_usage(f"{base('p')}:transitions", samples=100)
        stream_bytes = stream / int(store.xlen(f"{base('p')}:transitions"))
        return (
            f"| {kind.name} | {count:,} | {pending_bytes:,.0f} | {join_us:.0f} | {reward_us:.0f} | {took_s:.1f} "
            f"({calls:,}, {longest_ms:.0f} ms) | {1e6 * took_s / swept:.0f} "
            f"| {closed_bytes - stream_bytes:,.0f} | {stream_bytes:,.0f} |"
        )


def main(sizes: Sequence[int] = SIZES) -> None:
    say = sys.stdout.write
    say("| decisions | pending | bytes each | µs to join one | µs to reward one | s to default all (calls, longest) ")
    say("| µs to default one | bytes closed | bytes on the stream |\n|---|---|---|---|---|---|---|---|---|\n")
    for kind in KINDS:
        for size in sizes:
            say(measure(kind, size) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]] or SIZES)
