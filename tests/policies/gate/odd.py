"""Networks that pass the gate and that their owner should know something about."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

from tests.policies.gate.hostile import FLOAT, OPSET, network
from tests.policies.networks import bundle_files, identity_files

Files = dict[str, bytes]
NINE = [[float(i), float(9 - i)] for i in range(9)]


def bounded(low: float = 0.0, high: float = 10.0, **more: Any) -> dict[str, Any]:
    """An observation of two features with these bounds."""
    return {"shape": [2], "dtype": "float32", "features": [{"name": n, "low": low, "high": high, **more} for n in "xy"]}


def good(**changes: Any) -> Files:
    """A bundle about which there is nothing to say: many states, both actions, bounds."""
    files = identity_files(observation=bounded(), **changes)
    return files | {"golden.json": json.dumps({"states": NINE, "outputs": NINE}).encode()}


def around(proto: onnx.ModelProto, outputs: list[list[float]], atol: float = 1e-5, **changes: Any) -> Files:
    """A bundle of nine golden states around a network."""
    files = bundle_files(proto, NINE, outputs, **({"observation": bounded()} | changes))
    return files | {"golden.json": json.dumps({"states": NINE, "outputs": outputs, "atol": atol}).encode()}


def drawing() -> Files:
    """Adds noise to the state."""
    noise = helper.make_node("RandomUniformLike", ["observation"], ["noise"])
    return around(network([noise, helper.make_node("Add", ["observation", "noise"], ["q_values"])]), NINE, atol=2.0)


def mixing() -> Files:
    """Takes the batch's mean from each state, as batch normalisation in training mode does."""
    mean = helper.make_node("ReduceMean", ["observation"], ["mean"], axes=[0], keepdims=1)
    proto = network([mean, helper.make_node("Sub", ["observation", "mean"], ["q_values"])])
    return around(proto, (np.array(NINE) - np.mean(NINE, axis=0)).tolist())


def undefined_below_zero() -> Files:
    """The square root of the state: NaN where training has not been, by the golden states, but has by the bounds."""
    proto = network([helper.make_node("Sqrt", ["observation"], ["q_values"])])
    return around(proto, np.sqrt(NINE).tolist(), observation=bounded(low=-10.0))


def failing_above_nine() -> Files:
    """Looks its answer up in a table of ten rows."""
    nodes = [
        helper.make_node("ReduceMax", ["observation"], ["largest"], axes=[1], keepdims=0),
        helper.make_node("Cast", ["largest"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["q_values"], axis=0),
    ]
    table = np.stack([np.arange(10), np.arange(10)[::-1]], axis=1).astype(np.float32)
    outputs = [table[int(max(state))].tolist() for state in NINE]
    return around(network(nodes, table=table), outputs, observation=bounded(high=100.0))


def looping_above(limit: float) -> Files:
    """Loops for as long as the state's largest element is above `limit`: forever, or not at all."""
    body = helper.make_graph(
        [
            helper.make_node("ReduceMax", ["value"], ["largest"], keepdims=0),
            helper.make_node("Greater", ["largest", "limit"], ["go_on"]),
            helper.make_node("Identity", ["value"], ["value_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_out", FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["", "yes", "observation"], ["q_values"], body=body)
    proto = network([loop], yes=np.array(True), limit=np.array(limit, np.float32))
    return around(proto, NINE, observation=bounded(high=100.0))


def no_distribution() -> Files:
    """Divides by a number that is the sum of every golden state, and of few others."""
    proto = network([helper.make_node("Div", ["observation", "nine"], ["q_values"])], nine=np.array(9, np.float32))
    return around(proto, (np.array(NINE) / 9).tolist(), head="probabilities")


def masked(forbidden: float) -> Files:
    """Adds `forbidden` to what its mask input does not allow."""
    nodes = [
        helper.make_node("Where", ["mask", "zero", "forbidden"], ["penalty"]),
        helper.make_node("Add", ["observation", "penalty"], ["q_values"]),
    ]
    proto = network(nodes, zero=np.zeros(1, np.float32), forbidden=np.array([forbidden], np.float32))
    proto.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, ["batch", 2]))
    return _with_model(around(proto, NINE), mask="mask")


def deviating(log_std: float) -> Files:
    """A Gaussian around the state with that log deviation everywhere."""
    nodes = [
        helper.make_node("Mul", ["observation", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "log_std"], ["same"]),
        helper.make_node("Concat", ["observation", "same"], ["q_values"], axis=1),
    ]
    proto = network(nodes, zero=np.zeros(1, np.float32), log_std=np.array([log_std], np.float32))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
    outputs = [[*state, log_std, log_std] for state in NINE]
    action = {"kind": "continuous", "low": [-10.0, -10.0], "high": [10.0, 10.0]}
    return around(proto, outputs, head="gaussian", action=action, fallback=[0.0, 0.0], exploration=None)


def recurrent(growth: float) -> Files:
    """Remembers one number, multiplied by `growth` and increased at each step, and leaves the state as it is."""
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["observation"], ["q_values"]),
            helper.make_node("Mul", ["h", "growth"], ["grown"]),
            helper.make_node("Add", ["grown", "one"], ["h_out"]),
        ],
        "recurrent",
        [helper.make_tensor_value_info(n, FLOAT, ["batch", size]) for n, size in (("observation", 2), ("h", 1))],
        [helper.make_tensor_value_info(n, FLOAT, ["batch", size]) for n, size in (("q_values", 2), ("h_out", 1))],
        [numpy_helper.from_array(np.array([v], np.float32), n) for n, v in (("growth", growth), ("one", 1.0))],
    )
    proto = helper.make_model(graph, opset_imports=OPSET, ir_version=10)
    return around(proto, NINE, recurrent={"states": [{"input": "h", "output": "h_out", "shape": [1]}]})


def _with_model(files: Files, **fields: str) -> Files:
    manifest = yaml.safe_load(files["policy.yaml"])
    manifest["model"] |= fields
    return files | {"policy.yaml": yaml.safe_dump(manifest).encode()}
