"""The promises of a store of versions, as a kit: every store is held to the same sentences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from policies.bundle import content_digest
from policies.errors import BundleError
from policies.store import Store, StoredVersion, refs_of
from tests.policies.networks import identity_files

Promise = Callable[[Store, str], Coroutine[Any, Any, None]]
PROMISES: dict[str, Promise] = {}


def promise(check: Promise) -> Promise:
    PROMISES[check.__name__] = check
    return check


each_promise = pytest.mark.parametrize("promise", PROMISES.values(), ids=PROMISES)


def bundle(policy: str, version: str = "v1", **changes: Any) -> tuple[StoredVersion, dict[str, bytes]]:
    """A version ready to be put: its entry and its files."""
    files = identity_files(policy=policy, version=version, **changes)
    return StoredVersion(policy, version, content_digest(files), refs_of(files), 1_000, "me"), files


@promise
async def what_is_put_is_listed_and_fetched_as_it_was(store: Store, policy: str) -> None:
    entry, files = bundle(policy)
    assert await store.versions(policy) == {}
    assert await store.put(entry, files) == entry
    assert await store.versions(policy) == {"v1": entry}
    assert policy in await store.policies()
    assert await store.fetch(entry) == files


@promise
async def a_label_is_never_given_other_content(store: Store, policy: str) -> None:
    entry, files = bundle(policy)
    other, others = bundle(policy, description="another")
    await store.put(entry, files)
    assert await store.put(other, others) == entry
    assert await store.versions(policy) == {"v1": entry}
    assert await store.fetch(entry) == files
    again = msgspec.structs.replace(entry, pushed_at_ms=2_000)
    assert await store.put(again, files) == entry


@promise
async def of_many_pushes_under_one_label_one_wins_and_all_learn_which(store: Store, policy: str) -> None:
    pushes = [bundle(policy, description=f"push {i}") for i in range(8)]
    stand = await asyncio.gather(*(store.put(entry, files) for entry, files in pushes))
    assert len({each.digest for each in stand}) == 1
    assert await store.versions(policy) == {"v1": stand[0]}
    winner = next(files for entry, files in pushes if entry.digest == stand[0].digest)
    assert await store.fetch(stand[0]) == winner


@promise
async def deleting_a_version_leaves_the_files_that_others_share(store: Store, policy: str) -> None:
    (one, ones), (two, twos) = bundle(policy), bundle(policy, "v2")
    assert one.files["model.onnx"] == two.files["model.onnx"]
    await store.put(one, ones)
    await store.put(two, twos)
    await store.delete(one)
    await store.delete(one)
    assert await store.versions(policy) == {"v2": two}
    assert await store.fetch(two) == twos
    with pytest.raises(BundleError) as caught:
        await store.fetch(one)
    assert caught.value.check == "digest"


@promise
async def a_deleted_label_is_free_again(store: Store, policy: str) -> None:
    entry, files = bundle(policy)
    other, others = bundle(policy, description="another")
    await store.put(entry, files)
    await store.delete(entry)
    assert await store.put(other, others) == other
    assert await store.fetch(other) == others


@promise
async def pushes_and_deletions_beside_each_other_leave_every_version_whole(store: Store, policy: str) -> None:
    """All versions share one network, so that each deletion may take away what a push counts on."""
    pushes = [bundle(policy, f"v{i}") for i in range(12)]

    async def come_and_go(entry: StoredVersion, files: dict[str, bytes], times: int) -> None:
        for _ in range(times):
            await store.put(entry, files)
            await store.delete(entry)
        await store.put(entry, files)

    await asyncio.gather(*(come_and_go(entry, files, i % 4) for i, (entry, files) in enumerate(pushes)))
    assert await store.versions(policy) == {entry.version: entry for entry, _ in pushes}
    for entry, files in pushes:
        assert await store.fetch(entry) == files


@promise
async def an_empty_file_and_a_large_one_come_back(store: Store, policy: str) -> None:
    _, files = bundle(policy)
    files |= {"golden.json": b"", "model.onnx": bytes(range(256)) * (5 << 12) + b"end"}
    entry = StoredVersion(policy, "v1", content_digest(files), refs_of(files), 1_000, "me")
    assert entry.size > 5 << 20
    await store.put(entry, files)
    assert await store.fetch(entry) == files
