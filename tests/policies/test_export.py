"""What is exported passes the checks of a load and answers as its source does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from policies.engine import Engine
from policies.errors import BundleError
from policies.export import Options, export_file, inspect_file
from policies.heads import index_rows, target
from policies.store import read_folder
from service.cli import app
from tests.policies.networks import linear

TABLE = np.array([[1.0, 2.0], [4.0, 3.0], [0.0, 5.0]])


def test_a_q_table_answers_its_rows_and_faults_where_there_is_none(tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", TABLE)
    engine = Engine(read_folder(export_file(tmp_path / "q.npy", Options("toy", "v1", tmp_path, "a,b"))))
    states = np.array([[0], [1], [2], [3], [-1], [0.5], [np.nan]], dtype=np.float32)
    wanted = target(engine.run(states), "q_values")
    assert wanted.scores[:3].tolist() == TABLE.tolist()
    assert wanted.faulty.tolist() == [False] * 3 + [True] * 4


def test_a_plain_file_with_a_batch_of_one_is_asked_row_by_row(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(linear([[1, 2], [3, 4]], batch=1).SerializeToString())
    assert "head: q_values" in inspect_file(file)
    engine = Engine(read_folder(export_file(file, Options("toy", "v1", tmp_path))))
    assert engine.run(np.eye(2, dtype=np.float32)).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(BundleError, match="2 actions, 3 were named"):
        export_file(file, Options("toy", "v2", tmp_path, "3"))


def test_a_number_that_is_no_index_is_a_fault() -> None:
    rows = index_rows(np.array([0.0, 2.0, 1.5, -1.0, 3.0, np.nan, np.inf]), 3)
    assert target(rows, "action").faulty.tolist() == [False, False] + [True] * 5
    assert target(rows, "action").scores[:2].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_the_command_exports_inspects_and_checks(tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", TABLE)
    runner, options = CliRunner(), ["--policy", "toy", "--version", "v1", "--out", str(tmp_path / "policies")]
    done = runner.invoke(app, ["policy", "export", str(tmp_path / "q.npy"), *options, "--actions", "stay,go"])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "policies" / "toy" / "v1"
    assert runner.invoke(app, ["policy", "check", str(folder)]).output.startswith("ok: toy/v1")
    assert "head: q_values" in runner.invoke(app, ["policy", "inspect", str(folder / "model.onnx")]).output
    assert read_folder(folder).action.names == ("stay", "go")


def test_what_cannot_be_exported_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    for name, content, said in (
        ("net.onnx", b"\xff\xff", "not an ONNX file"),
        ("net.pt", b"", "sb3, qtable and onnx"),
        ("net.zip", b"", "VecNormalize"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BundleError, match=said):
            export_file(tmp_path / name, Options("toy", "v1", tmp_path / "out"))
    np.save(tmp_path / "q.npy", TABLE[0])
    with pytest.raises(BundleError, match="Q-table"):
        export_file(tmp_path / "q.npy", Options("toy", "v1", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_stable_baselines3_answers_as_its_own_prediction(tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed")
    for algorithm in (sb3.DQN, sb3.PPO):
        model = algorithm("MlpPolicy", "CartPole-v1", device="cpu")
        model.save(tmp_path / "model.zip")
        options = Options("toy", algorithm.__name__.lower(), tmp_path, without_normalisation=True)
        bundle = read_folder(export_file(tmp_path / "model.zip", options))
        states = np.random.default_rng(1).standard_normal((1000, 4)).astype(np.float32)
        served = target(Engine(bundle).run(states), bundle.head).scores.argmax(axis=1)
        assert served.tolist() == model.predict(states, deterministic=True)[0].tolist()
