"""The promotion of the CartPole example on two replicas of one Valkey: the one that leads is killed on the way, and the
other goes on from what it had kept.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, cast

import httpx

from examples.cartpole.at_service import Operator, packed
from examples.cartpole.crowd import Crowd
from examples.cartpole.rollout import PLAN, POLICY, REWARD, make_bundles, unit_time_s
from surefoot import AsyncClient, Unavailable, Unreachable
from tests.service.admins import AUTHORIZED, Admin, serving
from tests.surefoot.valkey import Valkey

SEATS = 16
PATIENCE_S = 240.0
# A replica that was killed and does not come back holds event time back for so long: five minutes by default.
SETTINGS = {"max_lag_s": "2"}


class Either:
    """Asks the first of its clients while it answers, then the next one."""

    def __init__(self, *clients: AsyncClient) -> None:
        self.clients = list(clients)

    async def act_batch(self, states: Any, **options: Any) -> Any:
        return await self._ask("act_batch", states, **options)

    async def reward_batch(self, rewards: Any) -> Any:
        return await self._ask("reward_batch", rewards)

    async def _ask(self, call: str, *arguments: Any, **options: Any) -> Any:
        asked = self.clients[0]
        try:
            return await getattr(asked, call)(*arguments, **options)
        except (Unreachable, Unavailable):
            if asked is self.clients[0] and len(self.clients) > 1:
                self.clients.pop(0)
            return await getattr(self.clients[0], call)(*arguments, **options)


async def reached(operator: Operator, playing: asyncio.Task[None], *stages: str, units: int = 0) -> dict[str, Any]:
    """Wait until the rollout stands in one of the stages, with so many units."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            view = await operator.view()
            counted = (view["evidence"] or {}).get("units", {}).get("challenger", 0)
            assert view["standing"]["stage"] in ("shadow", "canary", *stages), view["standing"]
            assert not view["standing"]["paused"], view["standing"]
            if view["standing"]["stage"] in stages and counted >= units:
                return view
            await asyncio.wait([playing], timeout=0.2)
            assert not playing.done(), playing.exception()


async def promoted(one: Admin, start_other: Callable[[], Admin], bundles: dict[str, bytes]) -> Admin:
    """Promote v2; gives the replica that survived."""
    async with AsyncExitStack() as stack:

        async def entered(admin: Admin) -> tuple[Operator, AsyncClient]:
            http = httpx.AsyncClient(base_url=admin.server.url, headers=AUTHORIZED, timeout=30.0)
            client = AsyncClient(admin.server.url, retry_for_s=0.0, timeout_s=5.0)
            return Operator(await stack.enter_async_context(http), POLICY), await stack.enter_async_context(client)

        operator, client = await entered(one)
        for label in ("v1", "baseline", "v2"):
            await operator.push(bundles[label])
        standing = {"champion": "v1", "baseline": "baseline", "route_by": "episode", "reward": REWARD}
        await operator.deploy(schema=1, policy=POLICY, **standing)
        either = Either(client)
        crowd = Crowd(cast(AsyncClient, either), POLICY, SEATS)
        playing = asyncio.create_task(crowd.play())
        try:
            changes = {"steps": [0.3, 0.5], "hold_s": 1.0, "min_units": 8}
            await operator.plan(PLAN | changes | {"unit_time_s": await unit_time_s(crowd, SEATS)})
            await operator.begin("v2")
            await reached(operator, playing, "canary")
            two = await asyncio.to_thread(start_other)
            survivor, other = await entered(two)
            either.clients.append(other)
            before = await reached(operator, playing, "canary", units=3)
            await asyncio.to_thread(one.server.kill)
            after = await reached(survivor, playing, "champion")
            assert before["standing"]["id"] == after["standing"]["id"]
            assert "return +" in after["standing"]["reason"]
        finally:
            crowd.stop()
            await playing
        return two


def test_a_leader_that_is_killed_is_followed_and_the_better_version_promoted(tmp_path: Path) -> None:
    make_bundles(tmp_path)
    bundles = {label: packed(tmp_path / label) for label in ("v1", "baseline", "v2")}
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="sf-"))
        valkey = stack.enter_context(Valkey(Path(directory)))

        def start(name: str) -> Admin:
            return stack.enter_context(serving(tmp_path / name, redis_url=valkey.url, **SETTINGS))

        two = asyncio.run(promoted(start("one"), lambda: start("two"), bundles))
        assert '"move": "promote"' in two.server.log
