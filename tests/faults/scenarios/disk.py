"""Row 10: the disk is full, or answers with errors: what cannot be kept is not acknowledged."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.journal import Act
from tests.faults.launcher import LAUNCH
from tests.faults.players import Game
from tests.faults.report import Report, Row, Settings
from tests.faults.skipping import Impossible
from tests.faults.world import World, world
from tests.waiting import until

DISK_BYTES = 8 << 20


@contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    """Mount 8 MiB of memory as a disk. Raises Impossible where mounting is not allowed."""
    at.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(at)]
    tried = subprocess.run(["mount", *options], capture_output=True, text=True)
    if tried.returncode:
        raise Impossible(f"mounting a small disk is not allowed here: {tried.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def full_disk(settings: Settings) -> Report:
    """Fill the spool's disk to the last byte, and make room again."""
    return _filled(settings, "disk full", 0)


def low_disk(settings: Settings) -> Report:
    """Leave less free than the service keeps in reserve: it stops before the disk is full."""
    return _filled(settings, "disk below its reserve", 3 << 20)


def _filled(settings: Settings, name: str, reserve: int) -> Report:
    with (
        small_disk(settings.folder / "replica-0" / "data") as disk,
        world(settings, window_s=6.0, spool_min_free_bytes=str(reserve)) as here,
    ):
        ballast = disk / "ballast"

        def fill() -> None:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while reserve == 0 or file.tell() < DISK_BYTES - reserve:
                        file.write(bytes(4096))
                except OSError:
                    return

        report = _broken_disk(here, settings, name, fill, ballast.unlink)
        here.replicas[0].kill()
    return report


def failing_disk(settings: Settings) -> Report:
    """Let every write to the spool fail for a while."""
    plan = settings.folder / "plan"
    plan.mkdir()
    flag = plan / "broken"
    with world(settings, window_s=6.0, command=LAUNCH, environments=[{"FAULT_PLAN": str(plan)}]) as here:
        return _broken_disk(here, settings, "disk I/O error", flag.touch, flag.unlink)


def _broken_disk(
    here: World, settings: Settings, name: str, damage: Callable[[], object], mend: Callable[[], object]
) -> Report:
    with here.play(rate=settings.either(60, 100), tries=3) as game:
        game.more(40)
        damage()
        until(lambda: any(_unlogged(here)), "an answer that is not logged")
        game.more(settings.count(60, 600))
        told = here.replicas[0].health() or {}
        alone = _unlogged(here)
        mend()
        until(lambda: here.replicas[0].ready(), "readiness")
        _logged_again(here, game)
    report = Report(10, name, here.settle())
    _as_promised(report, here, told, alone)
    return report


def _unlogged(here: World) -> list[Act]:
    return [act for act in here.journal.between(0.0, float("inf")) if act.answer and not act.answer["logged"]]


def _logged_again(here: World, game: Game) -> None:
    before = sum(act.acked for act in here.journal.between(0.0, float("inf")))
    until(lambda: sum(act.acked for act in here.journal.between(0.0, float("inf"))) > before + 20, "logged answers")
    game.more(20)


def _as_promised(report: Report, here: World, told: dict[str, object], alone: list[Act]) -> None:
    acts, rewards = here.journal.failed("/v1/act"), here.journal.failed("/v1/reward")
    report.expect(not acts, f"{len(acts)} acts failed: {acts[:3]}")
    report.expect(told.get("status") == "not_ready", f"readiness said {told}")
    report.expect(len(alone) > 20, f"only {len(alone)} answers were not logged")
    # The first of them were drawn before anybody knew.
    explored = [act for act in alone[20:] if act.answer and act.answer["explored"]]
    report.expect(not explored, f"{len(explored)} decisions explored and were not logged")
    wrong = [each for each in rewards if each.status != 503 or each.retry_after is None]
    report.expect(
        rewards and not wrong,
        f"of {len(rewards)} refused rewards {len(wrong)} are not 503 with Retry-After: {wrong[:3]}",
    )
    report.expect(not here.counted_lost(), f"{here.counted_lost()} events counted lost")
    report.notes.append(f"{len(alone)} decisions answered and said not to be logged, {len(rewards)} rewards refused")


ROWS = (
    Row(10, "disk full", full_disk),
    Row(10, "low disk", low_disk, in_tests=False),
    Row(10, "failing disk", failing_disk, in_tests=False),
)
