"""What is known of policies: what Redis says, what the store has, what is kept on disk of both for when they are away.

    Redis: documents, and how often each policy has changed      store: versions, listed where that number is another

Duty: the `known` side of each policy's state, and nothing of what is loaded or served.
Strategy: a document is taken over as soon as it is read, and its versions are listed afterwards, so that a store that
is slow or away holds back no halt.
Promise: the generation that is known never goes back: a Redis that has forgotten is told again, one that says something
else under the same number is believed, and that is written down.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence
from hashlib import sha256
from typing import Final

import msgspec
import structlog
from msgspec.structs import replace

from policies.errors import AuditBroken, StoreAway
from policies.store import Store, StoredPolicy
from service.audit_log import SYSTEM, AuditLog
from service.clock import Clock
from service.control import UNREADABLE, Control, Snapshot
from service.loading import Loading
from service.safeguards import document_of
from service.standing import Document, Known, PolicyState

# A store may change without a change of `rev` (a crash between the two), or be shared with another deployment.
RELIST_S: Final = 60.0
CONFIRM_S: Final = 10.0  # how often the snapshot is told that Redis still says the same

log = structlog.get_logger(__name__)


class Hearing:
    """What one worker hears. Use from the event loop's thread only."""

    def __init__(
        self,
        seeds: Sequence[StoredPolicy],
        store: Store,
        control: Control,
        snapshot: Snapshot,
        loading: Loading,
        clock: Clock,
        audit: AuditLog | None,
    ) -> None:
        self.states = {seed.name: PolicyState(seed.name, seed, document_of(seed)) for seed in seeds}
        self.asked = self.there = False  # whether Redis has answered since the start; whether it did when asked last
        self._store, self._control, self._snapshot, self._loading = store, control, snapshot, loading
        self._clock = clock
        self._audit = audit
        self._saving = asyncio.Lock()
        self._read_s = -math.inf  # when Redis last told what is deployed
        self._shared_s = self._confirmed_s = -math.inf  # when the store told its policies; when the snapshot was told
        self._saved: dict[str, Known] | None = None
        self._owed: set[str] = set()  # policies of which Redis has forgotten something
        self._kept: set[str] = set()  # digests whose copies stay on this machine

    @property
    def age_s(self) -> float:
        """Seconds since Redis last told what is deployed: this worker, or the one that left the snapshot."""
        return self._clock.monotonic_s() - self._read_s

    def state(self, name: str) -> PolicyState:
        """Give a policy's state, a new one if need be."""
        return self.states.setdefault(name, PolicyState(name))

    async def ask(self) -> None:
        """Hear what Redis says of every policy. Raises StoreAway."""
        now_s, self.there = self._clock.monotonic_s(), False
        found = await self._control.read()
        for name in sorted(found.keys() | {state.name for state in self.states.values() if state.known != Known()}):
            (rev, document), state = found.get(name, (0, None)), self.state(name)
            state.unreadable = (rev, document) == UNREADABLE
            if state.unreadable:
                continue  # what is served goes on
            if await self._hear(state, rev, document):
                self._owed.add(name)
            else:
                self._owed.discard(name)
        self._read_s, self.asked, self.there = now_s, True, True

    async def ask_for(self, name: str) -> PolicyState:
        """Give a policy's state as it is this moment. Raises StoreAway or BundlesAway."""
        state = self.state(name)
        for _ in range(2):
            rev, document = await self._control.read_one(name)
            if (rev, document) == UNREADABLE:
                detail = "its deployment in Redis is not one that this version of the service can read"
                raise StoreAway(f"{name}: {detail}")
            if not await self._hear(state, rev, document):
                break
            await self._remind(state)
        await self._list(state)
        return state

    async def remember(self) -> None:
        """Take from the snapshot what Redis, or the store of versions, does not tell."""
        for name, kept in (await asyncio.to_thread(self._snapshot.read)).items():
            state = self.state(name)
            state.known = replace(kept, document=state.known.document) if self.asked else kept
            state.cached = not self.asked
        if not self.asked:
            self._read_s = self._clock.monotonic_s() - await asyncio.to_thread(self._snapshot.age_s)

    async def save(self) -> None:
        """Keep what is known on disk, once it is Redis that said so."""
        async with self._saving:
            known = {name: state.known for name, state in self.states.items() if state.known != Known()}
            now_s = self._clock.monotonic_s()
            if not (self.asked and self.there):
                return
            if known != self._saved:
                self._saved, self._confirmed_s = known, now_s
                await asyncio.to_thread(self._snapshot.write, known)
            elif now_s - self._confirmed_s >= CONFIRM_S:
                self._confirmed_s = now_s
                await asyncio.to_thread(self._snapshot.confirm)

    async def catch_up(self) -> None:
        """Tell Redis what it forgot, and list what changed. Raises StoreAway or BundlesAway."""
        for name in list(self._owed):
            await self._remind(self.states[name])
            self._owed.discard(name)
        await self.list_all()
        kept = {entry.digest for state in self.states.values() for entry in state.known.versions.values()}
        if kept != self._kept:
            self._kept = kept
            await self._loading.prune(kept)

    async def list_all(self) -> None:
        """List what has changed, and now and then everything. Raises StoreAway or BundlesAway."""
        now_s = self._clock.monotonic_s()
        if now_s - self._shared_s >= RELIST_S:
            for name in await self._store.policies():
                self.state(name)
            self._shared_s = now_s
        await self.list_changed(now_s - RELIST_S)

    async def list_changed(self, before_s: float = -math.inf) -> None:
        """List the versions of policies that have changed, and of those that were listed long ago."""
        for state in list(self.states.values()):
            changed = state.heard_rev != state.known.rev or state.listed_s <= before_s
            if changed and state.name not in self._owed:
                await self._list(state)

    async def _hear(self, state: PolicyState, rev: int, document: Document | None) -> bool:
        """Take over what Redis says of a policy. Return whether it has forgotten what was known here."""
        ours, theirs = (0 if each is None else each.generation for each in (state.known.document, document))
        cached, state.cached, state.heard_rev = state.cached, False, rev
        if theirs < ours:
            return True
        if theirs == ours and state.known.document is not None and state.known.document != document:
            await self._give_way(state, document)
        # What a snapshot knows of versions may be older than Redis, whatever the numbers are: they are to be listed.
        state.known = Known(-1 if cached else state.known.rev, document, state.known.versions)
        return rev < state.known.rev

    async def _give_way(self, state: PolicyState, document: Document | None) -> None:
        """Two documents have one generation: a Redis that came back with less was changed. Redis's is the one."""
        ours, theirs = (sha256(msgspec.json.encode(each)).hexdigest()[:12] for each in (state.known.document, document))
        log.error("control_documents_differ", policy=state.name, generation=state.generation, ours=ours, redis=theirs)
        if self._audit is not None:
            with contextlib.suppress(AuditBroken):  # logged there
                await self._audit.record(SYSTEM, "give_way", state.name, f"{state.generation}: {ours} to {theirs}")

    async def _list(self, state: PolicyState) -> None:
        rev = state.heard_rev
        versions = await self._store.versions(state.name)
        if rev < state.known.rev:
            return  # another listing has seen more, or Redis has forgotten this one
        if rev != state.known.rev:
            state.failures.clear()  # something has changed: worth another try
        state.known = Known(rev, state.known.document, versions)
        state.listed_s = self._clock.monotonic_s()

    async def _remind(self, state: PolicyState) -> None:
        """Redis has forgotten what it said a moment ago (flushed, or restored from a backup): tell it."""
        log.error("redis_lost_deployments", policy=state.name, rev=state.known.rev, generation=state.generation)
        standing = await self._store.versions(state.name)
        for label, entry in state.known.versions.items():
            if label not in standing:
                await self._store.put(entry, await self._loading.files(entry))
        await self._control.remind(state.name, state.known)
