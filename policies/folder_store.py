"""EDGE: a store of versions in a folder, or at any URL that fsspec knows: file://, memory://, s3://, gs://, …

Duty: keep, list, fetch and delete versions. It knows nothing of what is live: who deletes has asked before.
Strategy: `<policy>/<label>/<sha256>` for each file and `<policy>/<label>/version.json` written last, by exclusive
creation, so that of two pushes under one label one wins, whole. Files belong to one version: deleting one never asks
what the others need. A version.json that cannot be read is a write that was cut off, and counts as not there.
Promise: calls run in a thread and never block the event loop; whatever a backend raises becomes BundlesAway.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from policies.errors import BundlesAway, ConfigError
from policies.store import StoredVersion, damaged

T = TypeVar("T")
ENTRY = "version.json"
# Where files show while they are written, an entry that cannot be read gets so long to become whole.
PATIENCE, PAUSE_S = 5, 0.1


class FolderStore:
    """Versions below an fsspec URL, or a plain path."""

    def __init__(self, url: str) -> None:
        """Find the backend. Raises ConfigError when fsspec, or what it needs for this URL, is not installed."""
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]

            self._fs, self._root = _found(url_to_fs(url))
        except ImportError as error:
            detail = f"{url} needs a package that is not installed ({error}): pip install 'surefoot[store]'"
            raise ConfigError(detail, "SUREFOOT_STORE") from None
        except ValueError as error:
            raise ConfigError(f"{url}: {error}", "SUREFOOT_STORE") from None

    async def policies(self) -> set[str]:
        """Name the policies that have versions."""
        return {path.split("/")[-3] for path in await self._thread(self._glob, f"{self._root}/*/*/{ENTRY}")}

    async def versions(self, policy: str) -> dict[str, StoredVersion]:
        """List a policy's versions by label."""
        return await self._thread(self._versions, policy)

    async def put(self, entry: StoredVersion, files: Mapping[str, bytes]) -> StoredVersion:
        """Add a version, unless its label is taken. Gives the entry that stands."""
        return await self._thread(self._put, entry, files)

    async def fetch(self, entry: StoredVersion) -> dict[str, bytes]:
        """Read a version's files. Raises BundleError when they are gone or damaged."""
        files = await self._thread(self._fetch, entry)
        if files is None:
            raise damaged(entry)
        return files

    async def delete(self, entry: StoredVersion) -> None:
        """Remove a version: its entry first, so that nobody starts to read what is going."""
        await self._thread(self._delete, entry)

    def _put(self, entry: StoredVersion, files: Mapping[str, bytes]) -> StoredVersion:
        standing = self._entry(self._path(entry, ENTRY))
        if standing is not None:
            return standing
        self._fs.makedirs(self._path(entry), exist_ok=True)
        for name, content in files.items():
            self._fs.pipe_file(self._path(entry, entry.files[name].sha256), content)
        try:
            self._create(self._path(entry, ENTRY), msgspec.json.encode(entry))
        except FileExistsError:
            return self._lost(entry)
        return entry

    def _create(self, path: str, content: bytes) -> None:
        """Write a file that must not be there. Raises FileExistsError.

        Object stores create whole files; a disk shows one that is still being written, so there it gets its name last.
        """
        if not hasattr(self._fs, "link"):
            self._fs.pipe_file(path, content, mode="create")
            return
        draft = f"{path}.{uuid.uuid4()}"
        self._fs.pipe_file(draft, content)
        try:
            self._fs.link(draft, path)
        finally:
            self._fs.rm_file(draft)

    def _lost(self, entry: StoredVersion) -> StoredVersion:
        """Another push was first, or was cut off while it wrote."""
        standing = self._entry(self._path(entry, ENTRY))
        for _ in range(PATIENCE):
            if standing is None:
                time.sleep(PAUSE_S)
                standing = self._entry(self._path(entry, ENTRY))
        if standing is None:
            self._fs.pipe_file(self._path(entry, ENTRY), msgspec.json.encode(entry))
            return entry
        needed = {file.sha256 for file in standing.files.values()}
        for file in entry.files.values():
            if file.sha256 not in needed:
                self._fs.rm_file(self._path(entry, file.sha256))
        return standing

    def _fetch(self, entry: StoredVersion) -> dict[str, bytes] | None:
        try:
            files = {name: self._fs.cat_file(self._path(entry, file.sha256)) for name, file in entry.files.items()}
        except FileNotFoundError:
            return None
        return files if entry.holds(files) else None

    def _delete(self, entry: StoredVersion) -> None:
        for path in (self._path(entry, ENTRY), self._path(entry)):
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def _versions(self, policy: str) -> dict[str, StoredVersion]:
        entries = [self._entry(path) for path in self._glob(f"{self._root}/{policy}/*/{ENTRY}")]
        return {entry.version: entry for entry in entries if entry is not None and entry.policy == policy}

    def _entry(self, path: str) -> StoredVersion | None:
        try:
            return msgspec.json.decode(self._fs.cat_file(path), type=StoredVersion)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def _glob(self, pattern: str) -> list[str]:
        self._fs.invalidate_cache()  # others write here, too
        return [str(path) for path in self._fs.glob(pattern)]

    def _path(self, entry: StoredVersion, name: str = "") -> str:
        return f"{self._root}/{entry.policy}/{entry.version}/{name}".rstrip("/")

    async def _thread(self, call: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.to_thread(call, *arguments)
        except Exception as error:  # each backend has errors of its own: botocore's, aiohttp's, OSError
            raise BundlesAway(f"{self._root}: {error or type(error).__name__}") from error


def _found(pair: Any) -> tuple[Any, str]:
    filesystem, root = pair
    return filesystem, str(root).rstrip("/")
