"""EDGE: verdicts of trials, kept in a folder, so that a start does not try again what it has tried.

Duty: one small file for each (bundle, runtime, limits). It knows nothing of how a verdict comes about.
Strategy: a file is written beside its place and renamed into it; whatever cannot be read counts as absent. The cache
only ever saves time: a folder that cannot be written changes no verdict.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from msgspec import Struct

from policies.bundle import content_digest
from policies.confine import Limits
from policies.errors import BundleError

# Raised when the gate learns to refuse more: verdicts of before are not believed any more.
GATE = 1
# Some 400 bytes each; a year of daily pushes of three policies.
MAX_ENTRIES = 1024


class Verdict(Struct, frozen=True, forbid_unknown_fields=True):
    """A verdict as it is kept. check: None when the bundle passed."""

    key: str
    check: str | None
    field: str | None
    detail: str

    @property
    def refusal(self) -> BundleError | None:
        return None if self.check is None else BundleError(self.detail, self.field, self.check)


class VerdictCache:
    """The place of one bundle's verdict, under these limits and this runtime."""

    def __init__(self, folder: Path, files: Mapping[str, bytes], limits: Limits) -> None:
        what = [GATE, content_digest(files), asdict(limits), *runtime_versions()]
        self._key = sha256(json.dumps(what).encode()).hexdigest()
        self._folder = folder
        self._file = folder / f"{self._key}.json"

    def read(self) -> Verdict | None:
        """Give the verdict, None when there is none that can be read."""
        try:
            verdict = msgspec.json.decode(self._file.read_bytes(), type=Verdict)
        except (OSError, msgspec.DecodeError, ValueError):
            return None
        return verdict if verdict.key == self._key else None

    def write(self, refusal: BundleError | None) -> None:
        """Keep a verdict: a refusal, or None for a bundle that passed."""
        told = (None, None, "") if refusal is None else (refusal.check, refusal.field, refusal.detail)
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, prefix=".verdict-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(msgspec.json.encode(Verdict(self._key, *told)))
                os.replace(name, self._file)
            except OSError:
                os.unlink(name)
                raise
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        entries = [entry for entry in os.scandir(self._folder) if entry.name.endswith(".json")]
        if len(entries) > MAX_ENTRIES:
            for entry in sorted(entries, key=lambda each: each.stat().st_mtime)[: len(entries) - MAX_ENTRIES]:
                with suppress(OSError):
                    os.unlink(entry.path)


@cache
def runtime_versions() -> tuple[str, ...]:
    """Versions of what reads and runs a network here."""
    return tuple(f"{name} {_version(name)}" for name in ("surefoot", "onnxruntime-gpu", "onnxruntime", "onnx"))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"
