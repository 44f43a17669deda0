"""Holders of limits on a real Valkey, each behind a proxy of its own, and a slow judge of what they executed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from policies.types import Bools, Choices
from safety.limits import Limit, LimitSet, bind
from safety.rules import Cooldown, Cost, MaxStep, Rate, Rule
from service.clock import ManualClock
from service.limits import LimitRow, Limits, Reserved
from service.redis_connection import Client, One
from service.redis_streams import RedisStreams

Mode = Literal["pass", "cut", "lose", "hang"]
SPACE = Choices((("hold", "up", "down", "boost"),))
FALLBACK = (0,)
WINDOW_S = 10.0


def rules(scope: Literal["shared", "strict", "local"] = "shared", per: Literal["key", "policy"] = "key") -> list[Rule]:
    """One of each kind that counts."""
    return [
        Rate(name="rate", actions=["up", "boost"], limit=3, window_s=WINDOW_S, per=per, scope=scope),
        Cost(name="cost", costs={"up": 0.1, "boost": 0.25}, cap=0.6, window_s=WINDOW_S, per=per, scope=scope),
        Cooldown(name="calm", actions=["down"], seconds=WINDOW_S / 2, per=per, scope=scope),
        Cooldown(name="after", actions=["boost"], after=["down"], seconds=WINDOW_S, per=per, scope=scope),
    ]


def bound(*given: Rule) -> LimitSet:
    return bind(given, SPACE)


STEP = MaxStep(name="step", limit=1, initial="hold")


class Proxy:
    """Forwards a TCP port to a unix socket, or cuts it off, or loses replies, or keeps requests back until it heals."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._healed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.mode: Mode = "pass"
        self.url = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        self.switch("pass")

    def switch(self, mode: Mode) -> None:
        self.mode = mode
        if mode == "hang":
            self._healed.clear()
        else:
            self._healed.set()
        if mode == "cut":
            for writer in self._writers:
                writer.transport.abort()

    async def close(self) -> None:
        self._server.close()
        self.switch("cut")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            if self.mode == "cut":
                return
            with suppress(OSError, asyncio.CancelledError):
                await self._forward(reader, writer)
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._target)
        try:
            while request := await reader.read(1 << 20):
                await self._healed.wait()
                far_writer.write(request)
                reply = await far_reader.read(1 << 20)
                if self.mode == "lose":
                    return
                writer.write(reply)
        finally:
            far_writer.close()


@dataclass(frozen=True, slots=True)
class Executed:
    """order: of the reservation, over all holders."""

    at_ms: int
    key: str | None
    action: tuple[float, ...]
    holder: str
    order: int


@dataclass(slots=True, eq=False)
class Open:
    """A batch between its reservation and its draw."""

    rows: list[LimitRow]
    reserved: Reserved
    order: int


@dataclass(eq=False)
class Holder:
    """One replica."""

    limits: Limits
    proxy: Proxy
    client: Client
    name: str
    open: list[Open] = field(default_factory=list)

    async def close(self) -> None:
        with suppress(Exception):
            await self.client.aclose()
        await self.proxy.close()


class World:
    """Several replicas of one policy, one clock for all and for Redis, and everything they executed."""

    def __init__(self, socket: str, policy: str, limits: LimitSet, seed: int, local_keys: int = 100) -> None:
        self.random = random.Random(seed)
        self.clock = ManualClock()
        self.executed: list[Executed] = []
        self.holders: list[Holder] = []
        self.orders = 0
        self.denied = 0
        self._socket, self._policy, self._limits, self._local_keys = socket, policy, limits, local_keys
        self._gone: list[Holder] = []

    async def add(self) -> Holder:
        proxy = Proxy(self._socket)
        await proxy.start()

        def impatient() -> Redis:
            retry = Retry(NoBackoff(), 0)
            return Redis.from_url(proxy.url, retry=retry, socket_timeout=0.05, socket_connect_timeout=0.05)

        client = Client(One(impatient))
        name = f"h{len(self.holders) + len(self._gone)}"
        limits = Limits(
            RedisStreams(client), self._policy, self.clock, holder=name, local_keys=self._local_keys, now_ms=1
        )
        limits.calls.answer_s = 2.0  # this machine may be busy; what is too late is tested by itself
        limits.configure(self._limits)
        holder = Holder(limits, proxy, client, name)
        self.holders.append(holder)
        self.tick(0)
        return holder

    def tick(self, ms: int) -> None:
        self.clock.advance(ms)
        for holder in [*self.holders, *self._gone]:
            holder.limits.calls.now_ms = self.clock.now_ms

    async def reserve(self, holder: Holder, rows: Sequence[LimitRow], possible: Bools | None = None) -> Open:
        reserved = await holder.limits.reserve(rows, possible)
        self.orders += 1
        batch = Open(list(rows), reserved, self.orders)
        holder.open.append(batch)
        return batch

    def draw(self, holder: Holder, batch: Open, prefer: Sequence[int] = (3, 1, 2)) -> list[tuple[float, ...]]:
        """Execute the first of `prefer` that is left, in each row; nothing of a reservation that has lapsed."""
        holder.open.remove(batch)
        holds = batch.reserved.holds(self.clock.monotonic_s())
        actions: list[tuple[float, ...]] = []
        for index, row in enumerate(batch.rows):
            allowed = np.logical_and.reduce(
                [np.ones(SPACE.size, bool), *(verdict.allowed[index] for verdict in batch.reserved.verdicts)]
            )
            left = [choice for choice in prefer if allowed[choice]] if holds else []
            self.denied += not left
            actions.append((left[0],) if left else FALLBACK)
            self.executed.append(Executed(self.clock.now_ms, row.key, actions[-1], holder.name, batch.order))
        return actions

    def settle(self, holder: Holder, batch: Open, prefer: Sequence[int] = (3, 1, 2)) -> list[tuple[float, ...]]:
        actions = self.draw(holder, batch, prefer)
        holder.limits.settle(batch.reserved.token, actions)
        return actions

    async def act(self, holder: Holder, rows: Sequence[LimitRow], prefer: Sequence[int] = (3, 1, 2)) -> list[float]:
        """Reserve, draw and settle at once. Gives the choices."""
        return [choice for (choice,) in self.settle(holder, await self.reserve(holder, rows), prefer)]

    async def quiet(self) -> None:
        """Let every replica say what it has to say."""
        for holder in self.holders:
            await holder.limits.run_once()

    async def die(self, holder: Holder) -> None:
        """What SIGKILL leaves: nothing is drawn, settled or told any more."""
        self.holders.remove(holder)
        self._gone.append(holder)
        await holder.close()

    async def close(self) -> None:
        for holder in self.holders:
            await holder.close()


def most_in_a_window(executed: Sequence[Executed], limit: Limit) -> int:
    """The largest sum of charges that executions within less than a window of each other come to, by brute force."""
    most = 0
    keys = {each.key for each in executed} if limit.per == "key" else {None}
    for key in keys:
        own = [each for each in executed if limit.per == "policy" or each.key == key]
        for first in own:
            within = [each for each in own if first.at_ms <= each.at_ms < first.at_ms + limit.window_ms]
            most = max(most, sum(limit.charge(each.action) for each in within))
    return most


def broken_cooldowns(executed: Sequence[Executed], rule: Cooldown) -> int:
    """Executions of a cooled action within `seconds` after one that it follows, in the order of reservations."""
    actions = {SPACE.index(each) for each in rule.actions}
    after = {SPACE.index(each) for each in rule.after or rule.actions}
    broken = 0
    for each in executed:
        if each.action[0] in actions:
            broken += any(
                other.order < each.order
                and other.action[0] in after
                and (rule.per == "policy" or other.key == each.key)
                and each.at_ms - other.at_ms < 1000 * rule.seconds
                for other in executed
            )
    return broken
