"""A trainer reads through Sentinels and from a cluster as from a single server, also while its node dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.redis_streams import base
from surefoot import Unreachable, transitions
from surefoot.streams import tail, transitions_async
from surefoot.topology import async_client, client
from tests.service.clusters import Cluster, Node, cluster, free_port, sentinels
from tests.surefoot.stream_entries import add
from tests.waiting import until

POLICY = "trained"
KEY = f"{base(POLICY)}:transitions"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


def fill(node: Node, steps: range) -> None:
    """Add transitions, and wait until a replica has them."""
    with node.client() as store:
        add(store, POLICY, steps)
        until(lambda: store.execute_command("WAIT", 1, 1_000) >= 1, "a replica in step")  # for what this one wrote


def read(url: str, first: int, between: Callable[[], None], last: int) -> list[int]:
    """Read `first` steps, let something happen, read on to `last`."""
    steps: list[int] = []
    with transitions(POLICY, "g", "c", redis_url=url, max_wait_s=60.0, batch_size=5) as stream:
        while len(steps) < first:
            steps += next(stream).steps.tolist()
        between()
        while len(steps) < last:
            steps += next(stream).steps.tolist()
    return steps


def test_a_trainer_reads_from_a_cluster_while_its_node_dies(nodes: Cluster) -> None:
    old = nodes.owner(KEY)
    fill(old, range(20))

    def dies() -> None:
        old.kill()
        until(lambda: nodes.owner(KEY) is not old, "another owner")
        with nodes.owner(KEY).client() as store:
            add(store, POLICY, range(20, 30))

    try:
        steps = read(nodes.url, 10, dies, 30)
        assert sorted(set(steps)) == list(range(30))
        assert [row["step"] for row in tail(POLICY, nodes.url)] == list(range(30))
    finally:
        old.start()
        until(nodes.settled, "a cluster that agrees")


def test_an_asynchronous_trainer_reads_from_a_cluster(nodes: Cluster) -> None:
    async def scenario() -> None:
        steps: list[int] = []
        async with transitions_async(POLICY, "h", "c", redis_url=nodes.url, max_wait_s=60.0) as stream:
            while len(steps) < 10:
                batch = await anext(stream)
                steps += batch.steps.tolist()
        assert steps[:10] == list(range(10))

    nodes.owner(KEY).ask("DEL", KEY)
    fill(nodes.owner(KEY), range(10))
    asyncio.run(scenario())


def test_a_trainer_follows_the_sentinels(tmp_path: Path) -> None:
    with sentinels(tmp_path) as those:
        old = those.primary()
        fill(old, range(20))

        def dies() -> None:
            old.kill()
            until(lambda: those.primary() is not old, "another primary")

        assert sorted(set(read(those.url, 10, dies, 20))) == list(range(20))

        async def pinged() -> Any:
            other = async_client(those.url, 5.0)
            try:
                return await other.ping()
            finally:
                await other.aclose()

        assert asyncio.run(pinged())


def test_a_cluster_that_is_away_is_a_redis_that_is_away() -> None:
    with pytest.raises(Unreachable):
        next(tail(POLICY, f"redis+cluster://127.0.0.1:{free_port()}"))


def test_what_is_no_url_is_refused_by_both() -> None:
    for make in (client, async_client):
        with pytest.raises(ValueError, match="begins with one of"):
            make("http://127.0.0.1", 1.0)
