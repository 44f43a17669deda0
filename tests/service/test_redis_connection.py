"""One URL for each shape of Redis; every error has its reason; nothing is sent twice; every queue is bounded."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import DataError, NoScriptError, ResponseError

from policies.errors import ConfigError, StoreAway
from service.redis_connection import Client, answered, connect, key_of, translated
from service.redis_pool import CONNECTIONS, WAITING
from service.shipcall import Refused
from surefoot.redis_url import parse
from tests.service.clusters import Node, free_port, sentinels, server
from tests.service.tls import Certificates, TlsFront, tls_server_binary
from tests.surefoot.valkey import LossyProxy, Valkey


def with_client(url: str, scenario: Callable[[Client], Awaitable[None]]) -> None:
    async def run() -> None:
        client = connect(url)
        try:
            await scenario(client)
        finally:
            await client.aclose()

    asyncio.run(run())


async def reason(call: Awaitable[Any]) -> str:
    with pytest.raises(StoreAway) as caught:
        await answered(call)
    return caught.value.reason


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30.0):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with server(tmp_path_factory.mktemp("node")) as found:
        yield found


# URLs


@pytest.mark.parametrize(
    ("url", "kind", "addresses", "options"),
    [
        ("redis://h", "server", (("h", 6379),), {}),
        ("redis://u:p%40ss@h:1/3", "server", (("h", 1),), {"username": "u", "password": "p@ss", "db": 3}),
        ("redis://:secret@[::1]:7/", "server", (("::1", 7),), {"password": "secret"}),
        ("redis://h?db=4&client_name=sf", "server", (("h", 6379),), {"db": 4, "client_name": "sf"}),
        (
            "rediss://h?ssl_ca_certs=/ca.pem&ssl_certfile=/c.pem&ssl_keyfile=/k.pem&ssl_check_hostname=no",
            "server",
            (("h", 6379),),
            {"ssl_ca_certs": "/ca.pem", "ssl_certfile": "/c.pem", "ssl_keyfile": "/k.pem", "ssl_check_hostname": False},
        ),
        ("unix:///tmp/v%20k.sock?db=2", "socket", (), {"db": 2}),
        ("redis+sentinel://:p@a,b:1/main", "sentinel", (("a", 26379), ("b", 1)), {"password": "p"}),
        ("redis+sentinel://a/main/5", "sentinel", (("a", 26379),), {"db": 5}),
        ("redis+cluster://u:p@a:1,b:2", "cluster", (("a", 1), ("b", 2)), {"username": "u", "password": "p"}),
        ("rediss+cluster://a:1/0", "cluster", (("a", 1),), {"db": 0}),
    ],
)
def test_a_url_says_what_there_is(url: str, kind: str, addresses: tuple[Any, ...], options: dict[str, Any]) -> None:
    found = parse(url)
    assert (found.kind, found.addresses, found.options) == (kind, addresses, options)
    assert found.tls == url.startswith("rediss")


def test_the_parts_that_only_some_urls_have() -> None:
    assert parse("unix:///tmp/v%20k.sock").path == "/tmp/v k.sock"
    found = parse("rediss+sentinel://u:p@a/main?sentinel_password=s&ssl_ca_certs=/ca.pem")
    assert found.service == "main"
    assert found.sentinel_options == {"password": "s", "ssl_ca_certs": "/ca.pem"}
    assert found.options == {"username": "u", "password": "p", "ssl_ca_certs": "/ca.pem"}
    assert "'p'" not in repr(found)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://h", "begins with one of"),
        ("h:6379", "begins with one of"),
        ("redis://h?socket_timeout=60", "socket_timeout"),
        ("redis://h?retry_on_timeout=true", "retry_on_timeout"),
        ("redis://h?ssl_ca_certs=/x", "ssl_ca_certs"),
        ("redis://h/three", "whole number"),
        ("redis://h:port", "no host and port"),
        ("redis+cluster://h/1", "database 0 only"),
        ("redis+sentinel://h", "names the primary"),
        ("unix://relative.sock", "names a file"),
    ],
)
def test_what_is_no_such_url_is_refused_at_the_start(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        connect(url)
    assert caught.value.field == "SUREFOOT_REDIS_URL"


def test_a_refused_url_keeps_its_password() -> None:
    with pytest.raises(ValueError, match="database") as caught:
        parse("redis+cluster://u:hunter2@h/1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("GET", "k"), b"k"),
        (("MGET", b"k", b"l"), b"k"),
        (("EVALSHA", "sha", 1, "k", "a"), b"k"),
        (("EVAL", "return 1", 0), None),
        (("XREAD", "COUNT", 1, "STREAMS", "k", "0"), b"k"),
        (("XREADGROUP", "GROUP", "g", "c", "streams", "k", ">"), b"k"),
        (("XINFO STREAM", "k"), b"k"),
        (("XINFO", "GROUPS", "k"), b"k"),
        (("MEMORY USAGE", "k"), b"k"),
        (("INFO",), None),
        (("CONFIG GET", "maxmemory"), None),
        (("WAITAOF", 1, 0, 100), None),
    ],
)
def test_the_key_of_a_command_says_where_it_goes(command: tuple[Any, ...], key: bytes | None) -> None:
    assert key_of(command) == key


# Reasons


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("-ERR max number of clients reached", "crowded"),
        ("-NOAUTH Authentication required.", "noauth"),
        ("-MASTERDOWN Link with MASTER is down", "masterdown"),
        ("-CLUSTERDOWN The cluster is down", "clusterdown"),
        ("-TRYAGAIN Multiple keys request during rehashing of slot", "tryagain"),
        ("-LOADING Redis is loading the dataset in memory", "loading"),
        ("-UNKILLABLE Sorry the script already executed write commands", "busy"),
        ("-ERR something new", "error"),
    ],
)
def test_what_a_server_says_has_its_reason(said: str, expected: str) -> None:
    """Answers that are hard to bring a server to, from a socket that gives them to every command."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def scenario(client: Client) -> None:
            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                while asked := await reader.read(4096):
                    commands = sum(line.startswith(b"*") for line in asked.split(b"\r\n"))
                    writer.write(commands * (said.encode() + b"\r\n"))
                writer.close()

            async with await asyncio.start_server(serve, sock=listener):
                assert await reason(client.execute_command("GET", "k")) == expected
                await client.aclose()

        with_client(f"redis://127.0.0.1:{listener.getsockname()[1]}", scenario)


def test_a_reason_for_what_the_network_does() -> None:
    async def refused(client: Client) -> None:
        assert await reason(client.execute_command("GET", "k")) == "refused"

    async def unknown(client: Client) -> None:
        assert await reason(client.execute_command("GET", "k")) in ("dns", "timeout")

    with_client(f"redis://127.0.0.1:{free_port()}", refused)
    with_client("unix:///nowhere/valkey.sock", refused)
    with_client("redis://host.invalid", unknown)


def test_events_are_refused_for_what_is_theirs_only() -> None:
    assert isinstance(translated(ResponseError("user_script:1: column 3"), events=True), Refused)
    assert isinstance(translated(ResponseError("user_script:1: column 3")), StoreAway)
    for passing in ("BUSY x", "MISCONF x", "NOREPLICAS x", "ERR ACL failure in script: x", "a non local key x"):
        found = translated(ResponseError(passing), events=True)
        assert isinstance(found, StoreAway)
        assert found.reason != "error"


def test_bugs_and_unknown_scripts_are_not_outages(node: Node) -> None:
    async def scenario(client: Client) -> None:
        with pytest.raises(DataError):
            await answered(client.execute_command("GET", None))
        with pytest.raises(NoScriptError):
            await answered(client.execute_command("EVALSHA", "0" * 40, 1, "k"))

    with_client(node.url, scenario)


# One server


def test_commands_in_order_share_a_connection(node: Node) -> None:
    async def scenario(client: Client) -> None:
        ids = await client.in_order(("SET", "k", "v"), ("CLIENT", "ID"), ("EVALSHA", "0" * 40, 0), ("CLIENT", "ID"))
        assert ids[0] is True
        assert ids[1] == ids[3]
        assert isinstance(ids[2], NoScriptError)

    with_client(node.url, scenario)


def test_a_lost_reply_is_told_and_the_command_not_repeated(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Valkey(tmp_path_factory.mktemp("v")) as valkey, valkey.client() as direct:
        proxy = LossyProxy(valkey.socket_path)

        async def scenario(client: Client) -> None:
            await client.execute_command("INCR", "n")
            proxy.lose = b"INCR"
            assert await reason(client.execute_command("INCR", "n")) == "away"
            assert await client.execute_command("INCR", "n") == 3

        with closing(proxy):
            with_client(proxy.url, scenario)
        assert proxy.lost == 1
        assert direct.get("n") == b"3"


def test_a_demoted_primary_is_left_behind(tmp_path: Path) -> None:
    """As behind a load balancer: the same address leads to another server, the old connections do not."""

    async def scenario(client: Client) -> None:
        await asyncio.gather(*(client.execute_command("SET", "k", "v") for _ in range(8)))
        mine = {each["id"] for each in connections(node)}
        assert len(mine) > 1
        node.ask("REPLICAOF", "127.0.0.1", "1")
        assert await reason(client.execute_command("SET", "k", "v")) == "readonly"
        await client.execute_command("INFO")  # tells a role that no primary has
        assert client.statistics().renewed == 2
        await eventually(lambda: not mine & {each["id"] for each in connections(node)})
        node.ask("REPLICAOF", "NO", "ONE")
        assert await client.execute_command("SET", "k", "v") is True

    def connections(node: Node) -> list[dict[str, str]]:
        lines = node.ask("CLIENT LIST")
        return [each for each in lines if each["lib-name"].startswith("redis-py") and each["cmd"] != "client|list"]

    with server(tmp_path) as node:
        with_client(node.url, scenario)


def test_a_black_hole_bounds_connections_and_callers() -> None:
    """A listener that never accepts: the kernel takes connections for it, and nothing is ever answered."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def scenario(client: Client) -> None:
        before, most, open_ = descriptors(), 0, 0
        callers = [asyncio.ensure_future(reason(client.execute_command("GET", "k"))) for _ in range(3_000)]
        while not all(each.done() for each in callers):
            now = client.statistics()
            most, open_ = max(most, now.running), max(open_, descriptors() - before)
            assert now.waiting <= WAITING
            await asyncio.sleep(0)
        reasons = [each.result() for each in callers]
        assert set(reasons) == {"timeout", "crowded"}
        assert reasons.count("crowded") == 3_000 - CONNECTIONS - WAITING
        assert 0 < most <= CONNECTIONS
        assert open_ <= 3 * CONNECTIONS  # those under way, and those that are being closed
        assert (client.statistics().running, client.statistics().waiting) == (0, 0)
        await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})  # what closes has closed
        assert descriptors() <= before

    with socket.create_server(("127.0.0.1", 0), backlog=4096) as hole:
        with_client(f"redis://127.0.0.1:{hole.getsockname()[1]}", scenario)


def test_after_a_black_hole_the_same_client_works(node: Node) -> None:
    async def scenario(client: Client) -> None:
        await client.execute_command("SET", "k", "v")
        node.hang()
        try:
            assert await reason(client.execute_command("GET", "k")) == "timeout"
        finally:
            node.wake()
        assert await client.execute_command("GET", "k") == b"v"

    with_client(node.url, scenario)


def test_a_caller_that_is_cancelled_leaves_no_answer_for_the_next(node: Node) -> None:
    async def scenario(client: Client) -> None:
        await client.execute_command("SET", "k", "v")
        node.hang()
        try:
            caller = asyncio.ensure_future(client.execute_command("GET", "k"))
            while not client.statistics().running:
                await asyncio.sleep(0)
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
        finally:
            node.wake()
        assert await client.execute_command("ECHO", "mine") == b"mine"

    with_client(node.url, scenario)


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def test_tls_with_a_client_certificate(node: Node, certificates: Certificates) -> None:
    """Behind a front that ends TLS, as Valkey's binary here knows none."""

    async def works(client: Client) -> None:
        assert await client.execute_command("SET", "k", "v") is True

    async def fails(client: Client) -> None:
        assert await reason(client.execute_command("SET", "k", "v")) in ("tls", "away")

    with TlsFront(certificates, node.port) as front:
        url = f"rediss://localhost:{front.port}?ssl_ca_certs={certificates.ca}"
        mine = f"&ssl_certfile={certificates.client}&ssl_keyfile={certificates.client_key}"
        with_client(url + mine, works)
        with_client(url, fails)
        with_client(f"rediss://localhost:{front.port}?{mine[1:]}", fails)


@pytest.mark.skipif(tls_server_binary() is None, reason="no redis-server or valkey-server with TLS on the PATH")
def test_tls_of_a_server(tmp_path: Path, certificates: Certificates) -> None:
    async def works(client: Client) -> None:
        assert await client.execute_command("SET", "k", "v") is True

    binary = tls_server_binary()
    assert binary is not None
    node = Node(tmp_path, *certificates.of_server(), binary=binary)
    tls_port = free_port()
    try:
        node.start("--tls-port", str(tls_port))
        login = f"ssl_certfile={certificates.client}&ssl_keyfile={certificates.client_key}"
        with_client(f"rediss://localhost:{tls_port}?ssl_ca_certs={certificates.ca}&{login}", works)
    finally:
        node.kill()


# Sentinels and clusters; more of them in test_redis_trouble.py


def test_silent_sentinels_are_passed_over(tmp_path: Path) -> None:
    async def scenario(client: Client) -> None:
        assert await client.execute_command("SET", "k", "v") is True
        for node in those.sentinels[:2]:
            node.hang()
        those.servers[0].ask("CLIENT", "KILL", "TYPE", "normal")
        assert await reason(client.execute_command("GET", "k")) == "away"
        assert await client.execute_command("GET", "k") == b"v"

    with sentinels(tmp_path) as those:
        with_client(those.url, scenario)


def test_a_cluster_url_of_a_server_that_is_none_says_so(node: Node) -> None:
    async def scenario(client: Client) -> None:
        with pytest.raises(StoreAway, match="cluster support disabled"):
            await answered(client.execute_command("GET", "k"))

    with_client(f"redis+cluster://127.0.0.1:{node.port}", scenario)
