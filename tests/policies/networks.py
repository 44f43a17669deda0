"""Small real ONNX networks and bundles around them, made in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper


def linear(
    weights: Sequence[Sequence[float]],
    bias: Sequence[float] | None = None,
    *,
    batch: int | str = "batch",
    opset: int = 17,
    ir_version: int = 10,
) -> onnx.ModelProto:
    """A network that answers states [B, d] with states @ weights + bias, [B, n]."""
    w = np.asarray(weights, dtype=np.float32)
    b = np.zeros(w.shape[1], dtype=np.float32) if bias is None else np.asarray(bias, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["observation", "w", "b"], ["q_values"])],
        "linear",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, [batch, w.shape[0]])],
        [helper.make_tensor_value_info("q_values", TensorProto.FLOAT, [batch, w.shape[1]])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def flattened(shape: Sequence[int], weights: Sequence[Sequence[float]], dtype: str = "float32") -> onnx.ModelProto:
    """A network that answers states [B, *shape] of either dtype with their elements, in order, @ weights."""
    kind = TensorProto.FLOAT if dtype == "float32" else TensorProto.DOUBLE
    w = np.asarray(weights, dtype=dtype)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["observation"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["q_values"]),
        ],
        "flattened",
        [helper.make_tensor_value_info("observation", kind, ["batch", *shape])],
        [helper.make_tensor_value_info("q_values", kind, ["batch", w.shape[1]])],
        [numpy_helper.from_array(w, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def flattened_files(
    shape: Sequence[int], actions: int = 2, *, dtype: str = "float32", **changes: Any
) -> dict[str, bytes]:
    """A bundle around `flattened`, its weights drawn with a fixed seed; features are not named."""
    weights = np.random.default_rng(7).normal(size=(int(np.prod(shape)), actions)).astype(np.float32)
    observation = {"shape": list(shape), "dtype": dtype}
    golden = [np.zeros(shape).tolist()]
    network = flattened(shape, weights.tolist(), dtype)
    return bundle_files(network, golden, [[0.0] * actions], **{"observation": observation, **changes})


def logarithm(n: int = 2) -> onnx.ModelProto:
    """A network that answers states [B, n] with log(states): NaN for a negative element, -inf for zero."""
    graph = helper.make_graph(
        [helper.make_node("Log", ["observation"], ["q_values"])],
        "logarithm",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", n])],
        [helper.make_tensor_value_info("q_values", TensorProto.FLOAT, ["batch", n])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def indexer(n: int = 2) -> onnx.ModelProto:
    """A network that fails at run time: it gathers rows of a small table by the state's first element."""
    table = numpy_helper.from_array(np.eye(n, dtype=np.float32), "table")
    zero = numpy_helper.from_array(np.array([0], dtype=np.int64), "zero")
    axes = numpy_helper.from_array(np.array([1], dtype=np.int64), "axes")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["observation", "zero"], ["column"], axis=1),
            helper.make_node("Squeeze", ["column", "axes"], ["flat"]),
            helper.make_node("Cast", ["flat"], ["index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["q_values"], axis=0),
        ],
        "indexer",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", n])],
        [helper.make_tensor_value_info("q_values", TensorProto.FLOAT, ["batch", n])],
        [table, zero, axes],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def index_of_largest(n: int = 2, *, shape: Sequence[int | str] = ("batch",)) -> onnx.ModelProto:
    """A network that answers states [B, n] with the index of the largest element, int64."""
    graph = helper.make_graph(
        [helper.make_node("ArgMax", ["observation"], ["q_values"], axis=1, keepdims=len(shape) - 1)],
        "index",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", n])],
        [helper.make_tensor_value_info("q_values", TensorProto.INT64, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def manifest(network: bytes, features: int, actions: int, /, **changes: Any) -> dict[str, Any]:
    """A manifest that fits a network of this module; `changes` replace top-level fields, None removes one."""
    fields: dict[str, Any] = {
        "schema": 1,
        "policy": "toy",
        "version": "v1",
        "observation": {
            "shape": [features],
            "dtype": "float32",
            "features": [{"name": f"f{i}"} for i in range(features)],
        },
        "action": {"kind": "discrete", "n": actions, "names": [f"a{i}" for i in range(actions)]},
        "head": "q_values",
        "model": {"sha256": sha256(network).hexdigest(), "input": "observation", "output": "q_values"},
        "exploration": {"epsilon": 0.1},
        "fallback": "a0",
        "latency_budget_ms": 1000,
    }
    fields.update(changes)
    return {name: value for name, value in fields.items() if value is not None}


def bundle_files(
    proto: onnx.ModelProto,
    states: Sequence[Sequence[float]],
    outputs: Sequence[Sequence[float]],
    **changes: Any,
) -> dict[str, bytes]:
    """The three files of a bundle."""
    model = proto.SerializeToString()
    written = manifest(model, len(states[0]), len(outputs[0]), **changes)
    golden = {"states": states, "outputs": outputs}
    return {
        "policy.yaml": yaml.safe_dump(written, sort_keys=False).encode(),
        "model.onnx": model,
        "golden.json": json.dumps(golden).encode(),
    }


def identity_files(n: int = 2, **changes: Any) -> dict[str, bytes]:
    """A bundle whose network answers with the state itself."""
    states = [[float(i + j) for j in range(n)] for i in range(3)]
    return bundle_files(linear(np.eye(n).tolist()), states, states, **changes)
