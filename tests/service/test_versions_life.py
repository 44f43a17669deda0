"""Versions over restarts, replicas and outages: what is deployed is served, and what is served goes on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import redis

from policies.bundle import content_digest
from policies.store import StoredVersion, refs_of
from policies.trial import try_bundle
from policies.trial_template import Template
from service.control import Control
from service.redis_store import RedisStore
from service.redis_streams import RedisStreams, connect
from service.valkey import EmbeddedValkey
from tests.service.admins import STATE, Admin, files_of, serving
from tests.waiting import until


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A Redis that services share, and that a test may stop and start."""
    valkey = EmbeddedValkey(tmp_path / "shared", maxmemory_bytes=128 << 20)
    valkey.start()
    yield valkey
    valkey.stop()


@pytest.fixture
def replicas(tmp_path: Path, shared: EmbeddedValkey) -> Iterator[tuple[Admin, Admin]]:
    with serving(tmp_path / "one", redis_url=shared.url) as one, serving(tmp_path / "two", redis_url=shared.url) as two:
        yield one, two


def test_a_killed_service_comes_back_with_what_was_deployed(tmp_path: Path) -> None:
    with serving(tmp_path) as admin:
        admin.pushed("toy", "v1")
        admin.pushed("toy", "v2", prefers=1)
        admin.promote("toy", "v2")
        admin.server.kill()
        admin.server.start()
        answer = admin.act("toy")
        assert (answer["version"], answer["action"], answer["generation"]) == ("v2", 1, 2)
        until(lambda: admin.view("toy")["versions"]["v1"]["loaded"], "the version that stands by")


def test_a_start_without_redis_serves_what_was_served_before(tmp_path: Path, shared: EmbeddedValkey) -> None:
    with serving(tmp_path / "one", redis_url=shared.url) as admin:
        admin.pushed("toy", "v1")
        admin.pushed("toy", "v2", prefers=1)
        admin.promote("toy", "v2")
        admin.server.kill()
        shared.stop()
        admin.server.start()
        answer = admin.act("toy")
        assert (answer["version"], answer["action"], answer["generation"]) == ("v2", 1, 2)
        assert admin.view("toy")["source"] == "cached"
        assert admin.http.get("/metrics").text.count("surefoot_control_age_seconds +Inf") == 0  # as old as the snapshot
        refused = admin.push(files_of("toy", "v3"), "toy")
        assert (refused.status_code, refused.json()["code"]) == (503, "store_away")
        shared.start()
        until(lambda: admin.view("toy")["source"] == "redis", "Redis")
        admin.pushed("toy", "v3")
        admin.promote("toy", "v3")
        assert admin.act("toy")["generation"] == 3


def test_a_snapshot_and_copies_that_are_damaged_are_not_believed(tmp_path: Path, shared: EmbeddedValkey) -> None:
    with serving(tmp_path / "one", redis_url=shared.url) as admin:
        admin.pushed("toy", "v1")
        admin.server.kill()
        (copy,) = (admin.server.data_dir / "bundles").iterdir()
        (copy / "model.onnx").write_bytes(b"nonsense")
        snapshot = admin.server.data_dir / "control.json"
        snapshot.write_bytes(snapshot.read_bytes()[:-2])
        admin.server.start()  # Redis has both
        assert admin.act("toy")["version"] == "v1"
        assert (copy / "model.onnx").read_bytes() == files_of("toy", "v1")["model.onnx"]
        admin.server.kill()
        shared.stop()
        snapshot.write_bytes(snapshot.read_bytes()[:-2])
        admin.server.start()
        assert admin.http.post("/v1/act", json={"policy": "toy", "state": STATE}).status_code == 503
        assert "control_snapshot_damaged" in admin.server.log
        shared.start()
        until(lambda: admin.http.get("/admin/policies/toy").status_code == 200, "Redis")
        until(lambda: admin.http.post("/v1/act", json={"policy": "toy", "state": STATE}).status_code == 200, "toy")


def test_replicas_converge(replicas: tuple[Admin, Admin]) -> None:
    one, two = replicas
    one.pushed("toy", "v1")
    until(lambda: two.http.post("/v1/act", json={"policy": "toy", "state": STATE}).status_code == 200, "the policy")
    two.pushed("toy", "v2", prefers=1)
    one.promote("toy", "v2")  # `one` has never heard of it: a change looks first
    assert one.act("toy")["version"] == "v2"
    until(lambda: two.act("toy")["version"] == "v2", "the promotion")
    assert two.act("toy")["generation"] == 2
    assert two.delete("toy", "v1").status_code == 204
    until(lambda: set(one.view("toy")["versions"]) == {"v2"}, "the deletion")
    decision = one.act("toy")["decision_id"]
    reward = two.http.post("/v1/reward", json={"decision_id": decision, "reward": 1.0})
    assert reward.status_code == 202


def test_a_redis_that_has_lost_everything_is_told_again(replicas: tuple[Admin, Admin], shared: EmbeddedValkey) -> None:
    one, two = replicas
    one.pushed("toy", "v1")
    one.pushed("toy", "v2", prefers=1)
    one.promote("toy", "v2")
    until(lambda: two.http.post("/v1/act", json={"policy": "toy", "state": STATE}).status_code == 200, "the policy")
    until(lambda: two.act("toy")["version"] == "v2", "the promotion")
    with redis.Redis.from_url(shared.url) as client:
        client.flushall()
        until(lambda: client.hlen("sf:{toy}:versions") == 2, "the versions")
        until(lambda: client.hget("sf:{toy}:control", "deployment"), "the deployment")
    assert one.act("toy")["version"] == two.act("toy")["version"] == "v2"
    one.promote("toy", "v1")
    until(lambda: two.act("toy")["version"] == "v1", "the promotion")
    assert two.act("toy")["generation"] == 3


def test_a_version_that_does_not_load_here_is_reported_and_the_old_one_serves(
    replicas: tuple[Admin, Admin], shared: EmbeddedValkey
) -> None:
    one, two = replicas
    one.pushed("toy", "v1")
    until(lambda: two.http.post("/v1/act", json={"policy": "toy", "state": STATE}).status_code == 200, "the policy")

    async def behind_the_back() -> None:
        """Register a version whose network is not what its entry says, and deploy it, as nobody could by the API."""
        streams = RedisStreams(connect(shared.url))
        try:
            files = files_of("toy", "v2")
            entry = StoredVersion("toy", "v2", content_digest(files), refs_of(files), 1, "nobody")
            await RedisStore(streams).put(entry, files)
            await streams.command("SET", f"sf:{{toy}}:blob:{entry.files['model.onnx'].sha256}:0", b"hostile")
            (_, document) = (await Control(streams).read())["toy"]
            assert document is not None
            changed = type(document)(2, type(document.deployment)(1, "toy", "v2"), 0, "nobody")
            assert await Control(streams).change("toy", changed, 0) is None
        finally:
            await streams.aclose()

    asyncio.run(behind_the_back())
    for admin in replicas:
        until(lambda admin=admin: admin.view("toy")["versions"].get("v2", {}).get("failure"), "the report")  # type: ignore[misc]
        view = admin.view("toy")
        assert (view["champion"], view["pending"], view["versions"]["v2"]["failure"]["check"]) == ("v1", True, "digest")
        assert admin.act("toy")["version"] == "v1"
        metrics = admin.http.get("/metrics").text
        assert 'surefoot_version_load_failures_total{policy="toy"}' in metrics
        assert admin.http.get("/health/ready").status_code == 200
        assert admin.http.get("/admin/policies/toy/versions/v2").json()["loaded"] is False
    one.promote("toy", "v1")
    until(lambda: two.view("toy")["pending"] is False, "the way back")


def test_a_deployment_that_a_newer_service_wrote_changes_nothing_here(
    replicas: tuple[Admin, Admin], shared: EmbeddedValkey
) -> None:
    one, _ = replicas
    one.pushed("toy", "v1")
    one.pushed("sane", "v1")
    newer = b'{"generation": 9, "deployment": {"schema": 2}, "changed_at_ms": 1, "changed_by": "x"}'
    with redis.Redis.from_url(shared.url) as client:
        client.hset("sf:{toy}:control", mapping={"deployment": newer, "rev": 99})
        until(lambda: "deployment_not_readable" in one.server.log, "the report")
        assert one.act("toy")["generation"] == 1
        assert one.push(files_of("toy", "v2"), "toy").json()["code"] == "store_away"
        one.pushed("sane", "v2")
        assert client.hget("sf:{toy}:control", "deployment") == newer
        assert one.http.get("/health/ready").status_code == 200


def test_versions_beyond_the_cap_are_not_loaded_but_can_be_promoted(tmp_path: Path) -> None:
    with serving(tmp_path, max_loaded="2") as admin:
        for i in range(1, 5):
            admin.pushed("toy", f"v{i}", prefers=i % 2)
        # cartpole's live version and toy's count, and live ones are loaded regardless

        def loaded() -> set[str]:
            return {label for label, each in admin.view("toy")["versions"].items() if each["loaded"]}

        until(lambda: loaded() == {"v1"}, "what is too much to go")
        admin.promote("toy", "v3")
        assert admin.act("toy")["version"] == "v3"
        until(lambda: loaded() == {"v3"}, "what is too much to go")


def test_a_hundred_versions_are_loaded_at_once_and_each_is_served(tmp_path: Path) -> None:
    bundles = {label: files_of("toy", label, prefers=i % 2) for i, label in enumerate(f"v{i:03}" for i in range(100))}
    with serving(tmp_path, max_loaded="110") as admin, Template() as template:
        for label, files in bundles.items():
            # The service finds this verdict, and starts no process for each.
            try_bundle(files, cache=admin.server.data_dir / "trials", run=template.run)
            assert admin.push(files, "toy").status_code == 201, label

        def loaded() -> int:
            return sum(each["loaded"] for each in admin.view("toy")["versions"].values())

        assert loaded() == 100
        for i, label in enumerate(bundles):
            admin.promote("toy", label)
            answer = admin.act("toy")
            assert (answer["version"], answer["action"]) == (label, i % 2)
        assert loaded() == 100
        admin.server.kill()
        admin.server.start()
        until(lambda: loaded() == 100, "all versions")
        assert 'surefoot_loaded_versions{policy="toy"} 100.0' in admin.http.get("/metrics").text


# Switching under load


@dataclass
class Traffic:
    """Requests at a steady rate from a few threads, each remembered with when it was sent and answered."""

    url: str
    answers: list[tuple[float, float, str, int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self, stop: threading.Event, every_s: float) -> None:
        with httpx.Client(base_url=self.url, timeout=10.0) as client:
            while not stop.wait(every_s):
                sent = time.monotonic()
                try:
                    answer = client.post("/v1/act", json={"policy": "toy", "state": STATE})
                    body = answer.json()
                    assert answer.status_code == 200
                    assert body["fallback"] is None
                    self.answers.append((sent, time.monotonic(), body["version"], body["action"]))
                except Exception as error:
                    self.failures.append(repr(error))


def test_switching_under_load_fails_no_request_and_answers_by_what_is_live(tmp_path: Path) -> None:
    """Twenty times: push a version, promote it, delete the one before, at about 100 requests/s."""
    with serving(tmp_path) as admin:
        admin.pushed("toy", "w0")
        traffic, stop = Traffic(admin.server.url), threading.Event()
        live: list[tuple[str, float, float]] = []  # label, not live before, not live after
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(traffic.run, stop, 0.035) for _ in range(4)]
            try:
                for turn in range(1, 21):
                    admin.pushed("toy", f"w{turn}", prefers=turn % 2)
                    asked = time.monotonic()
                    admin.promote("toy", f"w{turn}")
                    live.append((f"w{turn - 1}", began, time.monotonic()))
                    began = asked
                    assert admin.delete("toy", f"w{turn - 1}").status_code == 204
                until(lambda: traffic.answers[-1][2] == "w20", "an answer of the last")
            finally:
                stop.set()
            for thread in threads:
                thread.result()
        live.append(("w20", began, time.monotonic()))
        assert traffic.failures == []
        spans = {label: (since, until_) for label, since, until_ in live}
        for sent, answered, label, action in traffic.answers:
            since, end = spans[label]
            assert answered >= since, label
            assert sent <= end, label
            assert action == int(label[1:]) % 2
        served = Counter(label for _, _, label, _ in traffic.answers)
        assert len(served) == 21, served
        assert set(admin.view("toy")["versions"]) == {"w20"}
