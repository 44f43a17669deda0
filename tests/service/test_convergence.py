"""Replicas of one control state: who has a change when it is answered, and what becomes of it without Redis."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis

from service.valkey import EmbeddedValkey
from tests.conftest import children
from tests.service.admins import STATE, Admin, serving
from tests.service.valkeys import SMALL
from tests.waiting import until

EPSILON = {"epsilon": 1.0}
CONTROL = "sf:{toy}:control"


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    mine = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=SMALL)
    mine.start()
    yield mine
    mine.stop()


@contextmanager
def replicas(folder: Path, shared: EmbeddedValkey, count: int, **settings: str) -> Iterator[list[Admin]]:
    with ExitStack() as stack:
        names = (f"replica-{number}" for number in range(count))
        yield [stack.enter_context(serving(folder / name, redis_url=shared.url, **settings)) for name in names]


def change(admin: Admin, champion: str, **deployment: Any) -> httpx.Response:
    tag = admin.http.get("/admin/policies/toy/deployment").headers["etag"]
    answer = admin.deploy("toy", tag, champion=champion, **deployment)
    assert answer.status_code == 200, answer.text
    return answer


def halt(admin: Admin, *on: str) -> dict[str, Any]:
    answer = admin.http.put("/admin/policies/toy/halts", json={"on": list(on)})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def worker_of(admin: Admin) -> int:
    """The process that serves."""
    assert admin.server.process is not None
    found = children(admin.server.process.pid)
    (pid,) = (each for each in found if b"service.worker" in Path(f"/proc/{each}/cmdline").read_bytes())
    return pid


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def loaded(admins: Sequence[Admin], *labels: str) -> None:
    """Wait until every replica could serve these versions at once."""
    for admin in admins:
        for label in labels:
            where = f"/admin/policies/toy/versions/{label}"
            until(lambda admin=admin, where=where: admin.http.get(where).json().get("loaded"), label)  # type: ignore[misc]


def test_a_change_is_answered_when_every_replica_has_it(tmp_path: Path, shared: EmbeddedValkey) -> None:
    with replicas(tmp_path, shared, 3) as admins:
        first, complete = admins[0], 0
        first.pushed("toy", "v1")
        first.pushed("toy", "v2", prefers=1)
        loaded(admins, "v1", "v2")
        for turn in range(20):
            admin, champion = admins[turn % 3], ("v2", "v1")[turn % 2]
            if change(admin, champion).json()["behind"] == []:
                complete += 1
                answers = [each.act("toy") for each in admins]
                assert {(each["version"], each["generation"]) for each in answers} == {(champion, turn + 2)}
        assert complete > 10  # on a machine where a replica may be kept from running for 2 s
        until(lambda: halt(first, "fallback_only")["behind"] == [], "a halt that all have")
        assert {each.act("toy")["fallback"] for each in admins} == {"fallback_only"}
        until(lambda: "surefoot_live_workers 3.0" in first.http.get("/metrics").text, "the roll")


def test_every_change_says_who_does_not_have_it_yet(tmp_path: Path, shared: EmbeddedValkey) -> None:
    with replicas(tmp_path, shared, 1) as (one,):
        assert one.pushed("toy", "v1")["behind"] == []
        assert one.pushed("toy", "v2", prefers=1)["behind"] == []
        for method, route, body in (
            ("PUT", "exploration", {"epsilon": 0.5}),
            ("PUT", "halts", {"on": []}),
            ("PUT", "deployment", {"schema": 1, "policy": "toy", "champion": "v2"}),
            ("PUT", "shadows/v1", None),
            ("DELETE", "shadows/v1", None),
            ("POST", "versions/v1/rearm", None),
        ):
            tag = {"If-Match": one.http.get("/admin/policies/toy").headers["etag"]}
            answer = one.http.request(method, f"/admin/policies/toy/{route}", json=body, headers=tag)
            assert (answer.status_code, answer.json()["behind"]) == (200, []), route
        tag = {"If-Match": one.http.get("/admin/policies/toy").headers["etag"]}
        assert one.http.put("/admin/policies/toy/safety", content=b"", headers=tag).json()["behind"] == []


def test_a_replica_that_does_not_move_is_named_and_then_waited_for_no_more(
    tmp_path: Path, shared: EmbeddedValkey
) -> None:
    with replicas(tmp_path, shared, 3) as (one, two, three):
        one.pushed("toy", "v1")
        loaded((two, three), "v1")
        pid = worker_of(three)
        with stopped(pid):
            assert f":{pid}/" in " ".join(halt(one, "freeze_exploration")["behind"])
            assert two.act("toy")["exploration"]["epsilon"] == 0.0
            until(lambda: "surefoot_live_workers 2.0" in one.http.get("/metrics").text, "the end of its term")
            until(lambda: halt(one)["behind"] == [], "an answer without it")
        until(lambda: "surefoot_live_workers 3.0" in one.http.get("/metrics").text, "its return")
        until(lambda: halt(one, "fallback_only")["behind"] == [], "its confirmation")
        assert three.act("toy")["generation"] == one.act("toy")["generation"]


def test_what_is_changed_stands_in_the_audit_log_before_the_others_have_it(
    tmp_path: Path, shared: EmbeddedValkey
) -> None:
    """And Redis goes away while it is waited for."""
    with replicas(tmp_path, shared, 2) as (one, two), ThreadPoolExecutor(1) as pool:
        one.pushed("toy", "v1")
        loaded([two], "v1")
        pid = worker_of(two)
        with stopped(pid):
            asked: Future[dict[str, Any]] = pool.submit(halt, one, "fallback_only")
            until(lambda: noted(one) or asked.done(), "the outcome")
            assert not asked.done()
            shared.stop()
            (named,) = asked.result()["behind"]
            assert f":{pid}/" in named
        shared.start()
        until(lambda: two.act("toy")["fallback"] == "fallback_only", "the halt")


def noted(admin: Admin) -> bool:
    return any((each["action"], each["outcome"]) == ("halt", "done") for each in audited(admin))


def audited(admin: Admin) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = admin.http.get("/admin/audit").json()["entries"]
    return found


def test_a_halt_that_redis_was_not_told_names_the_others(tmp_path: Path, shared: EmbeddedValkey) -> None:
    with replicas(tmp_path, shared, 2, grace_s="1") as (one, two):  # which they wait for Redis at their end
        one.pushed("toy", "v1")
        shared.stop()
        thrown = halt(one, "fallback_only")
        assert (thrown["published"], len(thrown["behind"])) == (False, 1)
        assert f":{worker_of(two)}/" in thrown["behind"][0]


def test_an_older_document_in_redis_gives_way_to_the_higher_generation(tmp_path: Path, shared: EmbeddedValkey) -> None:
    """A backup comes back; whatever the number of its last change is."""
    with replicas(tmp_path, shared, 2) as (one, two), redis.Redis.from_url(shared.url) as client:
        one.pushed("toy", "v1")
        one.pushed("toy", "v2", prefers=1)
        old = client.hgetall(CONTROL)
        assert isinstance(old, dict)
        change(one, "v2")
        for rev in (old[b"rev"], client.hget(CONTROL, "rev"), b"1000"):
            client.hset(CONTROL, mapping={"deployment": old[b"deployment"], "rev": rev})
            until(lambda: generation(client) == 2, "the higher generation")
            assert {(each.act("toy")["version"], each.act("toy")["generation"]) for each in (one, two)} == {("v2", 2)}
        client.hset(CONTROL, mapping={"deployment": old[b"deployment"], "rev": 5_000})
        assert change(two, "v1").headers["etag"] == '"3"'  # also when nobody has polled in between
        assert {each.act("toy")["generation"] for each in (one, two)} == {3}


def generation(client: redis.Redis) -> int:
    raw = client.hget(CONTROL, "deployment")
    assert isinstance(raw, bytes)
    return int(msgspec.json.decode(raw)["generation"])


def test_a_replica_that_began_without_redis_tells_an_older_one(tmp_path: Path, shared: EmbeddedValkey) -> None:
    with serving(tmp_path / "one", redis_url=shared.url) as one:
        one.pushed("toy", "v1")
        one.pushed("toy", "v2", prefers=1)
        with redis.Redis.from_url(shared.url) as client:
            old = client.hgetall(CONTROL)
            assert isinstance(old, dict)
            change(one, "v2")
            one.server.kill()
            client.hset(CONTROL, mapping=old)
        shared.stop()
        one.server.start()
        shared.start()
        until(lambda: one.view("toy")["source"] == "redis", "Redis")
        with redis.Redis.from_url(shared.url) as client:
            until(lambda: generation(client) == 2, "the higher generation")
        assert one.act("toy")["version"] == "v2"


def test_of_two_documents_of_one_generation_redis_has_the_one(tmp_path: Path, shared: EmbeddedValkey) -> None:
    with replicas(tmp_path, shared, 1) as (one,), redis.Redis.from_url(shared.url) as client:
        one.pushed("toy", "v1")
        one.pushed("toy", "v2", prefers=1)
        raw = client.hget(CONTROL, "deployment")
        assert isinstance(raw, bytes)
        client.hset(CONTROL, "deployment", raw.replace(b'"champion":"v1"', b'"champion":"v2"'))
        until(lambda: one.act("toy")["version"] == "v2", "what Redis says")
        assert one.act("toy")["generation"] == 1
        (given,) = (each for each in audited(one) if each["action"] == "give_way")
        assert (given["actor"], given["policy"], given["subject"].split(":")[0]) == ("system", "toy", "1")


# Without Redis


def with_a_challenger(admin: Admin) -> str:
    """v1 decides, v2 is on trial, both always explore. Gives an episode that began on v2."""
    admin.pushed("toy", "v1", exploration=EPSILON)
    admin.pushed("toy", "v2", prefers=1, exploration=EPSILON)
    change(admin, "v1", challengers=[{"version": "v2", "weight": 0.9}])
    return next(name for name in map(str, range(1000)) if admin.act("toy", episode=name)["role"] == "challenger")


def test_without_redis_nothing_is_explored_and_then_the_champion_alone_decides(
    tmp_path: Path, shared: EmbeddedValkey
) -> None:
    with serving(tmp_path / "one", redis_url=shared.url, max_stale_s="1") as admin:
        episode = with_a_challenger(admin)
        assert admin.act("toy", episode=episode)["exploration"]["epsilon"] == 1.0
        shared.stop()
        until(lambda: admin.act("toy", episode=episode)["role"] == "champion", "the champion alone")
        for name in (episode, *map(str, range(20))):
            alone = admin.act("toy", episode=name)
            assert (alone["version"], alone["exploration"]["epsilon"], alone["generation"]) == ("v1", 0.0, 2)
        view = admin.view("toy")
        assert (view["source"], view["freshness"], view["challenger"]["version"]) == ("cached", "alone", "v2")
        metrics = admin.http.get("/metrics").text
        for effect in ("challenger", "exploration"):
            assert f'surefoot_control_stale{{effect="{effect}",policy="toy"}} 1.0' in metrics
        shared.start()
        until(lambda: admin.view("toy")["freshness"] == "fresh", "Redis")
        fresh = [admin.act("toy", key=str(key)) for key in range(50)]
        assert {each["role"] for each in fresh} == {"champion", "challenger"}
        assert {each["exploration"]["epsilon"] for each in fresh} == {1.0}
        assert admin.act("toy", episode=episode)["role"] == "champion"  # where it goes on is no change to and fro


def test_a_start_without_redis_explores_nothing_and_keeps_the_challenger_for_a_while(
    tmp_path: Path, shared: EmbeddedValkey
) -> None:
    with serving(tmp_path / "one", redis_url=shared.url, max_stale_s="600") as admin:
        with_a_challenger(admin)
        admin.server.kill()
        shared.stop()
        admin.server.start()
        answers = [admin.act("toy", key=str(key)) for key in range(50)]
        assert {each["exploration"]["epsilon"] for each in answers} == {0.0}
        assert {each["role"] for each in answers} == {"champion", "challenger"}
        assert (admin.view("toy")["source"], admin.view("toy")["freshness"]) == ("cached", "stale")
        snapshot = admin.server.data_dir / "control.json"
        admin.server.kill()
        os.utime(snapshot, (0, 0))  # nobody has heard of Redis for half a century
        admin.server.start()
        assert {admin.act("toy", key=str(key))["role"] for key in range(50)} == {"champion"}
        shared.start()
        until(lambda: admin.http.post("/v1/act", json={"policy": "toy", "state": STATE}).json()["explored"], "Redis")
        assert admin.view("toy")["freshness"] == "fresh"
