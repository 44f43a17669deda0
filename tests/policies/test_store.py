"""Stores in folders keep the kit's promises; what is damaged is found; copies on this machine, too."""

from __future__ import annotations

import asyncio
import sys
import uuid
from pathlib import Path

import pytest

from policies.bundle_cache import BundleCache
from policies.errors import BundleError, BundlesAway, ConfigError
from policies.folder_store import FolderStore
from tests.policies.stores import Promise, bundle, each_promise


@pytest.mark.parametrize("kind", ["file", "memory", "path"])
@each_promise
def test_a_folder_keeps_the_promises(kind: str, promise: Promise, tmp_path: Path) -> None:
    url = {"file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4()}", "path": str(tmp_path / "a" / "b")}[kind]
    asyncio.run(promise(FolderStore(url), "toy"))


def test_a_damaged_file_is_an_error_and_never_a_version(tmp_path: Path) -> None:
    store = FolderStore(str(tmp_path))
    entry, files = bundle("toy")
    asyncio.run(store.put(entry, files))
    blob = tmp_path / "toy" / "v1" / entry.files["model.onnx"].sha256
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(BundleError, match="push it again") as caught:
        asyncio.run(store.fetch(entry))
    assert caught.value.check == "digest"


def test_an_entry_that_was_cut_off_counts_as_not_there(tmp_path: Path) -> None:
    store = FolderStore(str(tmp_path))
    entry, files = bundle("toy")
    (tmp_path / "toy" / "v1").mkdir(parents=True)
    (tmp_path / "toy" / "v1" / "version.json").write_bytes(b'{"policy": "to')
    assert asyncio.run(store.versions("toy")) == {}
    assert asyncio.run(store.put(entry, files)) == entry
    assert asyncio.run(store.versions("toy")) == {"v1": entry}


def test_a_store_that_does_not_answer_is_away(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    entry, files = bundle("toy")
    with pytest.raises(BundlesAway, match="file"):
        asyncio.run(FolderStore(str(tmp_path / "file")).put(entry, files))


def test_a_url_that_cannot_be_served_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as unknown:
        FolderStore("nonsense://bucket")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"surefoot\[store\]") as missing:
        FolderStore("memory://x")
    assert unknown.value.field == missing.value.field == "SUREFOOT_STORE"


def test_a_copy_is_whole_or_not_there(tmp_path: Path) -> None:
    cache, (entry, files) = BundleCache(tmp_path / "bundles"), bundle("toy")
    assert cache.read(entry) is None
    cache.write(entry, files)
    cache.write(entry, files)
    assert cache.read(entry) == files
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == [entry.digest]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_copy_is_thrown_away(tmp_path: Path, damage: str) -> None:
    cache, (entry, files) = BundleCache(tmp_path), bundle("toy")
    cache.write(entry, files)
    file = tmp_path / entry.digest / "model.onnx"
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "flip" else b""))
    assert cache.read(entry) is None
    cache.write(entry, files)
    assert cache.read(entry) == files


def test_copies_of_versions_that_are_no_more_go(tmp_path: Path) -> None:
    cache = BundleCache(tmp_path / "bundles")
    cache.prune(set())
    (one, ones), (two, twos) = bundle("toy"), bundle("toy", "v2")
    cache.write(one, ones)
    cache.write(two, twos)
    cache.prune({two.digest})
    assert cache.read(one) is None
    assert cache.read(two) == twos


def test_a_disk_without_room_for_copies_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "bundles").write_bytes(b"not a folder")
    cache, (entry, files) = BundleCache(tmp_path / "bundles"), bundle("toy")
    cache.write(entry, files)
    assert cache.read(entry) is None
