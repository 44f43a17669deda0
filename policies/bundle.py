"""Bytes to a checked policy bundle. Pure: every check on what a stranger's files say, none that runs them.

Duty: `policy.yaml`, `model.onnx` and `golden.json`, given as bytes, become a `PolicyBundle`, or a BundleError that
names the check and the field. It opens no file and creates no ONNX session: `engine.py` does, and holds the
golden vectors against the network; `trial.py` does both in a process of its own.
Order: size cap, manifest, digest, external data, operators, opset and IR, inputs and outputs, golden vectors' shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from msgspec import Meta, Struct

from policies.errors import BundleError
from policies.graph import FLOAT_TYPES, Shape, inputs_of, outputs_of, parse_model, shape_of
from policies.graph import INDEX_TYPES as INDEX_TYPES
from policies.graph import check_operators as check_operators
from policies.graph import check_tensors as check_tensors
from policies.manifest import (
    CONTINUOUS_HEADS,
    Manifest,
    action_spec,
    check_head,
    fallback_action,
    observation_spec,
    read_manifest,
    sigma_of,
)
from policies.manifest import GOLDEN as GOLDEN
from policies.manifest import MANIFEST as MANIFEST
from policies.manifest import MODEL as MODEL
from policies.manifest import Label as Label
from policies.types import ActionSpec, Box, HeadKind, ObservationSpec, TransformKind

# Far above any policy network met so far, far below what would push other versions out of memory.
MAX_MODEL_BYTES = 256 << 20
# A manifest that names 3,000 features with bounds and quantiles; a hundred states of 84×84×4 pixels.
CAPS = {MANIFEST: 512 << 10, MODEL: MAX_MODEL_BYTES, GOLDEN: 64 << 20}
FILES = (MANIFEST, MODEL, GOLDEN)
EXPORT_AGAIN = "export network and golden vectors again, together, from states as in training"
STATE_TYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64"}


class GoldenVectors(Struct, forbid_unknown_fields=True, frozen=True):
    """States and the outputs that a load must reproduce: |got - expected| <= atol + rtol · |expected|."""

    states: list[object]
    outputs: list[list[float]]
    rtol: Annotated[float, Meta(ge=0)] = 1e-4
    atol: Annotated[float, Meta(ge=0)] = 1e-5


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of a recurrent network's memory. shape: of one episode's, without the batch axis."""

    input: str
    output: str
    shape: tuple[int, ...]
    batch_axis: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Interface:
    """How a network is asked, and what its answer is."""

    head: HeadKind
    action: ActionSpec
    input: str
    output: str
    log_std: str | None
    mask: str | None  # an input for the caller's mask
    recurrent: tuple[StateTensor, ...]
    one_by_one: bool  # it was exported for a batch of exactly one state

    @property
    def width(self) -> int:
        """How many numbers the head has for each state: scores, coordinates, or means and log deviations."""
        return self.action.size * (2 if self.head in CONTINUOUS_HEADS else 1)

    @property
    def memory_size(self) -> int:
        """How many numbers a recurrent network remembers of an episode; 0 for others."""
        return sum(math.prod(state.shape) for state in self.recurrent)


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
    transform: TransformKind
    epsilon: float
    sigma: tuple[float, ...] | None  # of the exploring Gaussian, one for each coordinate
    fallback: tuple[float, ...] | None  # None: `fallback: none`
    latency_budget_ms: float
    model: bytes
    interface: Interface
    golden_states: npt.NDArray[np.floating]  # [G, *shape]
    golden_outputs: npt.NDArray[np.float64]  # [G, width]
    golden_rtol: float
    golden_atol: float
    manifest: Manifest

    @property
    def width(self) -> int:
        """How many numbers the head has for each state."""
        return self.interface.width


def read_bundle(files: Mapping[str, bytes]) -> PolicyBundle:
    """Check the files of a bundle, given by name, and build it. Raises BundleError."""
    check_files(files)
    model, manifest = files[MODEL], read_manifest(files[MANIFEST])
    observation, action = observation_spec(manifest), action_spec(manifest)
    check_head(manifest, action)
    if sha256(model).hexdigest() != manifest.model.sha256:
        detail = "model.onnx is not the file that the manifest was written for; export the bundle again"
        raise BundleError(detail, "model.sha256", "digest")
    interface = read_interface(model, manifest, observation, action)
    golden = _golden(files[GOLDEN], observation, interface.width)
    return PolicyBundle(
        policy=manifest.policy,
        version=manifest.version,
        digest=content_digest(files),
        observation=observation,
        action=action,
        head=manifest.head,
        temperature=manifest.temperature,
        transform=manifest.action_transform,
        epsilon=manifest.exploration.epsilon,
        sigma=sigma_of(manifest, action),
        fallback=fallback_action(manifest.fallback, action),
        latency_budget_ms=manifest.latency_budget_ms,
        model=model,
        interface=interface,
        golden_states=observation.array(golden.states),
        golden_outputs=np.asarray(golden.outputs, dtype=np.float64),
        golden_rtol=golden.rtol,
        golden_atol=golden.atol,
        manifest=manifest,
    )


def check_files(files: Mapping[str, bytes]) -> None:
    """Check that the three files are there and not too large, before anything reads them. Raises BundleError."""
    for name in FILES:
        if name not in files:
            raise BundleError(f"the bundle has no {name}; a bundle has {', '.join(FILES)}", name, check="files")
        if len(files[name]) > CAPS[name]:
            what = "network" if name == MODEL else "file"
            detail = f"{name} has {len(files[name])} bytes, the cap is {CAPS[name]}; export a smaller {what}"
            raise BundleError(detail, name, "size")


def read_interface(model: bytes, manifest: Manifest, observation: ObservationSpec, action: ActionSpec) -> Interface:
    """Look through the graph, and say how the network is asked. Raises BundleError."""
    proto = parse_model(model)
    check_tensors(proto)
    check_operators(proto)
    recurrent, one_by_one = check_interface(proto.graph, manifest, observation, action)
    return Interface(
        head=manifest.head,
        action=action,
        input=manifest.model.input,
        output=manifest.model.output,
        log_std=manifest.model.log_std,
        mask=manifest.model.mask,
        recurrent=recurrent,
        one_by_one=one_by_one,
    )


def content_digest(files: Mapping[str, bytes]) -> str:
    """Identify a bundle: sha256 over the digests of its three files."""
    whole = sha256()
    for name in FILES:
        whole.update(sha256(files[name]).digest())
    return whole.hexdigest()


def _golden(raw: bytes, observation: ObservationSpec, width: int) -> GoldenVectors:
    try:
        golden = msgspec.json.decode(raw, type=GoldenVectors)
        with np.errstate(over="ignore"):
            states = np.asarray(golden.states, dtype=observation.dtype)
        outputs = np.asarray(golden.outputs, dtype=np.float64)
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise BundleError(f"{GOLDEN} cannot be read: {error}; {EXPORT_AGAIN}", GOLDEN, "golden") from None
    if not golden.states or states.shape[1:] != observation.shape or outputs.shape != (len(states), width):
        expected = f"states [G, {', '.join(map(str, observation.shape))}] and outputs [G, {width}]"
        detail = f"{GOLDEN} does not hold {expected} with G at least 1; {EXPORT_AGAIN}"
        raise BundleError(detail, GOLDEN, "golden")
    if not (np.isfinite(states).all() and np.isfinite(outputs).all()):
        detail = f"{GOLDEN} holds numbers that are not finite; {EXPORT_AGAIN}"
        raise BundleError(detail, GOLDEN, "golden")
    return golden


def check_interface(
    graph: onnx.GraphProto, manifest: Manifest, observation: ObservationSpec, action: ActionSpec
) -> tuple[tuple[StateTensor, ...], bool]:
    """Hold inputs and outputs against the manifest. Gives the memory's tensors, and whether the network takes one state
    at a time only. Raises BundleError naming the manifest's field.
    """
    inputs, outputs = inputs_of(graph), outputs_of(graph)
    _check_names(inputs, outputs, manifest)
    tensor = inputs[manifest.model.input]
    expected = onnx.TensorProto.DataType.Value({"float32": "FLOAT", "float64": "DOUBLE"}[observation.dtype])
    if tensor.elem_type != expected:
        detail = f"the network's input is not {observation.dtype}; declare the dtype that it takes"
        raise BundleError(detail, "observation.dtype", "interface")
    found = [_check_shape(shape_of(tensor), observation.shape, "observation.shape")]
    if manifest.model.mask is not None:
        found.append(_check_mask(inputs[manifest.model.mask], action))
    states = manifest.recurrent.states if manifest.recurrent else []
    memory = []
    for index, state in enumerate(states):
        tensors = inputs[state.input], outputs[state.output]
        tensor_of, fixed = _check_state(tensors, tuple(state.shape), state.batch_axis, f"recurrent.states[{index}]")
        memory.append(StateTensor(state.input, state.output, tuple(state.shape), state.batch_axis, tensor_of))
        found.append(fixed)
    found += _check_heads(outputs, manifest, action)
    return tuple(memory), any(found)


def _check_names(
    inputs: Mapping[str, onnx.TypeProto.Tensor], outputs: Mapping[str, onnx.TypeProto.Tensor], manifest: Manifest
) -> None:
    states = manifest.recurrent.states if manifest.recurrent else []
    named = [manifest.model.input, *([manifest.model.mask] if manifest.model.mask else []), *(s.input for s in states)]
    if set(inputs) != set(named) or len(set(named)) != len(named):
        detail = f"the network's inputs are {sorted(inputs)}, the manifest names {sorted(named)}; name each once"
        raise BundleError(detail, "model.input", "interface")
    read = {"model.output": manifest.model.output, "model.log_std": manifest.model.log_std}
    read |= {f"recurrent.states[{index}].output": state.output for index, state in enumerate(states)}
    for field, name in read.items():
        if name is not None and name not in outputs:
            detail = f"the network's outputs are {sorted(outputs)}, the manifest names {name!r}; name one of them"
            raise BundleError(detail, field, "interface")


def _check_heads(outputs: Mapping[str, onnx.TypeProto.Tensor], manifest: Manifest, action: ActionSpec) -> list[bool]:
    head = outputs[manifest.model.output]
    if manifest.head == "action" and not isinstance(action, Box):
        return [_check_index(head, len(action.nvec))]
    if head.elem_type not in FLOAT_TYPES:
        detail = f"head {manifest.head} answers with float32 or float64; cast the output when exporting"
        raise BundleError(detail, "model.output", "interface")
    field = "action.low" if isinstance(action, Box) else "action.n" if not action.factors else "action.nvec"
    if manifest.model.log_std is None:
        width = action.size * (2 if manifest.head in CONTINUOUS_HEADS else 1)
        return [_check_shape(shape_of(head), (width,), field)]
    deviation = outputs[manifest.model.log_std]
    return [_check_shape(shape_of(each), (action.size,), field) for each in (head, deviation)]


def _check_index(tensor: onnx.TypeProto.Tensor, factors: int) -> bool:
    """Check that an `action` head's output is one index for each factor; say whether it is for one state only."""
    shape = shape_of(tensor)
    rows = ([1], [None], []) if factors == 1 else ([factors], [None])
    if tensor.elem_type not in INDEX_TYPES or len(shape) > 2 or shape[1:] not in rows:
        wanted = "[batch] or [batch, 1]" if factors == 1 else f"[batch, {factors}]"
        detail = (
            f"an action head answers with one index for each factor, {wanted}, and this output has shape {shape}; "
            "export the index, or declare the head that the numbers are"
        )
        raise BundleError(detail, "model.output", "interface")
    return shape[:1] in ([], [1])


def _check_mask(tensor: onnx.TypeProto.Tensor, action: ActionSpec) -> bool:
    if tensor.elem_type not in FLOAT_TYPES | {onnx.TensorProto.BOOL}:
        detail = "a mask input is bool, float32 or float64; cast it inside the network"
        raise BundleError(detail, "model.mask", "interface")
    return _check_shape(shape_of(tensor), (action.size,), "model.mask")


def _check_state(
    tensors: tuple[onnx.TypeProto.Tensor, onnx.TypeProto.Tensor], shape: tuple[int, ...], axis: int, field: str
) -> tuple[str, bool]:
    """Check one tensor of the memory, in and out. Gives its dtype, and whether it is for one state only."""
    if axis > len(shape):
        detail = f"a batch of {list(shape)} has no axis {axis}; give one of 0 to {len(shape)}"
        raise BundleError(detail, f"{field}.batch_axis")
    taken, given = tensors
    if taken.elem_type != given.elem_type or taken.elem_type not in STATE_TYPES:
        detail = "a state is float32 or float64, the same going in and coming out; cast it inside the network"
        raise BundleError(detail, f"{field}.input", "interface")
    fixed = []
    for name, tensor in (("input", taken), ("output", given)):
        found = shape_of(tensor)
        if name == "output" and not found:
            continue  # exporters often leave the shape of a state's output open; a trial run shows it
        moved = found[axis : axis + 1] + found[:axis] + found[axis + 1 :]
        fixed.append(_check_shape(moved, shape, f"{field}.{name}"))
    return STATE_TYPES[taken.elem_type], any(fixed)


def _check_shape(found: Shape, declared: tuple[int, ...], field: str) -> bool:
    """Check all axes but the first; say whether that is fixed at one."""
    if len(found) != len(declared) + 1 or any(
        have not in (None, want) for have, want in zip(found[1:], declared, strict=True)
    ):
        said = f"[batch, {', '.join(map(str, declared))}]"
        detail = f"the network has shape {found}, the manifest says {said}; correct whichever is wrong"
        raise BundleError(detail, field, "interface")
    if found[0] not in (None, 1):
        detail = f"the network takes batches of {found[0]} only; export with a dynamic batch axis (dynamic_axes)"
        raise BundleError(detail, field, "batch")
    return found[0] == 1
