"""The chart as Helm's own engine renders it, offline, and the environment that its container would see.

It knows Kubernetes objects as plain mappings and nothing of the service.
"""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
VALUES_FILES = sorted((CHART / "ci").glob("*-values.yaml"))
NAMESPACE = "live"

Object = dict[str, Any]


@cache
def chart() -> helm.Chart:
    return helm.Chart.load(CHART)


def values_of(path: Path) -> Object:
    values: Object = yaml.safe_load(path.read_text())
    return values


def manifests(values: Object | None = None, release: str = "demo") -> dict[str, str]:
    """Render, and return the text of each template by the path of its file in `templates/`."""
    rendered = chart().render(values or {}, name=release, namespace=NAMESPACE)
    return {path.removeprefix("surefoot/templates/"): text for path, text in rendered.items()}


def objects(values: Object | None = None, release: str = "demo") -> list[Object]:
    """Render, and return every Kubernetes object."""
    texts = [text for path, text in manifests(values, release).items() if not path.endswith(".txt")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def of_kind(kind: str, found: list[Object]) -> list[Object]:
    return [each for each in found if each["kind"] == kind]


def the(kind: str, found: list[Object]) -> Object:
    """Return the only object of a kind."""
    (single,) = of_kind(kind, found)
    return single


def container(found: list[Object]) -> Object:
    (single,) = the("StatefulSet", found)["spec"]["template"]["spec"]["containers"]
    assert isinstance(single, dict)
    return single


def environment(found: list[Object]) -> dict[str, str | None]:
    """Return what the container's environment would be; None for what a Secret outside the chart holds."""
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind("ConfigMap", found)}
    seen: dict[str, str | None] = {}
    for source in container(found)["envFrom"]:
        seen |= maps[source["configMapRef"]["name"]]
    for entry in container(found)["env"]:
        known, value = _value(entry, found)
        if known:
            seen[entry["name"]] = value
    return seen


def _value(entry: Object, found: list[Object]) -> tuple[bool, str | None]:
    """Tell whether the variable is set, and to what as far as the chart knows."""
    if "value" in entry:
        return True, entry["value"]
    reference = entry["valueFrom"]["secretKeyRef"]
    secrets = {each["metadata"]["name"]: each["data"] for each in of_kind("Secret", found)}
    if reference["name"] not in secrets:
        return True, None
    encoded = secrets[reference["name"]].get(reference["key"])
    assert encoded is not None or reference.get("optional"), f"{entry['name']} is neither in the Secret nor optional"
    return encoded is not None, base64.b64decode(encoded).decode() if encoded is not None else None
