"""One store, a proxy before it, replicas, and a trainer: the world that a row damages.

Duty: put the parts together and take them apart; wait until a healed world is drained; hand all to the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import redis

from tests.faults.journal import Journal
from tests.faults.oracle import Found, Verdict, judge
from tests.faults.players import Game, Habits, playing
from tests.faults.policy import write_policy
from tests.faults.proxy import FaultProxy
from tests.faults.replicas import SERVE, Replica
from tests.faults.report import Settings
from tests.faults.stores import Store
from tests.faults.trainer import Trainer
from tests.waiting import until

DRAIN_S = 120.0
BUDGET, BUDGET_WINDOW_S = 60, 5.0  # explored decisions, per window, of all replicas together


@dataclass
class World:
    """`store` is the server behind the proxy; a row may put another in its place."""

    settings: Settings
    policy: str
    store: Store
    proxy: FaultProxy
    replicas: list[Replica]
    trainer: Trainer
    journal: Journal = field(default_factory=Journal)
    games: int = 0

    @property
    def urls(self) -> list[str]:
        return [replica.url for replica in self.replicas]

    def play(self, urls: Sequence[str] = (), **habits: Any) -> AbstractContextManager[Game]:
        """Let clients act and reward during a `with` block."""
        self.games += 1
        wanted = Habits(**({"players": self.settings.count(6, 24)} | habits))
        return playing(urls or self.urls, self.policy, self.journal, wanted, self.settings.seed + self.games)

    def drained(self) -> bool:
        """Whether everything that replicas hold is in Redis, and nothing is open there."""
        try:
            clean = all(
                replica.ready()
                and not replica.metric("surefoot_ledger_unshipped_events")
                and replica.metric("surefoot_store_up") == 1
                for replica in self.replicas
                if replica.runs
            )
            return clean and not self.open_in_redis()
        except (httpx.HTTPError, redis.RedisError):
            return False

    def wait_drained(self) -> None:
        try:
            until(self.drained, "everything to be drained", DRAIN_S)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.describe()}") from None

    def describe(self) -> str:
        """Where everything stands, for who must find out why."""
        told = [f"{self.open_in_redis()} open in Redis"] if self.store.answers() else ["Redis does not answer"]
        for replica in self.replicas:
            told.append(f"{replica.folder.name}: {replica.health()}")
            if replica.ready():
                told.append(f"{replica.metric('surefoot_ledger_unshipped_events'):.0f} unshipped")
            told.append(replica.log[-2000:])
        return "\n".join(told)

    def open_in_redis(self) -> int:
        """Decisions and rewards that the join still holds."""
        with self.store.client() as client:
            return sum(int(client.zcard(f"sf:{{{self.policy}}}:{name}")) for name in ("due", "early"))

    def settle(self, **habits: Any) -> Verdict:
        """Wait until the healed world is drained and alive, and judge."""
        self.wait_drained()
        with self.play(**({"rate": 40.0, "players": 2} | habits)) as game:  # it lives: fresh acts and rewards pass
            game.more(4)
        self.wait_drained()
        self.trainer.finish()
        with self.store.client() as client:
            found = Found.read(client, self.policy, self.trainer.rows, self.trainer.copies)
        return judge(self.journal, found)

    def counted_lost(self) -> float:
        """Events that the service itself counts as lost."""
        return sum(replica.metric("surefoot_ledger_lost_events") for replica in self.replicas if replica.runs)


@contextmanager
def world(
    settings: Settings,
    *,
    replicas: int = 1,
    window_s: float = 4.0,
    store: Store | None = None,
    command: Sequence[str] = SERVE,
    environments: Sequence[Mapping[str, str]] = (),
    max_lag_s: float = 20.0,
    wait: bool = True,
    **more: str,
) -> Iterator[World]:
    """Start a world of its own below the settings' folder, and end it whatever happens."""
    policy, folder = f"faulty-{settings.seed}", settings.folder
    write_policy(folder / "policies", policy, window_s=window_s, limit=BUDGET, limit_window_s=BUDGET_WINDOW_S)
    with ExitStack() as stack:
        server = stack.enter_context(store or Store(folder / "store"))
        proxy = stack.enter_context(FaultProxy(lambda: here.store.address))
        own = {
            "policies": str(folder / "policies"),
            "redis_url": proxy.redis_url,
            "durability": settings.tier,
            "max_lag_s": str(max_lag_s),
            "spool_min_free_bytes": "0",
            "trace_sample": "0",
            "stream_keep": "1000000",  # the oracle wants to see all
            **more,
        }
        here = World(settings, policy, server, proxy, [], Trainer(policy, ""))
        direct = stack.enter_context(FaultProxy(lambda: here.store.address))
        here.trainer = Trainer(policy, direct.redis_url)
        stack.callback(_end, here)
        for number in range(replicas):
            at = _folder_of(folder, number)
            here.replicas.append(Replica(at, own, environments[number] if environments else {}, command))
            here.replicas[-1].start(wait)
        stack.enter_context(here.trainer)
        yield here


def _folder_of(folder: Path, number: int) -> Path:
    """Make a replica's folder. Verdicts on bundles are shared: they are tried once for all."""
    at = folder / f"replica-{number}"
    (at / "data").mkdir(parents=True, exist_ok=True)
    (folder / "trials").mkdir(exist_ok=True)
    (at / "data" / "trials").symlink_to(folder / "trials")
    return at


def _end(here: World) -> None:
    for replica in here.replicas:
        if replica.runs:
            replica.kill()
    here.store.kill()
