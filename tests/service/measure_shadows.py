"""Print what showing decisions to a shadow costs, and how fast one scores: `python -m tests.service.measure_shadows`.

Medians of whole batches in process, without and with a shadow, in turns of one run; then rows a second of one thread.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from policies.draw import uniforms
from service.plan import Row
from shadow.runner import CPU_SHARE, Runner
from tests.service.pipelines import IDENTITY, KEYS, decider, plan, version
from tests.service.watching import METRICS, deployed, honest, many, shadows_of

STATE: list[object] = [0.0, 1.0]


async def costs_us(rows: int, batches: int) -> tuple[float, float]:
    """The median of a batch without and with a shadow."""
    in_force = plan({"v1": version(METRICS, "v1", IDENTITY), "s": honest()})
    shadows, _ = shadows_of(share=CPU_SHARE)
    shadows.follow(in_force, deployed("s"))
    taken: tuple[list[float], list[float]] = [], []
    with decider(in_force) as (pipeline, _, _):
        for turn in range(batches * 2):
            shown = bool(turn // 50 % 2)
            pipeline.onlooker = (lambda seen: shadows.show("toy", seen)) if shown else None
            began_s = time.perf_counter()
            await pipeline.decide([Row(state=STATE) for _ in range(rows)])
            for _ in range(3):  # until it has been shown
                await asyncio.sleep(0)
            taken[shown].append(time.perf_counter() - began_s)
    await shadows.aclose()
    return statistics.median(taken[0]) * 1e6, statistics.median(taken[1]) * 1e6


def rows_per_second() -> float:
    """What one thread scores when nothing else runs."""
    loaded = honest()
    runner = Runner(lambda: loaded.engine, lambda ids, n: uniforms(KEYS.signing.draw, ids, n), lambda entries: None)
    began_s, scored = time.perf_counter(), 0
    while time.perf_counter() - began_s < 2.0:
        runner.offer_nowait(many(64))
        scored += runner.run_once()
    return scored / (time.perf_counter() - began_s)


def main() -> None:
    print("rows  alone (µs)  with a shadow (µs)  ratio")  # noqa: T201
    for rows, batches in ((1, 1500), (16, 600), (128, 150)):
        alone, watched = asyncio.run(costs_us(rows, batches))
        print(f"{rows:4}  {alone:10.0f}  {watched:18.0f}  {watched / alone:5.2f}")  # noqa: T201
    print(f"scored by one thread: {rows_per_second():.0f} rows/s")  # noqa: T201


if __name__ == "__main__":
    main()
