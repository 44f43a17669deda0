"""Networks that no trainer exports, made by code: each breaks one rule of the gate, most of them in a hidden place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.policies.networks import linear

Change = Callable[[onnx.ModelProto], None]

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
OPSET = [helper.make_opsetid("", 17)]


def identity(change: Change) -> onnx.ModelProto:
    """The network that answers with its state, changed."""
    proto = linear([[1, 0], [0, 1]])
    change(proto)
    return proto


def network(nodes: Sequence[onnx.NodeProto], **constants: np.ndarray) -> onnx.ModelProto:
    """A network from `observation` [batch, 2] to `q_values` [batch, 2]."""
    graph = helper.make_graph(
        list(nodes),
        "hostile",
        [helper.make_tensor_value_info("observation", FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("q_values", FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=OPSET, ir_version=10)


def _plus_largest_of(nodes: Sequence[onnx.NodeProto], **constants: np.ndarray) -> onnx.ModelProto:
    """Answer with the state, plus the largest element of a tensor `huge`, which must be computed for it."""
    last = [
        helper.make_node("ReduceMax", ["huge"], ["largest"], keepdims=0),
        helper.make_node("Add", ["observation", "largest"], ["q_values"]),
    ]
    return network([*nodes, *last], **constants)


# Data that lies elsewhere.


def external(tensor: onnx.TensorProto, location: str = "../../etc/passwd") -> None:
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location


def _elsewhere(location: str = "../../etc/passwd") -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), "elsewhere")
    external(tensor, location)
    return tensor


def traversal(proto: onnx.ModelProto) -> None:
    external(proto.graph.initializer[0])


def beside(proto: onnx.ModelProto) -> None:
    """As a link: the location is an innocent name, and what lies there is not."""
    external(proto.graph.initializer[0], "weights.bin")


def memory_address(proto: onnx.ModelProto) -> None:
    """ONNX Runtime's own marker for data at an address of its process."""
    external(proto.graph.initializer[0], "*/_ORT_MEM_ADDR_/*")


def entries_only(proto: onnx.ModelProto) -> None:
    """An entry without the flag that says that it counts."""
    external(proto.graph.initializer[0])
    proto.graph.initializer[0].data_location = TensorProto.DEFAULT


def in_sparse_values(proto: onnx.ModelProto) -> None:
    sparse = proto.graph.sparse_initializer.add()
    sparse.values.CopyFrom(_elsewhere())


def in_sparse_indices(proto: onnx.ModelProto) -> None:
    sparse = proto.graph.sparse_initializer.add()
    sparse.indices.CopyFrom(_elsewhere())


def in_an_attribute(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=_elsewhere()))


def in_a_list_of_tensors(proto: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.append(helper.make_attribute("tensors", [_elsewhere()]))
    proto.graph.node.append(node)


def in_a_sparse_attribute(proto: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"])
    attribute = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(_elsewhere())
    proto.graph.node.append(node)


def _hidden_graph() -> onnx.GraphProto:
    return helper.make_graph([], "inner", [], [], [_elsewhere()])


def in_a_subgraph(proto: onnx.ModelProto) -> None:
    inner = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=_hidden_graph())], "outer", [], [])
    proto.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner))


def _function(node: onnx.NodeProto) -> onnx.FunctionProto:
    return helper.make_function("ai.onnx.ml", "Hidden", ["x"], ["y"], [node], OPSET)


def in_a_function(proto: onnx.ModelProto) -> None:
    proto.functions.append(_function(helper.make_node("Constant", [], ["y"], value=_elsewhere())))


def in_a_functions_subgraph(proto: onnx.ModelProto) -> None:
    proto.functions.append(_function(helper.make_node("If", ["x"], ["y"], then_branch=_hidden_graph())))


def in_a_functions_default(proto: onnx.ModelProto) -> None:
    function = _function(helper.make_node("Identity", ["x"], ["y"]))
    function.attribute_proto.append(helper.make_attribute("value", _elsewhere()))
    proto.functions.append(function)


def in_a_graph_of_a_functions_default(proto: onnx.ModelProto) -> None:
    function = _function(helper.make_node("Identity", ["x"], ["y"]))
    function.attribute_proto.append(helper.make_attribute("body", _hidden_graph()))
    proto.functions.append(function)


def in_training_info(proto: onnx.ModelProto) -> None:
    proto.training_info.add().algorithm.CopyFrom(_hidden_graph())


# Operators that are not the standard's.


def foreign_node(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "com.microsoft"


def foreign_import(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("evil.example", 1))


def foreign_in_a_function(proto: onnx.ModelProto) -> None:
    proto.functions.append(_function(helper.make_node("PyOp", ["x"], ["y"], domain="ai.onnx.contrib")))


def foreign_import_of_a_function(proto: onnx.ModelProto) -> None:
    function = _function(helper.make_node("Identity", ["x"], ["y"]))
    function.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto.functions.append(function)


def foreign_in_a_subgraph(proto: onnx.ModelProto) -> None:
    node = helper.make_node("PyOp", ["x"], ["y"], domain="ai.onnx.contrib")
    inner = helper.make_graph([node], "inner", [], [])
    proto.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner))


def ep_context(proto: onnx.ModelProto) -> None:
    """A node by which an execution provider opens a file that it names."""
    proto.graph.node.append(helper.make_node("EPContext", [], ["y"], ep_cache_context="/etc/passwd", embed_mode=0))


def old_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 7


def new_ir(proto: onnx.ModelProto) -> None:
    proto.ir_version = 99


def runtimes_own_format(model: bytes) -> bytes:
    """A network that is ONNX to a parser of protobufs, and says `ORTM` where ONNX Runtime looks for its own format."""
    return b"\x12\x06xxORTM" + model  # field 2, producer_name, six bytes long


# Networks that are small in the file and large when they run.


def constant_of_shape() -> onnx.ModelProto:
    node = helper.make_node("ConstantOfShape", ["dims"], ["huge"])
    return _plus_largest_of([node], dims=np.array([1 << 20, 1 << 20], np.int64))


def expand() -> onnx.ModelProto:
    """To 4 TiB, from a tensor that depends on the state, so that nothing is folded at load."""
    nodes = [
        helper.make_node("ReduceMax", ["observation"], ["one"], keepdims=0),
        helper.make_node("Expand", ["one", "dims"], ["huge"]),
    ]
    return _plus_largest_of(nodes, dims=np.array([1 << 20, 1 << 20], np.int64))


def tile() -> onnx.ModelProto:
    node = helper.make_node("Tile", ["observation", "times"], ["huge"])
    return _plus_largest_of([node], times=np.array([1 << 19, 1 << 18], np.int64))


def chain_of_constants() -> onnx.ModelProto:
    """Forty constants, each the two before it side by side: folded at load, they fill any memory."""
    nodes = [helper.make_node("Concat", ["c0", "c0"], ["c1"], axis=0)]
    nodes += [helper.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(1, 40)]
    nodes.append(helper.make_node("Identity", ["c40"], ["huge"]))
    return _plus_largest_of(nodes, c0=np.ones(1024, np.float32))


def declared_huge(proto: onnx.ModelProto) -> None:
    """A bias that says it has terabytes, and brings none."""
    _redeclare(proto, [1 << 20, 1 << 20])


def overflowing_dims(proto: onnx.ModelProto) -> None:
    """Its elements, counted in 64 bits, are none."""
    _redeclare(proto, [1 << 32, 1 << 32])


def negative_dims(proto: onnx.ModelProto) -> None:
    _redeclare(proto, [-1, 4])


def _redeclare(proto: onnx.ModelProto, dims: Sequence[int]) -> None:
    bias = proto.graph.initializer[1]
    del bias.dims[:]
    bias.dims.extend(dims)
    bias.raw_data = b""


def loop(trips: int | None) -> onnx.ModelProto:
    """Add nothing to the state, so many times; without a count, forever."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["go_on"]),
            helper.make_node("Mul", ["value", "value"], ["squared"]),
            helper.make_node("Identity", ["squared"], ["value_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_out", FLOAT, None),
        ],
    )
    count = {} if trips is None else {"trips": np.array(trips, np.int64)}
    node = helper.make_node("Loop", ["trips" if count else "", "yes", "observation"], ["q_values"], body=body)
    return network([node], yes=np.array(True), **count)


def nested_subgraphs(depth: int) -> bytes:
    """An If in an If in an If, deeper than any parser follows, so written byte by byte."""
    node = helper.make_node("Identity", ["observation"], ["y"]).SerializeToString()
    for _ in range(depth):
        graph = _field(1, node)
        attribute = _field(1, b"then_branch") + _field(6, graph) + b"\xa0\x01\x05"  # name, g, type GRAPH
        node = _field(1, b"yes") + _field(2, b"y") + _field(4, b"If") + _field(5, attribute)
    proto = network([], yes=np.array(True))
    whole: bytes = proto.SerializeToString()
    return whole + _field(7, _field(1, node))  # a second `graph` is merged into the first


def of_empty_nodes(count: int) -> bytes:
    """A network with so many nodes of two bytes each, which take a hundred when parsed."""
    whole: bytes = linear([[1, 0], [0, 1]]).SerializeToString()
    return whole + _field(7, b"\n\0" * count)


def _field(number: int, content: bytes) -> bytes:
    """One length-delimited field of a protobuf."""
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def slow(width: int = 2048, layers: int = 6) -> onnx.ModelProto:
    """Some 25 million multiplications for a state."""
    nodes, at = [helper.make_node("Tile", ["observation", "times"], ["h0"])], "h0"
    for layer in range(layers):
        nodes.append(helper.make_node("MatMul", [at, "w"], [f"h{layer + 1}"]))
        at = f"h{layer + 1}"
    nodes.append(helper.make_node("Slice", [at, "zero", "two", "axis"], ["q_values"]))
    return network(
        nodes,
        times=np.array([1, width // 2], np.int64),
        w=np.zeros((width, width), np.float32),
        zero=np.array([0], np.int64),
        two=np.array([2], np.int64),
        axis=np.array([1], np.int64),
    )
