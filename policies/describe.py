"""What a bundle holds, in words: inputs, outputs, spaces, head, what training has seen. Pure.

Duty: the text of `surefoot policy inspect`. It decides nothing and refuses nothing that a load would not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from policies.bundle import PolicyBundle, read_bundle
from policies.graph import inputs_of, outputs_of, parse_model, shape_of
from policies.manifest import MODEL
from policies.profiles import Profile
from policies.types import Box, Feature

HEADS = {
    "q_values": "the largest value wins",
    "logits": "drawn from their softmax",
    "probabilities": "drawn from",
    "action": "the network names the action itself",
    "gaussian": "drawn around the mean, then clipped to the bounds",
    "squashed_gaussian": "drawn around the mean, then tanh, then scaled to the bounds",
}
# Longer lists are cut: an inspection is read, not parsed.
MOST_LISTED = 32


def describe(files: Mapping[str, bytes]) -> str:
    """Describe a bundle by its three files. Raises BundleError as a load does, short of running the network."""
    bundle = read_bundle(files)
    manifest = bundle.manifest
    lines = [
        f"{bundle.policy}/{bundle.version}  {bundle.digest[:12]}  {manifest.description}".rstrip(),
        *_network(files[MODEL]),
        *_observation(bundle),
        f"action       {_action(bundle)}",
        f"head         {manifest.head}: {HEADS[manifest.head]}" + _temperature(manifest.temperature),
        f"batch        {'one state at a time: export with a dynamic batch axis' if _static(bundle) else 'any size'}",
        f"memory       {_memory(bundle)}",
        f"exploration  ε {manifest.exploration.epsilon:g}" + _sigma(manifest.exploration.sigma),
        f"fallback     {manifest.fallback}",
        f"latency      at most {manifest.latency_budget_ms:g} ms for one state",
        f"golden       {len(bundle.golden_states)} states",
    ]
    lines += [f"training     {key}: {_short(value)}" for key, value in manifest.training.items()]
    return "\n".join(lines)


def describe_profile(profile: Profile) -> str:
    """Describe what was recognised in a file that is no bundle."""
    meaning = profile.meaning
    sizes = ", ".join("?" if size is None else str(size) for size in meaning.sizes)
    shape = "?" if profile.shape is None else ", ".join(map(str, profile.shape))
    lines = [
        f"convention   {profile.convention}",
        f"observation  {profile.input}: {profile.dtype} [batch, {shape}]",
        f"output       {profile.output}" + (f" and {profile.log_std}" if profile.log_std else ""),
        f"action       {meaning.kind or '?'} [{sizes}]",
        f"head         {meaning.head or '?'}: {meaning.note}",
        f"batch        {'one state at a time: export with a dynamic batch axis' if profile.one_by_one else 'any size'}",
    ]
    lines += [f"memory       {each.input} to {each.output} {list(each.shape)}" for each in profile.memory]
    return "\n".join([*lines, *([f"mask         {profile.mask}"] if profile.mask else [])])


def _network(model: bytes) -> list[str]:
    proto = parse_model(model)
    opset = next((each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")), "?")
    kinds = sorted({node.op_type for node in proto.graph.node})
    lines = [f"model        {len(model) / 1024:.1f} KiB, opset {opset}, IR {proto.ir_version}: {_listed(kinds)}"]
    for role, tensors in (("input", inputs_of(proto.graph)), ("output", outputs_of(proto.graph))):
        lines += [
            f"{role:<12} {name} [{', '.join('any' if size is None else str(size) for size in shape_of(tensor))}]"
            for name, tensor in tensors.items()
        ]
    return lines


def _observation(bundle: PolicyBundle) -> list[str]:
    spec = bundle.observation
    lines = [f"observation  {spec.dtype} {list(spec.shape)}"]
    return lines + [f"  {_feature(feature)}" for feature in spec.features]


def _feature(feature: Feature) -> str:
    seen = ", ".join(f"{name} {value:g}" for name, value in feature.quantiles.items())
    bounds = f"{_bound(feature.low)} … {_bound(feature.high)}"
    return f"{feature.name}  {bounds}" + (f"  training: {seen}" if seen else "  training: not known")


def _bound(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:g}"


def _action(bundle: PolicyBundle) -> str:
    action = bundle.action
    if isinstance(action, Box):
        names = action.names or tuple(f"[{d}]" for d in range(action.size))
        sides = zip(names, action.low, action.high, strict=True)
        scaled = ", scaled from [-1, 1]" if bundle.manifest.action_transform == "unscale" else ""
        return (
            f"continuous, {action.size}: "
            + _listed([f"{name} {low:g} … {high:g}" for name, low, high in sides])
            + scaled
        )
    if not action.factors:
        return f"discrete, {action.size}: {_listed(action.names[0])}"
    factors = zip(action.factors, action.names, strict=True)
    return "multi_discrete: " + _listed([f"{name} ({_listed(names)})" for name, names in factors])


def _static(bundle: PolicyBundle) -> bool:
    return bundle.interface.one_by_one


def _memory(bundle: PolicyBundle) -> str:
    states = bundle.interface.recurrent
    return "; ".join(f"{each.input} to {each.output} {list(each.shape)}" for each in states) or "none"


def _temperature(temperature: float | None) -> str:
    return "" if temperature is None else f"; temperature {temperature:g}"


def _sigma(sigma: object) -> str:
    return "" if sigma is None else f", σ {sigma}"


def _listed(items: Any) -> str:
    listed = [str(item) for item in items]
    return ", ".join(listed[:MOST_LISTED]) + (f", … ({len(listed)})" if len(listed) > MOST_LISTED else "")


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
