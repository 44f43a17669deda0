"""Make the files of this folder's `d3rlpy/`: real algorithms of d3rlpy, trained for a few steps.

They are kept because d3rlpy pins a Gymnasium older than the one that the tests run with. Run in an environment with
`d3rlpy==2.8.1 torch==2.13.0` and this repository: `python -m tests.policies.exports.make_d3rlpy`.

For each algorithm: `NAME.onnx`, as its own `save_policy` writes it; `NAME/`, the bundle that `export_d3rlpy` makes; and
its `predict` for some states in `predictions.json`. torch's newer exporter refuses the scripted function that
`save_policy` hands it, so the older one is put in its place, as it was when d3rlpy 2.8.1 was written.
"""

from __future__ import annotations

import functools
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policies.export import Options, export_d3rlpy
from policies.export_torch import library

d3rlpy = library("d3rlpy")

OUT = Path(__file__).parent / "d3rlpy"
CONTINUOUS = ("SAC", "TD3", "TD3PlusBC", "CQL", "IQL", "AWAC", "DDPG")
DISCRETE = ("DQN", "DoubleDQN", "DiscreteCQL", "DiscreteSAC", "DiscreteBC")


def dataset(actions: Any, rng: np.random.Generator) -> Any:
    states = (rng.standard_normal((400, 3)) * [1, 5, 0.1] + [0, 10, 0]).astype(np.float32)
    ends = np.zeros(400, np.float32)
    ends[99::100] = 1
    return d3rlpy.dataset.MDPDataset(states, actions, rng.standard_normal(400).astype(np.float32), ends)


def train(name: str) -> Any:
    """Train with both scalers, in networks of 16 units."""
    rng = np.random.default_rng(0)
    d3rlpy.seed(0)
    config = getattr(d3rlpy.algos, f"{name}Config")
    small = d3rlpy.models.encoders.VectorEncoderFactory([16])
    options: dict[str, Any] = {each.name: small for each in fields(config) if each.name.endswith("encoder_factory")}
    options |= {"batch_size": 32, "observation_scaler": d3rlpy.preprocessing.StandardObservationScaler()}
    if name in CONTINUOUS:
        options["action_scaler"] = d3rlpy.preprocessing.MinMaxActionScaler()
        data = dataset(rng.uniform([-2, 0], [2, 5], (400, 2)).astype(np.float32), rng)
    else:
        data = dataset(rng.integers(0, 3, (400, 1)), rng)
    algo = config(**options).create(device="cpu")
    quiet = d3rlpy.logging.NoopAdapterFactory()
    algo.fit(data, n_steps=50, n_steps_per_epoch=50, show_progress=False, logger_adapter=quiet)
    return algo


def main() -> None:
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
    OUT.mkdir(exist_ok=True)
    states = (np.random.default_rng(1).standard_normal((64, 3)) * [1, 5, 0.1] + [0, 10, 0]).astype(np.float32)
    predictions: dict[str, Any] = {"states": states.tolist()}
    for name in CONTINUOUS + DISCRETE:
        algo = train(name)
        algo.save_policy(str(OUT / f"{name}.onnx"))
        (OUT / name).mkdir(exist_ok=True)
        for file, content in export_d3rlpy(algo, Options(policy="d3rlpy", version=name)).items():
            (OUT / name / file).write_bytes(content)
        predictions[name] = algo.predict(states).tolist()
    (OUT / "predictions.json").write_text(json.dumps(predictions) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
