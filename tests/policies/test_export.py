"""What is exported passes the checks of a load and answers as its source does: Q-tables, plain files, d3rlpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper

from policies.bundle import read_bundle
from policies.engine import Engine
from policies.errors import BundleError
from policies.export import Options, bundle_files, export_file, export_qtable, write_files
from policies.export_bundle import read_fallback
from policies.heads import index_rows, target
from policies.store import read_folder
from policies.types import Box
from tests.policies.networks import indexer, linear, logarithm

TABLE = np.array([[1.0, 2.0], [4.0, 3.0], [0.0, 5.0]])
D3RLPY = Path(__file__).parent / "exports" / "d3rlpy"
CONTINUOUS = ("SAC", "TD3", "TD3PlusBC", "CQL", "IQL", "AWAC", "DDPG")
DISCRETE = ("DQN", "DoubleDQN", "DiscreteCQL", "DiscreteSAC", "DiscreteBC")


def saved(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def manifest_of(files: dict[str, bytes]) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(files["policy.yaml"])
    return read


def test_a_q_table_answers_its_rows_and_faults_where_there_is_none(tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", TABLE)
    options = Options(policy="toy", actions=("a", "b"))
    engine = Engine(read_folder(export_file(tmp_path / "q.npy", options, tmp_path)))
    states = np.array([[0], [1], [2], [3], [-1], [0.5], [np.nan]], dtype=np.float32)
    wanted = target(engine.run(states), "q_values")
    assert wanted.scores[:3].tolist() == TABLE.tolist()
    assert wanted.faulty.tolist() == [False] * 3 + [True] * 4
    assert engine.bundle.observation.features[0].high == 2.0


def test_a_plain_file_with_a_batch_of_one_is_asked_row_by_row(tmp_path: Path) -> None:
    file = saved(linear([[1, 2], [3, 4]], batch=1), tmp_path / "net.onnx")
    engine = Engine(read_folder(export_file(file, Options(policy="toy"), tmp_path)))
    assert engine.run(np.eye(2, dtype=np.float32)).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(BundleError, match="2 actions, 3 were named"):
        export_file(file, Options(policy="toy", nvec=(3,)), tmp_path)


def test_a_number_that_is_no_index_is_a_fault() -> None:
    rows = index_rows(np.array([0.0, 2.0, 1.5, -1.0, 3.0, np.nan, np.inf]), (3,))
    assert target(rows, "action").faulty.tolist() == [False, False] + [True] * 5
    assert target(rows, "action").scores[:2].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_what_the_owner_says_stands_in_the_manifest(tmp_path: Path) -> None:
    states = np.random.default_rng(0).uniform(-5, 5, (1000, 2))
    options = Options(
        policy="toy",
        version="v7",
        features=("cpu", "rps"),
        actions=("hold", "up"),
        fallback="hold",
        epsilon=0.1,
        temperature=2.0,
        latency_budget_ms=7.0,
        description="as trained",
        states=states,
    )
    files = bundle_files(saved(linear([[1, 2], [3, 4]]), tmp_path / "net.onnx"), options)
    written = manifest_of(files)
    assert (written["fallback"], written["exploration"], written["temperature"]) == ("hold", {"epsilon": 0.1}, 2.0)
    assert (written["latency_budget_ms"], written["description"]) == (7.0, "as trained")
    feature = written["observation"]["features"][1]
    assert (feature["name"], feature["quantiles"]["p50"]) == ("rps", pytest.approx(np.median(states[:, 1]), rel=1e-5))
    golden = np.array(json.loads(files["golden.json"])["states"])
    assert (golden[:, None] == states[None].astype(np.float32)).all(axis=2).any(axis=1).all()
    assert read_bundle(files).fallback == (0.0,)


def test_states_that_a_network_cannot_take_are_asked_for(tmp_path: Path) -> None:
    file = saved(logarithm(), tmp_path / "net.onnx")
    with pytest.raises(BundleError, match=r"--states states\.npy"):
        bundle_files(file, Options(policy="toy"))
    bundle_files(file, Options(policy="toy", states=np.full((3, 2), 2.0)))
    with pytest.raises(BundleError, match=r"states have shape \[3, 5\]"):
        bundle_files(file, Options(policy="toy", states=np.zeros((3, 5))))
    with pytest.raises(BundleError, match="cannot run the network"):
        bundle_files(saved(indexer(), tmp_path / "index.onnx"), Options(policy="toy", states=np.full((3, 2), 9.0)))


def external(folder: Path, location: str, **changes: str) -> Path:
    """A network as torch's newer exporter writes it: weights in a file beside."""
    proto = linear([[1, 2], [3, 4]])
    weights = numpy_helper.to_array(proto.graph.initializer[0]).tobytes()
    (folder / "net.onnx.data").write_bytes(b"\0" * 8 + weights)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in ({"location": location, "offset": "8", "length": "16"} | changes).items():
        tensor.external_data.add(key=key, value=value)
    return saved(proto, folder / "net.onnx")


def test_weights_beside_the_file_become_part_of_it(tmp_path: Path) -> None:
    files = bundle_files(external(tmp_path, "net.onnx.data"), Options(policy="toy"))
    assert Engine(read_bundle(files)).run(np.eye(2, dtype=np.float32)).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("location", ["../net.onnx.data", "/etc/hostname", "none.data", "", "link.data", "."])
def test_weights_elsewhere_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "net.onnx.data").write_bytes(bytes(24))
    (folder / "link.data").symlink_to("net.onnx.data")
    with pytest.raises(BundleError) as caught:
        bundle_files(external(folder, location), Options(policy="toy"))
    assert caught.value.check == "external_data"


def test_what_cannot_be_exported_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"\xff\xff")
    (tmp_path / "net.bin").write_bytes(b"")
    (tmp_path / "q.npy").write_bytes(b"no array")
    for name, said in (
        ("net.onnx", "not an ONNX file"),
        ("net.bin", "add --kind, one of d3rlpy, onnx, qtable, sb3, torch"),
        ("q.npy", "no array of numpy's save"),
        ("absent.onnx", "there is no file"),
    ):
        with pytest.raises(BundleError, match=said):
            export_file(tmp_path / name, Options(policy="toy"), tmp_path / "out")
    for table in (TABLE[0], np.array([[np.nan]]), np.zeros((0, 2)), np.array([["a"]])):
        with pytest.raises(BundleError, match="Q-table"):
            export_qtable(table, Options(policy="toy"))
    slow = bundle_files(saved(linear([[1, 2]]), tmp_path / "net.onnx"), Options(policy="toy", latency_budget_ms=1e-6))
    with pytest.raises(BundleError, match="the budget is"):
        write_files(slow, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def predictions() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((D3RLPY / "predictions.json").read_text())
    return read


@pytest.mark.parametrize("name", CONTINUOUS + DISCRETE)
def test_files_of_d3rlpys_save_policy_answer_as_its_predict(name: str, predictions: dict[str, Any]) -> None:
    bounds: dict[str, Any] = {"low": (-2, 0), "high": (2, 5)} if name in CONTINUOUS else {}
    bundle = read_bundle(bundle_files(D3RLPY / f"{name}.onnx", Options(policy="d3rlpy", **bounds)))
    assert bundle.manifest.training == {"exported_as": "d3rlpy"}
    outputs = Engine(bundle).run(np.array(predictions["states"], dtype=np.float32))
    if isinstance(bundle.action, Box):
        np.testing.assert_allclose(outputs, predictions[name], rtol=1e-5, atol=1e-6)
    else:
        assert outputs.argmax(axis=1).tolist() == predictions[name]


@pytest.mark.parametrize("name", CONTINUOUS + DISCRETE)
def test_bundles_made_from_d3rlpys_algorithms_answer_as_its_predict(name: str, predictions: dict[str, Any]) -> None:
    bundle = read_folder(D3RLPY / name)
    assert not bundle.interface.one_by_one
    assert bundle.manifest.training["algorithm"] == name
    outputs = Engine(bundle).run(np.array(predictions["states"], dtype=np.float32))
    if isinstance(bundle.action, Box):
        assert bundle.manifest.head == "action"
        np.testing.assert_allclose(outputs, predictions[name], rtol=1e-5, atol=1e-6)
        assert all(bundle.action.validate(tuple(row)) for row in np.round(outputs, 4))
        assert -2 <= bundle.action.low[0] < -1.9  # the action scaler's, fitted to the data
        assert 4.9 < bundle.action.high[1] <= 5
    else:
        stochastic = name in ("DiscreteSAC", "DiscreteBC")
        assert bundle.manifest.head == ("logits" if stochastic else "q_values")
        assert outputs.argmax(axis=1).tolist() == predictions[name]


@pytest.mark.parametrize(
    ("fallback", "action", "read"),
    [
        ("none", {"kind": "discrete", "n": 2}, "none"),
        ("none", {"kind": "discrete", "n": 2, "names": ["none", "up"]}, "none"),
        ("1", {"kind": "discrete", "n": 2}, 1),
        ("1", {"kind": "discrete", "n": 2, "names": ["0", "1"]}, "1"),
        (1, {"kind": "discrete", "n": 2}, 1),
        ("0.5,-1", {"kind": "continuous", "low": [None, None], "high": [None, None]}, [0.5, -1.0]),
        ("1, 0", {"kind": "multi_discrete", "nvec": [2, 2]}, [1, 0]),
        ("on, 0", {"kind": "multi_discrete", "nvec": [2, 1], "factors": [{"name": "fan"}]}, ["on", "0"]),
    ],
)
def test_a_fallback_is_read_for_its_action_space(fallback: Any, action: dict[str, Any], read: Any) -> None:
    assert read_fallback(fallback, action) == read


def test_a_fallback_that_is_no_action_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is numbers, not 'up'"):
        read_fallback("up", {"kind": "continuous"})
    file = saved(linear([[1, 2], [3, 4]]), tmp_path / "net.onnx")
    with pytest.raises(BundleError, match="there is no action 'up'"):
        read_bundle(bundle_files(file, Options(policy="toy", fallback="up")))
