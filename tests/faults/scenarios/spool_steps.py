"""Row 2: the worker dies at each exact step of its spool, once before it and once after."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

from tests.faults.failing_worker import FUNCTIONS, STATEMENTS, UNLINKS
from tests.faults.launcher import LAUNCH
from tests.faults.report import Report, Row, Settings
from tests.faults.world import world
from tests.waiting import until

POINTS = [(point, when) for point, when in product((*FUNCTIONS, *STATEMENTS, *UNLINKS), ("before", "after"))]
# What every epoch goes through once: a later call may not come.
ONCE = re.compile(r"Adoption|reopen|create|start_new_file|finish_file|unlink|[dD]elete|expire")
QUICK = (
    ("COMMIT", "before"),
    ("INSERT", "before"),
    ("COMMIT", "before"),
    ("COMMIT", "after"),
    ("RedisStreams.ship", "after"),
    ("Lane.ack", "after"),
    ("unlink .db", "after"),
    ("Spool.reopen", "after"),
)


def failpoints(settings: Settings) -> Report:
    """Die at one point after the other, each in a worker of its own, under load."""
    chance = settings.chance
    points = [*POINTS, *POINTS] if settings.full else list(QUICK)
    plan = [
        {"point": point, "when": when, "nth": 1 if ONCE.search(point) else chance.randrange(1, 8)}
        for point, when in points
    ]
    folder = settings.folder / "plan"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {"FAULT_PLAN": str(folder), "FAULT_HASTE": "1"}
    with world(settings, command=LAUNCH, environments=[environment], wait=False) as here:
        with here.play(rate=settings.either(60, 100), players=4, tries=60) as game:
            for number, point in enumerate(plan):
                _reached(folder / f"mark-{number}", f"{point['when']} {point['point']}")
            here.replicas[0].wait_ready()
            game.more(20)
        report = Report(2, f"SIGKILL at {len(plan)} steps of the spool", here.settle())
        report.expect(not here.counted_lost(), f"{here.counted_lost()} events counted lost")
        refused = [each for each in here.journal.failed() if each.status]
        report.expect(not refused, f"{len(refused)} calls were refused: {refused[:3]}")
        report.notes.append(f"{len(POINTS) if settings.full else len(plan)} different steps")
    return report


def _reached(mark: Path, step: str) -> None:
    until(mark.exists, f"the death {step}", 120.0)


ROWS = (Row(2, "failpoints", failpoints),)
