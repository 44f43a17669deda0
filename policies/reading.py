"""What an ONNX graph says of itself: names, types, shapes, and what stands behind a tensor. Pure.

Duty: the questions that `profiles.py` asks of a file that nobody wrote a manifest for. It knows no convention and no
policy, runs nothing and refuses nothing: hostile files are refused by `graph.py`.
Strategy: shapes are inferred once; from an output one walks back to the operator that made it, through those that only
carry numbers on.
Promise: no walk is longer than the graph has nodes, whatever the file claims.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from policies.graph import shape_of

# Operators that carry numbers on as they are: what stands before them decides what an output means.
CARRIERS = frozenset({"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output. dims: None where the file does not say even how many axes there are."""

    name: str
    elem: int
    dims: tuple[int | None, ...] | None

    @property
    def width(self) -> int | None:
        """How many numbers a row holds; one for a row that is a lone number."""
        if self.dims is None or len(self.dims) > 2:
            return None
        return self.dims[1] if len(self.dims) == 2 else 1


class Reading:
    """A graph with its shapes inferred, and who made what."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.graph = _inferred(proto)
        self.weights = {tensor.name for tensor in self.graph.initializer}
        self.inputs = [_tensor(value) for value in self.graph.input if value.name not in self.weights]
        self.outputs = [_tensor(value) for value in self.graph.output]
        self._producers = {name: node for node in self.graph.node for name in node.output if name}
        self._dims = {each.name: each.dims for each in map(_tensor, (*self.graph.value_info, *self.graph.input))}

    def last(self, name: str) -> onnx.NodeProto | None:
        """Find the operator that made a tensor, looking through those that only carry it on."""
        node = self._producers.get(name)
        for _ in range(len(self.graph.node)):  # a bound: a hostile graph may run in a circle
            if node is None or node.op_type not in CARRIERS:
                break
            node = self._producers.get(node.input[0]) if node.input else None
        return node

    def last_operator(self, name: str) -> str:
        node = self.last(name)
        return "" if node is None else str(node.op_type)

    def choices(self, name: str) -> tuple[int | None, ...]:
        """Say among how many each index of a tensor was chosen by an ArgMax. None where none stands behind it."""
        node = self.last(name)
        parts = [node] if node is None or node.op_type != "Concat" else [self.last(part) for part in node.input]
        return tuple(self._argmax(part) for part in parts)

    def behind(self, names: Iterable[str]) -> tuple[set[str], list[onnx.NodeProto]]:
        """Give the names and the nodes that these tensors depend on, those that inner graphs read included."""
        waiting = list(names)
        needed, nodes = set(waiting), dict[int, onnx.NodeProto]()
        while waiting:
            node = self._producers.get(waiting.pop())
            if node is None or id(node) in nodes:
                continue
            nodes[id(node)] = node
            fresh = {read for read in _reads(node) if read} - needed
            needed |= fresh
            waiting += fresh
        return needed, list(nodes.values())

    def _argmax(self, node: onnx.NodeProto | None) -> int | None:
        if node is None or node.op_type != "ArgMax" or not node.input:
            return None
        dims = self._dims.get(node.input[0])
        return dims[-1] if dims else None


def _inferred(proto: onnx.ModelProto) -> onnx.GraphProto:
    """Give the graph with the shapes that can be computed; as it is where they cannot."""
    try:
        return onnx.shape_inference.infer_shapes(proto).graph
    except Exception:  # C++ raises InferenceError, and others on graphs that ONNX Runtime will refuse by name
        return proto.graph


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    found = value.type.tensor_type
    return Tensor(value.name, found.elem_type, tuple(shape_of(found)) if found.HasField("shape") else None)


def _reads(node: onnx.NodeProto) -> list[str]:
    inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    inner += [graph for attribute in node.attribute for graph in attribute.graphs]
    return [*node.input, *(name for graph in inner for each in graph.node for name in _reads(each))]
