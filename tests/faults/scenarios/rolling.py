"""Row 3: rolling restarts of two replicas behind a balancer, under load."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.faults.proxy import Address, FaultProxy
from tests.faults.replicas import Replica
from tests.faults.report import Report, Row, Settings
from tests.faults.world import world
from tests.waiting import until

LOOK_S = 0.05


class Balancer:
    """Sends each new connection to the next replica that says it is ready, as a load balancer does."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._ready = list(replicas)
        self._turn = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="balancer")

    def target(self) -> Address:
        self._turn += 1
        ready = self._ready or list(self._replicas)
        return "127.0.0.1", ready[self._turn % len(ready)].port

    def serves(self, replica: Replica) -> bool:
        return replica in self._ready

    @contextmanager
    def looking(self) -> Iterator[FaultProxy]:
        self._thread.start()
        try:
            with FaultProxy(self.target) as proxy:
                yield proxy
        finally:
            self._stop.set()
            self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(LOOK_S):
            self._ready = [replica for replica in self._replicas if replica.port and replica.ready()]


def rolling_restarts(settings: Settings) -> Report:
    """SIGTERM one replica after the other, and start it again, while clients talk to the balancer."""
    rounds = settings.count(2, 10)
    with world(settings, replicas=2, drain_delay_s="2") as here:
        balancer = Balancer(here.replicas)
        codes = []
        with (
            balancer.looking() as front,
            here.play([front.http_url], rate=settings.either(60, 100), players=settings.count(4, 8)) as game,
        ):
            for number in range(rounds):
                replica = here.replicas[number % 2]
                game.more(20)
                codes.append(replica.stop())
                replica.start()
                until(lambda replica=replica: balancer.serves(replica), "traffic again")  # type: ignore[misc]
            game.more(20)
        report = Report(3, f"{rounds} rolling restarts", here.settle())
        failed = here.journal.failed()
        report.expect(not failed, f"{len(failed)} calls failed: {failed[:3]}")
        report.expect(codes == [0] * rounds, f"exit codes {codes}")
        report.expect(not here.counted_lost(), f"{here.counted_lost()} events counted lost")
        killed = sum(replica.log.count('"worker_killed"') for replica in here.replicas)
        report.expect(not killed, f"{killed} workers did not leave within their grace")
        report.notes.append(f"{len(failed)} calls failed")
    return report


ROWS = (Row(3, "rolling restarts", rolling_restarts),)
