"""What a worker knows of policies and versions, as JSON for operators. It changes nothing."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgspec

from policies.bundle import PolicyBundle
from policies.errors import SurefootError
from policies.types import ActionSpec, Box
from service.loading import Loading
from service.standing import Document, PolicyState


def policy_view(state: PolicyState) -> dict[str, Any]:
    """A policy: what is served, what should be, and every version in a line."""
    served, wanted = state.served, state.document
    routes = None if served is None else served.deployment
    challenger = routes.challengers[0] if routes and routes.challengers else None
    return {
        "policy": state.name,
        "generation": served.generation if served else 0,
        "champion": routes.champion if routes else None,
        "challenger": {"version": challenger.version, "weight": challenger.weight} if challenger else None,
        "baseline": routes.baseline if routes else None,
        "shadows": routes.shadows if routes else [],
        "deployment": None if wanted is None else deployment_view(wanted),
        "halts": sorted(state.halts),
        "source": source_of(state),
        "freshness": state.freshness,
        "pending": wanted != served,  # what should be served cannot be yet: `versions` says why
        "versions": {label: version_line(state, label) for label in sorted(state.labels)},
    }


def source_of(state: PolicyState) -> str:
    """Say who said how the policy is deployed: the directory, Redis, or what is kept of Redis while it is away."""
    if state.known.document is None:
        return "directory"
    return "cached" if state.cached or state.stale else "redis"


def deployment_view(document: Document) -> dict[str, Any]:
    """A deployment as `deployment.yaml` has it, and as a change sends it back."""
    view: dict[str, Any] = msgspec.to_builtins(document.deployment)
    return view


def halts_view(state: PolicyState) -> dict[str, Any]:
    """Kill switches that are on here. `published`: Redis says the same, so every replica has them within 2 s."""
    published = state.document is not None and state.halts_published
    return {"policy": state.name, "on": sorted(state.halts), "published": published}


def exploration_view(state: PolicyState) -> dict[str, Any]:
    """How a policy explores, as a change sends it back; {} where every version explores by its own ε."""
    declared = None if state.document is None else state.document.exploration
    view: dict[str, Any] = {} if declared is None else msgspec.to_builtins(declared)
    return view


def version_line(state: PolicyState, label: str) -> dict[str, Any]:
    """A version in short, from what is in memory."""
    loaded, entry, failure = state.loaded.get(label), state.known.versions.get(label), state.failures.get(label)
    bundle = loaded.bundle if loaded else _seeded(state, label)
    document = state.served or state.document
    described: dict[str, Any] = {}
    if bundle is not None:
        described = {"head": bundle.head, "epsilon": bundle.epsilon, "description": bundle.manifest.description}
    return {
        "version": label,
        "digest": state.digest(label),
        "role": None if document is None else document.deployment.role_of(label),
        "loaded": state.has(label),
        "device": loaded.engine.device if loaded else None,
        "tripped": label in state.tripped,
        "failure": None if failure is None else {"check": failure.check, "detail": failure.reason},
        "bytes": entry.size if entry else len(bundle.model) if bundle else None,
        "pushed_at_ms": entry.pushed_at_ms if entry else None,
        "pushed_by": entry.pushed_by if entry else None,
        "from": "store" if entry else "directory",
    } | described


async def version_view(state: PolicyState, label: str, loading: Loading) -> dict[str, Any]:
    """A version at length. One that is not loaded is read from this machine's copy, or from the store."""
    view = version_line(state, label)
    loaded, entry = state.loaded.get(label), state.known.versions.get(label)
    bundle = loaded.bundle if loaded else _seeded(state, label)
    if bundle is None and entry is not None:
        with contextlib.suppress(SurefootError):  # one that is refused here is still listed, with the reason
            bundle = await loading.read(entry)
    if bundle is not None:
        view |= _spaces(bundle)
    if loaded is not None:
        view |= {"predicted_ms": round(loaded.engine.predicted_s(1) * 1000, 4)}
    return {"policy": state.name} | view


def _seeded(state: PolicyState, label: str) -> PolicyBundle | None:
    return None if state.seed is None or label in state.known.versions else state.seed.bundles.get(label)


def _spaces(bundle: PolicyBundle) -> dict[str, Any]:
    observation = bundle.observation
    return {
        "head": bundle.head,
        "observation": {"shape": observation.shape, "dtype": observation.dtype, "names": observation.names},
        "action": _action(bundle.action),
        "training": bundle.manifest.training,
        "latency_budget_ms": bundle.latency_budget_ms,
        "golden_states": len(bundle.golden_states),
        "manifest": msgspec.to_builtins(bundle.manifest),
    }


def _action(action: ActionSpec) -> dict[str, Any]:
    if isinstance(action, Box):
        low, high = ([end if math.isfinite(end) else None for end in ends] for ends in (action.low, action.high))
        return {"kind": action.kind, "low": low, "high": high, "names": action.names}
    if action.factors:
        factors = [{"name": f, "names": names} for f, names in zip(action.factors, action.names, strict=True)]
        return {"kind": action.kind, "nvec": action.nvec, "factors": factors}
    return {"kind": action.kind, "n": action.nvec[0], "names": action.names[0]}
