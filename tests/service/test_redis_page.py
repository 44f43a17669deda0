"""What docs/redis.md promises to operators: reasons, and rules for users under which everything works, on a cluster."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import NoPermissionError

from service.redis_pool import REASONS
from service.redis_streams import RedisStreams, base, connect
from service.trimming import TRANSITIONS
from surefoot import transitions
from tests.service.admins import Admin, serving
from tests.service.clusters import Cluster, cluster
from tests.service.test_budget import explore
from tests.service.test_rules import put
from tests.waiting import until

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "redis.md").read_text()


def rules() -> dict[str, list[str]]:
    """The words of each ACL SETUSER on the page, by user."""
    found = [block.split() for block in re.findall(r"```\n(ACL SETUSER .*?)```", PAGE, re.DOTALL)]
    return {words[2]: words[2:] for words in found}


def allowed(user: str) -> set[str]:
    return {word[1:].split("|")[0].upper() for word in rules()[user] if word.startswith("+")}


def test_every_reason_stands_in_the_page_and_no_other() -> None:
    assert set(re.findall(r"^\| `([a-z]+)` \| .* \| .* \|$", PAGE.split("## When it is")[1], re.MULTILINE)) == REASONS


def test_the_services_rule_has_every_command_of_its_sources() -> None:
    sources = [*(ROOT / "service").rglob("*.lua"), *(ROOT / "service").glob("*.py")]
    text = "\n".join(path.read_text() for path in sources if path.name != "valkey.py")
    in_scripts = re.findall(r"""(?:redis\.p?call|\bc)\(\s*'([A-Z]+)'""", text)
    direct = re.findall(r"""command\(\s*"([A-Z]+)""", text)
    assert set(in_scripts) >= {"GET", "XADD", "ZADD"}
    assert set(direct) >= {"SET", "EVALSHA", "MGET"}
    assert {*in_scripts, *direct} <= allowed("surefoot")
    of_groups = {name.lower() for name in re.findall(r"""["']XGROUP["'], ?["']([A-Z]+)""", text)}
    assert of_groups == {word.split("|")[1] for word in rules()["surefoot"] if word.startswith("+xgroup|")}


def test_the_trainers_rule_has_every_command_of_its_sources() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "surefoot").glob("*.py"))
    used = {name.split("_")[0].upper() for name in re.findall(r"""Command\(\s*"([a-z_]+)""", text)}
    used |= {name.upper() for name in re.findall(r"""(?:client|redis)\.(x[a-z]+|hvals)\(""", text)}
    assert "XREADGROUP" in used
    assert used <= allowed("trainer")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose only users are the page's, and one that the tests themselves are."""
    with cluster(tmp_path_factory.mktemp("cluster")) as found:
        for node in found.nodes:
            for words in rules().values():
                node.ask("ACL", "SETUSER", *words)
        yield found


def url(nodes: Cluster, user: str) -> str:
    return nodes.url.replace("://", f"://{user}:secret@")


def complaints(nodes: Cluster) -> list[Any]:
    """What users were denied, and errors but those that say where a key or a script is; EXECABORT: of a transaction."""
    denied = [entry for node in nodes.nodes for entry in node.ask("ACL LOG")]
    errors = {name for node in nodes.nodes for name in node.ask("INFO", "errorstats")}
    return denied + sorted(errors - {"errorstat_NOSCRIPT", "errorstat_MOVED", "errorstat_EXECABORT"})


RATE = "{kind: rate, name: seldom, actions: [a1], limit: 3, window_s: 60, per: policy, scope: strict}"
STEP = "{kind: cooldown, name: calm, actions: [a1], seconds: 1}"


def everything_that_is_kept_in_redis(admin: Admin, policy: str) -> None:
    admin.pushed(policy, "v1", exploration={"epsilon": 0.5})
    admin.pushed(policy, "v2", prefers=1, exploration={"epsilon": 0.5})
    admin.promote(policy, "v2")
    assert put(admin, policy, RATE, STEP).status_code == 200
    explore(admin, policy, epsilon=0.5, rate={"limit": 500, "window_s": 3600}, start="now")
    for n in range(20):
        answer = admin.act(policy, episode=f"e{n // 10}", step=n % 10)
        reward = {"decision_id": answer["decision_id"], "reward": 1.0}
        assert admin.http.post("/v1/reward", json=reward).status_code in (200, 202)
    for _ in range(2):
        body = {"policy": policy, "state": [1.0, 2.0]}
        assert admin.http.post("/v1/act", json=body, headers={"Idempotency-Key": "k"}).status_code == 200
    last = answer["decision_id"]
    until(lambda: admin.http.get(f"/v1/decisions/{last}").status_code == 200, "a decision that is recorded")
    assert admin.delete(policy, "v1").status_code in (200, 204)


def test_a_service_and_a_trainer_live_by_the_rules_in_a_cluster(guarded: Cluster, tmp_path: Path) -> None:
    """Two policies lie on two nodes; every script runs, and nobody is denied anything."""
    with serving(tmp_path, redis_url=url(guarded, "surefoot")) as admin:
        names = spread(guarded)
        for policy in names:
            everything_that_is_kept_in_redis(admin, policy)
        for policy in names:
            with transitions(policy, "g", "c", redis_url=url(guarded, "trainer"), max_wait_s=60.0) as stream:
                seen = 0
                while seen < 18:
                    seen += len(next(stream).steps)
        assert "surefoot_store_up 1.0" in admin.http.get("/metrics").text
    assert complaints(guarded) == []


def test_the_other_scripts_run_in_a_cluster_too(guarded: Cluster) -> None:
    """Those that a service runs now and then."""
    from service.burning import READ
    from service.calibration import WRITE as CALIBRATE
    from service.leases import COUNT
    from service.memory_store import WRITE as REMEMBER
    from service.trimming import Rules, drop_group, trim

    async def scenario() -> None:
        streams = RedisStreams(connect(url(guarded, "surefoot")))
        for policy in spread(guarded):
            at = base(policy)
            await streams.script(CALIBRATE, at, "0", "1", b"state", 60_000)
            await streams.script(COUNT, at, "", "0-0", 1000, 3, 1, 60_000)
            await streams.script(REMEMBER, at, 60_000, "digest", b"value", "")
            await streams.script(READ, at, "0-0", 10, 60_000)
            await streams.command("XADD", f"{at}:transitions", "*", "x", "y")
            await trim(streams, policy, TRANSITIONS, Rules(keep=0))
            assert await streams.command("MGET", f"{at}:mem:digest", f"{at}:mem:x") == [b"value", None]
            await drop_group(streams, policy, TRANSITIONS, "nobody")
        await streams.aclose()

    asyncio.run(scenario())
    assert complaints(guarded) == []


def test_a_trainer_cannot_change_what_is_not_its_own(guarded: Cluster) -> None:
    key = f"{base('toy')}:control"
    with guarded.owner(key).client(username="trainer", password="secret") as client:
        for command in (("HSET", key, "rev", 9), ("DEL", f"{base('toy')}:transitions"), ("SET", "k", "v")):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)


def spread(nodes: Cluster) -> list[str]:
    """Names of policies of which each lies on another node."""
    found: dict[int, str] = {}
    for n in range(100):
        found.setdefault(nodes.owner(f"{base(f'toy-{n}')}:x").port, f"toy-{n}")
        if len(found) == 3:
            break
    return list(found.values())
