"""A crowd that plays CartPole-v1 through the HTTP API for as long as it is let, and counts who decided what.

Duty: real episodes, many at once, at the speed of the machine: ask for actions, carry them out, post the rewards. It
knows Gymnasium and the client library, and of rollouts nothing.
Strategy: seats at a table take their steps together, one batch for each step; a seat whose episode has ended begins
another one. Rewards are posted beside the next request, as in `play.py`.
Promise: what is counted was answered by the service; a reward that was refused ends the crowd with an error.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import gymnasium

from surefoot import AsyncClient, BatchDecisions

ENVIRONMENT = "CartPole-v1"
REWARDS_UNDER_WAY = 4  # batches, for each table


@dataclass(slots=True)
class Tally:
    """What has happened so far. Counts by version are by the one that decided, which need not be the assigned one."""

    decisions: Counter[str] = field(default_factory=Counter)
    touched: Counter[str] = field(default_factory=Counter)  # episodes of which the version has decided a step
    fallbacks: Counter[str] = field(default_factory=Counter)  # by the version that was assigned
    episodes: int = 0  # begun
    returns: dict[str, list[float]] = field(default_factory=dict)  # of finished episodes that one version decided
    last: dict[str, float] = field(default_factory=dict)  # when each version's last answer came, time.time()

    def since(self, before: Tally, version: str) -> Period:
        """What has happened since an earlier copy, and how much of it was a version's."""
        return Period(
            decisions=self.decisions.total() - before.decisions.total(),
            episodes=self.episodes - before.episodes,
            own_decisions=self.decisions[version] - before.decisions[version],
            own_episodes=self.touched[version] - before.touched[version],
        )

    def copy(self) -> Tally:
        return Tally(Counter(self.decisions), Counter(self.touched), Counter(self.fallbacks), self.episodes)


@dataclass(frozen=True, slots=True)
class Period:
    """Decisions and episodes of a stretch of time, and those of one version among them."""

    decisions: int
    episodes: int
    own_decisions: int
    own_episodes: int


class Seat:
    """One environment and the episode that is being played in it."""

    def __init__(self, run: str, numbers: itertools.count[int]) -> None:
        self._env = gymnasium.make(ENVIRONMENT)
        self._run, self._numbers = run, numbers
        self.begin()

    def begin(self) -> None:
        number = next(self._numbers)
        self.episode, self.step, self.total = f"{self._run}-{number}", 0, 0.0
        self.versions: set[str] = set()
        self.state: list[float] = self._env.reset(seed=number)[0].tolist()

    def move(self, action: int) -> dict[str, Any]:
        """Carry an action out. Gives the reward to post, without the decision's id."""
        observation, reward, terminated, truncated, _ = self._env.step(action)
        self.state, self.step, self.total = observation.tolist(), self.step + 1, self.total + float(reward)
        truncated = truncated and not terminated  # a pole may fall in the very last step: then it has fallen
        body: dict[str, Any] = {"reward": float(reward), "terminated": terminated, "truncated": truncated}
        return body | {"next_state": self.state} if truncated else body


class Crowd:
    """Tables of seats, playing until `stop`; while `hurry` is not set nobody asks for another action."""

    def __init__(self, client: AsyncClient, policy: str, seats: int, tables: int = 1) -> None:
        self.tally = Tally()
        self.hurry = asyncio.Event()
        self.hurry.set()
        self._client, self._policy = client, policy
        run, numbers = uuid.uuid4().hex[:8], itertools.count()
        self._tables = [[Seat(run, numbers) for _ in range(seats // tables)] for _ in range(tables)]
        self.tally.episodes = seats
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        self.hurry.set()

    async def play(self) -> None:
        """Play until stopped; then the rewards under way are waited for."""
        async with asyncio.TaskGroup() as group:
            for table in self._tables:
                group.create_task(self._sit(table))

    async def _sit(self, table: list[Seat]) -> None:
        free = asyncio.Semaphore(REWARDS_UNDER_WAY)

        async def post(rewards: list[Any]) -> None:
            await self._client.reward_batch(rewards)
            free.release()

        async with asyncio.TaskGroup() as posting:
            while not self._stopped:
                await self.hurry.wait()
                rewards = await self._turn(table)
                await free.acquire()
                posting.create_task(post(rewards))

    async def _turn(self, table: list[Seat]) -> list[Any]:
        """One step of each seat. Gives the rewards."""
        told = await self._client.act_batch(
            [seat.state for seat in table],
            policy=self._policy,
            episodes=[seat.episode for seat in table],
            steps=[seat.step for seat in table],
        )
        if told.errors:
            raise next(iter(told.errors.values()))
        rewards = []
        for at, seat in enumerate(table):
            self._count(seat, told, at)
            body = seat.move(int(told.actions[at]))
            rewards.append({"decision_id": str(told.decision_ids[at]), **body})
            if body["terminated"] or body["truncated"]:
                self._finish(seat)
        return rewards

    def _count(self, seat: Seat, told: BatchDecisions, at: int) -> None:
        tally, version = self.tally, str(told.versions[at])
        tally.decisions[version] += 1
        tally.last[version] = time.time()
        tally.fallbacks[str(told.assigned_versions[at])] += bool(told.fallbacks[at])
        if version not in seat.versions:
            seat.versions.add(version)
            tally.touched[version] += 1

    def _finish(self, seat: Seat) -> None:
        if len(seat.versions) == 1:
            (version,) = seat.versions
            self.tally.returns.setdefault(version, []).append(seat.total)
        self.tally.episodes += 1
        seat.begin()
