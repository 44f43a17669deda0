"""What limits cost and by how much they undershoot: prints the tables of docs/limits.md.

    .venv/bin/python -m tests.service.measure_limits

Starts a Valkey of its own. Counts are simulated on one manual clock, so they do not depend on the machine; times do.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles

from safety.limits import LimitSet
from safety.rules import Rate
from service.clock import SystemClock
from service.limit_calls import RENEW_S
from service.limits import LimitRow, Limits
from service.redis_streams import RedisStreams, connect
from tests.service.limiting import STEP, World, bound, rules
from tests.surefoot.valkey import Valkey

STEP_MS = 100
WINDOWS = 20


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def limited(limit: int, window_s: float, per: str, scope: str) -> LimitSet:
    return bound(Rate(name="rate", actions=["up"], limit=limit, window_s=window_s, per=per, scope=scope))  # type: ignore[arg-type]


async def share_of_limit(
    socket: str, policy: str, limit: int, window_s: float, scope: str, holders: int, per_step: int
) -> tuple[float, int]:
    """Executions by replicas that want far more, in parts of the limit, and the most in any window."""
    world = World(socket, policy, limited(limit, window_s, "policy", scope), seed=1)
    at: list[int] = []
    try:
        for _ in range(holders):
            await world.add()
        await world.quiet()
        start = world.clock.now_ms
        steps = round((1 + WINDOWS) * 1000 * window_s / STEP_MS)
        for step in range(steps):
            for holder in world.holders:
                done = await world.act(holder, [LimitRow(None, (0,))] * per_step, [1])
                at += [world.clock.now_ms] * done.count(1)
            world.tick(STEP_MS)
            if step % round(1000 * RENEW_S / STEP_MS) == 0:
                await world.quiet()
    finally:
        await world.close()
    length = round(1000 * window_s)
    settled = sum(each >= start + length for each in at)
    first, most = 0, 0
    for last, each in enumerate(at):
        while at[first] <= each - length:
            first += 1
        most = max(most, last - first + 1)
    return settled / (WINDOWS * limit), most


async def undershoot(socket: str) -> None:
    say("| limit, window | replicas | scope | executed, of what the limit allows | most in any window |")
    say("|---|---|---|---|---|")
    for number, (limit, window_s, holders, scope, per_step) in enumerate(
        [
            (10, 10, 1, "shared", 1),
            (10, 10, 3, "shared", 1),
            (100, 10, 3, "shared", 2),
            (1_000, 10, 3, "shared", 8),
            (100, 60, 3, "shared", 1),
            (1, 10, 3, "shared", 1),
            (10, 10, 3, "strict", 1),
            (10, 10, 3, "local", 1),
        ]
    ):
        part, most = await share_of_limit(socket, f"measure-{number}", limit, window_s, scope, holders, per_step)
        say(f"| {limit} in {window_s} s | {holders} | `{scope}` | {100 * part:.0f} % | {most} |")


async def cost(url: str) -> None:
    say("\n| rows in a batch | reserve, median | p99 | Redis, CPU for each row | Python, CPU for each row |")
    say("|---|---|---|---|---|")
    streams = RedisStreams(connect(url))
    limits = Limits(streams, "cost", SystemClock())
    limits.configure(bound(*rules(), STEP))
    limits.calls.answer_s = 1.0
    for count in (1, 16, 64):
        took, turns = [], 6_400 // count
        before, began_s = await _cpu_s(streams), time.process_time()
        for turn in range(turns):
            rows = [LimitRow(f"key-{(turn * count + n) % 2_000}", (0,)) for n in range(count)]
            began = time.perf_counter()
            reserved = await limits.reserve(rows)
            took.append(1000 * (time.perf_counter() - began))
            limits.settle(reserved.token, [(turn % 3,)] * count)
        each_us = 1e6 / turns / count
        redis_us, python_us = ((await _cpu_s(streams)) - before) * each_us, (time.process_time() - began_s) * each_us
        p = quantiles(took, n=100)
        say(f"| {count} | {p[49]:.1f} ms | {p[98]:.1f} ms | {redis_us:.0f} µs | {python_us:.0f} µs |")
    used = [await streams.command("MEMORY", "USAGE", f"sf:{{cost}}:lim:k:{digest}") for digest in await _some(streams)]
    say(f"\nA key's past, after a few executions under four rules: {sum(used) / len(used):.0f} bytes.")
    await limits.close()
    await streams.aclose()


async def _cpu_s(streams: RedisStreams) -> float:
    found = await streams.command("INFO", "cpu")
    return float(found["used_cpu_user"] + found["used_cpu_sys"])


async def _some(streams: RedisStreams) -> list[str]:
    _, found = await streams.command("SCAN", 0, "MATCH", "sf:{cost}:lim:k:*", "COUNT", 1_000)
    return [each.decode().rsplit(":", 1)[1] for each in found[:200]]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="sf-") as directory, Valkey(Path(directory)) as server:
        asyncio.run(undershoot(str(server.socket_path)))
        asyncio.run(cost(server.url))


if __name__ == "__main__":
    main()
