"""Shadows through real services and a real Valkey: they come and go under traffic; scores meet transitions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from service.push import promote
from service.redis_streams import base
from service.valkey import EmbeddedValkey
from shadow.scores import Score, decode_score
from surefoot.streams import tail
from tests.policies.growing import loop
from tests.policies.networks import bundle_files, linear, logarithm
from tests.service.admins import AUTHORIZED, STATE, Admin, files_of, serving
from tests.service.pipelines import STATES
from tests.service.test_recurrent_http import push_counter
from tests.service.valkeys import SMALL
from tests.waiting import until


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("shadows"), inference_timeout_s="0.5") as mine:
        yield mine


def watch(admin: Admin, policy: str, label: str) -> dict[str, Any]:
    answer = admin.http.put(f"/admin/policies/{policy}/shadows/{label}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def unwatch(admin: Admin, policy: str, label: str) -> dict[str, Any]:
    answer = admin.http.delete(f"/admin/policies/{policy}/shadows/{label}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def here(admin: Admin, policy: str) -> dict[str, dict[str, Any]]:
    """What this replica's shadows have come to, by version."""
    body = admin.http.get(f"/admin/policies/{policy}/shadows").json()
    return {each["version"]: each for each in body["here"]}


def entries(url: str, policy: str, label: str) -> list[Score]:
    with redis.Redis.from_url(url, protocol=2) as client:
        found: Any = client.xrange(f"{base(policy)}:shadow:{label}")
    scores = [decode_score(fields[b"d"]) for _, fields in found]
    assert [fields[b"id"].decode() for _, fields in found] == [score.decision_id for score in scores]
    return scores


def problem(answer: httpx.Response) -> tuple[int, str, str | None]:
    body = answer.json()
    return answer.status_code, body["code"], next((each["field"] for each in body.get("errors", [])), None)


def test_scores_meet_transitions_by_decision_id(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=0)
    admin.pushed(policy, "v2", prefers=1)
    view = watch(admin, policy, "v2")
    assert (view["shadows"], view["generation"], view["versions"]["v2"]["role"]) == (["v2"], 2, "shadow")
    ids = []
    for _ in range(20):
        answer = admin.act(policy)
        assert (answer["version"], answer["role"], answer["action"]) == ("v1", "champion", 0)
        ids.append(answer["decision_id"])
        admin.http.post("/v1/reward", json={"decision_id": ids[-1], "reward": 1.0})
    url = admin.server.redis_url
    until(lambda: len(entries(url, policy, "v2")) == 20, "the scores")
    scores = {score.decision_id: score for score in entries(url, policy, "v2")}
    until(lambda: len(list(tail(policy, url))) == 20, "the transitions")
    for transition in tail(policy, url):
        score = scores[transition["id"]]
        assert (score.propensity, score.probability, score.proposed) == (transition["propensity"], 0.0, 1)
    assert set(scores) == set(ids)
    now = here(admin, policy)["v2"]
    assert (now["scored"], now["agreement"], now["divergence"], now["status"]) == (20, 0.0, 1.0, "watching")
    assert (now["waiting"], now["share"], now["dropped"]) == (0, 1.0, {"shed": 0})
    assert now["latency_ms"]["p50"] > 0.0
    labels = f'{{policy="{policy}",version="v2"}}'
    metrics = admin.http.get("/metrics").text
    for line in (
        f"surefoot_shadow_scored_total{labels} 20.0",
        f"surefoot_shadow_agreed_total{labels} 0.0",
        f"surefoot_shadow_divergence_total{labels} 20.0",
        f"surefoot_shadow_share{labels} 1.0",
        f"surefoot_shadow_breaker_open{labels} 0.0",
        f'surefoot_policy_info{{digest="{now["digest"]}",policy="{policy}",role="shadow",version="v2"}} 1.0',
    ):
        assert line in metrics, line


def test_a_shadow_is_live_but_never_answers_and_goes_without_a_trace(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1")
    admin.pushed(policy, "v2", prefers=1)
    watch(admin, policy, "v2")
    assert problem(admin.delete(policy, "v2"))[:2] == (409, "version_live")
    admin.act(policy)
    until(lambda: here(admin, policy)["v2"]["scored"] == 1, "the score")
    assert f'surefoot_shadow_scored_total{{policy="{policy}"' in admin.http.get("/metrics").text
    generation = unwatch(admin, policy, "v2")["generation"]
    assert unwatch(admin, policy, "v2")["generation"] == generation, "the same again changes nothing"
    assert here(admin, policy) == {}
    assert f'surefoot_shadow_scored_total{{policy="{policy}"' not in admin.http.get("/metrics").text
    assert admin.delete(policy, "v2").status_code == 204


def test_what_cannot_watch_is_refused(admin: Admin, policy: str) -> None:
    path = f"/admin/policies/{policy}"
    for label in ("v1", "v2", "v3", "v4", "v5", "v6"):
        admin.pushed(policy, label, prefers=int(label == "v2"), description=label)
    assert problem(admin.http.put(f"{path}/shadows/v9"))[:2] == (404, "unknown_version")
    assert problem(admin.http.put(f"{path}/shadows/v1")) == (422, "invalid_field", "shadows")
    tag = admin.http.get(f"{path}/deployment").headers["etag"]
    named = admin.deploy(policy, tag, champion="v1", shadows=["v9"])
    assert problem(named) == (422, "invalid_field", "shadows[0]")
    twice = admin.deploy(policy, tag, champion="v1", shadows=["v2", "v2"])
    assert twice.status_code == 422
    for label in ("v2", "v3", "v4", "v5"):
        watch(admin, policy, label)
    assert problem(admin.http.put(f"{path}/shadows/v6")) == (422, "invalid_field", "shadows")
    anonymous = httpx.put(f"{admin.server.url}{path}/shadows/v6")
    assert anonymous.status_code == 401


def test_a_shadow_is_promoted_and_the_champion_before_may_watch(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", prefers=0)
    admin.pushed(policy, "v2", prefers=1)
    watch(admin, policy, "v2")
    token = AUTHORIZED["Authorization"].removeprefix("Bearer ")
    view = promote(policy, "v2", admin.server.url, token)
    assert (view["champion"], view["shadows"]) == ("v2", [])
    assert admin.act(policy)["action"] == 1
    assert watch(admin, policy, "v1")["shadows"] == ["v1"]


def test_shadows_come_go_crash_and_hang_while_traffic_runs(admin: Admin, policy: str) -> None:
    """Every answer is the champion's, whatever shadows do beside it."""
    admin.pushed(policy, "v1", prefers=1)
    bad = {"hangs": loop(), "odd": logarithm()}
    for label, proto in bad.items():
        states, outputs = (STATES, STATES) if label == "hangs" else ([[1.0, 1.0]], [[0.0, 0.0]])
        files = bundle_files(proto, states, outputs, policy=policy, version=label, exploration=None)
        assert admin.push(files, policy).status_code == 201
    wrong: list[Any] = []
    stop = threading.Event()
    answered = [0]

    def traffic(state: list[float]) -> None:
        with httpx.Client(base_url=admin.server.url, timeout=30.0) as http:
            while not stop.is_set():
                answer = http.post("/v1/act", json={"policy": policy, "state": state})
                body = answer.json()
                if (answer.status_code, body.get("version"), body.get("action")) != (200, "v1", 1):
                    wrong.append(body)
                answered[0] += 1

    callers = [threading.Thread(target=traffic, args=(state,)) for state in (STATE, [float(1 << 40), -1.0])]
    for caller in callers:
        caller.start()
    try:
        for label in (*bad, *bad):
            watch(admin, policy, label)
            until(lambda label=label: here(admin, policy)[label]["status"] == "tripped", f"{label} to trip")  # type: ignore[misc]
            before = answered[0]
            until(lambda before=before: answered[0] > before + 20, "answers beside it")  # type: ignore[misc]
            unwatch(admin, policy, label)
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert wrong == []
    assert answered[0] > 80


def test_a_recurrent_shadow_watches_a_policy_that_remembers_nothing(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1")
    push_counter(admin, policy, "v2")
    watch(admin, policy, "v2")
    admin.act(policy)  # without an episode: it cannot be placed
    for step in range(4):
        admin.act(policy, episode="e", step=step)
    until(lambda: here(admin, policy)["v2"]["scored"] == 4, "the scores")
    assert here(admin, policy)["v2"]["dropped"]["memory"] == 1
    url = admin.server.redis_url
    until(lambda: len(entries(url, policy, "v2")) == 4, "the entries")
    # It remembers how many steps it took: (0, 1), (1, 0), (2, -1), (3, -2).
    assert [score.proposed for score in entries(url, policy, "v2")] == [1, 0, 0, 0]


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    valkey = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=SMALL)
    yield valkey.start()
    valkey.stop()


def test_two_replicas_score_what_each_decides_and_a_restart_goes_on(tmp_path: Path, redis_url: str) -> None:
    policy = "pair"
    settings = {"redis_url": redis_url, "shadow_stream_keep": "100000"}
    with serving(tmp_path / "one", **settings) as one, serving(tmp_path / "two", **settings) as two:
        one.pushed(policy, "v1", prefers=0)
        one.pushed(policy, "v2", prefers=1)
        until(lambda: policy in {each["policy"] for each in two.http.get("/admin/policies").json()}, "the policy")
        watch(one, policy, "v2")
        until(lambda: "v2" in here(two, policy), "the shadow on the other replica")
        ids = [each.act(policy)["decision_id"] for each in (one, two) * 10]
        until(lambda: len(entries(redis_url, policy, "v2")) == 20, "the scores of both")
        assert {score.decision_id for score in entries(redis_url, policy, "v2")} == set(ids)
        assert (here(one, policy)["v2"]["scored"], here(two, policy)["v2"]["scored"]) == (10, 10)
        two.server.kill()
        two.server.start()
        again = Admin(two.server)
        until(lambda: "v2" in here(again, policy), "the shadow after the restart")
        again.act(policy)
        until(lambda: len(entries(redis_url, policy, "v2")) == 21, "its score")
        unwatch(one, policy, "v2")
        until(lambda: here(again, policy) == {}, "its end on the other replica")
        again.close()


def test_a_shadow_that_no_replica_can_load_holds_nothing_up(tmp_path: Path, redis_url: str) -> None:
    policy = "toy"
    with serving(tmp_path / "one", redis_url=redis_url) as one:
        one.pushed(policy, "v1")
        one.pushed(policy, "v2", prefers=1)
        watch(one, policy, "v2")
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            # Its network is gone: nobody who has no copy can load it.
            model = bundle_files(linear([[0, 0], [0, 0]], [0.0, 1.0]), [STATE], [[0.0, 1.0]])["model.onnx"]
            assert client.delete(*client.scan_iter(f"{base(policy)}:blob:{sha256(model).hexdigest()}:*"))
        with serving(tmp_path / "two", redis_url=redis_url) as two:
            assert two.act(policy)["version"] == "v1"
            until(lambda: two.view(policy)["versions"]["v2"]["failure"], "the failure")
            assert here(two, policy) == {}
            one.pushed(policy, "v3", prefers=1, description="another")
            one.http.put(
                f"/admin/policies/{policy}/deployment",
                json={"schema": 1, "policy": policy, "champion": "v3", "shadows": ["v2"]},
                headers={"If-Match": one.http.get(f"/admin/policies/{policy}/deployment").headers["etag"]},
            )
            until(lambda: two.act(policy)["version"] == "v3", "the promotion")


def test_the_directory_of_the_start_may_name_shadows(tmp_path: Path) -> None:
    for label in ("v1", "v2"):
        folder = tmp_path / "policies" / "toy" / label
        folder.mkdir(parents=True)
        for name, content in files_of("toy", label, int(label == "v2")).items():
            (folder / name).write_bytes(content)
    (tmp_path / "policies" / "toy" / "deployment.yaml").write_text(
        "{schema: 1, policy: toy, champion: v1, shadows: [v2]}"
    )
    with serving(tmp_path / "one", policies=str(tmp_path / "policies")) as one:
        assert one.act("toy")["version"] == "v1"
        until(lambda: "v2" in here(one, "toy"), "the shadow, loaded behind the start")
        one.act("toy")
        until(lambda: here(one, "toy")["v2"]["scored"] >= 1, "its score")


def test_scores_that_redis_refuses_are_lost_and_counted(tmp_path: Path) -> None:
    with serving(tmp_path) as one:
        one.pushed("toy", "v1")
        one.pushed("toy", "v2", prefers=1)
        with redis.Redis.from_url(one.server.redis_url, protocol=2) as client:
            client.set(f"{base('toy')}:shadow:v2", "no stream")
        watch(one, "toy", "v2")
        one.act("toy")
        lost = 'surefoot_shadow_drops_total{policy="toy",reason="stream",version="v2"} 1.0'
        until(lambda: lost in one.http.get("/metrics").text, "the count")
        assert one.http.get("/health/ready").status_code == 200


def test_scores_wait_for_a_redis_that_is_away(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=SMALL)
    url = valkey.start()
    with serving(tmp_path / "one", redis_url=url) as one:
        one.pushed("toy", "v1")
        one.pushed("toy", "v2", prefers=1)
        watch(one, "toy", "v2")
        one.act("toy")
        until(lambda: len(entries(url, "toy", "v2")) == 1, "a score")
        valkey.stop()
        ids = [one.act("toy")["decision_id"] for _ in range(5)]
        until(lambda: here(one, "toy")["v2"]["scored"] == 6, "the scoring")
        valkey = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=SMALL)
        assert valkey.start() == url
        until(lambda: {score.decision_id for score in entries(url, "toy", "v2")} >= set(ids), "the scores")
    valkey.stop()
