"""Row 8, failover: the primary dies, and a replica that has not got everything takes its place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.faults.proxy import FaultProxy, Toxics
from tests.faults.report import Report, Row, Settings
from tests.faults.stores import DURABLE, Store
from tests.faults.world import World, world
from tests.waiting import until


@contextmanager
def _pair(settings: Settings) -> Iterator[tuple[World, FaultProxy, Store]]:
    """A primary, a replica behind a link that can be held, and the service on the primary."""
    primary = Store(settings.folder / "store", *DURABLE)
    with primary, FaultProxy(primary.address) as link:
        follow = ("--replicaof", f"127.0.0.1 {link.port}", "--repl-diskless-sync-delay", "0")
        with Store(settings.folder / "second", *DURABLE, *follow) as second:
            until(lambda: _follows(second), "the replica")
            with world(settings, replicas=2, store=_Started(primary), replication_timeout_s="1") as here:
                yield here, link, second


class _Started(Store):
    """A store that somebody else has started already."""

    def __init__(self, of: Store) -> None:
        self.__dict__ = of.__dict__

    def __enter__(self) -> Store:
        return self


def _follows(second: Store) -> bool:
    with second.client() as client:
        found = client.info("replication")
        return (found["role"], found["master_link_status"]) == ("slave", "up")


def failover(settings: Settings) -> Report:
    """Hold replication, go on writing, kill the primary, promote the replica that lags behind."""
    rounds = 1
    with _pair(settings) as (here, link, second):
        # Where every reward waits for the replica, a player is stuck in one until it has no try left.
        tries = 60 if settings.full or settings.tier != "replicated" else 10
        with here.play(rate=settings.either(60, 200), tries=tries) as game:
            game.more(60)
            link.set(Toxics(hold=True), Toxics(hold=True))
            held_s = time.monotonic()
            if settings.tier == "replicated":
                until(lambda: _doubted(here), "a reward that nobody confirms")
            game.stop.wait(settings.either(1.0, 5.0))
            game.more(40 if settings.tier != "replicated" else 10)
            kept = _length(here, here.store)
            here.store.kill()
            behind = kept - _length(here, second)
            lagging_s = time.monotonic()
            unconfirmed = [act for act in here.journal.between(held_s + 1.5, lagging_s) if act.acked]
            _promote(here, link, second, settings)
            game.more(40)
        report = Report(8, f"failover ({settings.tier})", here.settle())
        failed = [each for each in here.journal.failed() if each.code != "unconfirmed"]
        report.expect(not failed, f"{len(failed)} calls failed: {failed[:3]}")
        report.expect(behind > 0, "the replica had everything: nothing was tried")
        report.expect(not here.counted_lost(), f"{here.counted_lost()} events counted lost")
        if settings.tier == "replicated":
            report.expect(not unconfirmed, f"{len(unconfirmed)} acts acknowledged that no replica had")
        else:
            report.expect(not report.verdict.unlogged, f"{report.verdict.unlogged} decisions were not logged")
        report.notes.append(f"the promoted replica was {behind} transitions behind, {rounds} failover")
    return report


def _doubted(here: World) -> bool:
    return any(each.code == "unconfirmed" for each in here.journal.failed())


def _length(here: World, store: Store) -> int:
    with store.client() as client:
        return int(client.xlen(f"sf:{{{here.policy}}}:transitions"))


def _promote(here: World, link: FaultProxy, second: Store, settings: Settings) -> None:
    """Put the replica in the primary's place; the old primary comes back as its replica."""
    link.down()
    second.ask("REPLICAOF", "NO", "ONE")
    old = here.store
    here.store = second
    here.proxy.reset()
    if settings.tier == "replicated":
        third = Store(settings.folder / "third", *DURABLE, "--replicaof", f"127.0.0.1 {second.port}")
        third.start("--repl-diskless-sync-delay", "0")
        until(lambda: _follows(third), "the new replica")
        old._process = third._process  # ended with the first


ROWS = (Row(8, "failover", failover, ("process", "node", "replicated")),)
