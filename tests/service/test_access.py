"""Tokens, owners, rates and the audit log of real services: two replicas that share a Redis."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from service.audit import verify
from service.valkey import EmbeddedValkey
from tests.conftest import new_server
from tests.policies.networks import bundle_files, logarithm
from tests.service.admins import STATE, TOKEN, Admin, serving
from tests.service.test_breaking import trip
from tests.service.test_roles import made
from tests.waiting import until

RULES = """schema: 1
policy: toy
rules:
  - kind: forbid
    name: never-down
    when: action.index == 5
"""


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    valkey = EmbeddedValkey(tmp_path_factory.mktemp("redis") / "shared", maxmemory_bytes=64 << 20)
    yield valkey.start()
    valkey.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[list[Admin]]:
    folder, servers = tmp_path_factory.mktemp("pair"), []
    settings = {"admin_token": TOKEN, "client_token": "the-client", "redis_url": redis_url}
    for name in ("one", "two"):
        servers.append(new_server(folder / name, **settings))
        servers[-1].start()
    found = [Admin(server) for server in servers]
    found[0].pushed("toy", "v1")
    until(lambda: found[1].http.get("/admin/policies/toy").status_code == 200, "the policy on the other replica")
    yield found
    for admin in found:
        admin.close()
        assert admin.server.stop() == 0


def get(admin: Admin, path: str, token: str) -> int:
    return httpx.get(admin.server.url + path, headers=bearer(token)).status_code


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def entries(admin: Admin, **asked: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = admin.http.get("/admin/audit", params={"after": after, "limit": 1000, **asked}).json()
        found += page["entries"]
        after = page["next"]
    return found


def surefoot(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SUREFOOT_")}
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False)


# -- Tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_works_everywhere_until_it_is_revoked_everywhere(pair: list[Admin], redis_url: str) -> None:
    one, two = pair
    made_one = one.http.post("/admin/tokens", json={"role": "viewer", "owner": "eve"}).json()
    token, token_id = made_one["token"], made_one["id"]
    assert re.fullmatch(r"sf_[A-Za-z0-9_-]{43}", token)
    assert get(one, "/admin/policies", token) == 200
    until(lambda: get(two, "/admin/policies", token) == 200, "the token on the other replica")
    listed = {each["id"]: each for each in two.http.get("/admin/tokens").json()}
    assert listed[token_id]["owner"] == "eve"
    assert "hash" not in listed[token_id]
    with redis.Redis.from_url(redis_url, protocol=2) as store:
        assert token.encode() not in store.hget("sf:tokens", "document")

        def last_used() -> Any:
            return store.hget("sf:tokens:used", token_id)

        until(last_used, "the time of its last use")
        assert int(last_used() or 0) % 600_000 == 0
    assert two.http.delete(f"/admin/tokens/{token_id}").status_code == 204
    assert get(two, "/admin/policies", token) in (401, 429), "429: it was asked for before it was known here, too often"
    until(lambda: get(one, "/admin/policies", token) == 401, "the end of the token on the other replica")
    assert two.http.delete(f"/admin/tokens/{token_id}").json()["code"] == "unknown_token"


def test_a_token_ends_when_it_was_said_to(pair: list[Admin]) -> None:
    token = made(pair[0], "viewer", expires_in_hours=0.0005)  # 1.8 s
    assert get(pair[0], "/admin/policies", token) == 200
    until(lambda: get(pair[0], "/admin/policies", token) == 401, "its end")


@pytest.mark.parametrize(
    "wanted",
    [
        {"role": "viewer"},
        {"role": "god", "owner": "a"},
        {"role": "viewer", "owner": ""},
        {"role": "viewer", "owner": "a b"},
        {"role": "viewer", "owner": "a", "expires_in_hours": 0},
        {"role": "viewer", "owner": "a", "text": "mine"},
        {"role": "admin", "owner": "a", "policies": ["toy"]},
    ],
)
def test_a_token_that_makes_no_sense_is_not_made(pair: list[Admin], wanted: dict[str, Any]) -> None:
    assert pair[0].http.post("/admin/tokens", json=wanted).status_code == 422


def test_a_token_for_some_policies_reaches_no_other(pair: list[Admin]) -> None:
    one, _ = pair
    token = made(one, "operator", policies=["toy"])
    url, headers = one.server.url, bearer(token)
    names = [each["policy"] for each in httpx.get(f"{url}/admin/policies", headers=headers).json()]
    assert names == ["toy"]
    assert get(one, "/admin/policies/toy", token) == 200
    assert get(one, "/admin/policies/cartpole", token) == 403
    assert get(one, "/admin/audit", token) == 403
    assert get(one, "/admin/audit?policy=cartpole", token) == 403
    assert get(one, "/admin/audit?policy=toy", token) == 200

    def post(path: str, **body: Any) -> httpx.Response:
        return httpx.post(url + path, json=body, headers=headers)

    toy = post("/v1/act", policy="toy", state=STATE)
    assert toy.status_code == 200
    other = one.http.post("/v1/act", json={"policy": "cartpole", "state": [0.0] * 4}).json()["decision_id"]
    mine = toy.json()["decision_id"]
    assert post("/v1/act", policy="cartpole", state=[0.0] * 4).status_code == 403
    assert post("/v1/act/batch", policy="cartpole", states=[[0.0] * 4]).status_code == 403
    assert post("/v1/act/batch", policy="toy", states=[STATE]).status_code == 200
    assert post("/v1/reward", decision_id=mine, reward=1.0).status_code == 202
    assert post("/v1/reward", decision_id=other, reward=1.0).status_code == 403
    both = [{"decision_id": each, "reward": 1.0} for each in (mine, other)]
    assert post("/v1/reward/batch", rewards=both).status_code == 403
    assert post("/v1/reward", policy="cartpole", episode="e", reward=1.0).status_code == 403
    assert get(one, f"/v1/decisions/{mine}", token) == 200
    assert get(one, f"/v1/decisions/{other}", token) == 403


def test_a_replica_without_redis_still_knows_the_tokens(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=64 << 20)
    url = valkey.start()
    try:
        with serving(tmp_path / "one", redis_url=url, client_token="the-client", grace_s="1") as admin:
            token = made(admin, "client")
            until(lambda: (admin.server.data_dir / "tokens.json").exists(), "the copy on disk")
            kept = admin.server.data_dir / "tokens.json"
            assert token not in kept.read_text()
            assert kept.stat().st_mode & 0o777 == 0o600
            admin.server.stop()
            valkey.stop()
            admin.server.start()
            body = {"state": [0.0] * 4}
            answer = httpx.post(f"{admin.server.url}/v1/act", json=body, headers=bearer(token))
            assert answer.status_code == 200, answer.text
            refused = httpx.post(f"{admin.server.url}/v1/act", json=body, headers=bearer(token + "x"))
            assert refused.status_code == 401
    finally:
        valkey.stop()


def test_a_restored_backup_revives_no_token(tmp_path: Path) -> None:
    with serving(tmp_path) as admin, redis.Redis.from_url(admin.server.redis_url, protocol=2) as store:
        made_one = admin.http.post("/admin/tokens", json={"role": "admin", "owner": "eve"}).json()
        backup: Any = store.hgetall("sf:tokens")
        assert admin.http.delete(f"/admin/tokens/{made_one['id']}").status_code == 204
        store.delete("sf:tokens")
        store.hset("sf:tokens", mapping=backup)
        until(lambda: store.hget("sf:tokens", "generation") == b"2", "the newer document")
        assert get(admin, "/admin/tokens", made_one["token"]) == 401


# -- Owners of rules --------------------------------------------------------------------------------------------------


def test_rules_are_replaced_by_their_owner_or_by_an_admin(tmp_path: Path) -> None:
    with serving(tmp_path, auth_failures_per_minute="1000") as admin:
        admin.pushed("toy", "v1")
        mine, theirs = (made(admin, "operator", **{"owner": name}) for name in ("us", "them"))

        def rule(token: str, query: str = "") -> httpx.Response:
            tag = admin.http.get("/admin/policies/toy/safety").headers["etag"]
            headers = bearer(token) | {"If-Match": tag, "Content-Type": "application/yaml"}
            return httpx.put(f"{admin.server.url}/admin/policies/toy/safety{query}", content=RULES, headers=headers)

        assert rule(mine).status_code == 200, "they were nobody's"
        assert rule(mine).status_code == 200
        refused = rule(theirs)
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert "'us'" in refused.json()["detail"]
        assert rule(TOKEN).status_code == 200, "an admin replaces them, and they stay whose they are"
        assert rule(theirs).status_code == 403
        assert rule(mine, "?owner=them").status_code == 403
        assert rule(TOKEN, "?owner=them").status_code == 200
        assert rule(mine).status_code == 403
        assert rule(theirs).status_code == 200
        owners = [each["owner"] for each in entries(admin) if each["action"] == "rule"]
        assert owners == ["us", "us", "them", "", "them", "us", "", "us", "them"]


# -- Rates ------------------------------------------------------------------------------------------------------------


def test_who_asks_too_often_is_told_when_to_come_back(tmp_path: Path) -> None:
    with serving(tmp_path, admin_rate="2", auth_failures_per_minute="3") as admin:
        answers = [admin.http.get("/admin/policies") for _ in range(30)]
        counts = Counter(each.status_code for each in answers)
        assert set(counts) == {200, 429}
        last = answers[-1]
        assert (last.json()["code"], last.headers["retry-after"]) == ("too_many_requests", "1")
        wrong = [httpx.get(f"{admin.server.url}/admin/policies", headers=bearer("wrong")) for _ in range(5)]
        assert [each.status_code for each in wrong] == [401] * 3 + [429] * 2
        assert int(wrong[-1].headers["retry-after"]) > 10
        body = {"state": [0.0] * 4}
        assert all(httpx.post(f"{admin.server.url}/v1/act", json=body).status_code == 200 for _ in range(50))
        metrics = httpx.get(f"{admin.server.url}/metrics").text
        assert 'surefoot_refused_callers_total{reason="wrong"} 3.0' in metrics


# -- The audit log ----------------------------------------------------------------------------------------------------


def test_100_changes_at_once_on_two_replicas_have_one_winner_each_and_one_chain(pair: list[Admin]) -> None:
    one, two = pair
    before = len(entries(one, policy="toy"))
    started = one.view("toy")["deployment"]
    generation = int(one.http.get("/admin/policies/toy").headers["etag"].strip('"'))
    body = started | {"champion": "v1"}

    def change(number: int) -> tuple[int, int]:
        """Each from the generation that a client of its replica sees: ten rounds of ten at once."""
        admin = pair[number % 2]
        expected = generation + number // 10
        until(
            lambda: int(admin.http.get("/admin/policies/toy").headers["etag"].strip('"')) >= expected,
            f"generation {expected}",
        )
        with httpx.Client(base_url=admin.server.url, headers=bearer(TOKEN), timeout=60.0) as http:
            tag = {"If-Match": f'"{expected}"'}
            return expected, http.put("/admin/policies/toy/deployment", json=body, headers=tag).status_code

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(change, range(100)))
    by_generation = {
        each: Counter(status for expected, status in answers if expected == each) for each in dict(answers)
    }
    assert by_generation == {generation + n: Counter({412: 9, 200: 1}) for n in range(10)}

    until(lambda: one.http.get("/admin/audit").json()["unchained"] == 0, "the chain of the first")
    until(lambda: two.http.get("/admin/audit").json()["unchained"] == 0, "the chain of the second")
    found = entries(one, policy="toy")[before:]
    assert Counter(each["outcome"] for each in found) == {"done": 10, "generation_moved": 90}
    won = [each for each in found if each["outcome"] == "done"]
    assert sorted((each["before"], each["after"]) for each in won) == [
        (generation + n, generation + n + 1) for n in range(10)
    ]
    assert len({each["segment"] for each in found}) == 2
    assert all(each["actor"] == "admin" and each["address"] == "127.0.0.1" for each in found)
    until(lambda: files(one) == files(two), "the same chain on both disks")
    assert verify(files(one)).seq == len(files(one))
    digests = {each["after"]: each["digest"] for each in won}
    assert len(set(digests.values())) == 10


def files(admin: Admin) -> list[bytes]:
    return (admin.server.data_dir / "audit" / "chain-0.jsonl").read_bytes().splitlines()


def test_a_hundred_at_once_from_one_generation_have_one_winner(pair: list[Admin]) -> None:
    tag = {"If-Match": pair[0].http.get("/admin/policies/toy").headers["etag"]}
    until(lambda: pair[1].http.get("/admin/policies/toy").headers["etag"] == tag["If-Match"], "the generation")
    body = pair[0].view("toy")["deployment"]

    def change(number: int) -> int:
        url = f"{pair[number % 2].server.url}/admin/policies/toy/deployment"
        return httpx.put(url, json=body, headers=tag | bearer(TOKEN), timeout=60.0).status_code

    with ThreadPoolExecutor(100) as pool:
        assert Counter(pool.map(change, range(100))) == {200: 1, 412: 99}


def test_the_command_verifies_exports_and_finds_what_was_changed(pair: list[Admin], tmp_path: Path) -> None:
    one, two = pair
    until(lambda: files(one) == files(two), "the same chain on both disks")
    chain_file = one.server.data_dir / "audit" / "chain-0.jsonl"
    remote = ("--url", two.server.url, "--token", TOKEN)
    out = tmp_path / "audit.jsonl"
    assert surefoot("audit", "export", *remote, "--out", str(out)).returncode == 0
    assert out.read_bytes() == chain_file.read_bytes()
    found = [surefoot("audit", "verify", *which) for which in (("--file", str(out)), remote)]
    found.append(surefoot("audit", "verify", *remote, "--source", "disk"))
    found.append(surefoot("audit", "verify", SUREFOOT_DATA_DIR=str(one.server.data_dir)))
    assert [each.returncode for each in found] == [0] * 4, found
    assert len({each.stdout for each in found}) == 1
    head = found[0].stdout.split("head ")[1].strip()
    assert surefoot("audit", "verify", "--file", str(out), "--head", head).returncode == 0
    lines = out.read_bytes().splitlines()
    out.write_bytes(b"\n".join([*lines[:2], lines[2].replace(b'"actor":"admin"', b'"actor":"nobody"'), *lines[3:]]))
    broken = surefoot("audit", "verify", "--file", str(out))
    assert (broken.returncode, broken.stderr.startswith("broken at entry 3:")) == (1, True), broken.stderr
    out.write_bytes(b"\n".join(lines[:-1]))
    assert surefoot("audit", "verify", "--file", str(out)).returncode == 0
    cut = surefoot("audit", "verify", "--file", str(out), "--head", head)
    assert (cut.returncode, f"entry {len(lines)}" in cut.stderr) == (1, True)


def test_the_commands_for_tokens_mirror_the_api(pair: list[Admin]) -> None:
    where = ("--url", pair[0].server.url, "--token", TOKEN)
    done = surefoot("token", "create", "--role", "trainer", "--owner", "lab", "--policy", "toy", *where)
    assert done.returncode == 0, done.stderr
    token, told = done.stdout.strip(), json.loads(done.stderr)
    assert token.startswith("sf_")
    assert token not in done.stderr
    assert (told["role"], told["owner"], told["policies"]) == ("trainer", "lab", ["toy"])
    assert get(pair[0], "/admin/policies/toy", token) == 200
    listed = json.loads(surefoot("token", "list", *where).stdout)
    assert told["id"] in [each["id"] for each in listed]
    assert surefoot("token", "revoke", told["id"], *where).returncode == 0
    assert get(pair[0], "/admin/policies/toy", token) == 401
    assert surefoot("token", "revoke", told["id"], *where).returncode == 1


def test_changes_while_redis_is_away_are_chained_when_it_is_back(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=64 << 20)
    url = valkey.start()
    try:
        with serving(tmp_path / "one", redis_url=url) as admin:
            admin.pushed("toy", "v1")
            valkey.stop()
            until(lambda: admin.http.get("/admin/audit").json()["source"] == "disk", "the copy of this disk")
            body = {"on": ["freeze_exploration"]}
            assert admin.http.put("/admin/policies/toy/halts", json=body).status_code == 200
            assert admin.http.put("/admin/policies/toy/halts", json={"on": []}).status_code == 503
            assert admin.http.get("/admin/audit").json()["unchained"] == 2
            admin.server.kill()  # what was answered is on disk
            valkey.start()
            admin.server.start()
            until(lambda: len(entries(admin, policy="toy")) >= 4, "the entries of before")
            found = [(each["actor"], each["action"], each["outcome"]) for each in entries(admin, policy="toy")]
            assert found[:2] == [("system", "first_deployment", "done"), ("admin", "push", "done")]
            assert ("admin", "halt", "done") in found
            assert ("admin", "halt", "store_away") in found
            verify(files(admin))
    finally:
        valkey.stop()


def test_no_secret_stands_in_log_audit_or_on_disk(tmp_path: Path) -> None:
    canary = f"canary-{uuid.uuid4().hex}"
    settings = {"client_token": f"client-{canary}", "log_level": "debug", "auth_failures_per_minute": "1000"}
    with serving(tmp_path, **settings) as admin:
        token = made(admin, "operator")
        for text in (token, f"wrong-{canary}", f"client-{canary}"):
            url = f"{admin.server.url}/admin/policies"
            for method, path in (("GET", ""), ("PUT", "/toy/halts"), ("POST", "/toy/versions"), ("PUT", "/toy/safety")):
                httpx.request(method, url + path, headers=bearer(text), content=f"text: {text}")
            httpx.post(f"{admin.server.url}/v1/act", json={"state": [0.0] * 4}, headers=bearer(text))
            httpx.post(f"{admin.server.url}/v1/act", content=text, headers=bearer(text))
        told = json.dumps(entries(admin)) + httpx.get(f"{admin.server.url}/openapi.json").text
        told += admin.http.get("/admin/tokens").text
        admin.server.stop()
        told += admin.server.log
        assert len(admin.server.log) > 1_000
        for file in admin.server.data_dir.rglob("*"):
            if file.is_file():
                told += file.read_bytes().decode(errors="replace")
    for secret in (canary, token, TOKEN):
        assert secret not in told


def test_a_trip_is_written_down_as_the_service_s_own(tmp_path: Path) -> None:
    files = bundle_files(logarithm(), [[1.0, 1.0]], [[0.0, 0.0]], policy="toy", version="v1", exploration=None)
    with serving(tmp_path) as admin:
        assert admin.push(files, "toy").status_code == 201
        admin.pushed("toy", "v0")
        assert admin.deploy("toy", '"1"', champion="v1", baseline="v0").status_code == 200
        trip(admin, "toy")
        until(lambda: any(each["action"] == "trip_here" for each in entries(admin)), "the trip")
        until(lambda: any(each["action"] == "trip" for each in entries(admin)), "its generation")
        found = {each["action"]: each for each in entries(admin)}
        assert (found["trip_here"]["actor"], found["trip_here"]["subject"]) == ("system", "v1")
        assert found["trip"]["after"] == found["trip"]["before"] + 1
