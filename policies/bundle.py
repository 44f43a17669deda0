"""Bytes to a checked policy bundle. Pure: every check on what a stranger's files say, none that runs them.

Duty: `policy.yaml`, `model.onnx` and `golden.json`, given as bytes, become a `PolicyBundle`, or a BundleError that
names the check and the field. It opens no file and creates no ONNX session: `engine.py` does, and holds the
golden vectors against the network.
Order: size cap, manifest, digest, external data, operators, opset and IR, inputs and outputs, golden vectors' shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import yaml
from google.protobuf.message import DecodeError
from msgspec import Meta, Struct

from policies.errors import BundleError, UnknownAction
from policies.types import ActionSpec, Feature, HeadKind, ObservationSpec

# Far above any policy network met so far, far below what would push other versions out of memory.
MAX_MODEL_BYTES = 256 << 20
MANIFEST, GOLDEN = "policy.yaml", "golden.json"
OPERATOR_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
# Opsets 11 (d3rlpy's exports) to 25 and IR up to 13: what ONNX Runtime 1.31 documents as supported.
OPSETS = range(11, 26)
IR_VERSIONS = range(4, 14)
# What an exporter writes for an action index: d3rlpy and SB3 int64, others int32 or a float.
INDEX_TYPES = frozenset(
    {onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE}
)

Label = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Positive = Annotated[float, Meta(gt=0)]


class FeatureManifest(Struct, forbid_unknown_fields=True, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    low: float | None = None
    high: float | None = None
    quantiles: dict[str, float] = {}


class ObservationManifest(Struct, forbid_unknown_fields=True, frozen=True):
    shape: list[int]
    dtype: Literal["float32", "float64"] = "float32"
    features: list[FeatureManifest] = []


class ActionManifest(Struct, forbid_unknown_fields=True, frozen=True):
    kind: Literal["discrete"]
    n: int
    names: list[str] = []


class ModelManifest(Struct, forbid_unknown_fields=True, frozen=True):
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    input: str
    output: str
    file: Literal["model.onnx"] = "model.onnx"


class ExplorationManifest(Struct, forbid_unknown_fields=True, frozen=True):
    epsilon: Annotated[float, Meta(ge=0, le=1)] = 0.0


class Manifest(Struct, forbid_unknown_fields=True, frozen=True):
    """`policy.yaml`, as it is written."""

    schema: Literal[1]
    policy: Label
    version: Label
    observation: ObservationManifest
    action: ActionManifest
    head: HeadKind
    model: ModelManifest
    fallback: int | str
    description: str = ""
    temperature: Positive | None = None
    exploration: ExplorationManifest = ExplorationManifest()
    latency_budget_ms: Positive = 20.0
    training: dict[str, object] = {}


class GoldenVectors(Struct, forbid_unknown_fields=True, frozen=True):
    """States and the outputs that a load must reproduce: |got - expected| <= atol + rtol · |expected|."""

    states: list[object]
    outputs: list[list[float]]
    rtol: Annotated[float, Meta(ge=0)] = 1e-4
    atol: Annotated[float, Meta(ge=0)] = 1e-5


@dataclass(frozen=True, slots=True)
class PolicyBundle:
    """One immutable version of a policy: what its manifest says and the network that it says it of."""

    policy: str
    version: str
    digest: str  # sha256 over the three files: the version's identity
    observation: ObservationSpec
    action: ActionSpec
    head: HeadKind
    temperature: float | None
    epsilon: float
    fallback: int | None  # None: `fallback: none`
    latency_budget_ms: float
    input: str
    output: str
    model: bytes
    one_by_one: bool  # the network was exported for a batch of exactly one state
    golden_states: npt.NDArray[np.floating]  # [G, *shape]
    golden_outputs: npt.NDArray[np.float64]  # [G, n]
    golden_rtol: float
    golden_atol: float
    manifest: Manifest


def read_bundle(files: Mapping[str, bytes]) -> PolicyBundle:
    """Check the files of a bundle, given by name, and build it. Raises BundleError."""
    for name in (MANIFEST, "model.onnx", GOLDEN):
        if name not in files:
            raise BundleError(f"the bundle has no {name}", name, check="files")
    model = files["model.onnx"]
    if len(model) > MAX_MODEL_BYTES:
        raise BundleError(f"model.onnx has {len(model)} bytes, the cap is {MAX_MODEL_BYTES}", "model.onnx", "size")
    manifest = read_manifest(files[MANIFEST])
    observation, action = _specs(manifest)
    if sha256(model).hexdigest() != manifest.model.sha256:
        raise BundleError("model.onnx is not the file that the manifest was written for", "model.sha256", "digest")
    one_by_one = check_model(model, manifest, observation, action)
    golden = _golden(files[GOLDEN], observation, action)
    return PolicyBundle(
        policy=manifest.policy,
        version=manifest.version,
        digest=_content_digest(files),
        observation=observation,
        action=action,
        head=manifest.head,
        temperature=manifest.temperature,
        epsilon=manifest.exploration.epsilon,
        fallback=_fallback(manifest.fallback, action),
        latency_budget_ms=manifest.latency_budget_ms,
        input=manifest.model.input,
        output=manifest.model.output,
        model=model,
        one_by_one=one_by_one,
        golden_states=observation.array(golden.states),
        golden_outputs=np.asarray(golden.outputs, dtype=np.float64),
        golden_rtol=golden.rtol,
        golden_atol=golden.atol,
        manifest=manifest,
    )


def read_manifest(raw: bytes) -> Manifest:
    """Decode `policy.yaml`. Raises BundleError naming the field."""
    try:
        return msgspec.convert(yaml.safe_load(raw), Manifest)
    except yaml.YAMLError as error:
        raise BundleError(f"{MANIFEST} is not YAML: {error}", MANIFEST) from None
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        raise BundleError(message, path.strip(".`") or MANIFEST) from None


def _content_digest(files: Mapping[str, bytes]) -> str:
    whole = sha256()
    for name in (MANIFEST, "model.onnx", GOLDEN):
        whole.update(sha256(files[name]).digest())
    return whole.hexdigest()


def _specs(manifest: Manifest) -> tuple[ObservationSpec, ActionSpec]:
    features = tuple(Feature(f.name, f.low, f.high, f.quantiles) for f in manifest.observation.features)
    observation = ObservationSpec(tuple(manifest.observation.shape), manifest.observation.dtype, features)
    n = manifest.action.n
    names = tuple(manifest.action.names) or tuple(str(index) for index in range(max(n, 0)))
    return observation, ActionSpec(n, names)


def _fallback(declared: int | str, action: ActionSpec) -> int | None:
    if declared == "none" and "none" not in action.index_of:
        return None
    try:
        return action.index(declared, "fallback")
    except UnknownAction as error:
        raise BundleError(error.detail, "fallback") from None


def _golden(raw: bytes, observation: ObservationSpec, action: ActionSpec) -> GoldenVectors:
    try:
        golden = msgspec.json.decode(raw, type=GoldenVectors)
        states = np.asarray(golden.states, dtype=observation.dtype)
        outputs = np.asarray(golden.outputs, dtype=np.float64)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise BundleError(f"{GOLDEN}: {error}", GOLDEN, "golden") from None
    if not golden.states or states.shape[1:] != observation.shape or outputs.shape != (len(states), action.n):
        expected = f"states [G, {', '.join(map(str, observation.shape))}] and outputs [G, {action.n}]"
        raise BundleError(f"{GOLDEN} must hold {expected} with G at least 1", GOLDEN, "golden")
    if not (np.isfinite(states).all() and np.isfinite(outputs).all()):
        raise BundleError(f"{GOLDEN} holds numbers that are not finite", GOLDEN, "golden")
    return golden


def check_model(model: bytes, manifest: Manifest, observation: ObservationSpec, action: ActionSpec) -> bool:
    """Read the graph without running it; say whether it takes one state at a time only.

    Raises BundleError for what must never reach a session.
    """
    try:
        proto = onnx.load_model_from_string(model)
    except DecodeError:
        raise BundleError("model.onnx is not an ONNX file, or is cut short", "model.onnx", "parse") from None
    check_tensors(proto)
    check_operators(proto)
    return _check_signature(proto.graph, manifest, observation, action)


def check_tensors(proto: onnx.ModelProto) -> None:
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            detail = f"tensor {tensor.name!r} keeps its data in another file; export with everything in one file"
            raise BundleError(detail, "model.onnx", "external_data")


def check_operators(proto: onnx.ModelProto) -> None:
    if proto.ir_version not in IR_VERSIONS:
        raise BundleError(f"IR version {proto.ir_version} is not supported", "model.onnx", "ir_version")
    for opset in proto.opset_import:
        if opset.domain not in OPERATOR_DOMAINS:
            raise BundleError(f"operator domain {opset.domain!r} is not allowed", "model.onnx", "operators")
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            raise BundleError(f"opset {opset.version} is not in {OPSETS[0]}..{OPSETS[-1]}", "model.onnx", "opset")
    for node in _nodes(proto):
        if node.domain not in OPERATOR_DOMAINS or node.op_type == "EPContext":
            detail = f"operator {node.domain}:{node.op_type} is not allowed"
            raise BundleError(detail, "model.onnx", "operators")


def _check_signature(
    graph: onnx.GraphProto, manifest: Manifest, observation: ObservationSpec, action: ActionSpec
) -> bool:
    initialised = {tensor.name for tensor in graph.initializer}
    inputs = {value.name: value for value in graph.input if value.name not in initialised}
    if set(inputs) != {manifest.model.input}:
        detail = f"the network's inputs are {sorted(inputs)}, the manifest names {manifest.model.input!r}"
        raise BundleError(detail, "model.input", "signature")
    outputs = {value.name: value for value in graph.output}
    if manifest.model.output not in outputs:
        detail = f"the network's outputs are {sorted(outputs)}, the manifest names {manifest.model.output!r}"
        raise BundleError(detail, "model.output", "signature")
    tensor = inputs[manifest.model.input].type.tensor_type
    expected = onnx.TensorProto.DataType.Value({"float32": "FLOAT", "float64": "DOUBLE"}[observation.dtype])
    if tensor.elem_type != expected:
        raise BundleError(f"the network's input is not {observation.dtype}", "observation.dtype", "signature")
    one_by_one = _check_shape(_shape(tensor), observation.shape, "observation.shape")
    found = outputs[manifest.model.output].type.tensor_type
    if manifest.head == "action":
        return _check_index(found) or one_by_one
    return _check_shape(_shape(found), (action.n,), "action.n") or one_by_one


def _shape(tensor: onnx.TypeProto.Tensor) -> list[int | None]:
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]


def _check_index(tensor: onnx.TypeProto.Tensor) -> bool:
    """Check that an `action` head's output is one number for each state; say whether it is for one state only."""
    shape = _shape(tensor)
    if tensor.elem_type not in INDEX_TYPES or len(shape) > 2 or shape[1:] not in ([], [1], [None]):
        detail = f"an action head answers with one index for each state, [batch] or [batch, 1]; this has shape {shape}"
        raise BundleError(detail, "model.output", "signature")
    return shape[:1] in ([], [1])


def _check_shape(found: list[int | None], declared: tuple[int, ...], field: str) -> bool:
    """Check all axes but the first; say whether that is fixed at one."""
    if len(found) != len(declared) + 1 or any(
        have not in (None, want) for have, want in zip(found[1:], declared, strict=True)
    ):
        detail = f"the network has shape {found}, the manifest says [batch, {', '.join(map(str, declared))}]"
        raise BundleError(detail, field, "signature")
    if found[0] not in (None, 1):
        detail = f"the network takes batches of {found[0]} only; export with a dynamic batch axis (dynamic_axes)"
        raise BundleError(detail, field, "batch")
    return found[0] == 1


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Every graph of the model, those inside nodes and functions included."""
    waiting = [proto.graph]
    waiting += [graph for info in proto.training_info for graph in (info.initialization, info.algorithm)]
    waiting += [graph for function in proto.functions for node in function.node for graph in _subgraphs(node)]
    while waiting:
        graph = waiting.pop()
        yield graph
        waiting += [inner for node in graph.node for inner in _subgraphs(node)]


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [graph for attribute in node.attribute for graph in _present(attribute)]


def _present(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(proto):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(proto):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(proto):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
