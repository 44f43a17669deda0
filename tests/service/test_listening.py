"""What a worker hears of a change, whatever else it is doing: a real Valkey, store and network; only a load is held."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from policies.bundle import content_digest
from policies.bundle_cache import BundleCache
from policies.deployment import Deployment
from policies.errors import StoreAway
from policies.folder_store import FolderStore
from policies.store import Store, StoredVersion, refs_of
from safety.halt import KillSwitch
from service.catalog import Catalog
from service.clock import SystemClock
from service.control import TOLD, Control, Snapshot
from service.gate import Gate
from service.loading import Loading
from service.metrics import Metrics
from service.plan import LoadedVersion, Plan
from service.redis_streams import RedisStreams, connect
from service.standing import STALE_S, Document, Freshness, SafetySide, freshness
from tests.service.admins import files_of
from tests.service.clusters import cluster, sentinels

LONG_S = 30.0


class Held(Loading):
    """Loads versions, each once it is let."""

    def __init__(self, store: Store, folder: Path, metrics: Metrics) -> None:
        super().__init__(store, BundleCache(folder / "bundles"), Gate(folder / "trials", None), metrics, "cpu")
        self.begun: set[str] = set()
        self.free = asyncio.Event()

    async def load(self, entry: StoredVersion) -> LoadedVersion:
        self.begun.add(entry.version)
        if entry.version != "v1":
            await self.free.wait()
        return await super().load(entry)


class World:
    """A worker's catalog, and what it publishes."""

    def __init__(self, url: str, folder: Path) -> None:
        self.streams, metrics, self.store = (
            RedisStreams(connect(url)),
            Metrics(CollectorRegistry()),
            self._store(folder),
        )
        self.loading = Held(self.store, folder, metrics)
        self.control = Control(self.streams)
        self.plans: dict[str, Plan] = {}
        self.sides: dict[str, SafetySide] = {}
        self.catalog = Catalog(
            [], self.store, self.control, Snapshot(folder), self.loading, self._publish, self._guard, [], metrics,
            SystemClock(), 10,
        )  # fmt: skip

    def _store(self, folder: Path) -> FolderStore:
        (folder / "store").mkdir()
        return FolderStore(str(folder / "store"))

    def _publish(self, plan: Plan, deployment: Deployment) -> None:
        self.plans[plan.policy] = plan

    def _guard(self, policy: str, side: SafetySide, generation: int) -> None:
        self.sides[policy] = side

    async def put(self, policy: str, label: str) -> None:
        files: Mapping[str, bytes] = files_of(policy, label)
        await self.store.put(StoredVersion(policy, label, content_digest(files), refs_of(files), 1, "me"), files)

    async def deploy(self, policy: str, generation: int, champion: str, *halts: KillSwitch) -> None:
        wanted = Document(generation, Deployment(1, policy, champion), 0, "me", halts=halts)
        assert await self.control.change(policy, wanted, 0) is None


@asynccontextmanager
async def world(url: str, folder: Path) -> AsyncIterator[World]:
    mine = World(url, folder)
    running: asyncio.Task[None] | None = None
    try:
        await mine.catalog.start()
        running = asyncio.create_task(mine.catalog.run())
        yield mine
    finally:
        if running is not None:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
        mine.loading.close()
        await mine.streams.aclose()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_halt_waits_for_no_load(valkey_url: str, policy: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with world(valkey_url, tmp_path) as mine:
            for label in ("v1", "v2"):
                await mine.put(policy, label)
            await mine.deploy(policy, 1, "v1")
            await until(lambda: policy in mine.plans)
            await mine.deploy(policy, 2, "v2")
            await until(lambda: "v2" in mine.loading.begun)
            await mine.deploy(policy, 3, "v2", "fallback_only")
            await until(lambda: mine.sides[policy].halts == {"fallback_only"})
            assert mine.plans[policy].generation == 1
            assert not mine.loading.free.is_set()
            mine.loading.free.set()
            await until(lambda: mine.plans[policy].generation == 3)
            assert mine.plans[policy].routes.champion == "v2"

    asyncio.run(work())


def test_of_a_load_that_many_ask_for_there_is_one(valkey_url: str, policy: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with world(valkey_url, tmp_path) as mine:
            await mine.put(policy, "v2")
            await mine.deploy(policy, 1, "v2")
            await until(lambda: "v2" in mine.loading.begun)
            mine.loading.begun.clear()
            state = await mine.catalog.refresh(policy)
            asking = [asyncio.create_task(mine.catalog.require(state, "v2")) for _ in range(5)]
            await asyncio.sleep(0)
            asking[0].cancel()  # who leaves takes nothing along
            mine.loading.free.set()
            await asyncio.gather(*asking[1:])
            assert mine.loading.begun == set()
            assert state.has("v2")

    asyncio.run(work())


# The hint


async def hears(url: str, policy: str, change: Callable[[Control], Awaitable[None]]) -> None:
    """Whoever waits is told of a change at once: a wait for it ends long before its time."""
    streams = RedisStreams(connect(url))
    try:
        waiting, changing = Control(streams), Control(streams)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):  # what was told of before
                while (await streams.command("XLEN", TOLD)) and waiting._heard == "0-0":
                    await waiting.heed(0.01)
        told = asyncio.create_task(waiting.heed(LONG_S))
        await asyncio.sleep(0)
        await change(changing)
        async with asyncio.timeout(LONG_S / 2):
            await told
        assert await streams.command("XLEN", TOLD) == 1
    finally:
        await streams.aclose()


def document(policy: str) -> Document:
    return Document(1, Deployment(1, policy, "v1"), 0, "me")


async def changed(control: Control, policy: str) -> None:
    assert await control.change(policy, document(policy), 0) is None


def test_a_change_is_heard_of_at_once(valkey_url: str, policy: str) -> None:
    asyncio.run(hears(valkey_url, policy, lambda control: changed(control, policy)))
    asyncio.run(hears(valkey_url, policy, lambda control: control.touch(policy)))


@pytest.mark.parametrize("shape", [cluster, sentinels])
def test_it_is_heard_of_in_every_shape_of_redis(shape: Callable[[Path], object], tmp_path: Path, policy: str) -> None:
    with shape(tmp_path) as servers:  # type: ignore[attr-defined]
        asyncio.run(hears(servers.url, policy, lambda control: changed(control, policy)))


def test_a_change_between_two_waits_is_not_missed(valkey_url: str, policy: str) -> None:
    async def work() -> None:
        streams = RedisStreams(connect(valkey_url))
        try:
            waiting, changing = Control(streams), Control(streams)
            await changing.touch(policy)
            await waiting.heed(LONG_S)
            await changing.touch(policy)
            async with asyncio.timeout(LONG_S / 2):
                await waiting.heed(LONG_S)
        finally:
            await streams.aclose()

    asyncio.run(work())


def test_without_redis_a_wait_says_so() -> None:
    async def work() -> None:
        streams = RedisStreams(connect("unix:///nowhere/redis.sock"))
        with pytest.raises(StoreAway):
            await Control(streams).heed(0.01)
        await streams.aclose()

    asyncio.run(work())


# By its age


@pytest.mark.parametrize(
    ("age_s", "asked", "found"),
    [
        (0.0, True, "fresh"),
        (STALE_S, True, "fresh"),
        (STALE_S + 0.1, True, "stale"),
        (0.0, False, "stale"),  # a snapshot's
        (60.0, True, "stale"),
        (60.1, True, "alone"),
        (60.1, False, "alone"),
        (float("inf"), False, "alone"),
    ],
)
def test_what_may_be_done_by_a_control_state_of_an_age(age_s: float, asked: bool, found: Freshness) -> None:
    assert freshness(age_s, 60.0, asked=asked) == found
