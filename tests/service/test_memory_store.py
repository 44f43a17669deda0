"""Episodes in a real Redis: the newest step wins, nothing waits for ever, and what cannot be asked is said so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from prometheus_client import CollectorRegistry

from policies.route import Assignment
from service import memory_store
from service.memory import OVERHEAD_BYTES, Kept, encode
from service.memory_store import CALL_EPISODES, WRITE, MemoryStore
from service.memory_writes import Writes
from service.metrics import Metrics
from service.redis_streams import RedisStreams, base, connect
from tests.service.joining import decision
from tests.service.limiting import Proxy
from tests.service.test_redis_streams import call
from tests.surefoot.valkey import Valkey

BEGAN = Assignment("v1", "champion", 1.0)


def kept(decision_id: str, step: int | None = 0, size: int = 4) -> Kept:
    return Kept(BEGAN, "v1", "digest", step, decision_id, np.zeros(size, np.float32), np.ones(size, np.float32))


def steps(found: list[Kept | None] | None) -> list[int | None]:
    assert found is not None
    return [None if each is None else each.step for each in found]


def dropped(metrics: Metrics, policy: str, reason: str) -> float:
    found = metrics.registry.get_sample_value("surefoot_memory_drops_total", {"policy": policy, "reason": reason})
    return found or 0.0


@contextlib.asynccontextmanager
async def stored(url: str, policy: str, metrics: Metrics | None = None) -> AsyncIterator[MemoryStore]:
    streams = RedisStreams(connect(url))
    store = MemoryStore(streams, policy, 60.0, metrics or Metrics(CollectorRegistry()))
    try:
        yield store
    finally:
        await store.aclose()
        await streams.aclose()


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="sf-") as folder, Valkey(Path(folder)) as started:
        yield started


def test_what_is_put_is_found_by_other_workers_and_expires(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def work() -> None:
        async with stored(valkey_url, policy) as one, stored(valkey_url, policy) as two:
            one.put_nowait("e", kept("d1", 1))
            one.put_nowait("f", kept("d2", 7, 1000))
            one.put_nowait("e", kept("d3", 2))
            assert one.statistics().waiting == 2, "the newest wins, and nobody waits"
            await one.flush()
            assert one.statistics() == (two.statistics())
            found = await two.get(["e", "unknown", "f"])
            assert steps(found) == [2, None, 7]
            assert found is not None
            assert found[2] is not None
            assert found[2].after is not None
            assert found[2].after.sum() == 1000
        keys: Any = store.keys(f"{base(policy)}:mem:*")
        assert len(keys) == 2
        assert all(0 < int(store.pttl(key)) <= 60_000 for key in keys)

    asyncio.run(work())


def test_more_than_fits_into_a_call_is_written_all_the_same(valkey_url: str, policy: str) -> None:
    async def work() -> None:
        names = [f"e{i}" for i in range(2 * CALL_EPISODES + 5)]
        async with stored(valkey_url, policy) as one:
            for i, name in enumerate(names):
                one.put_nowait(name, kept(name, i))
            await one.flush()
            assert steps(await one.get(names)) == list(range(len(names)))
            one.put_nowait("large", kept("large", 3, 1 << 19))
            one.put_nowait("larger", kept("larger", 4, 1 << 20))
            await one.flush()
            assert one.statistics().waiting == 0

    asyncio.run(work())


def test_an_episode_is_forgotten_unless_another_worker_went_on_with_it(valkey_url: str, policy: str) -> None:
    async def work() -> None:
        async with stored(valkey_url, policy) as one, stored(valkey_url, policy) as two:
            for name in "abc":
                one.put_nowait(name, kept(f"{name}1", 1))
            await one.flush()
            two.put_nowait("b", kept("b2", 2))
            await two.flush()
            for name in "abcd":
                one.forget_nowait(name, f"{name}1")
            one.put_nowait("c", kept("c9", 0))  # it begins anew
            await one.flush()
            assert steps(await one.get(list("abcd"))) == [None, 2, 0, None]
            # A step that was never written leaves an older one, which must go too.
            one.put_nowait("b", kept("b3", 3))
            one.forget_nowait("b", "b3")
            one.forget_nowait("b", "b3")
            await one.flush()
            assert steps(await one.get(["b"])) == [None]

    asyncio.run(work())


def test_the_end_of_an_episode_that_another_worker_has_made_is_found_out(valkey_url: str, policy: str) -> None:
    async def work() -> None:
        streams = RedisStreams(connect(valkey_url))
        await streams.ship(call(policy, decision("last", "ep", 3), decision("lone")))
        async with stored(valkey_url, policy) as one, stored(valkey_url, policy) as two:
            one.put_nowait("ep", kept("last", 3))
            await one.flush()
            for each in ("never", "lone", "last"):
                two.ended_nowait(each)
            while two._ends:
                await asyncio.wait(set(two._ends))
            await two.flush()
            assert steps(await one.get(["ep"])) == [None]
        await streams.aclose()

    asyncio.run(work())


def test_without_redis_lookups_say_so_and_steps_wait_for_its_return(server: Valkey, policy: str) -> None:
    async def work() -> None:
        async with stored(server.url, policy) as one:
            one.put_nowait("e", kept("d1", 1))
            await one.flush()
            server.kill()
            assert await one.get(["e"]) is None
            one.put_nowait("e", kept("d2", 2))
            await one.flush()
            one.put_nowait("e", kept("d3", 3))
            one.put_nowait("f", kept("d4", 9))
            await one.flush()
            assert (one.statistics().waiting, one.statistics().away) == (2, True)
            server.start()
            async with asyncio.timeout(60):  # it tries again by itself
                while one.statistics().waiting:
                    await asyncio.sleep(0.01)
                while steps(await one.get(["e", "f"])) != [3, 9]:
                    await asyncio.sleep(0.01)
            assert not one.statistics().away

    asyncio.run(work())


def test_a_redis_that_never_answers_holds_up_one_lookup_and_closing_neither(server: Valkey, policy: str) -> None:
    metrics = Metrics(CollectorRegistry())

    async def work() -> None:
        proxy = Proxy(server.socket_path.as_posix())
        await proxy.start()
        async with stored(proxy.url, policy, metrics) as one:
            one.put_nowait("e", kept("d1", 1))
            await one.flush()
            proxy.switch("hang")
            assert await one.get(["e"]) is None
            assert one.statistics().overdue == 1
            assert await one.get(["e"]) is None
            assert one.statistics().overdue == 1, "the second did not even ask"
            one.put_nowait("e", kept("d2", 2))
            lookup = asyncio.ensure_future(one.get(["e"]))
            await asyncio.sleep(0)
            lookup.cancel()  # a caller who leaves
        assert dropped(metrics, policy, "closed") == 1
        assert await one.get(["e"]) is None
        one.ended_nowait("d2")
        one.put_nowait("e", kept("d3", 3))
        await one.flush()
        await proxy.close()

    asyncio.run(work())


def test_closing_has_an_end_whatever_is_in_flight(server: Valkey, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_store, "CLOSE_S", 0.0)
    metrics = Metrics(CollectorRegistry())

    async def work() -> None:
        proxy = Proxy(server.socket_path.as_posix())
        await proxy.start()
        proxy.switch("hang")
        async with stored(proxy.url, policy, metrics) as one:
            assert await one.get(["e"]) is None
            one.put_nowait("e", kept("d1", 1))
            one.ended_nowait("d0")
            await asyncio.sleep(0)  # the calls are on their way
        assert (one.statistics().waiting, one.statistics().overdue) == (0, 0)
        await proxy.close()

    asyncio.run(work())
    assert dropped(metrics, policy, "closed") == 1


def test_an_overdue_lookup_that_ends_lets_the_next_one_ask(server: Valkey, policy: str) -> None:
    async def work() -> None:
        proxy = Proxy(server.socket_path.as_posix())
        await proxy.start()
        async with stored(proxy.url, policy) as one:
            one.put_nowait("e", kept("d1", 1))
            await one.flush()
            proxy.switch("hang")
            assert await one.get(["e"]) is None
            proxy.switch("pass")
            async with asyncio.timeout(60):
                while await one.get(["e"]) is None:
                    await asyncio.sleep(0.01)
            proxy.switch("lose")  # written, and Redis' word for it is lost: written again
            one.put_nowait("e", kept("d2", 2))
            await one.flush()
            assert one.statistics().waiting == 1
            proxy.switch("pass")
            await one.flush()
            assert steps(await one.get(["e"])) == [2]
        await proxy.close()

    asyncio.run(work())


def test_what_other_releases_wrote_is_nothing(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def work() -> None:
        async with stored(valkey_url, policy) as one:
            one.put_nowait("e", kept("d1", 1))
            await one.flush()
            (key,) = store.keys(f"{base(policy)}:mem:*")
            store.set(key, b"\x93 of another kind")
            assert steps(await one.get(["e"])) == [None]
            store.delete(key)
            store.lpush(key, "of another type")
            one.put_nowait("e", kept("d2", 2))
            await one.flush()
            assert steps(await one.get(["e"])) == [2]

    asyncio.run(work())


def test_odd_errors_are_waited_out(valkey_url: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with stored(valkey_url, policy) as one:
            monkeypatch.setattr(memory_store, "digest_of", lambda episode: {})  # no value of Redis: a bug of ours
            one.put_nowait("e", kept("d1", 1))
            await one.flush()
            assert one.statistics().waiting == 1
            monkeypatch.undo()
            await one.flush()
            assert steps(await one.get(["e"])) == [1]
            one.ended_nowait(None)  # type: ignore[arg-type]
            while one._ends:
                await asyncio.wait(set(one._ends))

    asyncio.run(work())


def test_the_script_finds_the_decision_where_the_codec_puts_it(store: redis.Redis, policy: str) -> None:
    key = f"{base(policy)}:mem:x"
    for step in (None, 0, 2**40):
        for decision_id in ("a", "f" * 60):
            each = kept(decision_id, step)
            assert each.after is not None
            store.eval(WRITE.decode(), 1, base(policy), 1000, "x", encode(each, each.after), "")
            store.eval(WRITE.decode(), 1, base(policy), 1000, "x", b"", "0" * len(decision_id))
            assert store.exists(key)
            store.eval(WRITE.decode(), 1, base(policy), 1000, "x", b"", decision_id)
            assert not store.exists(key)


def bytes_of(*sizes: int) -> int:
    return sum(OVERHEAD_BYTES + 8 * size for size in sizes)


def test_the_queue_is_bounded_in_number_and_bytes() -> None:
    few = Writes(most=2)
    assert [few.put_nowait(name, kept(name)) for name in "abc"] == [0, 0, 1]
    assert list(few.take(9, 1 << 20)) == ["b", "c"]
    small = Writes(most_bytes=bytes_of(4, 4))
    assert [small.put_nowait(name, kept(name)) for name in "ab"] == [0, 0]
    assert small.put_nowait("a", kept("a", 1)) == 0, "in the place of the one before"
    assert small.put_nowait("c", kept("c", 0, 5)) == 2, "too large beside another"
    assert small.put_nowait("c", kept("c", 0, 5000)) == 0, "one may always wait"
    assert small.bytes == bytes_of(5000)
    assert (small.forget_nowait("c", "c"), small.forget_nowait("d", "d"), len(small)) == (0, 0, 2)
    assert (small.clear(), small.bytes, len(small)) == (2, 0, 0)


def test_what_was_not_written_comes_first_unless_something_newer_waits() -> None:
    writes = Writes(most=3)
    for name in "abc":
        writes.put_nowait(name, kept(f"{name}1"))
    taken = writes.take(2, 1 << 20)
    assert (list(taken), writes.bytes) == (["a", "b"], bytes_of(4))
    writes.put_nowait("b", kept("b2"))
    assert writes.give_back(taken) == 0
    assert writes.bytes == bytes_of(4, 4, 4)
    again = writes.take(9, bytes_of(4, 4))
    assert {name: write.kept and write.kept.decision_id for name, write in again.items()} == {"a": "a1", "b": "b2"}
    writes.put_nowait("x", kept("x"))
    writes.put_nowait("y", kept("y"))
    assert writes.give_back(again) == 2
    assert list(writes.take(9, 1 << 20)) == ["c", "x", "y"]
