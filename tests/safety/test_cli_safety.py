"""`surefoot safety`: faults as compilers tell them, exit codes, and the schema for editors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from policies.errors import BundleError, SurefootError
from policies.store import BUNDLED
from safety.document import read_rules
from safety.schema import json_schema
from service.cli import app
from tests.service.admins import TOKEN, Admin, serving
from tests.waiting import until

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


# Against a running service

FAR_LEFT = GOOD.replace("> 2.0", "< -2.0")  # where the network goes right


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("cli-safety")) as mine:
        yield mine


@pytest.fixture
def decided(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> Admin:
    """A service whose policy `cartpole` has made three decisions, and an environment that says where it is."""
    monkeypatch.setenv("SUREFOOT_PORT", str(admin.server.port))
    monkeypatch.setenv("SUREFOOT_ADMIN_TOKEN", TOKEN)
    for position in (0.0, -2.1, -2.3) if not looked_at(admin) else ():
        admin.act("cartpole", state=[position, 0.0, 0.0, 0.0], explore=False)
    until(lambda: looked_at(admin) == 3, "the decisions")
    return admin


def looked_at(admin: Admin) -> int:
    found: int = admin.http.post("/admin/policies/cartpole/safety/test").json()["looked_at"]["decisions"]
    return found


def test_rules_are_tried_on_recent_decisions(decided: Admin, file: Path) -> None:
    file.write_text(FAR_LEFT)
    done = safety("test", file, "--policy", "cartpole")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("cartpole: 3 decisions of 0 keys, ")
    assert lines[1] == f"in force: no rules; tested: {read_rules(FAR_LEFT.encode()).digest[:12]}"
    assert lines[4].split() == ["executed", "action", "forbidden", "0", "2", "2", "0"]
    assert "far-out: no reason given" in lines


def test_machines_get_the_whole_report(decided: Admin, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(FAR_LEFT)
    monkeypatch.delenv("SUREFOOT_ADMIN_TOKEN")
    here = ("--url", decided.server.url, "--token", TOKEN)
    done = safety("test", file, "--policy", "cartpole", "--last", 2, "--json", *here)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["looked_at"]["decisions"] == 2
    assert [(each["name"], each["tested"]["forbids"]) for each in found["rules"]] == [("far-out", 2), ("seen", 0)]
    assert len(found["rules"][0]["tested"]["examples"]) == 2


def test_an_empty_file_is_no_rules(decided: Admin, file: Path) -> None:
    file.write_text("")
    done = safety("test", file, "--policy", "cartpole")
    assert (done.exit_code, "tested: no rules" in done.stdout) == (0, True)


def test_a_service_refuses_a_file_as_the_check_does(decided: Admin, file: Path) -> None:
    for wrong, bundle in ((BAD, ()), (MISFIT, ("--policy-bundle", CARTPOLE))):
        file.write_text(wrong)
        checked, tested = safety("check", file, *bundle), safety("test", file, "--policy", "cartpole")
        assert (tested.exit_code, tested.stdout) == (1, "")
        assert tested.stderr == checked.stderr


def test_what_is_not_the_files_fault_is_said_as_elsewhere(decided: Admin, file: Path) -> None:
    file.write_text(GOOD)
    for arguments, detail in ((("--policy", "nowhere"), "unknown_policy"), (("--token", "wrong"), "give --token")):
        done = safety("test", file, *(("--policy", "cartpole") if "--token" in arguments else ()), *arguments)
        assert isinstance(done.exception, SurefootError)
        assert detail in done.exception.detail
    assert safety("test", file, "--policy", "cartpole", "--last", 0).exit_code == 2
