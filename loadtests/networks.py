"""The networks and policies that are measured, written as files: a bundle for Surefoot, the same ONNX file for peers.

Duty: three Q-networks with random weights (fixed seed), what Surefoot needs around them, and rules. It asks the network
for its golden vectors itself, through ONNX Runtime.
Strategy: weights hardly matter for speed; but where one action were best everywhere, no rule would ever change one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

ACTIONS = 4
POLICY = "bench"
EPSILON = 0.05
# No decision falls due within a run: what the join does at the end of a window is not what is measured here.
WINDOW_S = 3600
# Seeds of weights with which every action is best for some states, in each network.
DECIDES, WATCHES = 12, 18
MOST_LATENCY_MS = 5000  # a busy machine must not refuse a bundle


@dataclass(frozen=True, slots=True)
class Network:
    """A network's name and the shape of its observations; `layers` are widths, empty for the convolutional one."""

    name: str
    shape: tuple[int, ...]
    layers: tuple[int, ...] = ()

    @property
    def image(self) -> bool:
        return len(self.shape) > 1


SMALL = Network("small", (8,), (8, 64, 64, ACTIONS))
MEDIUM = Network("medium", (128,), (128, 512, 512, ACTIONS))
CONV = Network("conv", (84, 84, 4))  # Mnih et al. 2015, "Human-level control through deep reinforcement learning"
NETWORKS = {each.name: each for each in (SMALL, MEDIUM, CONV)}


class _Graph:
    """Nodes and weights, added layer by layer; `last` is the newest output."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last = "observation"
        self._draw = np.random.default_rng(seed)

    def add(self, kind: str, *weights: str, **attributes: Any) -> None:
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self.last, *weights], [output], **attributes))
        self.last = output

    def weight(self, shape: tuple[int, ...], fan_in: int) -> str:
        """Draw weights that keep the size of what passes (He et al. 2015, equation 10), and biases a tenth of those."""
        name = f"w_{len(self.weights)}"
        deviation = (2.0 / fan_in) ** 0.5 * (0.1 if len(shape) == 1 else 1.0)
        values = self._draw.normal(0.0, deviation, shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def dense(self, widths: Sequence[int]) -> None:
        for i, (wide, out) in enumerate(pairwise(widths)):
            if i:
                self.add("Relu")
            self.add("Gemm", self.weight((wide, out), wide), self.weight((out,), wide))

    def convolve(self) -> None:
        self.weights.append(numpy_helper.from_array(np.array(255.0, np.float32), "white"))
        self.add("Div", "white")
        self.add("Transpose", perm=[0, 3, 1, 2])
        for channels, out, kernel, stride in ((4, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)):
            fan_in = channels * kernel * kernel
            kernels = self.weight((out, channels, kernel, kernel), fan_in)
            self.add("Conv", kernels, self.weight((out,), fan_in), kernel_shape=[kernel] * 2, strides=[stride] * 2)
            self.add("Relu")
        self.add("Flatten")


def model(network: Network, seed: int = DECIDES) -> bytes:
    """The network as ONNX: observations [batch, *shape] float32 to values [batch, ACTIONS]."""
    graph = _Graph(seed)
    if network.image:
        graph.convolve()
    graph.dense(network.layers or (3136, 512, ACTIONS))
    graph.nodes[-1].output[0] = "q_values"
    inputs = [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", *network.shape])]
    outputs = [helper.make_tensor_value_info("q_values", TensorProto.FLOAT, ["batch", ACTIONS])]
    made = helper.make_graph(graph.nodes, network.name, inputs, outputs, graph.weights)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return bytes(proto.SerializeToString())


def states(network: Network, count: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """Draw observations: pixels 0 to 255, or features between -1 and 1 with four digits, as callers write them."""
    draw = np.random.default_rng(seed)
    if network.image:
        return draw.integers(0, 256, (count, *network.shape)).astype(np.float32)
    return draw.uniform(-1.0, 1.0, (count, *network.shape)).round(4).astype(np.float32)


def thresholds(count: int) -> list[dict[str, Any]]:
    """So many rules of the kind most are: a threshold on a feature forbids an action."""
    return [_forbid(f"threshold-{i}", f"state.x{i % 8} > {0.5 + 0.02 * i:.2f}", i) for i in range(count)]


def contextual(count: int) -> list[dict[str, Any]]:
    """So many rules that need what the request says of its context, and so the whole of CEL for each row."""
    return [_forbid(f"night-{i}", f"has(context.hour) && context.hour < {i % 6}", i) for i in range(count)]


def limits(count: int) -> list[dict[str, Any]]:
    """So many rules that count each key's executions, of all actions, and never deny one."""
    rule = {"kind": "rate", "actions": [f"a{i}" for i in range(ACTIONS)], "limit": 10**6, "window_s": WINDOW_S}
    return [{**rule, "name": f"often-{i}", "per": "key", "except_fallback": True} for i in range(count)]


def _forbid(name: str, condition: str, number: int) -> dict[str, Any]:
    action = f"a{1 + number % (ACTIONS - 1)}"  # a0 is the fallback, which no rule may forbid
    return {"kind": "forbid", "name": name, "when": f'{condition} && action.name == "{action}"'}


def write_policy(
    root: Path, network: Network, *, policy: str = POLICY, rules: Sequence[dict[str, Any]] = (), shadow: bool = False
) -> None:
    """Write a policy below `root` as Surefoot loads it: v1 decides, v2, where there is one, watches."""
    folder = root / policy
    for version, seed in (("v1", DECIDES), *((("v2", WATCHES),) if shadow else ())):
        write_version(folder / version, network, version, seed, policy=policy)
    deployment: dict[str, Any] = {"schema": 1, "policy": policy, "champion": "v1", "reward": {"window_s": WINDOW_S}}
    _write_yaml(folder / "deployment.yaml", deployment | ({"shadows": ["v2"]} if shadow else {}))
    if rules:
        _write_yaml(folder / "safety.yaml", {"schema": 1, "policy": policy, "rules": list(rules)})


def write_version(folder: Path, network: Network, version: str, seed: int, *, policy: str = POLICY) -> None:
    """Write the bundle of one version, with weights of its own."""
    folder.mkdir(parents=True)
    network_bytes = model(network, seed)
    golden = states(network, 2 if network.image else 8)
    (folder / "model.onnx").write_bytes(network_bytes)
    outputs = _answers(network_bytes, golden)
    vectors = {"states": golden.tolist(), "outputs": outputs.tolist(), "rtol": 1e-3, "atol": 1e-3}
    (folder / "golden.json").write_text(json.dumps(vectors))
    observation: dict[str, Any] = {"shape": list(network.shape), "dtype": "float32"}
    if not network.image:
        observation["features"] = [{"name": f"x{i}", "low": -1.0, "high": 1.0} for i in range(network.shape[0])]
    manifest = {
        "schema": 1, "policy": policy, "version": version, "observation": observation,
        "action": {"kind": "discrete", "n": ACTIONS, "names": [f"a{i}" for i in range(ACTIONS)]},
        "head": "q_values", "fallback": "a0", "exploration": {"epsilon": EPSILON},
        "model": {"sha256": sha256(network_bytes).hexdigest(), "input": "observation", "output": "q_values"},
        "latency_budget_ms": MOST_LATENCY_MS,
    }  # fmt: skip
    _write_yaml(folder / "policy.yaml", manifest)


def _answers(network: bytes, observations: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import onnxruntime  # a third of a second, which `--help` need not wait for

    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    found: npt.NDArray[np.float32] = session.run(None, {"observation": observations})[0]
    return found


def _write_yaml(path: Path, content: Any) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
