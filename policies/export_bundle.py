"""EDGE: a network and what its owner says of it, to the three files of a bundle. It runs the network once.

Duty: recognise, settle, trim, compute golden vectors, write `policy.yaml`. It knows no training library: what those
know of a policy (bounds, timesteps, states of the training) is handed in.
Promise: the files are what a load expects, or a BundleError says by which option to complete them. Whether the network
is fit to serve (time, memory, golden vectors) is asked by the checks of a load, not here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import yaml

from policies.bundle import read_interface
from policies.errors import BundleError
from policies.graph import check_operators, check_tensors
from policies.manifest import GOLDEN, MANIFEST, MODEL, action_spec, check_head, observation_spec, read_manifest
from policies.network import golden_outputs
from policies.profiles import recognise
from policies.propose import Said, Settled, Support, propose, settle
from policies.rewrite import served

GOLDEN_STATES = 16
# Golden vectors of images would fill megabytes: fewer states then, at least two.
MOST_GOLDEN_NUMBERS = 50_000
PERCENTILES = (1, 25, 50, 75, 99)

Files = dict[str, bytes]
States = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Options(Said):
    """All that the owner of a network says when it becomes a bundle. What the file says itself may be left out.

    fallback: an index or a name, a list of them (multi_discrete) or of numbers (continuous), or that as text with
    commas between; `none`: no action is safe without a network. sigma: deviation of the exploring Gaussian, in units of
    the action. states: observations [G, *shape] as in training; golden vectors and quantiles are taken from them.
    vec_normalize: of Stable-Baselines3, the object or the path of its pickle; without_normalisation: the owner's word
    that there was none. channels: where an image's colours lie in the observations that will be served. deterministic:
    serve the mode of a stochastic policy instead of drawing from it.
    """

    policy: str
    version: str = "v1"
    fallback: Any = "none"
    epsilon: float = 0.0
    sigma: float | list[float] | None = None
    temperature: float | None = None
    latency_budget_ms: float | None = None
    description: str = ""
    states: States | None = None
    vec_normalize: Any = None
    without_normalisation: bool = False
    channels: Literal["first", "last"] | None = None
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """What a training library knows of a policy beyond its graph.

    said: facts about the action; an owner who says otherwise is refused. states: observations for golden vectors.
    """

    said: Mapping[str, Any] = field(default_factory=dict)
    support: Support = field(default_factory=Support)
    states: States | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""


def assemble(proto: onnx.ModelProto, options: Options, known: Known | None = None) -> Files:
    """Make a network the three files of a bundle. Raises BundleError."""
    known = known or Known()
    check_tensors(proto)  # before ONNX Runtime sees a stranger's file for the golden vectors
    check_operators(proto)
    settled = settle(recognise(proto), _said(options, known))
    network, profile = served(proto, settled.profile)
    model = network.SerializeToString()
    states = options.states if options.states is not None else known.states
    manifest = propose(
        Settled(profile, settled.head, settled.shape, settled.action, settled.transform),
        policy=options.policy,
        version=options.version,
        sha256=sha256(model).hexdigest(),
        fallback=read_fallback(options.fallback, settled.action),
        exploration={"epsilon": options.epsilon} | ({} if options.sigma is None else {"sigma": options.sigma}),
        support=_support(known.support, options.states, settled.shape),
        features=options.features,
        extra=_extra(options, known, profile.convention),
    )
    files = {MODEL: model, MANIFEST: yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True).encode()}
    return {**files, GOLDEN: _golden(files, states)}


def feature_quantiles(states: States) -> list[dict[str, float]]:
    """Describe what training has seen of each element of a vector, states [G, n]."""
    values = np.percentile(states.astype(np.float64), PERCENTILES, axis=0)  # [5, n]
    return [
        {f"p{percent:02}": float(f"{value:.6g}") for percent, value in zip(PERCENTILES, column, strict=True)}
        for column in values.T
    ]


def read_fallback(fallback: Any, action: Mapping[str, Any]) -> Any:
    """Read a fallback that may be text, as a command line gives it, for this action space."""
    if not isinstance(fallback, str) or (fallback == "none" and "none" not in action.get("names", ())):
        return fallback
    if action["kind"] == "continuous":
        try:
            return [float(part) for part in fallback.split(",")]
        except ValueError:
            raise BundleError(f"the fallback of a continuous action is numbers, not {fallback!r}", "fallback") from None
    if action["kind"] == "multi_discrete":
        named = bool(action.get("factors"))
        return [int(part) if part.isdigit() and not named else part for part in map(str.strip, fallback.split(","))]
    return int(fallback) if fallback.isdigit() and not action.get("names") else fallback


def _said(options: Options, known: Known) -> Said:
    """Join what the owner says with what the library knows. Raises BundleError where they contradict each other."""
    told = {name: getattr(options, name) for name in Said.__dataclass_fields__}
    told = {name: value for name, value in told.items() if value not in (None, (), [], {}, False)}
    for name, fact in known.said.items():
        if told.get(name, fact) not in (fact, tuple(fact) if isinstance(fact, list) else fact):
            raise BundleError(f"the policy itself says {name} {fact}, not {told[name]}", name, "profile")
    return Said(**{**told, **known.said})


def _extra(options: Options, known: Known, convention: str) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if options.description or known.description:
        extra["description"] = options.description or known.description
    if options.temperature is not None:
        extra["temperature"] = options.temperature
    if options.latency_budget_ms is not None:
        extra["latency_budget_ms"] = options.latency_budget_ms
    return extra | {"training": dict(known.training) or {"exported_as": convention}}


def _support(support: Support, states: States | None, shape: tuple[int, ...]) -> Support:
    if states is None or len(shape) != 1 or states.shape[1:] != shape:
        return support
    return Support(support.low, support.high, feature_quantiles(states))


def _golden(files: Mapping[str, bytes], states: States | None) -> bytes:
    """Compute golden vectors from the given states, or from normal ones where nothing is known."""
    manifest = read_manifest(files[MANIFEST])
    observation, action = observation_spec(manifest), action_spec(manifest)
    check_head(manifest, action)
    interface = read_interface(files[MODEL], manifest, observation, action)
    count = max(2, min(GOLDEN_STATES, MOST_GOLDEN_NUMBERS // observation.size))
    if states is None:
        states = np.random.default_rng(0).standard_normal((count, *observation.shape))
    if states.shape[1:] != observation.shape or not len(states):
        detail = f"the states have shape {list(states.shape)}, the network observes [batch, {list(observation.shape)}]"
        raise BundleError(detail, "states", "profile")
    rows = np.linspace(0, len(states) - 1, min(count, len(states))).round().astype(int)
    chosen = states[rows].astype(observation.dtype)
    outputs = golden_outputs(files[MODEL], interface, chosen)
    if not np.isfinite(outputs).all():
        detail = (
            "the network answers with NaN or infinity; if it takes only some states, give such: --states states.npy"
        )
        raise BundleError(detail, "golden.json", "golden")
    return json.dumps({"states": chosen.tolist(), "outputs": outputs.astype(np.float64).tolist()}).encode() + b"\n"
