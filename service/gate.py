"""EDGE: what a bundle goes through before a worker may load it: signature, checks on its bytes, trial in a process.

Duty: one call for every way in (upload, directory, store), so that no way is weaker than another. Bundles that ship
with the package do not come here: they are the program itself.
Promise: synchronous and possibly slow (a trial starts a process), so it is called from a thread; a verdict is cached
by digest in the data directory, and asked for again for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from policies.archive import SIGNATURE
from policies.bundle import FILES, PolicyBundle
from policies.engine import DYNAMIC_BATCH
from policies.errors import BundleError, ConfigError
from policies.trial import Run, try_bundle


class Gate:
    """The checks of one worker. `key`: a PEM public key; with it, only bundles signed for it pass."""

    def __init__(self, cache: Path, key: Path | None) -> None:
        """Read the key. Raises ConfigError."""
        self._cache = cache
        self._key = None if key is None else _read_key(key)

    def check(self, files: Mapping[str, bytes], run: Run | None = None) -> PolicyBundle:
        """Check a bundle's files. Raises BundleError naming the check, or ConfigError. run: see `try_bundle`."""
        if self._key is not None:
            self._check_signature(files, self._key)
        return try_bundle({name: files[name] for name in FILES if name in files}, cache=self._cache, run=run)

    def _check_signature(self, files: Mapping[str, bytes], key: bytes) -> None:
        if SIGNATURE not in files:
            detail = f"the service takes signed bundles only, and this one has no {SIGNATURE}: sign it first"
            raise BundleError(detail, SIGNATURE, "signature")
        from policies.signing import verify  # needs a package that services without a key need not have

        verify({name: files[name] for name in FILES if name in files}, files[SIGNATURE], key)


def warnings_of(bundle: PolicyBundle) -> list[str]:
    """What the owner of an accepted bundle should know."""
    if not bundle.interface.one_by_one:
        return []
    return [DYNAMIC_BATCH.format(input=bundle.interface.input, output=bundle.interface.output)]


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "SUREFOOT_BUNDLE_KEY") from None
