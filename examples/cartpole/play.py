"""Play real CartPole-v1 episodes through the HTTP API, several at once, and report the mean return by version.

Duty: what an application does that lets Surefoot decide: ask for an action, carry it out, post the reward. It knows
Gymnasium and the client library, nothing of the service's inside.
Strategy: one environment for each episode. A step's reward is posted right after `env.step`, beside the request for the
next action: an answer about a reward may wait for the join, an environment need not. The number of rewards under way is
bounded for each episode.
Promise: an episode's figures are printed only once each of its rewards has been acknowledged. With `--journal`, a line
is written before each call and another after its answer, so that what was acknowledged can be compared with what
arrives in Redis whatever happens to the service in between.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
import uuid
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import gymnasium

from surefoot import AsyncClient

ENVIRONMENT = "CartPole-v1"
REWARDS_UNDER_WAY = 8  # for each episode

State = list[float]


class Decision(Protocol):
    """What this program reads of an answer to `act`."""

    @property
    def decision_id(self) -> str: ...
    @property
    def action(self) -> int: ...
    @property
    def version(self) -> str: ...
    @property
    def propensity(self) -> float | None: ...
    @property
    def explored(self) -> bool: ...
    @property
    def fallback(self) -> str | None: ...


class Client(Protocol):
    """What this program asks of `surefoot.AsyncClient`."""

    async def act(self, state: State, *, policy: str, key: str, episode: str, step: int) -> Decision: ...

    async def reward(
        self, decision_id: str, reward: float, *, terminated: bool, truncated: bool, next_state: State | None
    ) -> object: ...


class Journal:
    """One JSON line for each call issued and each acknowledged, out of this process before it goes on."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    def write(self, call: str, event: str, **fields: object) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"call": call, "event": event, **fields}) + "\n")
            self._file.flush()


@dataclass(slots=True)
class Episode:
    """One episode, as far as it has been played."""

    name: str
    seed: int
    total: float = 0.0
    steps: int = 0
    explored: int = 0
    fallbacks: int = 0
    versions: Counter[str] = field(default_factory=Counter)

    def add(self, decision: Decision, reward: float) -> None:
        self.total += reward
        self.steps += 1
        self.explored += decision.explored
        self.fallbacks += decision.fallback is not None
        self.versions[decision.version] += 1

    @property
    def version(self) -> str:
        """The version that decided, or all of them if the episode changed hands."""
        return "+".join(sorted(self.versions)) or "none"


def report(episodes: list[Episode]) -> str:
    """Say what happened: the mean return by version, then the totals."""
    by_version: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        by_version[episode.version].append(episode.total)
    lines = [
        f"{version}: mean return {sum(returns) / len(returns):.1f} over {len(returns)} episodes "
        f"(least {min(returns):.0f}, most {max(returns):.0f})"
        for version, returns in sorted(by_version.items())
    ]
    steps = sum(episode.steps for episode in episodes)
    explored = sum(episode.explored for episode in episodes)
    fallbacks = sum(episode.fallbacks for episode in episodes)
    share = explored / steps if steps else 0.0
    lines.append(f"{steps} steps, {explored} explored ({share:.2%}), {fallbacks} fallbacks")
    return "\n".join(lines)


async def play_episode(client: Client, policy: str, episode: Episode, journal: Journal) -> None:
    """Play `episode` to its end and wait until every reward has been acknowledged."""
    env = gymnasium.make(ENVIRONMENT)
    free = asyncio.Semaphore(REWARDS_UNDER_WAY)
    state = env.reset(seed=episode.seed)[0].tolist()
    over = False
    async with asyncio.TaskGroup() as rewards:
        while not over:
            decision = await act(client, policy, episode, state, journal)
            observation, reward, terminated, truncated, _ = env.step(decision.action)
            step, state, over = episode.steps, observation.tolist(), terminated or truncated
            episode.add(decision, float(reward))
            await free.acquire()
            body: dict[str, Any] = {"reward": float(reward), "terminated": terminated, "truncated": truncated}
            # Behind a time limit the world goes on: with its last state a trainer can bootstrap from there.
            body["next_state"] = state if truncated and not terminated else None
            where = {"episode": episode.name, "step": step}
            rewards.create_task(post_reward(client, decision.decision_id, body, where, journal, free))
    env.close()


async def act(client: Client, policy: str, episode: Episode, state: State, journal: Journal) -> Decision:
    where = {"episode": episode.name, "step": episode.steps}
    journal.write("act", "issued", **where, state=state)
    decision = await client.act(state, policy=policy, key=episode.name, episode=episode.name, step=episode.steps)
    answer = {name: getattr(decision, name) for name in ("decision_id", "action", "version", "propensity", "explored")}
    journal.write("act", "acked", **where, **answer, fallback=decision.fallback)
    return decision


async def post_reward(
    client: Client,
    decision_id: str,
    body: dict[str, Any],
    where: dict[str, Any],
    journal: Journal,
    free: asyncio.Semaphore,
) -> None:
    journal.write("reward", "issued", decision_id=decision_id, **where, **body)
    await client.reward(decision_id, **body)
    journal.write("reward", "acked", decision_id=decision_id, **where)
    free.release()


async def play_all(client: Client, options: argparse.Namespace, journal: Journal) -> tuple[list[Episode], list[str]]:
    """Play every episode, at most `concurrency` at once; return those finished and what went wrong with the others."""
    run = uuid.uuid4().hex[:12]
    waiting = [Episode(f"{run}-{index}", options.seed + index) for index in range(options.episodes)][::-1]
    finished: list[Episode] = []
    failures: list[str] = []
    started = time.monotonic()

    async def seat() -> None:
        while waiting:
            episode = waiting.pop()
            try:
                await play_episode(client, options.policy, episode, journal)
            except ExceptionGroup as group:  # of the episode's task group; the other episodes go on
                failures.extend(f"{episode.name}, step {episode.steps}: {error!r}" for error in group.exceptions)
            else:
                finished.append(episode)
                if options.progress:
                    rate = sum(each.steps for each in finished) / (time.monotonic() - started)
                    done = f"[{len(finished):>{len(str(options.episodes))}}/{options.episodes}]"
                    print(f"{done} {episode.version}: return {episode.total:.0f}, {rate:.0f} steps/s", flush=True)

    async with asyncio.TaskGroup() as seats:
        for _ in range(min(options.concurrency, options.episodes)):
            seats.create_task(seat())
    return finished, failures


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Play CartPole-v1 through a running Surefoot service.")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--token", default=os.environ.get("SUREFOOT_CLIENT_TOKEN"), help="if the service wants one")
    parser.add_argument("--policy", default="cartpole")
    parser.add_argument("--episodes", type=positive, default=20)
    parser.add_argument("--concurrency", type=positive, default=8, help="episodes played at once")
    parser.add_argument("--seed", type=int, default=0, help="the environments start from seed, seed + 1, …")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--journal", type=Path, help="append one JSON line for each call issued and acknowledged")
    return parser.parse_args(arguments)


async def run(options: argparse.Namespace, journal: Journal) -> int:
    async with AsyncClient(options.url, idempotent=True, token=options.token) as client:
        finished, failures = await play_all(client, options, journal)
    if finished:
        print(report(finished))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main() -> int:
    options = parse()
    with options.journal.open("a", encoding="utf-8") if options.journal else nullcontext() as file:
        try:
            return asyncio.run(run(options, Journal(file)))
        except KeyboardInterrupt:
            return 1


if __name__ == "__main__":
    sys.exit(main())
