"""What may be changed at run time: versions pushed and deleted, deployments replaced. Each in a fixed order of steps.

    push:    gate -> alike? -> store -> tell the others -> a new policy is deployed -> loaded here
    deploy:  versions there? -> loaded here? -> compare and set -> served here
    halt:    in force here -> compare and set
    rearm:   compare and set -> closed here
    watch:   version there? -> loaded here? -> compare and set -> shown what is decided here
    rule:    readable? fits the policy? -> compare and set -> in force here
    explore: fits the policy? -> compare and set -> in force here
    delete:  not live? -> kept out of deployments -> out of the store -> tell the others

Duty: the order, and the refusals. It knows nothing of HTTP.
Promise: an answer means that this worker has it: the version is loaded, the deployment served. The other replicas
are told, and poll. Whatever is refused has changed nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from policies.bundle import PolicyBundle
from policies.deployment import MOST_SHADOWS, Deployment
from policies.errors import (
    BundleError,
    Forbidden,
    GenerationMissing,
    GenerationMoved,
    InvalidField,
    SurefootError,
    UnknownPolicy,
    UnknownVersion,
    VersionExists,
    VersionLive,
    VersionReadOnly,
)
from policies.store import StoredVersion, difference, refs_of
from safety.exploration import Exploration
from safety.halt import KillSwitch
from service.audit_log import by_itself, noted
from service.catalog import AWAY, Catalog
from service.clock import Clock
from service.control import Going, Moved
from service.gate import warnings_of
from service.rolling import forgotten, redeployed
from service.safeguards import fitting_rules
from service.scalar import Scalar
from service.standing import Document, PolicyState


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of a push. `new`: false when the same content stood under the label already."""

    state: PolicyState
    digest: str
    version: str
    warnings: list[str]
    new: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """Who replaces rules: whose token, whether an admin's, and to whom the admin gives them."""

    owner: str
    admin: bool = False
    give_to: str | None = None

    def next_owner(self, standing: str) -> str:
        """Whose the rules are after this. Raises Forbidden for those of another owner."""
        if self.admin:
            return standing if self.give_to is None else self.give_to
        if self.give_to not in (None, self.owner):
            raise Forbidden("only an admin gives rules to another owner", "owner")
        if standing not in ("", self.owner):
            raise Forbidden(f"these rules are {standing!r}'s: only they, or an admin, replace them", "owner")
        return self.owner


NOBODY = Claim("")


class Changes:
    """Changes of one worker's catalog, and through the store and Redis of all others'."""

    def __init__(self, catalog: Catalog, clock: Clock) -> None:
        self._catalog = catalog
        self._clock = clock
        self._pushing = asyncio.Lock()  # uploads are large: one at a time

    async def push(self, policy: str, files: Mapping[str, bytes], by: str) -> Pushed:
        """Add a version. Raises BundleError, InvalidField, VersionExists, StoreAway or BundlesAway."""
        async with self._pushing:
            bundle = await self._catalog.loading.check(files)
            if bundle.policy != policy:
                raise InvalidField(f"the manifest says policy {bundle.policy!r}, the path says {policy!r}", "policy")
            state = await self._catalog.refresh(policy)
            new = await self._put(state, bundle, files, by)
            noted().told(f"{bundle.version}", bundle.digest)
            if state.document is None:
                await self._first(state, bundle.version, by)
            await self._catalog.converge()
            if not state.has(bundle.version):
                await self._try_to_load(state, bundle.version)
            return Pushed(state, bundle.digest, bundle.version, warnings_of(bundle), new)

    async def deploy(self, policy: str, wanted: Deployment, expected: int | None, by: str) -> PolicyState:
        """Replace a policy's deployment, if it is still at the expected generation.

        Raises InvalidField, BundleError, UnknownPolicy, GenerationMissing, GenerationMoved, StoreAway or BundlesAway.
        """
        state = await self._at(policy, expected)
        if wanted.reward.expression is not None:
            Scalar.read(wanted.reward.expression)
        if wanted.policy != policy:
            raise InvalidField(f"the deployment says policy {wanted.policy!r}, the path says {policy!r}", "policy")
        for label, at in wanted.by_role.items():
            if label not in state.labels:
                raise InvalidField(f"{policy} has no version {label!r}", at)
            await self._catalog.require(state, label)
        standing = state.document or Document(0, wanted, 0, by)
        await self._set(
            state, redeployed(standing, wanted, self._clock.event_ms(), lambda label: state.digest(label) or ""), by
        )
        await self._catalog.converge()
        return state

    async def amend(
        self, policy: str, expected: int | None, change: Callable[[PolicyState, Document], Document], by: str
    ) -> PolicyState:
        """Make the next control document of the one that stands. expected: the only generation it may stand at; None:
        whichever, and tried again while others are faster.

        Raises what `change` does; UnknownPolicy, GenerationMoved, StoreAway or BundlesAway.
        """
        while True:
            state = await self._catalog.refresh(policy)
            document = _document(state)
            if expected is not None and expected != document.generation:
                raise _moved(document.generation, expected)
            wanted = change(state, document)
            for label in wanted.deployment.deciding.keys() | wanted.deployment.versions - document.deployment.versions:
                await self._catalog.require(state, label)
            try:
                await self._set(state, wanted, by)
            except GenerationMoved:
                if expected is not None:
                    raise
                continue
            await self._catalog.converge()
            return state

    async def halt(self, policy: str, switches: Collection[KillSwitch], by: str) -> PolicyState:
        """Say which kill switches are on. A switch that is thrown works here before Redis is told, and also when it
        cannot be: then all are told as soon as it can. To turn one off Redis must be there.

        Raises UnknownPolicy; StoreAway when a switch should be turned off.
        """
        state = self._catalog.states.get(policy)
        if state is None or state.document is None:
            raise UnknownPolicy(f"there is no deployed policy {policy!r}", "policy")
        wanted = frozenset(switches)
        self._catalog.halt_here(state, wanted)
        try:
            await self._publish_halts(state, wanted, by)
        except AWAY:
            if state.halts != wanted:
                raise
        return state

    async def _publish_halts(self, state: PolicyState, wanted: frozenset[KillSwitch], by: str) -> None:
        while True:  # until nobody else changes the policy in between
            await self._catalog.refresh(state.name)
            document = _document(state)
            with contextlib.suppress(GenerationMoved):
                if frozenset(document.halts) != wanted:
                    await self._set(state, replace(document, halts=tuple(sorted(wanted))), by)
                await self._catalog.converge()  # which forgets what was thrown here once Redis says the same
                return

    async def rearm(self, policy: str, label: str, by: str) -> PolicyState:
        """Close a version's breaker again, everywhere. Raises UnknownVersion, StoreAway or BundlesAway."""
        state = await self._catalog.refresh(policy)
        if label not in state.labels:
            raise UnknownVersion(f"there is no version {policy}/{label}", "version")
        while True:
            document = _document(state)
            state.tripped_here -= {label}
            with contextlib.suppress(GenerationMoved):
                if label in document.tripped:
                    left = tuple(each for each in document.tripped if each != label)
                    await self._set(state, replace(document, tripped=left), by)
                await self._catalog.converge()
                return state
            await self._catalog.refresh(policy)

    async def watch(self, policy: str, label: str, by: str, *, watches: bool) -> PolicyState:
        """Make a version a shadow, or no shadow any more. The same again changes nothing, but a shadow that has tripped
        tries again.

        Raises UnknownVersion, InvalidField, BundleError, StoreAway or BundlesAway.
        """
        state = await self._catalog.refresh(policy)
        if watches and label not in state.labels:
            raise UnknownVersion(f"there is no version {policy}/{label}", "version")
        if watches:
            await self._catalog.require(state, label)
        while True:
            document = _document(state)
            others = [each for each in document.deployment.shadows if each != label]
            if not watches and others == document.deployment.shadows:
                return state
            wanted = _watched_by(document.deployment, [*others, label] if watches else others)
            changed = redeployed(document, wanted, self._clock.event_ms(), lambda label: state.digest(label) or "")
            with contextlib.suppress(GenerationMoved):
                await self._set(state, changed, by)
                await self._catalog.converge()
                return state
            await self._catalog.refresh(policy)

    async def rule(self, policy: str, source: str, expected: int | None, by: str, claim: Claim = NOBODY) -> PolicyState:
        """Replace a policy's `safety.yaml`; an empty one removes all rules.

        Raises SafetyError naming line, column and field; Forbidden for another owner's; otherwise as `deploy`.
        """
        state = await self._at(policy, expected)
        document = _document(state)
        owner = claim.next_owner(document.safety_owner)
        if source:
            fitting_rules(source, [version.bundle for version in state.loaded.values()])
        await self._set(state, replace(document, safety=source, safety_owner=owner), by)
        await self._catalog.converge()
        return state

    async def explore(self, policy: str, wanted: Exploration, expected: int | None, by: str) -> PolicyState:
        """Replace how a policy explores, and its budgets. Raises as `deploy`."""
        state = await self._at(policy, expected)
        document = _document(state)
        await self._set(state, replace(document, exploration=wanted), by)
        await self._catalog.converge()
        return state

    async def delete(self, policy: str, label: str) -> None:
        """Remove a version. Raises UnknownVersion, VersionLive, VersionReadOnly, StoreAway or BundlesAway."""
        state = await self._catalog.refresh(policy)
        entry = state.known.versions.get(label)
        if label not in state.labels:
            raise UnknownVersion(f"there is no version {policy}/{label}", "version")
        if label in state.reserve:
            detail = f"{policy}/{label} decides again if the champion is rolled back: deploy another champion first"
            raise VersionLive(detail, "version")
        if label in state.live:
            raise VersionLive(
                f"{policy}/{label} is live: promote another version before you delete this one", "version"
            )
        if entry is None:
            detail = f"{policy}/{label} lies in the service's directory of policies: remove it there"
            raise VersionReadOnly(detail, "version")
        await self._catalog.control.retire(policy, label)
        await self._catalog.store.delete(entry)
        await self._catalog.control.touch(policy)
        if state.document is not None and forgotten(state.document, label) is not None:
            await self.amend(policy, None, lambda _, standing: forgotten(standing, label) or standing, "surefoot")
        await self._catalog.converge()

    async def _put(self, state: PolicyState, bundle: PolicyBundle, files: Mapping[str, bytes], by: str) -> bool:
        label, standing = bundle.version, state.digest(bundle.version)
        if standing is None:
            champion = state.champion
            if champion is not None and (found := difference(bundle, champion)):
                raise BundleError(found[1], found[0], "spec")
            now_ms = self._clock.event_ms()
            refs = await asyncio.to_thread(refs_of, files)  # 256 MB take half a second
            entry = StoredVersion(state.name, label, bundle.digest, refs, now_ms, by)
            stands = await self._catalog.store.put(entry, files)
            standing = stands.digest
            if stands == entry:
                await self._catalog.loading.keep(entry, files)
                await self._catalog.control.welcome(state.name, label)
                await self._catalog.control.touch(state.name)
                return True
        if standing != bundle.digest:
            detail = f"{state.name}/{label} stands with other content (digest {standing[:12]}): versions never change"
            raise VersionExists(f"{detail}; push under another label", "version")
        return False

    async def _first(self, state: PolicyState, label: str, by: str) -> None:
        """Deploy the first version of a new policy. Another push may have been faster, and that is well, too."""
        document = Document(1, Deployment(schema=1, policy=state.name, champion=label), self._clock.event_ms(), by)
        with by_itself("first_deployment"):
            await self._catalog.control.change(state.name, document, unwritten=0)

    async def _at(self, policy: str, expected: int | None) -> PolicyState:
        """A policy as it is this moment, which must be at the generation that a change expects.

        Raises UnknownPolicy, GenerationMissing, GenerationMoved, StoreAway or BundlesAway.
        """
        state = await self._catalog.refresh(policy)
        if not state.labels:
            raise UnknownPolicy(f"there is no policy {policy!r}; push a version of it first", "policy")
        if expected is None and state.generation:
            detail = f"the policy is at generation {state.generation}: read it, and send its ETag as If-Match"
            raise GenerationMissing(detail, "If-Match")
        if (expected or 0) != state.generation:
            raise _moved(state.generation, expected or 0)
        return state

    async def _set(self, state: PolicyState, wanted: Document, by: str) -> None:
        """Put a document in force, made from the one at its generation. Raises GenerationMoved or InvalidField."""
        unwritten, expected = 0 if state.seeded is None else 1, wanted.generation
        document = replace(wanted, generation=expected + 1, changed_at_ms=self._clock.event_ms(), changed_by=by)
        refused = await self._catalog.control.change(state.name, document, unwritten)
        if isinstance(refused, Moved):
            raise _moved(refused.generation, expected)
        if isinstance(refused, Going):
            named = wanted.deployment.by_role[refused.version]
            raise InvalidField(f"{state.name}/{refused.version} is being deleted", named)

    async def _try_to_load(self, state: PolicyState, label: str) -> None:
        """Load what was pushed. It is registered whatever comes of it; why it is not loaded stands in its view."""
        try:
            await self._catalog.require(state, label)
        except SurefootError:
            return


def _watched_by(deployment: Deployment, shadows: list[str]) -> Deployment:
    """A deployment with these shadows. Raises InvalidField."""
    if len(shadows) > MOST_SHADOWS:
        raise InvalidField(f"there may be {MOST_SHADOWS} shadows of a policy, no more", "shadows")
    try:
        return replace(deployment, shadows=shadows)
    except ValueError as error:
        raise InvalidField(str(error), "shadows") from None


def _document(state: PolicyState) -> Document:
    if state.document is None:
        raise UnknownPolicy(f"{state.name!r} has versions but is not deployed", "policy")
    return state.document


def _moved(standing: int, expected: int) -> GenerationMoved:
    return GenerationMoved(f"the policy is at generation {standing}, not {expected}: read it again", "If-Match")
