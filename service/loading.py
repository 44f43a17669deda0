"""EDGE: from a version's files to an engine that is warm, in a thread, and the reason where there is none.

Duty: fetch, check, open, time one version; remember what failed here. It knows nothing of deployments or pipelines.
Strategy: one thread loads, so that loading takes one core at most and the measured durations are of one network at a
time; another one checks uploads. The event loop only waits.
Promise: a load that fails raises an error of the tree and changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import structlog

from policies.bundle import PolicyBundle
from policies.bundle_cache import BundleCache
from policies.engine import Device, Engine
from policies.errors import BundleError
from policies.store import Store, StoredVersion
from service.gate import Gate
from service.metrics import Metrics
from service.plan import LoadedVersion

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Loading:
    """Loads versions for one worker."""

    def __init__(self, store: Store, cache: BundleCache, gate: Gate, metrics: Metrics, device: Device) -> None:
        self._store = store
        self._cache = cache
        self._gate = gate
        self._metrics = metrics
        self._device = device
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="check")

    def close(self) -> None:
        """Start no other load; one that runs (a trial may take a minute) ends with the process."""
        for pool in (self._loader, self._checker):
            pool.shutdown(wait=False, cancel_futures=True)

    async def check(self, files: Mapping[str, bytes]) -> PolicyBundle:
        """Put an upload through the gate. Raises BundleError."""
        return await _on(self._checker, self._gate.check, files)

    async def load_bundle(self, bundle: PolicyBundle) -> LoadedVersion:
        """Load a version whose bundle is here and checked. Raises BundleError or ConfigError."""
        engine = await _on(self._loader, Engine, bundle, self._device)
        log.info("version_loaded", policy=bundle.policy, version=bundle.version, device=engine.device)
        return LoadedVersion(engine.bundle, engine, self._metrics.version(bundle.policy, bundle.version))

    async def load(self, entry: StoredVersion) -> LoadedVersion:
        """Load a version of the store. Raises BundleError, ConfigError, StoreAway or BundlesAway."""
        bundle = await self.read(entry)
        if (bundle.policy, bundle.version, bundle.digest) != (entry.policy, entry.version, entry.digest):
            raise BundleError(f"the store's entry {entry.policy}/{entry.version} is of another bundle", None, "digest")
        return await self.load_bundle(bundle)

    async def read(self, entry: StoredVersion) -> PolicyBundle:
        """Read and check a version of the store without loading it. Raises what `load` raises."""
        return await _on(self._loader, self._gate.check, await self.files(entry))

    async def files(self, entry: StoredVersion) -> dict[str, bytes]:
        """Give a version's files from this machine's copy, else from the store."""
        files = await _on(self._loader, self._cache.read, entry)
        if files is None:
            files = await self._store.fetch(entry)
            await self.keep(entry, files)
        return files

    async def keep(self, entry: StoredVersion, files: Mapping[str, bytes]) -> None:
        """Keep a copy of a version on this machine."""
        await _on(self._loader, self._cache.write, entry, files)

    async def aside(self, call: Callable[..., T], *arguments: Any) -> T:
        """Do something with files off the event loop, in turn with the loads."""
        return await _on(self._loader, call, *arguments)

    async def prune(self, digests: set[str]) -> None:
        """Remove this machine's copies of versions that are no more."""
        await _on(self._loader, self._cache.prune, digests)


async def _on(pool: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)
