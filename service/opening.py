"""One version of a policy, from its place in the store or the directory to one that is loaded; why, where it is not.

Duty: between a policy's state, which knows where its versions come from, and `loading.py`, which opens files. It knows
no deployments, and publishes nothing.
Promise: a load that fails leaves its reason in the state, is counted, and is not tried again for a while.
"""

from __future__ import annotations

from typing import Final

import structlog

from policies.errors import BundleError, BundlesAway, StoreAway, SurefootError
from policies.store import difference
from service.clock import Clock
from service.loading import Loading
from service.metrics import Metrics
from service.plan import LoadedVersion
from service.standing import Failure, PolicyState

RETRY_S: Final = 30.0  # before a version that failed to load is tried again
AWAY: Final = (StoreAway, BundlesAway)

log = structlog.get_logger(__name__)


class Opening:
    """Opens versions for one worker."""

    def __init__(self, loading: Loading, metrics: Metrics, clock: Clock) -> None:
        self._loading = loading
        self._metrics = metrics
        self._clock = clock

    async def open(self, state: PolicyState, label: str) -> LoadedVersion:
        """Load one version, and keep the reason when it fails: an error of the tree, which is raised."""
        try:
            version = await self._open(state, label)
            _check_alike(state, version)
        except AWAY as error:
            state.failures[label] = Failure(error.detail, None, float("-inf"))
            raise
        except SurefootError as error:
            self._failed(state, label, error)
            raise
        except Exception as error:
            log.exception("load_failed", policy=state.name, version=label)
            wrapped = BundleError(f"{state.name}/{label} does not load: {error}", None, "load")
            self._failed(state, label, wrapped)
            raise wrapped from error
        state.failures.pop(label, None)
        return version

    def worth_a_try(self, state: PolicyState, label: str) -> bool:
        """Whether a version has not failed here, or not for a while."""
        failure = state.failures.get(label)
        return failure is None or self._clock.monotonic_s() - failure.at_s >= RETRY_S

    async def _open(self, state: PolicyState, label: str) -> LoadedVersion:
        entry = state.known.versions.get(label)
        if entry is not None:
            return await self._loading.load(entry)
        if state.seed is None or label not in state.seed.bundles:
            raise BundleError(
                f"{state.name}/{label} is deployed, but neither store nor directory has it", None, "files"
            )
        return await self._loading.load_bundle(state.seed.bundles[label])

    def _failed(self, state: PolicyState, label: str, error: SurefootError) -> None:
        check = error.check if isinstance(error, BundleError) else None
        state.failures[label] = Failure(error.detail, check, self._clock.monotonic_s())
        self._metrics.load_failures.labels(state.name).inc()
        log.error("version_not_loaded", policy=state.name, version=label, check=check, reason=error.detail)


def _check_alike(state: PolicyState, version: LoadedVersion) -> None:
    champion = state.champion
    found = None if champion is None else difference(version.bundle, champion)
    if found:
        raise BundleError(found[1], found[0], "spec")
