"""EDGE: where bundles lie. For now a directory: `<policy>/deployment.yaml` and `<policy>/<version>/` with three files.

Duty: find, read and check; a folder that is wrong is a ConfigError that names it. It runs no network: `engine.py` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from policies.bundle import GOLDEN, MANIFEST, PolicyBundle, read_bundle
from policies.deployment import DEPLOYMENT, Deployment, default_deployment, read_deployment
from policies.errors import BundleError, ConfigError

BUNDLED = Path(__file__).parent / "bundles"


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """A policy as it lies on disk: its deployment and all its bundles by version label."""

    name: str
    deployment: Deployment
    bundles: dict[str, PolicyBundle]


def read_directory(root: Path) -> list[StoredPolicy]:
    """Read every policy below `root`. Raises ConfigError when there is none or one is wrong."""
    if not root.is_dir():
        raise ConfigError(f"{root} is not a directory of policies", "SUREFOOT_POLICIES")
    policies = [read_policy(folder) for folder in _folders(root)]
    if not policies:
        raise ConfigError(f"{root} holds no policy folder", "SUREFOOT_POLICIES")
    return policies


def read_policy(folder: Path) -> StoredPolicy:
    """Read one policy's folder. Raises ConfigError naming file and field."""
    bundles = {path.name: read_folder(path) for path in _folders(folder)}
    file = folder / DEPLOYMENT
    if file.is_file():
        deployment = read_deployment(file.read_bytes(), str(file))
    else:
        deployment = default_deployment(folder.name, bundles)
    if deployment.policy != folder.name:
        raise ConfigError(f"{file}: policy is {deployment.policy!r}, its folder {folder.name!r}", "policy")
    for label in sorted(deployment.versions - bundles.keys()):
        raise ConfigError(f"{file}: there is no bundle {label!r} beside it", "champion")
    _check_alike(folder, deployment, bundles)
    return StoredPolicy(folder.name, deployment, bundles)


def read_folder(folder: Path) -> PolicyBundle:
    """Read one bundle. Raises BundleError naming the folder, the check and the field."""
    files = {
        name: (folder / name).read_bytes() for name in (MANIFEST, "model.onnx", GOLDEN) if (folder / name).is_file()
    }
    try:
        bundle = read_bundle(files)
    except BundleError as error:
        raise BundleError(f"{folder}: {error.detail}", error.field, error.check) from None
    if (bundle.policy, bundle.version) != (folder.parent.name, folder.name):
        detail = f"{folder}: the manifest says {bundle.policy}/{bundle.version}"
        raise BundleError(detail, "version", "manifest")
    return bundle


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))


def _check_alike(folder: Path, deployment: Deployment, bundles: dict[str, PolicyBundle]) -> None:
    """Versions of one policy answer the same callers, so they share observation and action spec."""
    champion = bundles[deployment.champion]
    for bundle in bundles.values():
        same_names = bundle.observation.names == champion.observation.names
        if bundle.observation.shape != champion.observation.shape or not same_names:
            raise ConfigError(
                f"{folder}: {bundle.version} observes something else than {champion.version}", "observation"
            )
        if bundle.action.names != champion.action.names:
            raise ConfigError(f"{folder}: {bundle.version} has other actions than {champion.version}", "action")
