"""`surefoot policy`: what is said on a command line, and what each command prints and exits with."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from policies.bundle import read_bundle
from policies.errors import BundleError
from policies.store import read_folder
from service.cli import app, main
from service.cli_options import options_of, read_options
from service.cli_policy import files_of
from tests.policies.networks import bundle_files, identity_files, linear

D3RLPY = Path(__file__).parent / "exports" / "d3rlpy"
BUNDLED = Path(__file__).parents[2] / "policies" / "bundles" / "cartpole" / "v2"


def run(*arguments: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["policy", *map(str, arguments)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.fixture
def network(tmp_path: Path) -> Path:
    path = tmp_path / "My Pole.v3.onnx"
    path.write_bytes(linear([[1, 2], [3, 4]]).SerializeToString())
    return path


def test_a_plain_file_is_exported_inspected_and_checked(network: Path, tmp_path: Path) -> None:
    said = ["--actions", "stay,go", "--features", "a,b", "--fallback", "stay", "--epsilon", "0.1"]
    folder = Path(run("export", network, "--out", tmp_path / "policies", *said).strip())
    assert folder == tmp_path / "policies" / "My-Pole" / "v1"
    assert read_folder(folder).manifest.exploration.epsilon == 0.1
    for path in (folder, network):
        run("check", path, *(said if path == network else []))
    seen = run("inspect", network, *said)
    for part in (
        "convention   torch",
        "head         q_values: greedy",
        "discrete, 2: stay, go",
        "a  unbounded",
        "any size",
    ):
        assert part in seen
    assert "fallback     stay" in run("inspect", folder)


def test_what_is_missing_is_said_by_every_command(tmp_path: Path) -> None:
    file = D3RLPY / "SAC.onnx"
    asked = "add --low and --high"
    assert f"to make it a bundle: the file does not say the bounds of its action; {asked}" in run("inspect", file)
    assert asked in run("check", file, code=1)
    for command in (["export", file, "--out", tmp_path], ["push", file]):
        done = CliRunner().invoke(app, ["policy", *map(str, command)])
        assert isinstance(done.exception, BundleError)
        assert asked in done.exception.detail
    run("check", file, "--low=-2,0", "--high", "2,5")
    run("check", file, "--no-bounds")
    assert "continuous, 2: [0] -2 … 2, [1] -inf … 5" in run("inspect", file, "--low", "-2,none", "--high", "2,5")


def test_an_error_becomes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["surefoot", "policy", "export", "absent.onnx", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert (caught.value.code, capsys.readouterr().err) == (1, "surefoot: there is no file absent.onnx\n")


def tar_of(files: dict[str, bytes], path: Path, folder: str = "") -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(("name", "folder"), [("v1.tar", ""), ("v1.tar.gz", "v1/")])
def test_a_bundle_is_read_from_a_tar(tmp_path: Path, name: str, folder: str) -> None:
    files = identity_files()
    path = tar_of(files, tmp_path / name, folder)
    assert files_of(path, read_options(), "auto") == files
    assert run("inspect", path).startswith(f"toy/v1  {read_bundle(files).digest[:12]}")
    with pytest.raises(BundleError, match="its manifest says what the options would say"):
        files_of(path, read_options(version="v2"), "auto")


def test_a_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.tar").write_bytes(b"no tar")
    with pytest.raises(BundleError, match="tar"):
        files_of(tmp_path / "broken.tar", read_options(), "auto")
    files = identity_files()
    twice = tmp_path / "twice.tar"
    with tarfile.open(twice, "w") as archive:
        for folder in ("a/", "b/"):
            member = tarfile.TarInfo(f"{folder}policy.yaml")
            member.size = len(files["policy.yaml"])
            archive.addfile(member, io.BytesIO(files["policy.yaml"]))
    with pytest.raises(BundleError, match="more than one"):
        files_of(twice, read_options(), "auto")
    files["golden.json"] = b'{"states": [[1, 2]], "outputs": [[1, 9]]}'
    (tmp_path / "toy").mkdir()
    for name, content in files.items():
        (tmp_path / "toy" / name).write_bytes(content)
    assert "golden" in run("check", tmp_path / "toy", code=1)
    assert "the bundle has no model.onnx" in run("inspect", tar_of({"policy.yaml": b""}, tmp_path / "less.tar"), code=1)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"actions": "3"}, {"nvec": (3,), "actions": ()}),
        ({"actions": "a, b"}, {"actions": ("a", "b")}),
        (
            {"actions": "fan=off,on;heater=off,low,high"},
            {"factors": {"fan": ("off", "on"), "heater": ("off", "low", "high")}, "actions": ()},
        ),
        ({"nvec": "3,2"}, {"nvec": (3, 2)}),
        ({"low": "-2", "high": "[2, inf]"}, {"low": (-2.0,), "high": (2.0, np.inf)}),
        ({"low": "none,0"}, {"low": (None, 0.0)}),
        ({"sigma": "0.1"}, {"sigma": 0.1}),
        ({"sigma": "0.1,0.2"}, {"sigma": [0.1, 0.2]}),
        ({"shape": "3,84,84"}, {"shape": (3, 84, 84)}),
    ],
)
def test_options_are_read(given: dict[str, Any], read: dict[str, Any]) -> None:
    options = options_of(Path("toy.onnx"), read_options(**given))
    assert {name: getattr(options, name) for name in read} == read
    assert (options.policy, options.version) == ("toy", "v1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nvec": "3,x"}, "--nvec '3,x' is not whole numbers"),
        ({"shape": "0"}, "--shape '0': every number must be at least 1"),
        ({"low": "a"}, "--low 'a' is not numbers"),
        ({"head": "values"}, "--head is one of q_values, logits"),
        ({"transform": "scale"}, "--transform is one of none, unscale"),
        ({"channels": "2"}, "--channels is one of first, last"),
        ({"states": Path("absent.npy")}, r"--states absent\.npy"),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_options_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        read_options(**given)


def test_names_of_files_become_names_of_policies() -> None:
    for file, policy in (("a b.onnx", "a-b"), ("x" * 80 + ".zip", "x" * 63), ("_-.onnx", "policy"), ("a.b.npy", "a")):
        assert options_of(Path(file), read_options()).policy == policy
    assert options_of(Path("a.onnx"), read_options(policy="given")).policy == "given"


@pytest.mark.parametrize(
    ("action", "outputs", "changes", "said"),
    [
        ({"kind": "discrete", "n": 2}, 2, {"fallback": 1, "temperature": 2.0}, "largest value wins; temperature 2"),
        (
            {"kind": "multi_discrete", "nvec": [2, 1], "factors": [{"name": "fan", "names": ["off", "on"]},
                                                                   {"name": "way", "names": ["up"]}]},
            3, {"fallback": ["on", "up"]}, "multi_discrete: fan (off, on), way (up)",
        ),
        (
            {"kind": "continuous", "low": [-1.0], "high": [5.0]}, 2,
            {"head": "gaussian", "fallback": [0.0], "action_transform": "unscale",
             "exploration": {"epsilon": 0.1, "sigma": 0.5}},
            "continuous, 1: [0] -1 … 5, scaled from [-1, 1]",
        ),
    ],
)  # fmt: skip
def test_spaces_are_described(action: Any, outputs: int, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    weights = np.ones((2, outputs)).tolist()
    files = bundle_files(linear(weights), [[1.0, 2.0]], [[3.0] * outputs], action=action, **changes)
    (tmp_path / "toy").mkdir()
    for name, content in files.items():
        (tmp_path / "toy" / name).write_bytes(content)
    seen = run("inspect", tmp_path / "toy")
    assert said in seen
    assert f"fallback     {yaml.safe_load(files['policy.yaml'])['fallback']}" in seen


def test_the_bundled_policies_are_listed() -> None:
    assert "cartpole/v2\tchampion\tq_values" in run("list")
    assert "p50 -0.034151" in run("inspect", BUNDLED)
