"""`surefoot safety`: faults as compilers tell them, exit codes, and the schema for editors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from policies.errors import BundleError
from policies.store import BUNDLED
from safety.document import read_rules
from safety.schema import json_schema
from service.cli import app

CARTPOLE = BUNDLED / "cartpole" / "v1"
GOOD = """\
schema: 1
policy: cartpole
rules:
  - {kind: forbid, name: far-out, when: state.cart_position > 2.0 && action.name == "right"}
  - {kind: support, name: seen, by: quantiles, max_outside: 1}
"""
BAD = """\
schema: 1
policy: cartpole
rules:
  - kind: rate
    name: calm
    actions: [right]
    limit: never
    window_s: 10
  - {kind: forbid, name: odd, when: state.x >}
"""
MISFIT = """\
schema: 1
policy: cart-pole
rules:
  - {kind: forbid, name: odd, when: state.angle > 0.1}
  - {kind: cooldown, name: rest, actions: [left], seconds: 1}
"""


def safety(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["safety", *map(str, arguments)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "safety.yaml"


def test_a_good_file_is_told_with_its_digest(file: Path) -> None:
    file.write_text(GOOD)
    done = safety("check", file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"{file}: 2 rules for cartpole, {read_rules(GOOD.encode()).digest[:12]}\n"


def test_the_rules_of_a_file_are_held_against_a_bundle(file: Path) -> None:
    file.write_text(GOOD)
    done = safety("check", file, "--policy-bundle", CARTPOLE)
    assert done.exit_code == 0
    assert done.stdout.endswith(f", and fit {CARTPOLE}\n")


def test_faults_are_told_as_compilers_tell_them(file: Path) -> None:
    file.write_text(BAD)
    done = safety("check", file)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{file}:7:12: rules[0].limit: Expected `int`, got `str`")
    file.write_text(BAD.replace("never", "1"))
    done = safety("check", file)
    assert done.stderr.startswith(f"{file}:9:37: rules[1].when: this is not CEL: Syntax error")


def test_what_does_not_fit_the_bundle_is_told_in_the_same_way(file: Path) -> None:
    file.write_text(MISFIT)
    assert safety("check", file).exit_code == 0
    done = safety("check", file, "--policy-bundle", CARTPOLE)
    assert done.exit_code == 1
    places = [line.split(": ")[:2] for line in done.stderr.splitlines()]
    assert places == [
        [f"{file}:2:9", "policy"],
        [f"{file}:4:37", "rules[0].when"],
        [f"{file}:5:43", "rules[1].actions"],
    ]


def test_golden_states_try_rules_on_the_fallback(file: Path) -> None:
    file.write_text(GOOD.replace("state.cart_position > 2.0", "state.pole_angle > 0.01").replace("right", "left"))
    done = safety("check", file, "--policy-bundle", CARTPOLE)
    assert done.exit_code == 1
    assert "in sample state" in done.stderr
    assert "the declared fallback left" in done.stderr


def test_a_bundle_may_be_a_tar(file: Path, tmp_path: Path) -> None:
    file.write_text(MISFIT)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for each in sorted(CARTPOLE.iterdir()):
            tar.add(each, each.name)
    (tmp_path / "v1.tar").write_bytes(packed.getvalue())
    done = safety("check", file, "--policy-bundle", tmp_path / "v1.tar")
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 3)


def test_a_bundle_that_is_not_there_is_an_error_of_the_tree(file: Path, tmp_path: Path) -> None:
    file.write_text(GOOD)
    done = safety("check", file, "--policy-bundle", tmp_path / "none")
    assert isinstance(done.exception, BundleError)
    assert str(tmp_path / "none") in done.exception.detail


def test_the_command_ends_with_one_where_there_is_no_file(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "safety", "check", str(file)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{file}: No such file or directory; give the path of a safety.yaml\n"


def test_the_schema_is_printed_for_editors() -> None:
    done = safety("schema")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == json_schema()
    assert done.stdout == (Path(__file__).parents[2] / "docs" / "safety.schema.json").read_text()
