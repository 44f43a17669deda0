"""The committed CartPole bundles are what their manifests say, and `train.py` makes such bundles.

Read with yaml, onnx and ONNX Runtime alone, so that this file stays a second opinion beside `policies/bundle.py`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import onnx
import onnxruntime
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "policies" / "bundles" / "cartpole"
VERSIONS = ("baseline", "v1", "v2")

each_version = pytest.mark.parametrize("folder", [FOLDER / version for version in VERSIONS], ids=VERSIONS)


@cache
def manifest(folder: Path) -> Any:
    return yaml.safe_load((folder / "policy.yaml").read_text(encoding="utf-8"))


@cache
def session(folder: Path) -> Any:
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def q_values(folder: Path, states: Any) -> Any:
    names = manifest(folder)["model"]
    return session(folder).run([names["output"]], {names["input"]: np.asarray(states, np.float32)})[0]


def check_bundle(folder: Path) -> None:
    """Hold a bundle against its manifest: label, digest, size, golden vectors, any batch size."""
    described = manifest(folder)
    assert described["schema"] == 1
    assert described["policy"] == "cartpole"
    assert described["version"] == folder.name
    assert described["model"]["sha256"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert sorted(path.name for path in folder.iterdir()) == ["golden.json", "model.onnx", "policy.yaml"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000

    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    assert np.shape(golden["states"]) == (16, 4)
    answers = q_values(folder, golden["states"])
    np.testing.assert_allclose(answers, golden["outputs"], rtol=golden["rtol"], atol=golden["atol"])
    for rows in (1, 7):
        assert q_values(folder, golden["states"][:rows]).shape == (rows, described["action"]["n"])


@each_version
def test_a_committed_bundle_agrees_with_its_manifest(folder: Path) -> None:
    check_bundle(folder)


@each_version
def test_the_model_stands_alone_and_carries_nothing_of_the_machine_it_was_made_on(folder: Path) -> None:
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert all(opset.version >= 17 for opset in model.opset_import)
    assert all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@each_version
def test_features_are_those_of_the_environment_with_ordered_quantiles(folder: Path) -> None:
    features = manifest(folder)["observation"]["features"]
    assert [feature["name"] for feature in features] == [
        "cart_position",
        "cart_velocity",
        "pole_angle",
        "pole_angular_velocity",
    ]
    assert [feature["high"] for feature in features] == [4.8, None, 0.418879, None]
    assert [feature["low"] for feature in features] == [-4.8, None, -0.418879, None]
    for feature in features:
        quantiles = [feature["quantiles"][name] for name in ("p01", "p25", "p50", "p75", "p99")]
        assert quantiles == sorted(set(quantiles))


def test_v1_is_clearly_worse_than_the_baseline_and_v2_solves_the_task() -> None:
    returns = {version: manifest(FOLDER / version)["training"]["metrics"] for version in VERSIONS}
    assert 60 <= returns["v1"]["mean_return"] <= 250
    assert 400 <= returns["baseline"]["mean_return"] <= returns["v2"]["mean_return"] == 500
    assert returns["v2"]["mean_return_served_epsilon"] >= 485


def test_v2_balances_the_pole_in_fresh_episodes() -> None:
    env = gymnasium.make("CartPole-v1")
    returns = []
    for episode in range(10):
        state, over, total = env.reset(seed=9_000 + episode)[0], False, 0.0
        while not over:
            state, reward, terminated, truncated, _ = env.step(int(q_values(FOLDER / "v2", state[None]).argmax()))
            over, total = terminated or truncated, total + float(reward)
        returns.append(total)
    assert np.mean(returns) >= 450


def test_the_deployment_names_versions_that_exist() -> None:
    deployment = yaml.safe_load((FOLDER / "deployment.yaml").read_text(encoding="utf-8"))
    assert deployment["schema"] == 1
    assert deployment["policy"] == "cartpole"
    assert (deployment["champion"], deployment["baseline"]) == ("v2", "baseline")
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == set(VERSIONS)


@pytest.mark.parametrize("arguments", [["--steps", "400"], ["--baseline"]], ids=["dqn", "controller"])
def test_train_writes_a_bundle(arguments: list[str], tmp_path: Path) -> None:
    """In a process of its own: the exporter warns of its age, and torch is slow to leave."""
    pytest.importorskip("torch", reason="training needs the `export` extra")
    script = ROOT / "examples" / "cartpole" / "train.py"
    command = [sys.executable, str(script), "--version", "tiny", "--out", str(tmp_path), "--seed", "7", *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    check_bundle(tmp_path / "tiny")
    assert manifest(tmp_path / "tiny")["training"]["seed"] == 7
