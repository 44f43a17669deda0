"""Let versions of a CartPole policy walk from shadow to canary to champion, or straight back, with no hand on them.

Duty: a service, a crowd that plays real episodes, four versions one after the other: one that is better, one that is
worse, one that answers NaN, one that is slow. Each is pushed, its rollout is begun, and what the service then does by
itself is printed, with how many seconds, decisions and episodes it took.
Strategy: `objective: episode`. A step's rewards are all 1, so only the return of a whole episode tells. How long a unit
must be watched follows from how long an episode takes here, which is measured first.
Promise: the exit code is 0 only if the better one became champion and each of the others was rolled back and has not
answered since.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from examples.cartpole.at_service import Operator, packed, service
from examples.cartpole.crowd import Crowd, Period, Tally
from examples.cartpole.spoil import spoil
from surefoot import AsyncClient

BUNDLES = Path(__file__).parents[2] / "policies" / "bundles" / "cartpole"
POLICY = "cartpole-rollout"
EPISODE = 500  # steps, at most
REWARD = {"window_s": 2.0, "default": 0.0, "range": [0.0, 1.0]}
PLAN: dict[str, Any] = {
    "objective": "episode",
    "return_range": [0.0, float(EPISODE)],
    "steps": [0.1, 0.25, 0.5],
    "shadow": True,
    "gate": "advisory",  # a log cannot follow another network for 500 steps: the gate says so, and has no evidence
    "hold_s": 5.0,
    "min_units": 15,
    "guards": {"return": {"margin": 25.0}},
}
BUDGET_MS = 50  # of each call; the 5 ms of the committed bundles are for a machine that has nothing else to do
WARM_UP_S, LINGER_S, POLL_S, BEHIND_S = 6.0, 2.0, 0.25, 1.5
CHAMPION, QUARANTINED = "champion", "quarantined"
# label: what is wrong with it, how its rollout should end
TRIALS = {
    "v2": ("", CHAMPION),
    "v3-worse": ("worse", QUARANTINED),
    "v3-nan": ("nan", QUARANTINED),
    "v3-slow": ("slow", QUARANTINED),
}
Playing = asyncio.Task[None]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a version. left_s: from the rollback to its last answer; stays: none has come since."""

    version: str
    stage: str
    seconds: float
    period: Period
    reason: str
    left_s: float | None = None
    stays: bool = True

    @property
    def as_wanted(self) -> bool:
        return self.stage == TRIALS[self.version][1] and self.stays


@dataclass(frozen=True, slots=True)
class Show:
    """Rollouts, watched from begin to end."""

    operator: Operator
    crowd: Crowd
    playing: Playing
    limit_s: float

    async def watch(self, version: str) -> Result:
        """Begin a rollout, print its moves, and wait for its end."""
        before, began = self.crowd.tally.copy(), time.monotonic()
        view = await self.operator.begin(version)
        print(f"\n{version}: begun, against {view['champion']}", flush=True)
        seen: tuple[Any, ...] = ()
        while True:
            standing, seconds = view["standing"], time.monotonic() - began
            state = standing["stage"], standing["step"], standing["paused"]
            if state != seen:
                print(_line(standing, seconds, self.crowd.tally.since(before, version)), flush=True)
            seen = state
            if standing["paused"] or standing["stage"] not in ("shadow", "canary"):
                break
            if seconds > self.limit_s:
                print(f"  no end after {seconds:.0f} s; it waits for: {view['next']}")
                break
            await self._pause(POLL_S)
            view = await self.operator.view()
        period = self.crowd.tally.since(before, version)
        left_s, stays = await self._left(version, standing) if standing["stage"] == QUARANTINED else (None, True)
        return Result(version, standing["stage"], seconds, period, standing["reason"], left_s, stays)

    async def _left(self, version: str, standing: dict[str, Any]) -> tuple[float | None, bool]:
        """How long after the rollback its last answer came, and whether that was the last."""
        tally = self.crowd.tally
        await self._pause(LINGER_S)
        settled = tally.decisions[version]
        await self._pause(LINGER_S)
        last = tally.last.get(version)
        left_s = None if last is None else max(0.0, last - standing["since_ms"] / 1000)
        return left_s, tally.decisions[version] == settled

    async def _pause(self, seconds: float) -> None:
        done, _ = await asyncio.wait([self.playing], timeout=seconds)
        for each in done:
            each.result()  # nobody plays any more: this says why


def _line(standing: dict[str, Any], seconds: float, so_far: Period) -> str:
    where = f"{standing['stage']} {standing['weight']:.0%}" if standing["weight"] else standing["stage"]
    where += " (paused)" if standing["paused"] else ""
    told = f"{so_far.decisions:,} decisions, {so_far.episodes:,} episodes"
    return f"  {seconds:6.1f} s  {where:<12} {told:<34} {standing['reason']}"


def make_bundles(folder: Path) -> None:
    """Write the versions of the trials, and those that they are held against."""
    for label in ("v1", "v2", "baseline"):
        (folder / label).mkdir()
        for source in (BUNDLES / label).iterdir():
            (folder / label / source.name).write_bytes(source.read_bytes())
        manifest = yaml.safe_load((folder / label / "policy.yaml").read_text(encoding="utf-8"))
        manifest |= {"policy": POLICY, "latency_budget_ms": BUDGET_MS}
        (folder / label / "policy.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")
    for label, (fault, _) in TRIALS.items():
        if fault:
            spoil(folder / "v2", fault, folder / label)


async def pace(crowd: Crowd, operator: Operator) -> None:
    """Hold the crowd while events wait to be joined: evidence that is late helps nobody."""
    while True:
        if await operator.behind_s() < BEHIND_S:
            crowd.hurry.set()
        else:
            crowd.hurry.clear()
        await asyncio.sleep(POLL_S)


@contextlib.asynccontextmanager
async def crowd_of(client: AsyncClient, operator: Operator, seats: int) -> AsyncIterator[tuple[Crowd, Playing]]:
    """A crowd that plays until the end."""
    crowd = Crowd(client, POLICY, seats)
    playing, pacing = asyncio.create_task(crowd.play()), asyncio.create_task(pace(crowd, operator))
    try:
        yield crowd, playing
    finally:
        pacing.cancel()
        crowd.stop()
        await playing


async def unit_time_s(crowd: Crowd, seats: int) -> float:
    """How long an episode of 500 steps takes here, and half as much again."""
    await asyncio.sleep(WARM_UP_S / 3)
    before, began = crowd.tally.decisions.total(), time.monotonic()
    await asyncio.sleep(WARM_UP_S)
    rate = (crowd.tally.decisions.total() - before) / (time.monotonic() - began)
    wanted = round(1.5 * EPISODE * seats / rate, 1)
    print(f"{seats} episodes at once, {rate:,.0f} decisions/s: a unit is watched for {wanted} s", flush=True)
    return wanted


async def run(url: str, token: str, bundles: dict[str, bytes], options: argparse.Namespace) -> list[Result]:
    """Every trial, one after the other."""
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        httpx.AsyncClient(base_url=url, headers=headers, timeout=60.0) as http,
        AsyncClient(url, token=token) as client,
    ):
        operator, results = Operator(http, POLICY), []
        for label in ("v1", "baseline"):
            await operator.push(bundles[label])
        standing = {"champion": "v1", "baseline": "baseline", "route_by": "episode", "reward": REWARD}
        await operator.deploy(schema=1, policy=POLICY, **standing)
        async with crowd_of(client, operator, options.seats) as (crowd, playing):
            unit = {"unit_time_s": await unit_time_s(crowd, options.seats)}
            await operator.plan(
                PLAN | unit | {name: getattr(options, name) for name in ("steps", "hold_s", "min_units")}
            )
            show = Show(operator, crowd, playing, options.limit_s)
            for label in options.trials:
                await operator.push(bundles[label])
                results.append(await show.watch(label))
            print("\n" + returns(crowd.tally))
    return results


def returns(tally: Tally) -> str:
    """The mean return of the episodes that one version decided from beginning to end."""
    lines = [
        f"{version}: mean return {sum(found) / len(found):.1f} over {len(found)} episodes"
        for version, found in sorted(tally.returns.items())
    ]
    return "\n".join(lines)


def table(results: list[Result]) -> str:
    """Everything once more, a line for each version."""
    lines = [
        "| version | outcome | s | decisions | its own | episodes | its own | last answer after | reason |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        outcome = each.stage if each.as_wanted else f"{each.stage}, NOT AS IT SHOULD"
        left, seen = "" if each.left_s is None else f"{each.left_s:.2f} s", each.period
        lines.append(
            f"| {each.version} | {outcome} | {each.seconds:.1f} | {seen.decisions:,} | {seen.own_decisions:,} | "
            f"{seen.episodes:,} | {seen.own_episodes:,} | {left} | {each.reason} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Roll CartPole versions out, and back, with no hand on them.")
    parser.add_argument("--url", help="a running service; else one is started in a temporary folder")
    parser.add_argument("--token", default=os.environ.get("SUREFOOT_ADMIN_TOKEN", ""), help="its admin token")
    parser.add_argument("--seats", type=int, default=32, help="episodes played at once")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="VERSION")
    parser.add_argument("--steps", nargs="+", type=float, default=PLAN["steps"], help="weights of the canary")
    parser.add_argument(
        "--hold-s", type=float, default=PLAN["hold_s"], help="least time in the shadow, and in each step"
    )
    parser.add_argument("--min-units", type=int, default=PLAN["min_units"], help="of the challenger, in each step")
    parser.add_argument("--limit-s", type=float, default=300.0, help="give up a rollout that takes longer")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="surefoot-") as name:
        folder = Path(name)
        make_bundles(folder)
        bundles = {label: packed(folder / label) for label in ("v1", "baseline", *TRIALS)}
        where = contextlib.nullcontext((options.url, options.token)) if options.url else service(folder)
        with where as (url, token):
            results = asyncio.run(run(url, token, bundles, options))
    print("\n" + table(results))
    return 0 if all(each.as_wanted for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
