"""What the README tells a newcomer to type works, word for word but for the port and the ids."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from onnx import TensorProto, helper

from tests.conftest import Server, new_server
from tests.policies.networks import linear

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORTENED = "019aa3…"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell(command: str, server: Server) -> str:
    """Run a command of the README against the running service."""
    environment = os.environ | {"SUREFOOT_DATA_DIR": str(server.data_dir)}
    command = command.replace("http://127.0.0.1:8080", server.url)
    command = command.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(beginning: str) -> str:
    found = [block.strip() for block in blocks("sh") if block.startswith(beginning)]
    assert len(found) == 1, beginning
    return found[0]


@pytest.mark.skipif(subprocess.run(["which", "curl"], capture_output=True).returncode != 0, reason="curl is not here")
def test_the_curl_commands_give_what_the_readme_shows(server: Server) -> None:
    answer = json.loads(shell(command("curl -s http://127.0.0.1:8080/v1/act"), server))
    shown = json.loads(blocks("json")[0])
    assert answer.keys() == shown.keys()
    assert {k: answer[k] for k in ("policy", "version", "role")} == {k: shown[k] for k in ("policy", "version", "role")}
    reward = command("curl -s http://127.0.0.1:8080/v1/reward").replace(SHORTENED, answer["decision_id"])
    assert json.loads(shell(reward, server))["status"] in {"joined", "early"}
    (asked,) = re.findall(rf"`(curl -s [^`]*/v1/decisions/){SHORTENED}`", README)
    assert json.loads(shell(asked + answer["decision_id"], server))["join"]["end"] == "terminated"


def test_a_plain_file_is_checked_pushed_and_served(tmp_path: Path) -> None:
    server = new_server(tmp_path)  # of its own: others expect one policy
    server.start()
    try:
        follow(server, tmp_path)
    finally:
        assert server.stop() == 0, server.log


def follow(server: Server, tmp_path: Path) -> None:
    (token,) = re.findall(r"admin token for this run: (\S+)", server.log)
    save_index_of_best(tmp_path / "model.onnx")
    block = command(".venv/bin/surefoot policy check").replace("model.onnx", str(tmp_path / "model.onnx"))
    check, push, ask = block.replace("TOKEN", token).splitlines()
    assert "accepted" in shell(check, server)
    pushed = json.loads(shell(push, server))
    assert {name: pushed[name] for name in ("policy", "role", "loaded", "new")} == {
        "policy": "pole", "role": "champion", "loaded": True, "new": True,
    }  # fmt: skip
    assert json.loads(shell(ask, server))["action_name"] == "right"  # as the network says
    assert "action       discrete [2]" in shell(f".venv/bin/surefoot policy inspect {tmp_path / 'model.onnx'}", server)


def test_rules_budget_and_kill_switch_are_put_in_force(tmp_path: Path) -> None:
    server = new_server(tmp_path)
    server.start()
    try:
        (token,) = re.findall(r"admin token for this run: (\S+)", server.log)
        (tmp_path / "safety.yaml").write_text(blocks("yaml")[0])
        shell(command("curl -s http://127.0.0.1:8080/v1/act"), server)
        block = command(".venv/bin/surefoot safety check").replace("TOKEN", token)
        check, test, *puts = block.replace("safety.yaml", str(tmp_path / "safety.yaml")).splitlines()
        shell(check, server)
        assert "not-off-the-track" in shell(test, server)
        answers = [json.loads(shell(put, server)) for put in puts]
        assert (answers[0]["generation"], answers[1]["epsilon"], answers[2]["on"]) == (2, 0.1, ["freeze_exploration"])
        at_the_end = {"state": [2.5, 0.0, 0.0, 0.0]}
        answer = httpx.post(f"{server.url}/v1/act", json=at_the_end).json()
        assert (answer["action_name"], answer["exploration"]["epsilon"]) == ("left", 0.0)
        declare, reward = command(
            "curl -s -X PUT http://127.0.0.1:8080/admin/policies/cartpole/deployment"
        ).splitlines()
        assert json.loads(shell(declare.replace("TOKEN", token), server))["generation"] == 5
        told = json.loads(shell(reward.replace(SHORTENED, answer["decision_id"]), server))
        assert (told["status"], told["reward"]) == ("joined", 2.5)
    finally:
        assert server.stop() == 0, server.log


def save_index_of_best(path: Path) -> None:
    """Save what an export by Stable-Baselines3's recipe looks like: one state in, the index of the best action out."""
    proto = linear([[0, 1], [0, 1], [0, 1], [0, 1]], batch=1)
    del proto.graph.output[:]
    proto.graph.node.append(helper.make_node("ArgMax", ["q_values"], ["best"], axis=1, keepdims=0))
    proto.graph.output.append(helper.make_tensor_value_info("best", TensorProto.INT64, [1]))
    path.write_bytes(proto.SerializeToString())


def test_the_transitions_command_and_the_python_snippet_read_what_was_decided(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = command(".venv/bin/python examples/cartpole/play.py").replace("20", "1")
    shell(f"{play} --url {server.url}", server)
    lines = shell(command(".venv/bin/surefoot transitions tail"), server).splitlines()
    assert [json.loads(line)["policy"] for line in lines] == ["cartpole"] * 3
    (snippet,) = [block for block in blocks("python") if "transitions(" in block]
    monkeypatch.chdir(server.data_dir.parent)  # where `data/` lies

    class Trained(Exception):
        pass

    def train(states: object, *rest: object) -> None:
        assert getattr(states, "shape", (0,))[1:] == (4,)
        assert len(rest) == 5
        raise Trained

    with pytest.raises(Trained):
        exec(snippet, {"train": train})


def test_every_page_that_the_readme_and_the_pages_link_to_exists() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_subcommands_that_the_documents_name_exist() -> None:
    from typer.main import get_command

    from service.cli import app

    tree = get_command(app)
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        for named in re.findall(
            r"surefoot ((?:serve|policy|config|transitions|replay)(?: [a-z-]+)?)\b", page.read_text()
        ):
            group, _, name = named.partition(" ")
            found = tree.commands[group]  # type: ignore[attr-defined]
            assert not name or not hasattr(found, "commands") or name in found.commands, f"{page.name} names {named!r}"
