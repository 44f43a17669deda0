"""Print what each tier of durability costs: `python -m tests.service.measure_durability [folder]`.

Real files in the folder given (default: the system's temporary one; a tmpfs would tell nothing of `node`), and a real
primary with one replica, both `appendfsync always`, on the same machine. Every tier has its shipper running. The tiers
take turns, round after round, so that what else the machine does meets all of them. The table stands in
docs/durability.md.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from service.clock import SystemClock
from service.decision import DecisionEvent, encode_events
from service.ledger import Ledger, Tier
from service.redis_streams import RedisStreams, connect
from service.shipcall import Confirm
from service.shipper import Shipper
from service.slots import take_slot
from tests.service.pairs import pair

# A label, the tier, and how often a second an idle primary looks at deadlines (10 is its default).
CASES: tuple[tuple[str, Tier, int], ...] = (
    ("`memory`", "memory", 10),
    ("`process`", "process", 10),
    ("`node`", "node", 10),
    ("`replicated`", "replicated", 10),
    ("`replicated`, Redis with `hz 100`", "replicated", 100),
)
POLICY = "measured"
ROUNDS = 5
SINGLE = 200  # appends of a round, each after the commit of the one before
CONCURRENT, EACH = 16, 50
RECORD_BYTES = 400  # about what a decision of the bundled policy takes
PATIENT = Confirm(1, 5.0)


@dataclass
class Measured:
    """Seconds from an append to its commit, and how long all of them took."""

    latencies_s: list[float] = field(default_factory=list)
    took_s: float = 0.0

    @property
    def per_s(self) -> float:
        return len(self.latencies_s) / self.took_s

    def at(self, percent: float) -> float:
        return float(np.percentile(self.latencies_s, percent))


def decision(name: str, now_ms: int) -> bytes:
    event = DecisionEvent(name, "", -1, now_ms + 60_000, now_ms, "1", bytes(16), b"\1\1", os.urandom(RECORD_BYTES))
    return encode_events([event])


async def append(ledger: Ledger, clock: SystemClock, measured: Measured, times: int, name: str) -> None:
    for k in range(times):
        now_ms = clock.event_ms()
        blob = decision(f"{name}-{k}", now_ms)
        began_s = time.perf_counter()
        await ledger.append_nowait(POLICY, 1, blob, now_ms).committed
        measured.latencies_s.append(time.perf_counter() - began_s)
        await asyncio.sleep(0)  # a commit that is done at once would leave nobody else a turn


@asynccontextmanager
async def running(tier: Tier, data_dir: Path, url: str) -> AsyncIterator[tuple[Ledger, SystemClock]]:
    clock = SystemClock()
    slot = None if tier == "memory" else take_slot(data_dir)
    ledger = Ledger(slot, clock, tier=tier, min_free_bytes=0, confirm=PATIENT if tier == "replicated" else None)
    streams = RedisStreams(connect(url))
    shipper = Shipper(ledger, streams, clock)
    shipper.register(POLICY)
    loop = asyncio.create_task(shipper.run())
    try:
        yield ledger, clock
        await shipper.drain(60.0)
        await loop
    finally:
        await ledger.aclose()
        await streams.aclose()
        if slot is not None:
            slot.release()


async def measure(tier: Tier, data_dir: Path, url: str, single: Measured, concurrent: Measured) -> None:
    async with running(tier, data_dir, url) as (ledger, clock):
        await append(ledger, clock, Measured(), 20, "warm")
        for measured, writers, times in ((single, 1, SINGLE), (concurrent, CONCURRENT, EACH)):
            began_s = time.perf_counter()
            names = [f"{os.urandom(8).hex()}" for _ in range(writers)]
            await asyncio.gather(*(append(ledger, clock, measured, times, name) for name in names))
            measured.took_s += time.perf_counter() - began_s


def row(label: str, single: Measured, concurrent: Measured, first: tuple[Measured, Measured]) -> str:
    cells = [label]
    for measured, memory in zip((single, concurrent), first, strict=True):
        cells.append(f"{measured.per_s:,.0f} ({measured.per_s / memory.per_s:.3f})")
        for percent in (50, 99):
            mine, base = measured.at(percent), memory.at(percent)
            cells.append(f"{1000 * mine:.3f} ({mine / base:,.0f})")
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> None:
    results = {label: (Measured(), Measured()) for label, _, _ in CASES}
    parent = Path(arguments[0]) if arguments else None
    with tempfile.TemporaryDirectory(prefix="sf-", dir=parent) as folder, pair(Path(folder) / "redis") as both:
        for turn in range(ROUNDS):
            for number, (label, tier, hz) in enumerate(CASES):
                both.primary.ask("CONFIG", "SET", "hz", hz)
                data_dir = Path(folder) / f"{number}-{turn}"
                asyncio.run(measure(tier, data_dir, both.primary.url, *results[label]))
    print("| tier | one by one: per s | p50, ms | p99, ms | 16 at once: per s | p50, ms | p99, ms |")  # noqa: T201
    print("|---|---|---|---|---|---|---|")  # noqa: T201
    for label, found in results.items():
        print(row(label, *found, results[CASES[0][0]]))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
