"""The store in Redis keeps the kit's promises, on a real Valkey, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import redis

from policies.errors import BundleError, StoreAway
from policies.store import StoredVersion, refs_of
from service import redis_store
from service.redis_store import PIECE_BYTES, RedisStore
from service.redis_streams import RedisStreams, connect
from tests.policies.stores import Promise, bundle, each_promise


def with_store(url: str, scenario: Callable[[RedisStore], Awaitable[None]]) -> None:
    async def run() -> None:
        streams = RedisStreams(connect(url))
        try:
            await scenario(RedisStore(streams))
        finally:
            await streams.aclose()

    asyncio.run(run())


def blobs(store: redis.Redis, policy: str) -> dict[bytes, int]:
    """Keys that hold pieces, and when they expire: -1 never."""
    found = store.scan_iter(f"sf:{{{policy}}}:blob:*", count=1000)
    return {key: store.pttl(key) for key in found}


@each_promise
def test_redis_keeps_the_promises(valkey_url: str, policy: str, promise: Promise) -> None:
    with_store(valkey_url, lambda store: promise(store, policy))


def test_files_go_with_the_last_version_that_needs_them(valkey_url: str, store: redis.Redis, policy: str) -> None:
    (one, ones), (two, twos) = bundle(policy), bundle(policy, "v2")
    large = {**ones, "model.onnx": b"x" * (2 * PIECE_BYTES + 1)}
    entry = StoredVersion(policy, "v3", "d" * 64, refs_of(large), 1_000, "me")

    async def scenario(mine: RedisStore) -> None:
        for each, files in ((one, ones), (two, twos), (entry, large)):
            await mine.put(each, files)
        assert set(blobs(store, policy).values()) == {-1}
        assert len(blobs(store, policy)) == 4 + 3  # two manifests, a network and golden.json shared; three pieces
        for each in (one, entry, two):
            await mine.delete(each)

    with_store(valkey_url, scenario)
    assert blobs(store, policy) == {}


def test_a_push_that_never_came_to_its_end_expires(
    valkey_url: str, store: redis.Redis, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry, files), (other, others) = bundle(policy), bundle(policy, "v2")

    async def scenario(mine: RedisStore) -> None:
        await mine.put(other, others)
        monkeypatch.setattr(redis_store, "REGISTER", "return redis.error_reply('LOADING cut off')")
        with pytest.raises(StoreAway):
            await mine.put(entry, files)

    with_store(valkey_url, scenario)
    left = {key.decode().split(":")[-2]: ttl for key, ttl in blobs(store, policy).items()}
    assert left.keys() == {file.sha256 for each in (entry, other) for file in each.files.values()}
    assert 0 < left.pop(entry.files["policy.yaml"].sha256) <= redis_store.DRAFT_MS
    assert set(left.values()) == {-1}  # what the other version needs lasts


def test_pieces_that_vanish_before_they_are_registered_are_sent_again(
    valkey_url: str, store: redis.Redis, policy: str
) -> None:
    """What a deletion of the last other version with the same network does between two calls of a push."""
    entry, files = bundle(policy)

    class Unlucky(RedisStore):
        sent = 0

        async def _send(self, key: str, file: object, content: bytes) -> None:
            await super()._send(key, file, content)  # type: ignore[arg-type]
            Unlucky.sent += 1
            if Unlucky.sent == 3:
                assert store.delete(*blobs(store, policy)) == 3

    async def run() -> None:
        streams = RedisStreams(connect(valkey_url))
        try:
            unlucky = Unlucky(streams)
            assert await unlucky.put(entry, files) == entry
            assert await unlucky.fetch(entry) == files
        finally:
            await streams.aclose()

    asyncio.run(run())
    assert Unlucky.sent == 6


def test_a_damaged_piece_is_found_and_mended_by_another_push(valkey_url: str, store: redis.Redis, policy: str) -> None:
    (one, ones), (two, twos) = bundle(policy), bundle(policy, "v2")

    async def scenario(mine: RedisStore) -> None:
        await mine.put(one, ones)
        key = f"sf:{{{policy}}}:blob:{one.files['model.onnx'].sha256}:0"
        store.setrange(key, 5, b"!")
        with pytest.raises(BundleError) as caught:
            await mine.fetch(one)
        assert caught.value.check == "digest"
        await mine.put(two, twos)
        assert await mine.fetch(one) == ones
        assert store.pttl(key) == -1
        store.delete(key)
        with pytest.raises(BundleError):
            await mine.fetch(one)

    with_store(valkey_url, scenario)
