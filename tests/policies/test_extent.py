"""Which networks do more work for some numbers than for others, told from the graph; what exporters write does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from policies.extent import SIZED_BY, grows_with_values
from policies.graph import parse_model
from policies.store import BUNDLED
from tests.policies import growing
from tests.policies.gate.hostile import network, slow
from tests.policies.networks import indexer, linear, logarithm
from tests.service.test_act_spaces import counter

ZERO = np.array([0], np.int64)


def scan(*inside: onnx.NodeProto) -> onnx.ModelProto:
    """A scan over the rows of the state, with these nodes in its body."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [*inside, helper.make_node("Identity", ["row"], ["row_out"])],
        "body",
        [value("row", TensorProto.FLOAT, [2])],
        [value("row_out", TensorProto.FLOAT, [2])],
    )
    return network([helper.make_node("Scan", ["observation"], ["q_values"], body=body, num_scan_inputs=1)])


def sized(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    return network([*nodes, helper.make_node("Identity", ["observation"], ["q_values"])], zero=ZERO)


def function(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    proto = network([helper.make_node("Own", ["observation"], ["q_values"], domain="ai.onnx.ml")])
    opsets: Sequence[onnx.OperatorSetIdProto] = proto.opset_import
    proto.functions.append(helper.make_function("ai.onnx.ml", "Own", ["x"], ["y"], list(nodes), opsets))
    return proto


GROWING: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "loop": (growing.loop, "Loop"),
    "square": (growing.square, "ConstantOfShape"),
    "product": (growing.product, "ConstantOfShape"),
    "range": (lambda: sized(helper.make_node("Range", ["zero", "observation", "zero"], ["many"])), "Range"),
    "tile": (lambda: sized(helper.make_node("Tile", ["zero", "observation"], ["many"])), "Tile"),
    "one_hot": (lambda: sized(helper.make_node("OneHot", ["zero", "observation", "zero"], ["many"])), "OneHot"),
    "resize": (lambda: sized(helper.make_node("Resize", ["zero", "", "", "observation"], ["many"])), "Resize"),
    "by_a_detour": (
        lambda: sized(
            helper.make_node("Round", ["observation"], ["rounded"]),
            helper.make_node("Concat", ["zero", "rounded"], ["sides"], axis=0),
            helper.make_node("Expand", ["zero", "sides"], ["many"]),
        ),
        "Expand",
    ),
    "inside_a_scan": (lambda: scan(helper.make_node("Tile", ["row", "row"], ["many"])), "Tile"),
    "inside_a_function": (lambda: function(helper.make_node("Tile", ["x", "x"], ["y"])), "Tile"),
    "after_a_scan": (
        lambda: sized(
            scan().graph.node[0],
            helper.make_node("Expand", ["zero", "q_values"], ["many"]),
        ),
        "Expand",
    ),
}
STEADY: dict[str, Callable[[], onnx.ModelProto]] = {
    "linear": lambda: linear([[1, 0], [0, 1]]),
    "logarithm": logarithm,
    "indexer": indexer,
    "counter": counter,
    "constant_times": slow,
    "scan": scan,
    "function": lambda: function(helper.make_node("Identity", ["x"], ["y"])),
    "by_the_batch": lambda: sized(
        helper.make_node("Shape", ["observation"], ["sides"]),
        helper.make_node("Concat", ["zero", "sides"], ["all"], axis=0),
        helper.make_node("ConstantOfShape", ["all"], ["many"]),
        helper.make_node("Expand", ["observation", "sides"], ["more"]),
    ),
}


@pytest.mark.parametrize("case", GROWING)
def test_a_size_or_a_count_that_follows_from_a_state_is_found(case: str) -> None:
    make, operator = GROWING[case]
    assert grows_with_values(make()) == operator


@pytest.mark.parametrize("case", STEADY)
def test_a_size_that_follows_from_the_batch_or_a_constant_is_none(case: str) -> None:
    assert grows_with_values(STEADY[case]()) is None


def test_what_ships_is_steady() -> None:
    models = list(BUNDLED.rglob("model.onnx"))
    assert models
    assert not any(grows_with_values(parse_model(model.read_bytes())) for model in models)


def test_every_operator_named_exists_and_has_such_inputs() -> None:
    for operator, positions in SIZED_BY.items():
        schema = onnx.defs.get_schema(operator, 9 if operator == "Upsample" else 25)
        assert max(positions) < len(schema.inputs), operator
