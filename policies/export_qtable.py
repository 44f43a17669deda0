"""EDGE: a Q-table to a bundle. Needs no library beyond those that serve.

Duty: a table [states, actions] becomes a network: the state's number in, its row of values out, by a Gather node.
Promise: where there is no such state the network answers NaN, which is a fault of that row, and never another's values.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from policies.errors import BundleError
from policies.export_bundle import GOLDEN_STATES, Files, Known, Options, assemble
from policies.propose import Support


def export_qtable(table: npt.NDArray[np.generic], options: Options) -> Files:
    """Make a table of finite values [states, actions] a bundle. The state is one number, 0 to states - 1.

    Gives the three files by name. Raises BundleError.
    """
    proto = qtable_model(table)
    last = len(table) - 1
    states = np.linspace(0, last, min(GOLDEN_STATES, len(table))).round().astype(np.float32)[:, None]
    known = Known(
        said={"head": "q_values"},
        support=Support(low=[0.0], high=[float(last)]),
        states=states,
        training={"exported_from": f"Q-table {len(table)} × {table.shape[1]}"},
    )
    return assemble(proto, options, known)


def qtable_model(table: npt.NDArray[np.generic]) -> onnx.ModelProto:
    """Make a network of a table [states, n]: the state's number in, values out; NaN where there is no such state."""
    if table.ndim != 2 or not table.size or table.dtype.kind not in "iuf" or not np.isfinite(table).all():
        raise BundleError("a Q-table must be finite numbers [states, actions]", "table", "profile")
    rows = np.vstack([table, np.full(table.shape[1], np.nan)]).astype(np.float32)  # the last row: no such state
    constants = {"table": rows, "zero": np.float32(0), "end": np.float32(len(table)), "axis": np.array([1])}
    nodes = [
        helper.make_node("Squeeze", ["state", "axis"], ["number"]),
        helper.make_node("Floor", ["number"], ["whole"]),
        helper.make_node("Equal", ["number", "whole"], ["integer"]),
        helper.make_node("GreaterOrEqual", ["number", "zero"], ["from_zero"]),
        helper.make_node("Less", ["number", "end"], ["before_end"]),
        helper.make_node("And", ["from_zero", "before_end"], ["inside"]),
        helper.make_node("And", ["inside", "integer"], ["known"]),
        helper.make_node("Where", ["known", "number", "end"], ["safe"]),
        helper.make_node("Cast", ["safe"], ["row"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "row"], ["q_values"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "qtable",
        [helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("q_values", TensorProto.FLOAT, ["batch", table.shape[1]])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
