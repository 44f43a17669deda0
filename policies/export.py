"""EDGE: trained policies to bundle folders. Stable-Baselines3 must be installed for its files, for others nothing more.

Duty: make the ONNX file where there is none, compute golden vectors, write the folder and read it back as a load does.
Promise: what is written passes every check of a load, or a BundleError says which not.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import yaml
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from policies.bundle import check_operators, check_tensors, read_bundle
from policies.engine import Engine, answer_of_file
from policies.errors import BundleError
from policies.heads import index_rows
from policies.profiles import Profile, propose, recognise, settle, trim

GOLDEN_STATES = 16


@dataclass(frozen=True, slots=True)
class Options:
    policy: str
    version: str
    out: Path
    actions: str = ""
    features: str = ""
    fallback: str = "none"
    epsilon: float = 0.0
    without_normalisation: bool = False  # the caller says that an SB3 model was trained without VecNormalize

    @property
    def names(self) -> list[str]:
        return [] if self.actions.isdigit() else [name.strip() for name in self.actions.split(",") if name.strip()]

    @property
    def n(self) -> int | None:
        return int(self.actions) if self.actions.isdigit() else len(self.names) or None


def export_file(source: Path, options: Options, kind: str = "auto") -> Path:
    """Write OUT/POLICY/VERSION from a file and return it. Raises BundleError."""
    found = {".zip": "sb3", ".npy": "qtable", ".onnx": "onnx"}.get(source.suffix) if kind == "auto" else kind
    if found == "sb3":
        if not options.without_normalisation:
            detail = (
                f"{source.name} does not say whether it was trained with VecNormalize, which is not folded in yet; "
                "pass --without-normalisation if it was not"
            )
            raise BundleError(detail, "source", "profile")
        return write_bundle(sb3_model(source), options)
    if found == "qtable":
        table = np.load(source, allow_pickle=False)
        states = np.linspace(0, len(table) - 1, min(GOLDEN_STATES, len(table))).round().astype(np.float32)[:, None]
        return write_bundle(qtable_model(table), options, states)
    if found == "onnx":
        return write_bundle(_parse(source), options)
    raise BundleError(f"{source.name}: this export makes bundles of sb3, qtable and onnx files", "kind", "profile")


def inspect_file(path: Path) -> str:
    """Describe a plain ONNX file and the manifest it would get."""
    proto = _parse(path)
    profile = recognise(proto)
    proposal = propose(profile, policy="POLICY", version="VERSION", sha256=sha256(path.read_bytes()).hexdigest())
    return f"# {profile.convention}: {profile.note}\n{yaml.safe_dump(proposal, sort_keys=False)}"


def write_bundle(proto: onnx.ModelProto, options: Options, states: npt.NDArray[Any] | None = None) -> Path:
    """Write a network's bundle and hold it against the checks of a load."""
    profile = settle(recognise(proto), options.n, None)
    check_tensors(proto)  # before ONNX Runtime sees a stranger's file for the golden vectors
    check_operators(proto)
    model = trim(proto, profile).SerializeToString()
    if states is None:
        states = np.random.default_rng(0).standard_normal((GOLDEN_STATES, *profile.shape)).astype(profile.dtype)
    fallback = int(options.fallback) if options.fallback.isdigit() and not options.names else options.fallback
    manifest = propose(
        profile,
        policy=options.policy,
        version=options.version,
        sha256=sha256(model).hexdigest(),
        actions=options.names,
        features=[{"name": name.strip()} for name in options.features.split(",") if name.strip()],
        fallback=fallback,
        epsilon=options.epsilon,
    )
    golden = {"states": states.tolist(), "outputs": _golden(model, profile, states).tolist()}
    files = {
        "model.onnx": model,
        "policy.yaml": yaml.safe_dump(manifest, sort_keys=False).encode(),
        "golden.json": json.dumps(golden).encode() + b"\n",
    }
    Engine(read_bundle(files))  # every check of a load, before anything is written
    folder = (options.out / options.policy / options.version).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def qtable_model(table: npt.NDArray[Any]) -> onnx.ModelProto:
    """Make a network of a table [states, n]: the state's number in, values out; NaN where there is no such state."""
    if table.ndim != 2 or not np.isfinite(table).all():
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


def sb3_model(source: Path) -> onnx.ModelProto:
    """Export the values of a DQN, or the logits of a PPO or A2C, with a dynamic batch."""
    import torch
    from stable_baselines3 import A2C, DQN, PPO

    with zipfile.ZipFile(source) as archive:
        data = json.loads(archive.read("data"))
    if "exploration_rate" in data:
        policy, output = DQN.load(source, device="cpu").policy, "q_values"
    elif "gae_lambda" in data:
        policy, output = (PPO if "clip_range" in data else A2C).load(source, device="cpu").policy, "logits"
    else:
        raise BundleError("only DQN, PPO and A2C: continuous actions are not served yet", "kind", "profile")
    if type(policy.action_space).__name__ != "Discrete":
        detail = f"{type(policy.action_space).__name__} actions are not served yet, only Discrete"
        raise BundleError(detail, "action", "profile")

    class Scores(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, states: Any) -> Any:
            if output == "q_values":
                return self.policy.q_net(states)
            return self.policy.get_distribution(states).distribution.logits

    file, axes = io.BytesIO(), {0: "batch"}
    example = torch.zeros(2, *policy.observation_space.shape)
    names: dict[str, Any] = {"input_names": ["observation"], "output_names": [output]}
    axes_of = {"observation": axes, output: axes}
    torch.onnx.export(Scores().eval(), (example,), file, opset_version=17, dynamo=False, dynamic_axes=axes_of, **names)
    return onnx.load_model_from_string(file.getvalue())


def _parse(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load_model_from_string(path.read_bytes())
    except DecodeError:
        raise BundleError(f"{path.name} is not an ONNX file, or is cut short", "model.onnx", "parse") from None


def _golden(model: bytes, profile: Profile, states: npt.NDArray[Any]) -> npt.NDArray[np.floating]:
    outputs = answer_of_file(model, profile.input, profile.output, states, profile.one_by_one)
    return index_rows(outputs, profile.n or 0) if profile.head == "action" else outputs
