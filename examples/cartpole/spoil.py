"""Make a version that looks sound and is not, from one that is: worse, or NaN in some states, or slow in some.

Duty: from a bundle's folder to another one's. It knows the bundle's format and nothing else of the service.
Strategy: the network stays a real one, with a few operators put behind it, or a column of its weights halved. What is
wrong with it shows only where the cart has left the middle of its track, which no golden state has: so the bundle
passes every check of a load, as such versions do.
Promise: the golden vectors are true, and the manifest is the old one's but for what says which version this is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import yaml
from onnx import TensorProto, helper, numpy_helper

POSITION, ANGLE = 0, 2  # columns of an observation
EDGE = 0.06  # m from the middle of the track; episodes begin within 0.05
TURNS = 100_000  # of an empty loop: some 100 ms


def short_sighted(network: onnx.ModelProto) -> None:
    """See half of the pole's angle: it sways, and falls after a hundred steps or so."""
    first = network.graph.node[0].input[1]
    for tensor in network.graph.initializer:
        if tensor.name == first:
            weights = numpy_helper.to_array(tensor).copy()  # [hidden, features]
            weights[:, ANGLE] *= 0.5
            tensor.CopyFrom(numpy_helper.from_array(weights, first))


def not_a_number(network: onnx.ModelProto) -> None:
    """Add a hundredth of log(room to the edge) to each value: NaN behind the edge."""
    said = _rename_output(network)
    network.graph.node.extend(
        [
            *_distance(network),
            helper.make_node("Sub", ["edge", "distance"], ["room"]),
            helper.make_node("Log", ["room"], ["log_room"]),
            helper.make_node("Mul", ["log_room", "hundredth"], ["bonus"]),
            helper.make_node("Add", [said, "bonus"], ["q_values"]),
        ]
    )
    _constants(network, edge=np.array([EDGE], np.float32), hundredth=np.array([0.01], np.float32))


def slow(network: onnx.ModelProto) -> None:
    """Turn a loop before answering, as soon as one state of the batch lies behind the edge."""
    said = _rename_output(network)
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["go_on"]), helper.make_node("Identity", ["row"], ["row_out"])],
        "body",
        [
            value("turn", TensorProto.INT64, []),
            value("going", TensorProto.BOOL, []),
            value("row", TensorProto.FLOAT, None),
        ],
        [value("go_on", TensorProto.BOOL, []), value("row_out", TensorProto.FLOAT, None)],
    )
    network.graph.node.extend(
        [
            *_distance(network),
            helper.make_node("ReduceMax", ["distance"], ["farthest"], keepdims=0),
            helper.make_node("Greater", ["farthest", "edge"], ["outside"]),
            helper.make_node("Where", ["outside", "many", "none"], ["turns"]),
            helper.make_node("Loop", ["turns", "yes", said], ["q_values"], body=body),
        ]
    )
    _constants(network, edge=np.float32(EDGE), many=np.int64(TURNS), none=np.int64(0), yes=np.bool_(True))


FAULTS: dict[str, Callable[[onnx.ModelProto], None]] = {"worse": short_sighted, "nan": not_a_number, "slow": slow}


def _rename_output(network: onnx.ModelProto) -> str:
    """Free the name of the output. Gives what the network's own answer is called now."""
    network.graph.node[-1].output[0] = "sound"
    return "sound"


def _distance(network: onnx.ModelProto) -> list[onnx.NodeProto]:
    """How far each cart is from the middle, float32 [batch, 1]."""
    _constants(network, position=np.array([POSITION]))
    return [
        helper.make_node("Gather", ["observation", "position"], ["place"], axis=1),
        helper.make_node("Abs", ["place"], ["distance"]),
    ]


def _constants(network: onnx.ModelProto, **values: np.generic | np.ndarray) -> None:
    network.graph.initializer.extend(numpy_helper.from_array(np.asarray(each), name) for name, each in values.items())


def spoil(source: Path, fault: str, folder: Path, policy: str | None = None) -> None:
    """Write the bundle of a spoiled version; its label is the folder's name."""
    network = onnx.load(source / "model.onnx")
    FAULTS[fault](network)
    onnx.checker.check_model(network, full_check=True)
    model = network.SerializeToString()
    golden = json.loads((source / "golden.json").read_text(encoding="utf-8"))
    states = np.array(golden["states"], np.float32)
    states[:, POSITION] = np.clip(states[:, POSITION], -0.9 * EDGE, 0.9 * EDGE)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    golden |= {"states": states.tolist(), "outputs": session.run(None, {"observation": states})[0].tolist()}
    manifest = yaml.safe_load((source / "policy.yaml").read_text(encoding="utf-8"))
    manifest |= {"policy": policy or manifest["policy"], "version": folder.name}
    manifest["description"] = f"{manifest['version']}: {source.name}, spoiled on purpose ({fault})"
    manifest["model"]["sha256"] = hashlib.sha256(model).hexdigest()
    manifest["training"] |= {"metrics": {}, "parent": source.name}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model)
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    (folder / "policy.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Spoil a CartPole bundle on purpose.")
    parser.add_argument("fault", choices=sorted(FAULTS))
    parser.add_argument("--source", type=Path, default=Path("policies/bundles/cartpole/v2"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the new bundle; its name is the label")
    parser.add_argument("--policy", help="name of the policy; else the source's")
    options = parser.parse_args()
    spoil(options.source, options.fault, options.out, options.policy)
    print(options.out)


if __name__ == "__main__":
    main()
