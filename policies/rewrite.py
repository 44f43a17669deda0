"""Small changes to ONNX graphs that leave their answers as they are. Pure.

Duty: what a recognised file needs before it is a bundle's `model.onnx`: only the inputs and outputs that are served,
and the axes that the exporter left out. It decides nothing: `profiles.py` says what is served.
Promise: for the same state, the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from policies.profiles import Profile
from policies.reading import Reading

# Added to the name of an input or output that got an axis.
BATCH = ".batch"


def served(proto: onnx.ModelProto, profile: Profile) -> tuple[onnx.ModelProto, Profile]:
    """Give the network as it is served, and its profile with the names that inputs and outputs have by now."""
    network = trim(proto, profile)
    if profile.unbatched:
        network = batched(network, profile)
        return network, replace(profile, input=f"{profile.input}{BATCH}", output=f"{profile.output}{BATCH}")
    if profile.lone:
        return column(network, profile), replace(profile, output=f"{profile.output}{BATCH}")
    return network, profile


def trim(proto: onnx.ModelProto, profile: Profile) -> onnx.ModelProto:
    """Leave the outputs that are served and what they depend on. RLlib's files carry states that they never read."""
    trimmed = onnx.ModelProto()
    trimmed.CopyFrom(proto)
    graph = trimmed.graph
    needed, _ = Reading(proto).behind(profile.outputs)
    kept = [node for node in graph.node if needed.intersection(node.output)]
    inputs = [value for value in graph.input if value.name in needed]
    outputs = [value for name in profile.outputs for value in graph.output if value.name == name]
    for held, values in ((graph.node, kept), (graph.input, inputs), (graph.output, outputs)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del held[:]
        held.extend(copies)
    return trimmed


def batched(proto: onnx.ModelProto, profile: Profile) -> onnx.ModelProto:
    """Give a network of one observation a batch axis of one: [features] becomes [1, features], the answer [1, n]."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    (taken,) = (value for value in changed.graph.input if value.name == profile.input)
    state = [dim.dim_value for dim in taken.type.tensor_type.shape.dim]
    (given,) = changed.graph.output
    answer = [dim.dim_value for dim in given.type.tensor_type.shape.dim] or [1]
    _reshape(changed.graph, profile.output, f"{profile.output}{BATCH}", [1, *answer])
    given.CopyFrom(_value(f"{profile.output}{BATCH}", given, [1, *answer]))
    _reshape(changed.graph, f"{profile.input}{BATCH}", profile.input, state)
    taken.CopyFrom(_value(f"{profile.input}{BATCH}", taken, [1, *state]))
    return changed


def column(proto: onnx.ModelProto, profile: Profile) -> onnx.ModelProto:
    """Give an answer of one number for each state, [batch], the axis of its numbers: [batch, 1]."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    (given,) = (value for value in changed.graph.output if value.name == profile.output)
    batch = given.type.tensor_type.shape.dim[0]
    _reshape(changed.graph, profile.output, f"{profile.output}{BATCH}", [-1, 1])
    given.CopyFrom(_value(f"{profile.output}{BATCH}", given, [batch.dim_value or batch.dim_param or None, 1]))
    return changed


def _value(name: str, like: onnx.ValueInfoProto, shape: Sequence[int | str | None]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, like.type.tensor_type.elem_type, shape)


def _reshape(graph: onnx.GraphProto, taken: str, given: str, shape: Sequence[int]) -> None:
    """Add a node that makes `given` of `taken`: first in the graph if that is an input of it, otherwise last."""
    graph.initializer.append(numpy_helper.from_array(np.array(shape, dtype=np.int64), f"{given}.shape"))
    node = helper.make_node("Reshape", [taken, f"{given}.shape"], [given])
    first = given in {value.name for value in graph.input}
    nodes = [node, *graph.node] if first else [*graph.node, node]
    copies = [onnx.NodeProto.FromString(each.SerializeToString()) for each in nodes]
    del graph.node[:]
    graph.node.extend(copies)
