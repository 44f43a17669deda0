"""One policy as a worker knows it: what is asked for, what there is, what is loaded, what is served. Pure.

Duty: the questions that `catalog.py` asks before it acts. It knows no clock, no Redis and no thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from msgspec import Struct

from policies.bundle import PolicyBundle
from policies.store import StoredPolicy, StoredVersion
from safety.exploration import Exploration
from safety.halt import KillSwitch
from service.document import Document as Document
from service.plan import LoadedVersion

# What a worker may do by what it knows: all; explore nothing; nor let any but the champion decide.
Freshness = Literal["fresh", "stale", "alone"]
# Beyond a failover that Sentinels bring about, and a moment's trouble; a lease on exploration ends after 2 s by itself.
STALE_S: Final = 5.0


def freshness(age_s: float, max_stale_s: float, *, asked: bool) -> Freshness:
    """Judge a control state by its age. asked: whether Redis, and not only a snapshot, has told it since the start."""
    if age_s > max_stale_s:
        return "alone"
    return "fresh" if asked and age_s <= STALE_S else "stale"


class SafetySide(NamedTuple):
    """What a document, and this worker, say of a policy's safety. stale: what is known is old: nothing is explored."""

    halts: frozenset[KillSwitch] = frozenset()
    tripped: frozenset[str] = frozenset()
    safety: str = ""
    exploration: Exploration | None = None
    stale: bool = False


class Known(Struct, frozen=True):
    """What is known of one policy: its document if there is one, and its versions as of the change number `rev`."""

    rev: int = 0
    document: Document | None = None
    versions: dict[str, StoredVersion] = {}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a version is not loaded here."""

    reason: str
    check: str | None
    at_s: float  # monotonic


@dataclass
class PolicyState:
    """Invariant: the labels that `served` lets answer are in `loaded`."""

    name: str
    seed: StoredPolicy | None = None  # of the directory of the start
    seeded: Document | None = None  # how the directory deploys it
    known: Known = field(default_factory=Known)
    cached: bool = False  # `known` is a snapshot's: Redis has not been asked yet
    heard_rev: int = 0  # what Redis said last; where `known.rev` is another one its versions are to be listed
    freshness: Freshness = "fresh"
    halted_here: frozenset[KillSwitch] = frozenset()  # thrown here, and Redis does not say so yet
    tripped_here: frozenset[str] = frozenset()  # the same for breakers
    unreadable: bool = False  # Redis holds a document that this version of the service cannot read
    listed_s: float = float("-inf")
    loaded: dict[str, LoadedVersion] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    served: Document | None = None
    served_alone: bool = False  # without its challenger
    side: SafetySide | None = None  # in force
    published: dict[str, str] = field(default_factory=dict)  # digests of the plan in force, by label

    @property
    def document(self) -> Document | None:
        """How the policy should be deployed: as Redis says, else as the directory does. None: nobody says."""
        return self.known.document or self.seeded

    @property
    def deployed(self) -> bool:
        """Whether anybody says that it should be served."""
        return self.document is not None or self.unreadable

    @property
    def generation(self) -> int:
        """The generation that a change must name: 0 for a policy that is not deployed."""
        return 0 if self.document is None else self.document.generation

    @property
    def stale(self) -> bool:
        """Whether what is known is too old to explore by."""
        return self.freshness != "fresh"

    @property
    def alone(self) -> bool:
        """Whether what is known is so old that the champion alone decides."""
        return self.freshness == "alone"

    @property
    def halts_published(self) -> bool:
        """Whether Redis says the same of kill switches as is in force here."""
        return self.halts == frozenset(self.document.halts if self.document else ())

    @property
    def halts(self) -> frozenset[KillSwitch]:
        """Kill switches that are on for this worker."""
        return self.halted_here | frozenset(self.document.halts if self.document else ())

    @property
    def tripped(self) -> frozenset[str]:
        """Versions whose breaker is open until it is re-armed."""
        return self.tripped_here | frozenset(self.document.tripped if self.document else ())

    @property
    def safety_side(self) -> SafetySide:
        """The safety side that should be in force."""
        if self.document is None:
            return SafetySide(self.halted_here, self.tripped_here, stale=self.stale)
        return SafetySide(self.halts, self.tripped, self.document.safety, self.document.exploration, self.stale)

    @property
    def live(self) -> set[str]:
        """Labels with a role, in what should be served or in what is; and what a champion is rolled back to."""
        documents = (self.document, self.served)
        roles = {label for each in documents if each is not None for label in each.deployment.versions}
        return roles | self.reserve

    @property
    def reserve(self) -> set[str]:
        """What a champion is rolled back to."""
        label = None if self.document is None else self.document.returns_to
        return set() if label is None else {label}

    @property
    def shadows(self) -> list[str]:
        """Labels of versions that should watch."""
        return [] if self.document is None else self.document.deployment.shadows

    @property
    def labels(self) -> set[str]:
        """Every version that there is, loaded or not."""
        return set(self.known.versions) | set(self.seed.bundles if self.seed else ())

    @property
    def digests(self) -> dict[str, str]:
        """What is loaded, by label."""
        return {label: version.bundle.digest for label, version in self.loaded.items()}

    @property
    def champion(self) -> PolicyBundle | None:
        """The bundle whose specs callers go by."""
        document = self.served or self.document
        loaded = None if document is None else self.loaded.get(document.deployment.champion)
        return None if loaded is None else loaded.bundle

    def digest(self, label: str) -> str | None:
        """The content that a label should have; the store goes before the directory."""
        if label in self.known.versions:
            return self.known.versions[label].digest
        bundle = None if self.seed is None else self.seed.bundles.get(label)
        return None if bundle is None else bundle.digest

    def has(self, label: str) -> bool:
        """Whether a version is loaded, with the content that it should have."""
        return label in self.loaded and self.loaded[label].bundle.digest == self.digest(label)


def deciding(states: Iterable[PolicyState]) -> list[tuple[str, str]]:
    """Versions of all policies that may answer, loaded or not."""
    return [
        (state.name, label)
        for state in states
        if state.document is not None
        for label in state.document.deployment.deciding
    ]


def watching(states: Iterable[PolicyState]) -> list[tuple[str, str]]:
    """Shadows of all policies, loaded or not."""
    return [(state.name, label) for state in states for label in state.shadows]


def reserves(states: Iterable[PolicyState]) -> list[tuple[str, str]]:
    """What the champions of all policies are rolled back to: kept loaded, so that nothing has to be waited for."""
    return [(state.name, label) for state in states for label in state.reserve]


def standby(states: Iterable[PolicyState], max_loaded: int) -> list[tuple[str, str]]:
    """Which versions without a role to keep loaded, of all policies, the most wanted first.

    The most recently pushed ones; then those of the directory that were live once and are loaded still.
    """
    served = [state for state in states if state.served is not None]
    room = max_loaded - sum(len(state.live) for state in served)
    pushed = sorted(
        (entry for state in served for entry in state.known.versions.values() if entry.version not in state.live),
        key=lambda entry: (-entry.pushed_at_ms, entry.policy, entry.version),
    )
    kept = [
        (state.name, label)
        for state in served
        for label in state.loaded
        if label not in state.known.versions and label not in state.live
    ]
    return [*((entry.policy, entry.version) for entry in pushed), *kept][: max(0, room)]
