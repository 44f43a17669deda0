"""Networks whose work a state's numbers decide: any trial passes them, and one state makes them hang or burst."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL

# More turns than a machine makes in a year, more bytes than an address has bits for: 2^30 · 2^30 · 4.
ENDLESS = [float(1 << 60), 0.0]
BURSTING = [float(1 << 30), 0.0]


def _network(nodes: Sequence[onnx.NodeProto], **constants: np.ndarray) -> onnx.ModelProto:
    """A network from `observation` [batch, 2] to `q_values` [batch, 2]; `largest`: the largest number of all states."""
    first = [
        helper.make_node("ReduceMax", ["observation"], ["maximum"], keepdims=0),
        helper.make_node("Cast", ["maximum"], ["largest"], to=INT64),
    ]
    graph = helper.make_graph(
        [*first, *nodes],
        "growing",
        [helper.make_tensor_value_info("observation", FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("q_values", FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def loop() -> onnx.ModelProto:
    """Answer with the state, after as many turns of a loop as its largest number says."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["go_on"]), helper.make_node("Identity", ["row"], ["row_out"])],
        "body",
        [value("turn", INT64, []), value("going", BOOL, []), value("row", FLOAT, None)],
        [value("go_on", BOOL, []), value("row_out", FLOAT, None)],
    )
    turning = helper.make_node("Loop", ["largest", "yes", "observation"], ["q_values"], body=body)
    return _network([turning], yes=np.array(True))


def square() -> onnx.ModelProto:
    """Answer with the state, after filling a square of zeros with sides as long as its largest number."""
    return _network([*_square_of_zeros(), *_plus_largest_of("square")], one=np.array([1]))


def product() -> onnx.ModelProto:
    """As `square`, and multiply it by itself: one kernel that takes as long as it takes."""
    multiply = helper.make_node("MatMul", ["square", "square"], ["product"])
    return _network([*_square_of_zeros(), multiply, *_plus_largest_of("product")], one=np.array([1]))


def _square_of_zeros() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Reshape", ["largest", "one"], ["side"]),
        helper.make_node("Concat", ["side", "side"], ["sides"], axis=0),
        helper.make_node("ConstantOfShape", ["sides"], ["square"]),
    ]


def _plus_largest_of(name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("ReduceMax", [name], ["zero"], keepdims=0),
        helper.make_node("Add", ["observation", "zero"], ["q_values"]),
    ]
