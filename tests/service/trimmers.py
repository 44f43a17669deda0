"""Streams to trim: a Valkey whose nodes hold as many entries as a test says, entries with ids that it chooses."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import redis
from prometheus_client import CollectorRegistry

from service.metrics import Metrics
from service.redis_streams import RedisStreams, base, connect
from service.trimming import TRANSITIONS, Rules, StreamView, Trimming, trim
from tests.surefoot.valkey import Valkey

T = TypeVar("T")
# Nothing goes because of age or size, nothing stays because it is young or among the newest.
BY_GROUPS = Rules(max_age_ms=10**15, max_bytes=10**15, keep=0, settle_ms=0)


@contextmanager
def nodes_of(entries: int) -> Iterator[Valkey]:
    """A server whose streams keep so many entries in a node: `~` frees whole nodes."""
    with tempfile.TemporaryDirectory(prefix="sf-") as directory, Valkey(Path(directory)) as server:
        with server.client() as client:
            client.config_set("stream-node-max-entries", entries)
        yield server


class Trimmer:
    """The service's side of one policy, called from a test that knows no event loop."""

    def __init__(self, url: str, policy: str) -> None:
        self.policy, self.url = policy, url
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)

    def __call__(self, rules: Rules = BY_GROUPS, stream: str = TRANSITIONS) -> StreamView | None:
        return self.ask(lambda streams: trim(streams, self.policy, stream, rules))

    def ask(self, question: Callable[[RedisStreams], Coroutine[Any, Any, T]]) -> T:
        async def asked() -> T:
            streams = RedisStreams(connect(self.url))
            try:
                return await question(streams)
            finally:
                await streams.aclose()

        return asyncio.run(asked())

    def turns(self, *policies: tuple[str, ...], rules: Rules = BY_GROUPS) -> None:
        """Let one worker make turns, each with these policies served."""

        async def turned(streams: RedisStreams) -> None:
            trimming = Trimming(streams, self.metrics, rules)
            for served in policies:
                await trimming.run_once(served)

        self.ask(turned)

    def value(self, name: str, stream: str = TRANSITIONS, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"surefoot_{name}", {"policy": self.policy, "stream": stream} | labels)


def key(policy: str, stream: str = TRANSITIONS) -> str:
    return f"{base(policy)}:{stream}"


def fill(store: redis.Redis, name: str, numbers: Iterable[int], size: int = 1) -> None:
    """Append entries with the ids 1-0, 2-0, …"""
    with store.pipeline(transaction=False) as pipe:
        for n in numbers:
            pipe.xadd(name, {"n": b"x" * size}, id=f"{n}-0")
        pipe.execute()


def left(store: redis.Redis, name: str) -> list[int]:
    """The numbers of the entries that are there."""
    found: Any = store.xrange(name)
    return [int(stream_id.partition(b"-")[0]) for stream_id, _ in found]
