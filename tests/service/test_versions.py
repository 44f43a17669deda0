"""Versions come and go while the service runs: pushed, promoted and deleted through the admin API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.errors import BundleError, ConfigError
from service.gate import Gate
from service.metrics import Metrics
from service.replay import replay_decision
from service.runtime import read_seeds
from service.settings import Settings
from tests.policies.networks import bundle_files, indexer, linear, logarithm
from tests.service.admins import STATE, Admin, files_of, serving, tar_of
from tests.waiting import until


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("versions")) as mine:
        yield mine


def problem(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and field of a refusal."""
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, body["code"], next((each["field"] for each in body.get("errors", [])), None)


# Pushing


def test_the_first_version_of_a_new_policy_is_served_at_once(admin: Admin, policy: str) -> None:
    unknown = admin.http.post("/v1/act", json={"policy": policy, "state": STATE})
    assert problem(unknown) == (404, "unknown_policy", "policy")
    pushed = admin.pushed(policy, "v1", prefers=1)
    assert (pushed["version"], pushed["role"], pushed["loaded"]) == ("v1", "champion", True)
    assert pushed["warnings"] == []
    answer = admin.act(policy)
    assert (answer["version"], answer["role"], answer["action"], answer["generation"]) == ("v1", "champion", 1, 1)
    assert answer["logged"] is True
    reward = {"decision_id": answer["decision_id"], "reward": 1.0}
    assert admin.http.post("/v1/reward", json=reward).json()["status"] in {"joined", "early"}
    joined = admin.http.get(f"/v1/decisions/{answer['decision_id']}").json()["join"]
    assert (joined["state"], joined["reward"]["reward"]) == ("joined", 1.0)
    metrics = admin.http.get("/metrics").text
    assert f'surefoot_loaded_versions{{policy="{policy}"}} 1.0' in metrics
    assert f'surefoot_policy_info{{digest="{pushed["digest"]}",policy="{policy}",role="champion"' in metrics
    assert f'surefoot_decisions_total{{policy="{policy}",role="champion",version="v1"}} 1.0' in metrics


def test_a_decision_of_a_pushed_policy_replays(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1")
    decision = admin.act(policy)["decision_id"]
    until(lambda: admin.http.get(f"/v1/decisions/{decision}").status_code == 200, "the record")
    settings = Settings(data_dir=admin.server.data_dir)
    assert asyncio.run(replay_decision(decision, settings))["same"] is True


def test_a_second_version_stands_by_until_it_is_promoted(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=0)
    pushed = admin.pushed(policy, "v2", prefers=1)
    assert (pushed["role"], pushed["loaded"]) == (None, True)
    assert admin.act(policy)["version"] == "v1"
    admin.promote(policy, "v2")
    answer = admin.act(policy)
    assert (answer["version"], answer["action"], answer["generation"]) == ("v2", 1, 2)


def test_the_same_content_again_is_nothing_new_and_other_content_is_refused(admin: Admin, policy: str) -> None:
    first = admin.pushed(policy, "v1")
    again = admin.push(files_of(policy, "v1"), policy)
    assert (again.status_code, again.json()["digest"]) == (200, first["digest"])
    other = admin.push(files_of(policy, "v1", prefers=1), policy)
    assert problem(other) == (409, "version_exists", "version")
    assert admin.view(policy)["versions"]["v1"]["digest"] == first["digest"]
    assert admin.view(policy)["generation"] == 1


@pytest.mark.parametrize("how", ["tar", "gzip", "folder in a tar", "form by file names", "form by names"])
def test_a_bundle_may_come_as_a_tar_or_as_a_form(admin: Admin, policy: str, how: str) -> None:
    files, path = files_of(policy, "v1"), f"/admin/policies/{policy}/versions"
    tar = {"Content-Type": "application/x-tar"}
    if how == "tar":
        answer = admin.http.post(path, content=tar_of(files), headers=tar)
    elif how == "gzip":
        answer = admin.http.post(path, content=tar_of(files, "w:gz"), headers={"Content-Type": "application/gzip"})
    elif how == "folder in a tar":
        inner = {f"./v1/{name}": content for name, content in files.items()}
        answer = admin.http.post(path, content=tar_of(inner), headers=tar)
    elif how == "form by file names":
        answer = admin.http.post(path, files=[("files", (name, content)) for name, content in files.items()])
    else:
        answer = admin.http.post(path, files={name: ("blob", content) for name, content in files.items()})
        assert problem(answer) == (422, "bundle_refused", "blob")  # a file's own name counts, where it has one
        answer = admin.http.post(path, files={name: (None, content) for name, content in files.items()})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"{path}/v1"
    assert admin.act(policy)["version"] == "v1"


def test_a_push_is_streamed_under_a_cap_and_needs_the_token(admin: Admin, policy: str) -> None:
    path, tar = f"/admin/policies/{policy}/versions", {"Content-Type": "application/x-tar"}
    body = tar_of(files_of(policy, "v1"))
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        refused = httpx.post(f"{admin.server.url}{path}", content=body, headers=tar | headers)
        assert problem(refused) == (401, "unauthorized", None)
    assert problem(admin.http.post(path, content=body, headers={"Content-Type": "text/plain"}))[:2] == (
        415,
        "unsupported_media_type",
    )
    cut = admin.http.post(path, content=body[:700], headers=tar)
    assert problem(cut)[:2] == (422, "bundle_refused")
    form = b'--x\r\nContent-Disposition: form-data; name="policy.yaml"\r\n\r\nhalf'
    cut_form = admin.http.post(path, content=form, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert problem(cut_form) == (422, "bundle_refused", "body")
    piece = b"\0" * (4 << 20)
    large = admin.http.post(path, content=(piece for _ in range(100)), headers=tar)
    assert problem(large)[:2] == (413, "body_too_large")
    assert admin.http.get(f"/admin/policies/{policy}").status_code == 404


REFUSED: list[tuple[str, str, Callable[[dict[str, bytes]], dict[str, bytes]]]] = [
    ("digest", "model.sha256", lambda files: files | {"model.onnx": linear([[1, 0], [0, 1]]).SerializeToString()}),
    ("manifest", "head", lambda files: _replaced(files, b"head: q_values", b"head: magic")),
    ("interface", "model.input", lambda files: _replaced(files, b"input: observation", b"input: nowhere")),
    ("files", "golden.json", lambda files: {name: files[name] for name in ("policy.yaml", "model.onnx")}),
]


def _replaced(files: dict[str, bytes], old: bytes, new: bytes) -> dict[str, bytes]:
    assert old in files["policy.yaml"]
    return files | {"policy.yaml": files["policy.yaml"].replace(old, new)}


@pytest.mark.parametrize(("check", "field", "change"), REFUSED)
def test_what_the_gate_refuses_names_check_and_field(
    admin: Admin, policy: str, check: str, field: str, change: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> None:
    answer = admin.push(change(files_of(policy, "v1")), policy)
    assert problem(answer) == (422, "bundle_refused", field)
    assert answer.json()["check"] == check
    assert admin.http.get(f"/admin/policies/{policy}").status_code == 404


def test_networks_that_fail_or_answer_nan_are_refused_and_nothing_else_notices(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1")
    nan = bundle_files(logarithm(), [[-1.0, 1.0]], [[0.0, 0.0]], policy=policy, version="v2")
    wrong = bundle_files(linear([[0, 0], [0, 0]], [1, 0]), [STATE], [[0.0, 9.0]], policy=policy, version="v2")
    failing = bundle_files(indexer(), [[7.0, 0.0]], [[1.0, 0.0]], policy=policy, version="v2")
    for files in (nan, wrong, failing):
        answer = admin.push(files, policy)
        assert problem(answer)[:2] == (422, "bundle_refused"), answer.text
    assert set(admin.view(policy)["versions"]) == {"v1"}
    assert admin.act(policy)["version"] == "v1"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("observation", {"observation": {"shape": [2], "features": [{"name": "x"}, {"name": "y"}]}}),
        ("observation", {"observation": {"shape": [2]}}),
        ("action", {"action": {"kind": "discrete", "n": 2, "names": ["x", "y"]}, "fallback": "x"}),
    ],
)
def test_a_version_must_answer_the_same_callers(admin: Admin, policy: str, field: str, changes: dict[str, Any]) -> None:
    admin.pushed(policy, "v1")
    answer = admin.push(files_of(policy, "v2", **changes), policy)
    assert problem(answer) == (422, "bundle_refused", field)
    assert answer.json()["check"] == "spec"
    feature = {"shape": [2], "features": [{"name": "f0", "low": 0, "high": 9}, {"name": "f1"}]}
    assert admin.push(files_of(policy, "v2", observation=feature), policy).status_code == 201


def test_a_manifest_must_name_the_path_s_policy(admin: Admin, policy: str) -> None:
    answer = admin.push(files_of("another", "v1"), policy)
    assert problem(answer) == (422, "invalid_field", "policy")


# Deploying


def test_a_change_must_name_the_generation_that_it_replaces(admin: Admin, policy: str) -> None:
    assert problem(admin.deploy(policy, champion="v1")) == (404, "unknown_policy", "policy")
    admin.pushed(policy, "v1")
    admin.pushed(policy, "v2")
    tag = admin.http.get(f"/admin/policies/{policy}").headers["etag"]
    assert tag == '"1"'
    assert problem(admin.deploy(policy, champion="v2")) == (428, "generation_missing", "If-Match")
    assert problem(admin.deploy(policy, '"7"', champion="v2")) == (412, "generation_moved", "If-Match")
    assert problem(admin.deploy(policy, "*", champion="v2")) == (422, "invalid_field", "If-Match")
    assert admin.view(policy)["champion"] == "v1"
    changed = admin.deploy(policy, tag, champion="v2")
    assert (changed.status_code, changed.headers["etag"], changed.json()["champion"]) == (200, '"2"', "v2")
    assert problem(admin.deploy(policy, tag, champion="v1")) == (412, "generation_moved", "If-Match")


def test_of_changes_from_one_generation_one_wins(admin: Admin, policy: str) -> None:
    for version in ("v1", "v2", "v3"):
        admin.pushed(policy, version)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: admin.deploy(policy, '"1"', champion=f"v{2 + i % 2}"), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 7
    (won,) = [answer.json()["champion"] for answer in answers if answer.status_code == 200]
    assert (admin.view(policy)["champion"], admin.view(policy)["generation"]) == (won, 2)


def test_a_deployment_that_names_what_is_not_there_is_refused(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1")
    tag = admin.http.get(f"/admin/policies/{policy}").headers["etag"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"champion": "v9"}, "champion"),
        ({"champion": "v1", "baseline": "v9"}, "baseline"),
        ({"champion": "v1", "challengers": [{"version": "v9", "weight": 0.1}]}, "challengers[0].version"),
        ({"champion": "v1", "challengers": [{"version": "v9", "weight": 2}]}, "challengers[0].weight"),
        ({"champion": "v1", "policy": "other"}, "policy"),
        ({"champion": "v1", "colour": 1}, "colour"),
    ]
    for deployment, field in cases:
        answer = admin.deploy(policy, tag, **deployment)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field), answer.text
    assert admin.http.get(f"/admin/policies/{policy}").headers["etag"] == tag


def test_a_challenger_gets_its_share_of_keys(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=0)
    admin.pushed(policy, "v2", prefers=1)
    answer = admin.deploy(
        policy, '"1"', champion="v1", challengers=[{"version": "v2", "weight": 0.5}], reward={"window_s": 5}
    )
    assert answer.json()["challenger"] == {"version": "v2", "weight": 0.5}
    answers = [admin.act(policy, key=f"k{i}") for i in range(60)]
    assert {(each["version"], each["role"], each["action"]) for each in answers} == {
        ("v1", "champion", 0),
        ("v2", "challenger", 1),
    }
    again = [admin.act(policy, key=f"k{i}") for i in range(60)]
    assert [each["version"] for each in again] == [each["version"] for each in answers]


def test_a_policy_of_the_directory_takes_versions_and_promotions_too(tmp_path: Path) -> None:
    seeds = tmp_path / "policies"
    for name, content in files_of("toy", "v1").items():
        (seeds / "toy" / "v1").mkdir(parents=True, exist_ok=True)
        (seeds / "toy" / "v1" / name).write_bytes(content)
    with serving(tmp_path, policies=str(seeds)) as mine:
        assert mine.view("toy")["source"] == "directory"
        assert problem(mine.push(files_of("toy", "v1", prefers=1), "toy")) == (409, "version_exists", "version")
        assert mine.push(files_of("toy", "v1"), "toy").status_code == 200
        assert problem(mine.deploy("toy", champion="v1")) == (428, "generation_missing", "If-Match")
        mine.pushed("toy", "v2", prefers=1)
        mine.promote("toy", "v2")
        assert (mine.act("toy")["version"], mine.act("toy")["generation"]) == ("v2", 2)
        assert problem(mine.delete("toy", "v1")) == (409, "version_read_only", "version")
        mine.promote("toy", "v1")
        assert mine.act("toy")["version"] == "v1"
        mine.promote("toy", "v2")
        mine.server.stop()
        mine.server.start()
        answer = mine.act("toy")
        assert (answer["version"], answer["generation"]) == ("v2", 4)
        assert mine.view("toy")["source"] == "redis"


# Looking


def test_a_version_shows_what_it_is_and_where_it_runs(admin: Admin, policy: str) -> None:
    training = {"algorithm": "dqn", "run": 7}
    pushed = admin.pushed(policy, "v1", training=training, description="a test")
    view = admin.http.get(f"/admin/policies/{policy}/versions/v1").json()
    assert (view["policy"], view["version"], view["digest"]) == (policy, "v1", pushed["digest"])
    assert (view["role"], view["loaded"], view["device"], view["failure"]) == ("champion", True, "cpu", None)
    assert view["observation"] == {"shape": [2], "dtype": "float32", "names": ["f0", "f1"]}
    assert view["action"] == {"kind": "discrete", "n": 2, "names": ["a0", "a1"]}
    assert (view["head"], view["training"], view["description"]) == ("q_values", training, "a test")
    assert view["manifest"]["fallback"] == "a0"
    assert view["bytes"] == sum(map(len, files_of(policy, "v1", training=training, description="a test").values()))
    assert [each["version"] for each in admin.http.get(f"/admin/policies/{policy}/versions").json()] == ["v1"]
    assert problem(admin.http.get(f"/admin/policies/{policy}/versions/v9")) == (404, "unknown_version", "version")
    listed = {each["policy"]: each["champion"] for each in admin.http.get("/admin/policies").json()}
    assert (listed[policy], listed["cartpole"]) == ("v1", "v2")
    assert json.dumps(view)


def test_a_network_for_a_batch_of_one_is_taken_with_a_warning(admin: Admin, policy: str) -> None:
    files = bundle_files(linear([[0, 0], [0, 0]], [1, 0], batch=1), [STATE], [[1, 0]], policy=policy)
    answer = admin.push(files, policy)
    assert answer.status_code == 201
    assert "dynamic_axes" in answer.json()["warnings"][0]


# Deleting


def test_what_is_live_cannot_be_deleted(admin: Admin, policy: str) -> None:
    for version in ("v1", "v2", "v3", "v4"):
        admin.pushed(policy, version)
    admin.deploy(policy, '"1"', champion="v1", baseline="v2", challengers=[{"version": "v3", "weight": 0.1}])
    for version in ("v1", "v2", "v3"):
        assert problem(admin.delete(policy, version)) == (409, "version_live", "version")
    assert admin.delete(policy, "v4").status_code == 204
    assert problem(admin.delete(policy, "v4")) == (404, "unknown_version", "version")
    assert set(admin.view(policy)["versions"]) == {"v1", "v2", "v3"}
    admin.promote(policy, "v2")
    assert admin.delete(policy, "v1").status_code == 204
    assert admin.act(policy)["version"] == "v2"
    assert problem(admin.http.get(f"/admin/policies/{policy}/versions/v1"))[0] == 404
    assert f'policy="{policy}",role="champion",version="v1"' not in admin.http.get("/metrics").text


def test_a_deployment_and_the_deletion_of_what_it_names_never_both_succeed(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v0")
    for turn in range(12):
        label = f"w{turn}"
        admin.pushed(policy, label)
        tag = admin.http.get(f"/admin/policies/{policy}").headers["etag"]
        with ThreadPoolExecutor(2) as pool:
            deployed = pool.submit(admin.deploy, policy, tag, champion=label)
            deleted = pool.submit(admin.delete, policy, label)
        statuses = deployed.result().status_code, deleted.result().status_code
        assert statuses in {(200, 409), (422, 204)}, statuses
        assert admin.act(policy)["version"] in admin.view(policy)["versions"]


def test_a_deleted_label_may_come_back_with_other_content(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1")
    admin.pushed(policy, "v2", prefers=0)
    assert admin.delete(policy, "v2").status_code == 204
    admin.pushed(policy, "v2", prefers=1)
    admin.promote(policy, "v2")
    assert admin.act(policy)["action"] == 1


# The store elsewhere


def test_versions_may_lie_in_a_folder_instead(tmp_path: Path) -> None:
    with serving(tmp_path, store=f"file://{tmp_path / 'store'}") as mine:
        pushed = mine.pushed("toy", "v1")
        mine.pushed("toy", "v2", prefers=1)
        mine.promote("toy", "v2")
        assert mine.delete("toy", "v1").status_code == 204
        entries = [path.parent.name for path in (tmp_path / "store").glob("toy/*/version.json")]
        assert entries == ["v2"]
        mine.server.kill()
        mine.server.start()
        assert (mine.act("toy")["version"], mine.act("toy")["action"]) == ("v2", 1)
        left, copies = mine.view("toy")["versions"]["v2"]["digest"], mine.server.data_dir / "bundles"
        assert left != pushed["digest"]
        until(lambda: {path.name for path in copies.iterdir()} == {left}, "the copy of what is left")


# Signatures


def test_with_a_key_only_signed_bundles_come_in_and_stay(tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from policies.signing import sign

    secret = ec.generate_private_key(ec.SECP256R1())
    private = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = secret.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "key.pem").write_bytes(public)
    with serving(tmp_path, bundle_key=str(tmp_path / "key.pem")) as mine:
        files = files_of("toy", "v1")
        unsigned = mine.push(files, "toy")
        assert problem(unsigned) == (422, "bundle_refused", "model.sig")
        assert unsigned.json()["check"] == "signature"
        other = mine.push(files_of("toy", "v1", prefers=1) | {"model.sig": sign(files, private)}, "toy")
        assert problem(other) == (422, "bundle_refused", "model.sig")
        signed = files | {"model.sig": sign(files, private)}
        assert mine.push(signed, "toy").status_code == 201
        mine.server.kill()
        (copy,) = (mine.server.data_dir / "bundles").iterdir()
        assert (copy / "model.sig").read_bytes() == signed["model.sig"]
        mine.server.start()
        assert mine.act("toy")["version"] == "v1"


def test_with_a_key_an_unsigned_directory_does_not_start(tmp_path: Path) -> None:
    for name, content in files_of("toy", "v1").items():
        (tmp_path / "policies" / "toy" / "v1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "policies" / "toy" / "v1" / name).write_bytes(content)
    key = tmp_path / "key.pem"
    key.write_bytes(b"any")
    settings = Settings(data_dir=tmp_path, policies=tmp_path / "policies")
    with pytest.raises(BundleError, match="signed bundles only") as caught:
        read_seeds(settings, Gate(tmp_path / "trials", key))
    assert caught.value.check == "signature"
    assert [each.name for each in read_seeds(settings, Gate(tmp_path / "trials", None))] == ["toy"]
    with pytest.raises(ConfigError) as missing:
        Gate(tmp_path / "trials", tmp_path / "nowhere.pem")
    assert missing.value.field == "SUREFOOT_BUNDLE_KEY"


def test_metrics_of_versions_that_are_no_more_go() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.version("toy", "v1").explored.inc()
    metrics.version("toy", "v2").explored.inc()
    metrics.forget("toy", "v1")
    metrics.forget("toy", "v1")
    text = generate_latest(registry).decode()
    assert 'version="v1"' not in text
    assert 'version="v2"' in text
