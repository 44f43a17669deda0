"""EDGE: this machine's copies of versions, by digest, so that a start needs no store.

Duty: `<folder>/<digest>/` with a version's files. Strategy: written into a folder beside and renamed, so that a copy is
whole or not there; held against its entry whenever it is read, so that a damaged one is thrown away and fetched anew.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from policies.store import StoredVersion


class BundleCache:
    """Synchronous: call it from a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, entry: StoredVersion) -> dict[str, bytes] | None:
        """Give a version's files, or None when they are not here, or no longer what they were."""
        copy = self._folder / entry.digest
        try:
            files = {name: (copy / name).read_bytes() for name in entry.files}
        except OSError:
            files = {}
        if entry.holds(files):
            return files
        shutil.rmtree(copy, ignore_errors=True)
        return None

    def write(self, entry: StoredVersion, files: Mapping[str, bytes]) -> None:
        """Keep a copy, unless there is one. A full disk is no reason to fail: the store has the files."""
        copy = self._folder / entry.digest
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self._folder))
            try:
                for name in entry.files:
                    (draft / name).write_bytes(files[name])
                os.rename(draft, copy)  # refused when the copy is there already
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def prune(self, keep: Collection[str]) -> None:
        """Remove the copies of all versions but those of these digests."""
        if self._folder.is_dir():
            for copy in self._folder.iterdir():
                if copy.name not in keep:
                    shutil.rmtree(copy, ignore_errors=True)
