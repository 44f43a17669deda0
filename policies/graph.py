"""What an ONNX graph may hold before a session sees it. Pure: it reads, and runs nothing.

Duty: no data outside the file, no operators but the standard ones, versions that the runtime knows, inputs and outputs
as declared. Every graph is looked at: those inside nodes, functions and training parts too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import onnx
from google.protobuf.message import DecodeError

from policies.errors import BundleError

# A part can be two bytes in the file and hundreds in memory. A policy has dozens of nodes, the largest some thousands.
MAX_PARTS = 50_000
OPERATOR_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
# Opsets 11 (d3rlpy's exports) to 25 and IR up to 13: what ONNX Runtime 1.31 documents as supported.
OPSETS = range(11, 26)
IR_VERSIONS = range(4, 14)
# What an exporter writes for an action index: d3rlpy and SB3 int64, others int32 or a float.
INDEX_TYPES = frozenset(
    {onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE}
)
FLOAT_TYPES = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE})

Shape = list[int | None]


def parse_model(model: bytes) -> onnx.ModelProto:
    """Parse a network. Raises BundleError."""
    try:
        proto = onnx.load_model_from_string(model)
    except DecodeError as error:
        if "alloc failed" in str(error):
            detail = "model.onnx has more parts than memory holds; export a network with fewer nodes"
            raise BundleError(detail, "model.onnx", "memory") from None
        detail = "model.onnx is not an ONNX file, or is cut short: export or copy it again"
        raise BundleError(detail, "model.onnx", "parse") from None
    graph = proto.graph
    lists = (graph.node, graph.initializer, proto.functions, proto.opset_import, proto.metadata_props)
    if (most := max(map(len, lists))) > MAX_PARTS:
        detail = (
            f"model.onnx has {most} nodes or other parts of one kind, the cap is {MAX_PARTS}; export a smaller network"
        )
        raise BundleError(detail, "model.onnx", "size")
    return proto


def check_tensors(proto: onnx.ModelProto) -> None:
    """Refuse tensors that keep their data elsewhere. Raises BundleError."""
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            detail = f"tensor {tensor.name!r} keeps its data in another file; export with everything in one file"
            raise BundleError(detail, "model.onnx", "external_data")


def check_operators(proto: onnx.ModelProto) -> None:
    """Refuse operators outside the standard, and versions that the runtime does not know. Raises BundleError."""
    if proto.ir_version not in IR_VERSIONS:
        detail = f"IR version {proto.ir_version} is not in {IR_VERSIONS[0]}..{IR_VERSIONS[-1]}; export it again"
        raise BundleError(detail, "model.onnx", "ir_version")
    for opset in (*proto.opset_import, *(each for function in proto.functions for each in function.opset_import)):
        if opset.domain not in OPERATOR_DOMAINS:
            detail = f"operator domain {opset.domain!r} is not allowed; export with standard ONNX operators only"
            raise BundleError(detail, "model.onnx", "operators")
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            detail = f"opset {opset.version} is not in {OPSETS[0]}..{OPSETS[-1]}; export with opset_version=17"
            raise BundleError(detail, "model.onnx", "opset")
    for node in _nodes(proto):
        if node.domain not in OPERATOR_DOMAINS or node.op_type == "EPContext":
            detail = f"operator {node.domain}:{node.op_type} is not allowed; export with standard ONNX operators only"
            raise BundleError(detail, "model.onnx", "operators")


def operators_of(proto: onnx.ModelProto) -> frozenset[str]:
    """Name the operators that a network uses, in whichever of its graphs."""
    return frozenset(node.op_type for node in _nodes(proto))


def inputs_of(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto.Tensor]:
    """The inputs that a caller must give, by name. A name that is not UTF-8 is bytes to the parser, and written out."""
    initialised = {tensor.name for tensor in graph.initializer}
    return {str(value.name): value.type.tensor_type for value in graph.input if value.name not in initialised}


def outputs_of(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto.Tensor]:
    return {str(value.name): value.type.tensor_type for value in graph.output}


def shape_of(tensor: onnx.TypeProto.Tensor) -> Shape:
    """The axes of a tensor, None where the file does not say how long one is."""
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Every graph of the model, those inside nodes and functions included."""
    waiting = [proto.graph]
    waiting += [graph for info in proto.training_info for graph in (info.initialization, info.algorithm)]
    for function in proto.functions:
        waiting += [graph for each in function.attribute_proto for graph in _present(each)]
        waiting += [graph for node in function.node for graph in _subgraphs(node)]
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
    defaults = [each for function in proto.functions for each in function.attribute_proto]
    for attribute in chain(defaults, (each for node in _nodes(proto) for each in node.attribute)):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
