"""Every kind of trouble that a Redis can be in, on real servers: the shipper goes on by itself, and delivers all once.

A world ships by itself to a server that is then broken, and mended. While it is broken, events are still recorded, the
failures are counted by reason, and nothing piles up; once it is mended, every decision has exactly one transition.
"""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from policies.errors import StoreAway
from service.clock import SystemClock
from service.redis_connection import answered, connect
from service.redis_pool import CONNECTIONS
from service.redis_streams import RedisStreams, base
from service.shipper import Shipper
from tests.faults.proxy import FaultProxy, Toxics
from tests.service.admins import serving
from tests.service.clusters import Cluster, Node, Sentinels, cluster, sentinels, server
from tests.service.pipelines import IDENTITY, decider, plan, rows, version
from tests.service.test_act import METRICS
from tests.service.test_shipper import POLICY, World, once, open_world
from tests.waiting import until

DEADLINE_S = 60.0
STREAM = f"{base(POLICY)}:transitions"


@asynccontextmanager
async def shipping(folder: Path, url: str) -> AsyncIterator[World]:
    """A world that ships by itself."""
    async with open_world(folder / "data", url, SystemClock()) as world:
        running = asyncio.create_task(world.shipper.run())
        try:
            yield world
        finally:
            await world.shipper.drain(5.0)
            await running


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


def delivered(node: Node) -> Counter[str]:
    try:
        entries: Any = node.client().xrange(STREAM)
        return Counter(fields[b"i"].decode() for _, fields in entries)
    except redis.RedisError:
        return Counter()


async def ordeal(
    world: World, where: Callable[[], Node], break_it: Callable[[], None], mend: Callable[[], None], reasons: set[str]
) -> None:
    """Ship, break, go on recording until a failure has one of the reasons, mend, and see everything arrive once."""
    await world.decide(20)
    await eventually(lambda: delivered(where()) == once(world.ids))
    before = Counter(world.shipper.statistics().failures)
    await in_thread(break_it)
    try:
        await world.decide(20)
        tasks = len(asyncio.all_tasks())
        async with asyncio.timeout(DEADLINE_S):
            while not reasons & (Counter(world.shipper.statistics().failures) - before).keys():
                await world.decide(1)
                assert len(asyncio.all_tasks()) <= tasks + 4
                await asyncio.sleep(0.01)
        assert world.ledger.accepting
        assert world.ledger.statistics().unshipped_events
        assert world.shipper.statistics().away_since_s is not None
    finally:
        await in_thread(mend)
    await world.decide(5)
    await eventually(lambda: delivered(where()) == once(world.ids))
    await eventually(lambda: world.shipper.statistics().away_since_s is None)
    assert world.ledger.statistics().rejected_events == 0
    assert world.ledger.statistics().lost_events == 0


# One server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    durable = ["--appendonly", "yes", "--appendfsync", "always", "--busy-reply-threshold", "100"]
    with server(tmp_path_factory.mktemp("node"), *durable) as found:
        yield found


@pytest.fixture
def node(shared: Node) -> Node:
    shared.ask("FLUSHALL")  # the fixture's own server
    return shared


def told(node: Node, *commands: str) -> Callable[[], None]:
    def tell() -> None:
        for command in commands:
            node.ask(*command.split())

    return tell


COMMANDS = {
    "oom": (["CONFIG SET maxmemory 1"], ["CONFIG SET maxmemory 0"]),
    "readonly": (["REPLICAOF 127.0.0.1 1"], ["REPLICAOF NO ONE"]),
    "masterdown": (
        ["CONFIG SET replica-serve-stale-data no", "REPLICAOF 127.0.0.1 1"],
        ["REPLICAOF NO ONE", "CONFIG SET replica-serve-stale-data yes"],
    ),
    "noreplicas": (["CONFIG SET min-replicas-to-write 1"], ["CONFIG SET min-replicas-to-write 0"]),
    "noperm": (["ACL SETUSER default -evalsha"], ["ACL SETUSER default +evalsha"]),
}


@pytest.mark.parametrize("reason", COMMANDS)
def test_a_server_that_refuses(node: Node, tmp_path: Path, reason: str) -> None:
    async def scenario() -> None:
        async with shipping(tmp_path, node.url) as world:
            broken, mended = COMMANDS[reason]
            await ordeal(world, lambda: node, told(node, *broken), told(node, *mended), {reason})

    asyncio.run(scenario())


def test_what_an_acl_forbids_inside_the_script_is_nobodys_event(node: Node, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with shipping(tmp_path, node.url) as world:
            broken, mended = told(node, "ACL SETUSER default -hset"), told(node, "ACL SETUSER default +hset")
            await ordeal(world, lambda: node, broken, mended, {"noperm"})

    asyncio.run(scenario())


def test_a_server_that_asks_for_a_password(node: Node, tmp_path: Path) -> None:
    def broken() -> None:
        node.ask("ACL", "SETUSER", "operator", "on", "nopass", "~*", "+@all")
        node.ask("CONFIG", "SET", "requirepass", "x")
        with node.client(username="operator", password="any") as client:
            client.client_kill_filter(_type="normal")

    def mended() -> None:
        with node.client(username="operator", password="any") as client:
            client.config_set("requirepass", "")

    async def scenario() -> None:
        async with shipping(tmp_path, node.url) as world:
            await ordeal(world, lambda: node, broken, mended, {"noauth"})

    asyncio.run(scenario())


def test_a_server_that_cannot_save(node: Node, tmp_path: Path) -> None:
    blocked = node.folder / "dump.rdb"

    def saved() -> str:
        info: Any = node.client().info("persistence")
        return "" if info["rdb_bgsave_in_progress"] else str(info["rdb_last_bgsave_status"])

    def broken() -> None:
        blocked.mkdir()
        (blocked / "file").touch()  # nothing can be renamed to a folder that holds something
        node.ask("CONFIG", "SET", "save", "3600 1")
        node.ask("BGSAVE")
        until(lambda: saved() == "err", "a snapshot that fails")

    def mended() -> None:
        (blocked / "file").unlink()
        blocked.rmdir()
        node.ask("BGSAVE")
        until(lambda: saved() == "ok", "a snapshot")
        node.ask("CONFIG", "SET", "save", "")

    async def scenario() -> None:
        async with shipping(tmp_path, node.url) as world:
            await ordeal(world, lambda: node, broken, mended, {"misconf"})

    asyncio.run(scenario())


def test_a_server_that_is_busy_with_a_script(node: Node, tmp_path: Path) -> None:
    def loop() -> None:
        with suppress(redis.RedisError), node.client(socket_timeout=None) as client:
            client.eval("while true do end", 0)

    def mended() -> None:
        node.ask("SCRIPT", "KILL")
        looping.join()

    looping = threading.Thread(target=loop)

    async def scenario() -> None:
        async with shipping(tmp_path, node.url) as world:
            await ordeal(world, lambda: node, looping.start, mended, {"busy"})

    asyncio.run(scenario())


def test_a_server_that_hangs(node: Node, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with shipping(tmp_path, node.url) as world:
            await world.decide(5)
            await eventually(lambda: delivered(node) == once(world.ids))
            node.hang()
            try:
                await world.decide(20)
                await eventually(lambda: world.shipper.statistics().failures.get("timeout", 0) >= 2)
                await world.decide(20)
            finally:
                node.wake()
            await eventually(lambda: delivered(node) == once(world.ids))

    asyncio.run(scenario())


def test_a_server_that_dies_and_loads_its_file(tmp_path: Path) -> None:
    """While it loads it answers LOADING, made long enough to be seen by a delay for each key."""

    async def scenario(node: Node) -> None:
        async with shipping(tmp_path, node.url) as world:
            await in_thread(fill, node)

            def loads() -> None:
                node.kill()
                node.launch("--key-load-delay", "150")

            await ordeal(world, lambda: node, loads, lambda: until(node.answers), {"loading"})
            await ordeal(world, lambda: node, node.kill, node.start, {"refused"})

    def fill(node: Node) -> None:
        with node.client() as client, client.pipeline(transaction=False) as pipe:
            for n in range(20_000):
                pipe.set(f"filler:{n}", "x")
            pipe.execute()

    durable = ["--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0"]
    with server(tmp_path / "node", *durable) as node:
        asyncio.run(scenario(node))


def test_a_server_whose_answers_come_too_late(node: Node, tmp_path: Path) -> None:
    """Every call is executed, and none is answered in time: each is as good as lost, and sent again."""

    async def scenario(proxy: FaultProxy) -> None:
        async with shipping(tmp_path, proxy.redis_url) as world:
            slow = lambda: proxy.set(down=Toxics(latency_s=2.0))  # noqa: E731
            await ordeal(world, lambda: node, slow, proxy.heal, {"timeout"})

    with FaultProxy(("127.0.0.1", node.port)) as proxy:
        asyncio.run(scenario(proxy))


@pytest.mark.parametrize("kind", ["hole", "resets", "slices", "bandwidth"])
def test_a_network_in_trouble(node: Node, tmp_path: Path, kind: str) -> None:
    async def scenario(proxy: FaultProxy) -> None:
        def broken() -> None:
            if kind == "hole":
                proxy.set(Toxics(hold=True), Toxics(hold=True))
            elif kind == "resets":
                proxy.down()
            elif kind == "slices":
                proxy.set(down=Toxics(slice_bytes=1, latency_s=0.2))
            else:
                proxy.set(up=Toxics(bytes_per_s=1_000.0))

        async with shipping(tmp_path, proxy.redis_url) as world:
            reasons = {"refused", "away"} if kind == "resets" else {"timeout"}
            await ordeal(world, lambda: node, broken, proxy.heal, reasons)
            assert proxy.counters.open <= 4

    with FaultProxy(("127.0.0.1", node.port)) as proxy:
        asyncio.run(scenario(proxy))


# Sentinels


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_sentinels_choose_another_primary(tmp_path: Path, how: str) -> None:
    async def scenario(those: Sentinels) -> None:
        async with shipping(tmp_path / "world", those.url) as world:
            old = those.primary()

            def broken() -> None:
                (old.kill if how == "dies" else old.hang)()
                until(lambda: those.primary() is not old, "another primary")

            def mended() -> None:
                (old.start if how == "dies" else old.wake)()

            await world.decide(20)
            await eventually(lambda: delivered(old) == once(world.ids))
            await in_thread(broken)
            await world.decide(20)
            await eventually(lambda: delivered(those.primary()) == once(world.ids))
            assert sum(world.shipper.statistics().failures.values())
            await in_thread(mended)
            await world.decide(20)
            await eventually(lambda: delivered(those.primary()) == once(world.ids))
            assert those.primary() is not old

    with sentinels(tmp_path / "those") as those:
        asyncio.run(scenario(those))


# A cluster


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


def clear(nodes: Cluster) -> None:
    until(nodes.settled, "a cluster that agrees")
    for node in nodes.nodes:
        with suppress(redis.ResponseError):
            node.ask("FLUSHALL")  # the fixture's own; replicas refuse


def test_a_slot_moves_key_by_key(nodes: Cluster, tmp_path: Path) -> None:
    """While it does, no script may run, for it would see some of the policy's keys only; nothing is torn apart."""
    clear(nodes)
    source = nodes.owner(STREAM)
    target = nodes.other(source)
    slot = source.ask("CLUSTER", "KEYSLOT", STREAM)
    names = {each.port: each.ask("CLUSTER", "MYID").decode() for each in (source, target)}

    def half() -> None:
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source.port])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target.port])
        move(1)

    def move(count: int) -> None:
        for key in source.ask("CLUSTER", "GETKEYSINSLOT", slot, count):
            source.ask("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)

    def rest() -> None:
        move(1 << 20)
        for each in (target, source):
            each.ask("CLUSTER", "SETSLOT", slot, "NODE", names[target.port])
        until(nodes.settled, "a cluster that agrees")
        until(lambda: nodes.owner(STREAM) is target, "another owner")

    async def scenario() -> None:
        async with shipping(tmp_path, nodes.url) as world:
            await ordeal(world, lambda: nodes.owner(STREAM), half, rest, {"ask"})

    asyncio.run(scenario())


def test_a_slot_moves_at_once(nodes: Cluster, tmp_path: Path) -> None:
    """Valkey 9 moves a slot atomically: calls are redirected, and go on."""
    clear(nodes)
    source = nodes.owner(STREAM)
    target = nodes.other(source)
    slot, name = source.ask("CLUSTER", "KEYSLOT", STREAM), target.ask("CLUSTER", "MYID").decode()

    def moved() -> None:
        source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", name)
        until(lambda: nodes.owner(STREAM) is target, "another owner")

    async def scenario() -> None:
        async with shipping(tmp_path, nodes.url) as world:
            await world.decide(50)
            moving = asyncio.ensure_future(in_thread(moved))
            while not moving.done():
                await world.decide(1)
            await moving
            await world.decide(50)
            await eventually(lambda: delivered(target) == once(world.ids))

    asyncio.run(scenario())


def test_keys_of_a_slot_that_moves_are_to_be_asked_for_again(nodes: Cluster) -> None:
    """TRYAGAIN, for a command of two keys of which one has moved."""
    clear(nodes)
    one, two = (f"{base('split')}:mem:{n}" for n in "ab")
    source = nodes.owner(one)
    target = nodes.other(source)
    slot = source.ask("CLUSTER", "KEYSLOT", one)
    names = {each.port: each.ask("CLUSTER", "MYID").decode() for each in (source, target)}
    for key in (one, two):
        source.ask("SET", key, "x")
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", names[source.port])
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target.port])
    source.ask("MIGRATE", "127.0.0.1", target.port, one, 0, 5000)

    async def scenario() -> None:
        client = connect(nodes.url)
        assert await failure(answered(client.execute_command("MGET", one, two))) == "tryagain"
        assert await failure(answered(client.execute_command("GET", one))) == "ask"
        assert await client.execute_command("GET", two) == b"x"
        await client.aclose()

    async def failure(call: Awaitable[Any]) -> str:
        with pytest.raises(StoreAway) as caught:
            await call
        return caught.value.reason

    try:
        asyncio.run(scenario())
    finally:
        source.ask("MIGRATE", "127.0.0.1", target.port, two, 0, 5000)
        for each in (target, source):
            each.ask("CLUSTER", "SETSLOT", slot, "NODE", names[target.port])


def test_a_node_dies_and_its_replica_takes_over(nodes: Cluster, tmp_path: Path) -> None:
    clear(nodes)
    old = nodes.owner(STREAM)

    def broken() -> None:
        old.kill()
        until(lambda: nodes.owner(STREAM) is not old, "another owner")

    async def scenario() -> None:
        async with shipping(tmp_path, nodes.url) as world:
            await world.decide(20)
            await eventually(lambda: delivered(old) == once(world.ids))
            await in_thread(broken)
            await world.decide(20)
            await eventually(lambda: delivered(nodes.owner(STREAM)) == once(world.ids))
            assert sum(world.shipper.statistics().failures.values())

    try:
        asyncio.run(scenario())
    finally:
        old.start()
        until(nodes.settled, "a cluster that agrees")


def test_a_cluster_that_does_not_serve_all_slots(nodes: Cluster, tmp_path: Path) -> None:
    """With a slot that nobody serves the whole cluster refuses: CLUSTERDOWN."""
    clear(nodes)
    owner = nodes.owner(STREAM)
    other = nodes.other(owner)
    first, last, *_ = next(each for each in other.ask("CLUSTER", "SLOTS") if int(each[2][1]) == other.port)
    slot = int(first)
    assert slot <= int(last)

    def broken() -> None:
        for each in nodes.nodes:
            with suppress(redis.ResponseError):
                each.ask("CLUSTER", "DELSLOTS", slot)
        until(lambda: b"cluster_state:fail" in owner.ask("CLUSTER", "INFO"), "a cluster that is down")

    def mended() -> None:
        other.ask("CLUSTER", "ADDSLOTS", slot)
        until(nodes.settled, "a cluster that agrees")

    async def scenario() -> None:
        async with shipping(tmp_path, nodes.url) as world:
            await ordeal(world, lambda: nodes.owner(STREAM), broken, mended, {"clusterdown"})

    asyncio.run(scenario())


# A whole service


def test_a_service_decides_while_redis_is_a_black_hole_and_says_so(node: Node, tmp_path: Path) -> None:
    """Nothing on the way of an answer waits for Redis: some thousand answers, within what few calls take to give up."""

    def metric(name: str) -> float:
        found = re.findall(rf"^{re.escape(name)} (\S+)$", admin.http.get("/metrics").text, re.MULTILINE)
        return float(found[0]) if found else 0.0

    def act(count: int) -> None:
        for _ in range(count):
            assert admin.act("toy")["logged"]

    with FaultProxy(("127.0.0.1", node.port)) as proxy, serving(tmp_path, redis_url=proxy.redis_url) as admin:
        admin.pushed("toy", "v1")
        act(50)
        until(lambda: metric("surefoot_ledger_unshipped_events") == 0, "what was shipped")
        proxy.set(Toxics(hold=True), Toxics(hold=True))
        failed = 'surefoot_ship_failures_total{reason="timeout"}'
        before = metric(failed)
        while metric(failed) < before + 3 or metric("surefoot_store_up"):
            act(50)
        assert metric("surefoot_ledger_unshipped_events") > 0
        assert metric("surefoot_ledger_oldest_seconds") > 0
        assert admin.http.get("/health/ready").status_code == 200
        assert proxy.counters.open <= 2 * CONNECTIONS
        assert len(list(Path(f"/proc/{admin.server.process.pid}/fd").iterdir())) < 200  # type: ignore[union-attr]
        proxy.heal()
        act(50)
        until(lambda: metric("surefoot_ledger_unshipped_events") == 0, "what was shipped")
        until(lambda: metric("surefoot_store_up") == 1, "a Redis that is there")
        assert metric("surefoot_ledger_lost_events") == 0
        assert metric("surefoot_ledger_rejected_events") == 0


def test_a_decision_is_made_while_a_call_of_the_shipper_hangs() -> None:
    """In one thread: the call stays open from before the decision until after it."""

    async def scenario() -> None:
        with decider(plan({"v1": version(METRICS, "v1", IDENTITY)})) as (pipeline, ledger, clock):
            client = connect(f"redis://127.0.0.1:{hole.getsockname()[1]}")
            shipper = Shipper(ledger, RedisStreams(client), clock)
            shipper.register("toy")
            hanging = asyncio.ensure_future(client.execute_command("GET", "k", timeout_s=DEADLINE_S))
            shipping = asyncio.ensure_future(shipper.run_once())
            await eventually(lambda: client.statistics().running == 2)
            (answer,) = await pipeline.decide(rows([1.0, 3.0]))
            assert getattr(answer, "logged", False)
            assert not hanging.done()
            hanging.cancel()
            assert not await shipping
            assert shipper.statistics().failures == {"timeout": 1}
            assert ledger.statistics().unshipped_events == 1
            await asyncio.gather(hanging, return_exceptions=True)
            await client.aclose()

    with socket.create_server(("127.0.0.1", 0)) as hole:
        asyncio.run(scenario())
