"""Whether a state's numbers, not only its shape, decide how much a network computes. Pure: it reads, and runs nothing.

Duty: name the operator, if there is one. Such a network passes any trial and may hang or fill memory on a state that
nobody has tried, so it never runs where it could hold up anything else.
Strategy: follow what depends on the inputs' numbers through the graph; `Shape` and `Size` end the trail. Where it
meets an input that says how large an output is, or how often a loop turns, that operator is the answer. What cannot be
followed (the inside of a branch, a scan or a function) counts as soon as it holds such an operator.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

# For each operator with an output as large as its input says: which inputs say so.
SIZED_BY: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1,),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
    "Tile": (1,),
    "Upsample": (1,),
}
SHAPES = frozenset({"Shape", "Size"})


def grows_with_values(proto: onnx.ModelProto) -> str | None:
    """Name an operator whose work a state's numbers may decide; None: the work follows from shapes alone."""
    functions = {function.name for function in proto.functions}
    initialised = {tensor.name for tensor in proto.graph.initializer}
    tainted = {value.name for value in proto.graph.input} - initialised
    for node in proto.graph.node:
        if node.op_type in functions:
            inner = [each for function in proto.functions for each in function.node]
            found = _anywhere(inner)
        else:
            found = _sized(node, tainted) or _anywhere(_inside(node))
        if found:
            return found
        if node.op_type not in SHAPES and _depends(node, tainted):
            tainted.update(node.output)
    return None


def _sized(node: onnx.NodeProto, tainted: set[str]) -> str | None:
    if node.op_type == "Loop":  # its body may decide when it ends
        return "Loop"
    named = [node.input[at] for at in SIZED_BY.get(node.op_type, ()) if at < len(node.input)]
    return str(node.op_type) if tainted.intersection(named) else None


def _depends(node: onnx.NodeProto, tainted: set[str]) -> bool:
    """A node with a graph inside may read any value of the graph around it."""
    return bool(tainted.intersection(node.input)) or any(attribute.HasField("g") for attribute in node.attribute)


def _inside(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [inner for attribute in node.attribute if attribute.HasField("g") for inner in attribute.g.node]


def _anywhere(nodes: Iterable[onnx.NodeProto]) -> str | None:
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.op_type == "Loop" or node.op_type in SIZED_BY:
            return str(node.op_type)
        waiting += _inside(node)
    return None
