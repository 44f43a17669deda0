"""Recurrent versions over HTTP: callers must name their episodes once such a version decides, and not before."""

from __future__ import annotations

from pathlib import Path

from tests.policies.networks import bundle_files
from tests.service.admins import STATE, Admin, serving
from tests.service.test_act_spaces import counter

RECURRENT = {"states": [{"input": "h", "output": "h_out", "shape": [1]}]}


def push_counter(admin: Admin, policy: str, version: str) -> None:
    files = bundle_files(
        counter(),
        [STATE],
        [[0.0, 1.0]],
        policy=policy,
        version=version,
        recurrent=RECURRENT,
        exploration=None,
    )
    answer = admin.push(files, policy)
    assert answer.status_code == 201, answer.text


def test_a_recurrent_version_asks_for_episodes_only_while_it_decides(tmp_path: Path) -> None:
    with serving(tmp_path) as admin:
        admin.pushed("toy", "v1")
        push_counter(admin, "toy", "v2")
        assert admin.view("toy")["versions"]["v2"]["loaded"], "it stands by"
        assert admin.act("toy")["version"] == "v1"

        admin.promote("toy", "v2")
        refused = admin.http.post("/v1/act", json={"policy": "toy", "state": STATE})
        problem = refused.json()
        assert (refused.status_code, problem["code"]) == (422, "missing_field")
        assert [error["field"] for error in problem["errors"]] == ["episode"]
        assert admin.act("toy", episode="e", step=0)["version"] == "v2"

        admin.promote("toy", "v1")
        assert admin.act("toy")["version"] == "v1"


def test_a_batch_for_a_recurrent_champion_names_the_row_without_an_episode(tmp_path: Path) -> None:
    with serving(tmp_path) as admin:
        push_counter(admin, "toy", "v1")
        batch = {"policy": "toy", "states": [STATE, STATE]}
        for episodes, field in ((None, "episodes[0]"), (["e", None], "episodes[1]")):
            refused = admin.http.post("/v1/act/batch", json=batch | ({"episodes": episodes} if episodes else {}))
            problem = refused.json()
            assert (refused.status_code, problem["code"]) == (422, "missing_field"), problem
            assert [error["field"] for error in problem["errors"]] == [field]
        answered = admin.http.post("/v1/act/batch", json=batch | {"episodes": ["e", "f"]})
        assert answered.status_code == 200, answered.text


def test_memory_goes_on_from_call_to_call_and_says_where_it_could_not(tmp_path: Path) -> None:
    with serving(tmp_path) as admin:
        push_counter(admin, "toy", "v1")
        steps = [admin.act("toy", episode="e", step=step, include=["values"]) for step in range(3)]
        assert [step["values"][0] for step in steps] == [0.0, 1.0, 2.0]
        assert not any(step.get("state_reset") for step in steps)
        hole = admin.act("toy", episode="e", step=9, include=["values"])
        assert (hole["state_reset"], hole["values"][0]) == (True, 0.0)
