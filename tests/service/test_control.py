"""Deployments in Redis change by compare-and-set, against a real Valkey; the snapshot is whole or not believed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from policies.deployment import Challenger, Deployment
from policies.errors import VersionLive
from service.control import UNREADABLE, Control, Going, Moved, Snapshot
from service.redis_streams import RedisStreams, connect
from service.standing import Document, Known
from tests.policies.stores import bundle


def with_control(url: str, scenario: Callable[[Control], Awaitable[None]]) -> None:
    async def run() -> None:
        streams = RedisStreams(connect(url))
        try:
            await scenario(Control(streams))
        finally:
            await streams.aclose()

    asyncio.run(run())


def document(policy: str, generation: int, champion: str = "v1", **fields: Any) -> Document:
    return Document(generation, Deployment(schema=1, policy=policy, champion=champion, **fields), 1_000, "me")


def test_a_change_replaces_the_generation_before_its_own(valkey_url: str, policy: str) -> None:
    async def scenario(control: Control) -> None:
        assert await control.change(policy, document(policy, 2), unwritten=0) == Moved(0)
        assert await control.change(policy, document(policy, 1), unwritten=0) is None
        assert (await control.read())[policy] == (1, document(policy, 1))
        assert await control.change(policy, document(policy, 1), unwritten=0) == Moved(1)
        assert await control.change(policy, document(policy, 2, "v2"), unwritten=0) is None
        assert (await control.read())[policy] == (2, document(policy, 2, "v2"))

    with_control(valkey_url, scenario)


def test_a_policy_of_a_directory_begins_at_generation_one(valkey_url: str, policy: str) -> None:
    async def scenario(control: Control) -> None:
        assert await control.change(policy, document(policy, 1), unwritten=1) == Moved(1)
        assert await control.change(policy, document(policy, 2), unwritten=1) is None

    with_control(valkey_url, scenario)


def test_of_many_changes_at_once_one_wins(valkey_url: str, policy: str) -> None:
    async def scenario(control: Control) -> None:
        changes = [control.change(policy, document(policy, 1, f"v{i}"), unwritten=0) for i in range(20)]
        assert sorted(map(str, await asyncio.gather(*changes))) == sorted(["None", *[str(Moved(1))] * 19])

    with_control(valkey_url, scenario)


def test_what_is_deployed_cannot_be_retired_and_what_is_retired_cannot_be_deployed(
    valkey_url: str, store: redis.Redis, policy: str
) -> None:
    first = document(policy, 1, baseline="v2", challengers=[Challenger("v3", 0.1)], shadows=["v5"])

    async def scenario(control: Control) -> None:
        await control.retire(policy, "v9")
        assert await control.change(policy, document(policy, 1, "v9"), unwritten=0) == Going("v9")
        assert await control.change(policy, first, unwritten=0) is None
        for label in ("v1", "v2", "v3", "v5"):
            with pytest.raises(VersionLive):
                await control.retire(policy, label)
        for fields in (
            {"champion": "v4"},
            {"baseline": "v4"},
            {"challengers": [Challenger("v4", 0.1)]},
            {"shadows": ["v4"]},
        ):
            await control.retire(policy, "v4")
            assert await control.change(policy, document(policy, 2, **fields), unwritten=0) == Going("v4")
        await control.welcome(policy, "v4")
        assert await control.change(policy, document(policy, 2, "v4"), unwritten=0) is None

    with_control(valkey_url, scenario)
    assert 0 < store.pttl(f"sf:{{{policy}}}:gone:v9") <= 60_000  # a deletion that was cut off does not last


def test_the_number_of_the_last_change_grows_with_everything(valkey_url: str, policy: str) -> None:
    async def scenario(control: Control) -> None:
        seen = []
        for _ in range(2):
            await control.touch(policy)
            seen.append((await control.read())[policy][0])
        await control.change(policy, document(policy, 1), unwritten=0)
        seen.append((await control.read())[policy][0])
        assert seen == [1, 2, 3]

    with_control(valkey_url, scenario)


def test_a_redis_is_reminded_only_of_what_it_has_forgotten(valkey_url: str, store: redis.Redis, policy: str) -> None:
    async def scenario(control: Control) -> None:
        await control.remind(policy, Known(7, document(policy, 3)))
        assert (await control.read())[policy] == (8, document(policy, 3))
        await control.remind(policy, Known(5, document(policy, 2, "v2")))
        await control.remind(policy, Known(5, document(policy, 3, "v2")))
        await control.remind(policy, Known(9))
        assert (await control.read())[policy] == (10, document(policy, 3))

    with_control(valkey_url, scenario)


def test_a_document_of_a_newer_service_is_unreadable_and_not_absent(
    valkey_url: str, store: redis.Redis, policy: str
) -> None:
    async def scenario(control: Control) -> None:
        await control.change(policy, document(policy, 1), unwritten=0)
        store.hset(f"sf:{{{policy}}}:control", "deployment", b'{"generation": 2, "deployment": {"schema": 2}}')
        assert (await control.read())[policy] == UNREADABLE

    with_control(valkey_url, scenario)


def test_a_snapshot_comes_back_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    snapshot, (entry, _) = Snapshot(tmp_path), bundle("toy")
    assert snapshot.read() == {}
    known = {"toy": Known(3, document("toy", 2), {"v1": entry}), "other": Known(1)}
    snapshot.write(known)
    assert snapshot.read() == known
    file = tmp_path / "control.json"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole.replace(b'"v1"', b'"v2"'), b"", b"\n", b"\xff" * 100):
        file.write_bytes(damaged)
        assert snapshot.read() == {}
    snapshot.write(known)
    assert [path.name for path in tmp_path.iterdir()] == ["control.json"]
    Snapshot(tmp_path / "nowhere").write(known)  # a full disk, a folder gone: logged, and the service goes on
