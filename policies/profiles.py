"""What an ONNX file that some library exported is: its convention, its shapes, the manifest it deserves. Pure.

Duty: read a graph that nobody wrote a manifest for, say which of the known conventions it follows, and propose one. It
runs nothing and opens nothing: golden vectors and the digest come from `export.py`, the refusal of hostile files from
`bundle.py`.
Strategy: names and positions of inputs and outputs decide, and the operators behind an output where names do not:
an index behind an ArgMax tells its number of actions, a Tanh at the end is a continuous action. What cannot be told
(the number of actions behind a bare index, logits or values) is asked for, never guessed silently: `note` says so.
Promise: a profile fits a discrete, memoryless policy with one observation; the rest is a BundleError that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import onnx

from policies.bundle import INDEX_TYPES
from policies.errors import BundleError
from policies.types import HeadKind

Convention = Literal["sb3_actor_critic", "sb3", "d3rlpy", "rllib", "torch"]
Shape = tuple[int | None, ...]

FLOATS: Mapping[int, Literal["float32", "float64"]] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
}
INTEGERS = INDEX_TYPES - FLOATS.keys()
# Operators that carry numbers on as they are: what stands before them decides what an output means.
CARRIERS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
# An actor that ends so answers with a continuous action in bounds: SB3's and d3rlpy's SAC, TD3, DDPG.
BOUNDED = frozenset({"Tanh", "Clip", "Min", "Max"})


@dataclass(frozen=True, slots=True)
class Profile:
    """What a graph says of itself. `n` is None where only the caller can know it."""

    convention: Convention
    input: str
    output: str
    head: HeadKind
    shape: tuple[int, ...]  # of one observation
    dtype: Literal["float32", "float64"]
    n: int | None
    one_by_one: bool
    note: str


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    elem: int
    dims: Shape | None  # None: the file does not say even how many axes


def recognise(proto: onnx.ModelProto) -> Profile:
    """Say which convention a network follows. Raises BundleError, naming what is not served."""
    graph = _inferred(proto)
    outputs = [_tensor(value) for value in graph.output]
    initialised = {tensor.name for tensor in graph.initializer}
    inputs = [_tensor(value) for value in graph.input if value.name not in initialised]
    if not inputs or not outputs:
        raise _refuse("the network has no input or no output")
    convention = _convention(inputs, outputs)
    output = outputs[0]
    if convention == "rllib":
        output = next(tensor for tensor in outputs if tensor.name == "output")
    observation = _observation(graph, inputs, output)
    shape = _shape(observation)
    head, n, note = _head(graph, convention, output)
    return Profile(
        convention=convention,
        input=observation.name,
        output=output.name,
        head=head,
        shape=shape,
        dtype=FLOATS[observation.elem],
        n=n,
        one_by_one=1 in ((observation.dims or ())[:1] + (output.dims or ())[:1]),
        note=note,
    )


def settle(profile: Profile, n: int | None, head: HeadKind | None) -> Profile:
    """Complete a profile by what the caller knows. Raises BundleError where that contradicts the file or is missing."""
    if head is not None and (head == "action") != (profile.head == "action"):
        raise BundleError(f"the network answers as head {profile.head}, not {head}", "head", "profile")
    if n is None and profile.n is None:
        detail = "the file does not say how many actions there are; name them (--actions left,right or --actions 2)"
        raise BundleError(detail, "action.n", "profile")
    if n is not None and profile.n is not None and n != profile.n:
        raise BundleError(f"the network has {profile.n} actions, {n} were named", "action.n", "profile")
    return replace(profile, n=profile.n if n is None else n, head=head or profile.head)


def propose(
    profile: Profile,
    *,
    policy: str,
    version: str,
    sha256: str,
    actions: Sequence[str] = (),
    features: Sequence[Mapping[str, Any]] = (),
    fallback: int | str = "none",
    epsilon: float = 0.0,
) -> dict[str, Any]:
    """Write the manifest of a settled profile, as `policy.yaml` holds it."""
    observation: dict[str, Any] = {"shape": list(profile.shape), "dtype": profile.dtype}
    action: dict[str, Any] = {"kind": "discrete", "n": profile.n}
    if features:
        observation["features"] = [dict(feature) for feature in features]
    if actions:
        action["names"] = list(actions)
    return {
        "schema": 1,
        "policy": policy,
        "version": version,
        "observation": observation,
        "action": action,
        "head": profile.head,
        "model": {"file": "model.onnx", "sha256": sha256, "input": profile.input, "output": profile.output},
        "exploration": {"epsilon": epsilon},
        "fallback": fallback,
        "training": {"exported_as": profile.convention},
    }


def trim(proto: onnx.ModelProto, profile: Profile) -> onnx.ModelProto:
    """Leave one input and one output, and the nodes between. RLlib's files carry states that they never read."""
    trimmed = onnx.ModelProto()
    trimmed.CopyFrom(proto)
    graph = trimmed.graph
    needed, nodes = _behind(graph, profile.output)
    kept = [node for node in graph.node if node in nodes]
    inputs = [value for value in graph.input if value.name == profile.input or value.name in needed]
    outputs = [value for value in graph.output if value.name == profile.output]
    for held, values in ((graph.node, kept), (graph.input, inputs), (graph.output, outputs)):
        del held[:]
        held.extend(values)
    return trimmed


def _refuse(detail: str, field: str = "model.onnx") -> BundleError:
    return BundleError(detail, field, "profile")


def _inferred(proto: onnx.ModelProto) -> onnx.GraphProto:
    """Give the graph with the shapes that can be computed; as it is where they cannot."""
    try:
        return onnx.shape_inference.infer_shapes(proto).graph
    except Exception:  # C++ raises InferenceError, and others on graphs that ONNX Runtime will refuse by name
        return proto.graph


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    found = value.type.tensor_type
    if not found.HasField("shape"):
        return Tensor(value.name, found.elem_type, None)
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in found.shape.dim)
    return Tensor(value.name, found.elem_type, dims)


def _convention(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Convention:
    names, answers = {tensor.name for tensor in inputs}, {tensor.name for tensor in outputs}
    if {"obs", "state_ins"} <= names and "output" in answers:
        return "rllib"
    if "input_0" in names and answers == {"output_0"}:
        return "d3rlpy"
    if names == {"input"} and len(outputs) == 3:
        return "sb3_actor_critic"
    if len(outputs) > 1:
        listed = ", ".join(tensor.name for tensor in outputs)
        raise _refuse(f"the network has several outputs ({listed}) and follows no known convention", "model.output")
    return "sb3" if names == {"input"} else "torch"


def _observation(graph: onnx.GraphProto, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
    """Find the one input that the output depends on."""
    needed, _ = _behind(graph, output.name)
    read = [tensor for tensor in inputs if tensor.name in needed]
    if any(tensor.name.startswith(("state_ins", "h_in", "c_in", "recurrent_in")) for tensor in read):
        raise _refuse("recurrent policies are not served yet: the network reads a state of its own", "model.input")
    if len(read) != 1:
        listed = ", ".join(tensor.name for tensor in read) or "none"
        raise _refuse(f"a network must read exactly one observation; this one reads {listed}", "model.input")
    return read[0]


def _shape(observation: Tensor) -> tuple[int, ...]:
    if observation.elem not in FLOATS:
        raise _refuse("the observation must be float32 or float64", "observation.dtype")
    shape = tuple(dim for dim in (observation.dims or ())[1:] if dim is not None)
    if not shape or len(shape) + 1 != len(observation.dims or ()):
        detail = f"the observation must have the shape [batch, sizes…], the file says {observation.dims}"
        raise _refuse(detail, "observation.shape")
    return shape


def _head(graph: onnx.GraphProto, convention: Convention, output: Tensor) -> tuple[HeadKind, int | None, str]:
    """Say what an output means, how many actions it tells of, and what the caller ought to know."""
    width = output.dims[1] if output.dims and len(output.dims) == 2 else None
    last = _last(graph, output.name)
    if output.dims is not None and len(output.dims) > 2:
        raise _refuse(f"the output has {len(output.dims)} axes, not [batch, actions]", "model.output")
    if output.elem in INTEGERS:
        if width not in (None, 1):
            raise _refuse("multi-discrete actions are not served yet: several indices for each state", "model.output")
        return "action", _choices(graph, last), "greedy: the file holds the action's index alone, no second-best"
    if output.elem not in FLOATS:
        raise _refuse("the output is neither a number nor an index", "model.output")
    if last is not None and last.op_type in {"ArgMax"}:
        return "action", _choices(graph, last), "greedy: the file holds the action's index alone, no second-best"
    if convention in ("d3rlpy", "sb3_actor_critic") or (last is not None and last.op_type in BOUNDED):
        raise _refuse("continuous actions are not served yet: the output is a number, not an index", "model.output")
    if width is None or width < 2:
        raise _refuse(f"the output {output.dims} is no row of actions, [batch, n]", "model.output")
    return _scores(convention, output.name, last), width, _advice(convention, output.name, last)


def _scores(convention: Convention, name: str, last: onnx.NodeProto | None) -> HeadKind:
    if last is not None and last.op_type == "Softmax":
        return "probabilities"
    if convention == "rllib" or "logit" in name.lower() or (last is not None and last.op_type == "LogSoftmax"):
        return "logits"
    return "q_values"


def _advice(convention: Convention, name: str, last: onnx.NodeProto | None) -> str:
    head = _scores(convention, name, last)
    if head != "q_values":
        return "stochastic: actions are drawn from the network's distribution"
    if name.lower().startswith("q"):
        return "greedy: the largest value wins"
    return "read as values of which the largest wins; with `head: logits` actions are drawn from their softmax instead"


def _producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output if name}


def _last(graph: onnx.GraphProto, name: str) -> onnx.NodeProto | None:
    """Find the operator that made an output, looking through those that only carry it on."""
    producers = _producers(graph)
    node = producers.get(name)
    for _ in range(len(graph.node)):  # a bound: a hostile graph may run in a circle
        if node is None or node.op_type not in CARRIERS:
            break
        node = producers.get(node.input[0]) if node.input else None
    return node


def _choices(graph: onnx.GraphProto, last: onnx.NodeProto | None) -> int | None:
    """Say among how many an ArgMax chose."""
    if last is None or last.op_type != "ArgMax" or not last.input:
        return None
    known = {value.name: _tensor(value).dims for value in (*graph.value_info, *graph.input)}
    dims = known.get(last.input[0])
    return dims[-1] if dims else None


def _behind(graph: onnx.GraphProto, output: str) -> tuple[set[str], list[onnx.NodeProto]]:
    """Give the names and nodes that an output depends on, those that inner graphs read included."""
    producers, needed, nodes = _producers(graph), {output}, list[onnx.NodeProto]()
    waiting = [output]
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or any(node is known for known in nodes):
            continue
        nodes.append(node)
        fresh = [name for name in _reads(node) if name and name not in needed]
        needed.update(fresh)
        waiting += fresh
    return needed, nodes


def _reads(node: onnx.NodeProto) -> list[str]:
    inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    inner += [graph for attribute in node.attribute for graph in attribute.graphs]
    return [*node.input, *(name for graph in inner for each in graph.node for name in _reads(each))]
