"""EDGE: where bundles lie: what a store of versions promises, and the directory of bundles that a start reads.

Duty: the words that stores and the service share (`StoredVersion`, `Store`), and `<policy>/deployment.yaml` beside
`<policy>/<version>/`, read and checked; a folder that is wrong is a ConfigError that names it. It runs no network.
Strategy: a store's methods are coroutines, because the usual store is Redis, whose only client here is asynchronous; a
store of files goes to a thread. A version is written whole or not at all: its files first, its entry last.
Promise: a label is never given other content; what is fetched is what was put, byte for byte, or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from policies.archive import read_folder_files
from policies.bundle import PolicyBundle, read_bundle
from policies.deployment import DEPLOYMENT, Deployment, default_deployment, read_deployment
from policies.errors import BundleError, ConfigError

BUNDLED = Path(__file__).parent / "bundles"
SAFETY, EXPLORATION, ROLLOUT = DOCUMENTS = "safety.yaml", "exploration.yaml", "rollout.yaml"
Read = Callable[[Mapping[str, bytes]], PolicyBundle]


class FileRef(Struct, frozen=True):
    """One file of a version, by content."""

    sha256: str
    size: int


class StoredVersion(Struct, frozen=True):
    """A version as a store lists it. Invariant: never changes once it stands."""

    policy: str
    version: str
    digest: str  # of the three files: the version's identity
    files: dict[str, FileRef]
    pushed_at_ms: int
    pushed_by: str

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())

    def holds(self, files: Mapping[str, bytes]) -> bool:
        """Whether these are the version's files, byte for byte."""
        return refs_of(files) == self.files


class Store(Protocol):
    """Versions by policy and label. Methods raise StoreAway or BundlesAway when the same may work later."""

    async def policies(self) -> set[str]:
        """Name the policies that have, or have had, versions."""

    async def versions(self, policy: str) -> dict[str, StoredVersion]:
        """List a policy's versions by label."""

    async def put(self, entry: StoredVersion, files: Mapping[str, bytes]) -> StoredVersion:
        """Add a version, unless its label is taken. Gives the entry that stands: ours, or the one that was there."""

    async def fetch(self, entry: StoredVersion) -> dict[str, bytes]:
        """Read a version's files, checked by content. Raises BundleError when they are gone or damaged."""

    async def delete(self, entry: StoredVersion) -> None:
        """Remove a version, and the files that no other version needs. Nothing happens when it is gone already."""


def refs_of(files: Mapping[str, bytes]) -> dict[str, FileRef]:
    """Say what files hold, by name."""
    return {name: FileRef(sha256(content).hexdigest(), len(content)) for name, content in files.items()}


def damaged(entry: StoredVersion) -> BundleError:
    """The error for a version whose files are not what its entry says."""
    name = f"{entry.policy}/{entry.version}"
    detail = f"{name}: the store's copy is gone or damaged; delete the version and push it again"
    return BundleError(detail, None, "digest")


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """A policy as it lies on disk: its deployment, all its bundles by version label, what is said of their safety."""

    name: str
    deployment: Deployment
    bundles: dict[str, PolicyBundle]
    documents: Mapping[str, bytes] = field(default_factory=dict)  # whichever of DOCUMENTS lie beside them, unread


def read_directory(root: Path, read: Read = read_bundle) -> list[StoredPolicy]:
    """Read every policy below `root`. Raises ConfigError when there is none or one is wrong."""
    if not root.is_dir():
        raise ConfigError(f"{root} is not a directory of policies", "SUREFOOT_POLICIES")
    policies = [read_policy(folder, read) for folder in _folders(root)]
    if not policies:
        raise ConfigError(f"{root} holds no policy folder", "SUREFOOT_POLICIES")
    return policies


def read_policy(folder: Path, read: Read = read_bundle) -> StoredPolicy:
    """Read one policy's folder. Raises ConfigError naming file and field."""
    bundles = {path.name: read_folder(path, read) for path in _folders(folder)}
    file = folder / DEPLOYMENT
    if file.is_file():
        deployment = read_deployment(file.read_bytes(), str(file))
    else:
        deployment = default_deployment(folder.name, bundles)
    if deployment.policy != folder.name:
        raise ConfigError(f"{file}: policy is {deployment.policy!r}, its folder {folder.name!r}", "policy")
    for label in sorted(deployment.versions - bundles.keys()):
        raise ConfigError(f"{file}: there is no bundle {label!r} beside it", "champion")
    champion = bundles[deployment.champion]
    for bundle in bundles.values():
        if found := difference(bundle, champion):
            field, detail = found
            raise ConfigError(f"{folder}: {detail}", field)
    documents = {name: (folder / name).read_bytes() for name in DOCUMENTS if (folder / name).is_file()}
    return StoredPolicy(folder.name, deployment, bundles, documents)


def read_folder(folder: Path, read: Read = read_bundle) -> PolicyBundle:
    """Read one bundle. Raises BundleError naming the folder, the check and the field."""
    try:
        bundle = read(read_folder_files(folder, hardlinks=True))  # package installers make them
    except BundleError as error:
        raise BundleError(f"{folder}: {error.detail}", error.field, error.check) from None
    if (bundle.policy, bundle.version) != (folder.parent.name, folder.name):
        detail = f"{folder}: the manifest says {bundle.policy}/{bundle.version}"
        raise BundleError(detail, "version", "manifest")
    return bundle


def difference(bundle: PolicyBundle, champion: PolicyBundle) -> tuple[str, str] | None:
    """Say in which field a version differs from what callers of the policy send and get, and how; None: in none.

    Versions of one policy answer the same callers, so they share the observation's shape, dtype and names, and the
    whole action space. What training has seen of a feature is a version's own.
    """
    mine, theirs = bundle.observation, champion.observation
    for where, here, there in (
        ("observation", (mine.shape, mine.dtype, mine.names), (theirs.shape, theirs.dtype, theirs.names)),
        ("action", bundle.action, champion.action),
    ):
        if here != there:
            what = "observes something else" if where == "observation" else "has other actions"
            return where, f"{bundle.version} {what} than {champion.version}: {_brief(here)}, not {_brief(there)}"
    return None


def _brief(spec: object) -> str:
    text = str(spec)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
