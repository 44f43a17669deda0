"""Rows 7 and 8, failover aside: Redis is there and takes no writes: full, read-only, loading, alone, without slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from redis.crc import key_slot

from tests.faults.players import Game
from tests.faults.report import Report, Row, Settings
from tests.faults.stores import DURABLE, Store
from tests.faults.world import World, world
from tests.waiting import until

Fault = Callable[[World], AbstractContextManager[None]]


def redis_full(settings: Settings) -> Report:
    """Lower maxmemory below what is used, play on, and raise it again."""
    with world(settings) as here:
        with here.play(rate=settings.either(60, 200)) as game:
            game.more(30)
            here.store.configure("maxmemory", 1 << 20)
            _refused(here, game, settings)
            told = here.replicas[0].health() or {}
            here.store.configure("maxmemory", 0)
            game.more(30)
            here.store.configure("maxmemory-policy", "allkeys-lru")
            until(lambda: (here.replicas[0].health() or {}).get("degraded"), "degraded readiness")
            here.store.configure("maxmemory-policy", "noeviction")
            until(lambda: not (here.replicas[0].health() or {"degraded": True})["degraded"], "readiness as before")
        report = Report(7, "Redis full", here.settle())
        report.expect(told.get("status") == "ready", f"readiness said {told}")
        _as_promised(report, here)
    return report


def _refused(here: World, game: Game, settings: Settings) -> None:
    """Play until Redis has refused some calls, and a while longer."""
    before = here.replicas[0].metric("surefoot_ship_failures_total")
    until(lambda: here.replicas[0].metric("surefoot_ship_failures_total") > before + 1, "calls that Redis refuses")
    game.stop.wait(settings.either(1.0, 15.0))
    game.more(30)


def _as_promised(report: Report, here: World) -> None:
    failed = here.journal.failed()
    report.expect(not failed, f"{len(failed)} calls failed: {failed[:3]}")
    report.expect(not report.verdict.unlogged, f"{report.verdict.unlogged} decisions were not logged")
    report.expect(not here.counted_lost(), f"{here.counted_lost()} events counted lost")
    rejected = sum(replica.metric("surefoot_ledger_rejected_events") for replica in here.replicas)
    report.expect(not rejected, f"{rejected:.0f} events rejected")
    report.notes.append(f"{here.replicas[0].metric('surefoot_ship_failures_total'):.0f} calls of the join refused")
    if here.trainer.refused:
        report.notes.append(
            f"the trainer's library gave up {len(here.trainer.refused)} times: {here.trainer.refused[0]}"
        )


@contextmanager
def _read_only(here: World) -> Iterator[None]:
    here.store.ask("REPLICAOF", "127.0.0.1", 1)  # where nobody listens: it keeps its data
    yield
    here.store.ask("REPLICAOF", "NO", "ONE")


@contextmanager
def _no_replicas(here: World) -> Iterator[None]:
    here.store.configure("min-replicas-to-write", 1)
    yield
    here.store.configure("min-replicas-to-write", 0)


@contextmanager
def _snapshots_fail(here: World) -> Iterator[None]:
    """MISCONF: the file of the snapshot is a folder."""
    in_the_way = here.store.folder / "dump.rdb"
    in_the_way.mkdir()
    here.store.configure("save", "3600 1")
    here.store.ask("BGSAVE")

    def failed() -> bool:
        with here.store.client() as client:
            return str(client.info("persistence")["rdb_last_bgsave_status"]) == "err"

    until(failed, "a snapshot that fails")
    yield
    here.store.configure("save", "")
    in_the_way.rmdir()
    here.store.ask("BGSAVE")


@contextmanager
def _loading(here: World) -> Iterator[None]:
    """Restart it with a file that takes seconds to load."""
    with here.store.client() as client, client.pipeline(transaction=False) as pipe:
        for number in range(4000):
            pipe.set(f"ballast:{number}", b"x")
        pipe.execute()
    here.store.ask("BGREWRITEAOF")

    def rewritten() -> bool:
        with here.store.client() as client:
            found = client.info("persistence")
            return not found["aof_rewrite_in_progress"] and found["aof_last_bgrewrite_status"] == "ok"

    until(rewritten, "the file to be rewritten")
    here.store.kill()
    here.store.start("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024", wait=False)
    yield
    until(here.store.answers, "the end of loading")


@contextmanager
def _slot_gone(here: World) -> Iterator[None]:
    slot = key_slot(here.policy.encode())
    here.store.ask("CLUSTER", "DELSLOTS", slot)
    until(lambda: b"cluster_state:fail" in _cluster_info(here.store), "CLUSTERDOWN")
    yield
    here.store.ask("CLUSTER", "ADDSLOTS", slot)
    until(lambda: b"cluster_state:ok" in _cluster_info(here.store), "the cluster")


def _cluster_info(store: Store) -> bytes:
    found = store.ask("CLUSTER", "INFO")
    return found if isinstance(found, bytes) else str(found).encode()


class ClusterStore(Store):
    """A cluster of one node."""

    def start(self, *more: str, wait: bool = True) -> None:
        fresh = not (self.folder / "nodes.conf").exists()
        super().start(*more, wait=wait)
        if fresh:
            self.ask("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until(lambda: b"cluster_state:ok" in _cluster_info(self), "the cluster")


def _refusing(name: str, fault: Fault, options: tuple[str, ...] = DURABLE, in_tests: bool = False) -> Row:
    def run(settings: Settings) -> Report:
        kind = ClusterStore if "--cluster-enabled" in options else Store
        with world(settings, store=kind(settings.folder / "store", *options)) as here:
            with here.play(rate=settings.either(60, 200)) as game:
                game.more(30)
                with fault(here):
                    _refused(here, game, settings)
                game.more(30)
            report = Report(8, name, here.settle())
            _as_promised(report, here)
        return report

    return Row(8, name, run, in_tests=in_tests)


ROWS = (
    Row(7, "Redis full", redis_full),
    _refusing("READONLY", _read_only),
    _refusing("NOREPLICAS", _no_replicas, in_tests=True),
    _refusing("MISCONF", _snapshots_fail),
    _refusing("LOADING", _loading),
    _refusing("CLUSTERDOWN", _slot_gone, (*DURABLE, "--cluster-enabled", "yes")),
)
