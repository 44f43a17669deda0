"""A primary and its replica, real servers that keep everything on disk, and the one name that leads to the primary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.faults.proxy import FaultProxy
from tests.service.clusters import Node, free_port
from tests.waiting import until

DURABLE = ("--appendonly", "yes", "--appendfsync", "always", "--repl-diskless-sync-delay", "0")


class Pair:
    """`primary` is where the proxy leads; `fail_over` makes it the replica, which stays where it was left."""

    def __init__(self, primary: Node, replica: Node) -> None:
        self.primary, self.replica = primary, replica
        self.proxy = FaultProxy(lambda: ("127.0.0.1", self.primary.port))

    @property
    def url(self) -> str:
        return self.proxy.redis_url

    def follow(self, replica: Node | None = None) -> None:
        """Let a node replicate from the primary, and wait until it does."""
        replica = replica or self.replica
        replica.ask("REPLICAOF", "127.0.0.1", self.primary.port)
        until(lambda: b"master_link_status:up" in info(replica, "replication"), "a replica in step")

    def part(self) -> None:
        """Cut the replica off: it keeps what it has, and gets nothing more."""
        self.replica.ask("REPLICAOF", "127.0.0.1", free_port())
        until(lambda: b"connected_slaves:0" in info(self.primary, "replication"), "a primary alone")

    def fail_over(self) -> None:
        """SIGKILL the primary and promote the replica."""
        self.primary.kill()
        self.replica.ask("REPLICAOF", "NO", "ONE")
        self.primary, self.replica = self.replica, self.primary
        self.proxy.reset()


def info(node: Node, section: str) -> bytes:
    with node.client() as client:
        client.set_response_callback("INFO", lambda reply, **_: reply)
        found: Any = client.execute_command("INFO", section)
        return bytes(found)


def transitions(node: Node, policy: str) -> Counter[str]:
    """Count the transitions on one node by decision id."""
    with node.client() as client:
        entries: Any = client.xrange(f"sf:{{{policy}}}:transitions")
        return Counter(fields[b"i"].decode() for _, fields in entries)


@contextmanager
def pair(folder: Path, *options: str) -> Iterator[Pair]:
    """Start both; `options` are of the primary alone."""
    with ExitStack() as stack:
        nodes = [Node(folder / name, *DURABLE, *more) for name, more in (("one", options), ("two", ()))]
        for node in nodes:
            stack.callback(node.kill)
            node.start()
        both = Pair(*nodes)
        stack.enter_context(both.proxy)
        both.follow()
        yield both
