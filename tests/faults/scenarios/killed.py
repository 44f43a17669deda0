"""Row 1: workers are killed in the middle of everything."""

from __future__ import annotations

import time

from tests.faults.report import Report, Row, Settings
from tests.faults.world import BUDGET, World, world


def killed_workers(settings: Settings) -> Report:
    """SIGKILL a random worker of two replicas again and again, under load."""
    kills, players = settings.count(3, 20), settings.count(6, 16)
    with world(settings, replicas=2) as here:
        with here.play(rate=settings.either(60, 200), players=players) as game:
            chance, begun_s = settings.chance, time.monotonic()
            for _ in range(kills):
                game.more(chance.randrange(30, 120) if not settings.full else chance.randrange(60, 400))
                _kill_one(here, chance.randrange(2))
            game.more(30)
            rate = (len(here.journal.acts) + len(here.journal.rewards)) / (time.monotonic() - begun_s)
        verdict = here.settle()
        report = Report(1, f"{kills} × SIGKILL of a worker", verdict)
        broken = [each for each in here.journal.failed() if each.status == 0]
        refused = [each for each in here.journal.failed() if each.status]
        report.expect(
            len(broken) <= kills * players, f"{len(broken)} calls broke off, {kills * players} were in flight"
        )
        report.expect(not refused, f"{len(refused)} calls were refused: {refused[:3]}")
        most = max(verdict.explored_by_window.values(), default=0)
        report.expect(0 < most <= BUDGET, f"{most} explored in a window of {BUDGET}")
        report.expect(not here.counted_lost(), f"{here.counted_lost()} events counted lost")
        report.notes.append(
            f"{rate:.0f} requests a second; {len(broken)} calls broke off; {most} of {BUDGET} explored in a window"
        )
    return report


def _kill_one(here: World, first: int) -> None:
    """Kill a worker of one replica, or of the other where the first has none just now."""
    assert any(here.replicas[(first + k) % 2].kill_worker() for k in range(2)), "no worker to kill"


ROWS = (Row(1, "killed workers", killed_workers),)
