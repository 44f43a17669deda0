"""Row 9: Redis forgets: emptied, restarted without its data, trimmed behind a trainer's back."""

from __future__ import annotations

from typing import Any

import redis

from surefoot import Gap, transitions
from tests.faults.launcher import LAUNCH
from tests.faults.report import Report, Row, Settings
from tests.faults.stores import FORGETFUL, Store
from tests.faults.world import World, world
from tests.waiting import until


def emptied(settings: Settings) -> Report:
    """FLUSHALL under load: what the spool still holds is shipped again, the trainer is told."""

    def empty(here: World) -> None:
        here.store.ask("FLUSHALL")

    return _forgotten(settings, "FLUSHALL", empty, Store(settings.folder / "store"))


def restarted_empty(settings: Settings) -> Report:
    """Kill a Redis that keeps nothing, and start it again."""

    def restart(here: World) -> None:
        here.store.kill()
        here.store.start()

    return _forgotten(settings, "restart without persistence", restart, Store(settings.folder / "store", *FORGETFUL))


def _forgotten(settings: Settings, name: str, forget: Any, store: Store) -> Report:
    times = settings.count(1, 3)
    with world(settings, store=store, replicas=2, max_lag_s=5.0) as here:
        with here.play(rate=settings.either(60, 100)) as game:
            for _ in range(times):
                game.more(80)
                forget(here)
            game.more(40)
        report = Report(9, f"{times} × {name}", here.settle())
        failed = here.journal.failed()
        report.expect(not failed, f"{len(failed)} calls failed: {failed[:3]}")
        reasons = [gap.reason for gap in here.trainer.gaps]
        report.expect(reasons.count("group_missing") >= 1, f"the trainer was told {reasons}")
        report.expect(not here.counted_lost(), f"{here.counted_lost()} events counted lost")
        report.notes.append(f"the trainer raised {len(reasons)} gaps ({', '.join(sorted(set(reasons)))})")
    return report


def forgotten_for_good(settings: Settings) -> Report:
    """FLUSHALL when the spool has let go of what was shipped: a loss, and it is counted to the last event."""
    folder = settings.folder / "plan"
    folder.mkdir()
    environment = {"FAULT_PLAN": str(folder), "FAULT_HASTE": "1"}  # spool files go as soon as they are shipped
    with world(settings, max_lag_s=5.0, command=LAUNCH, environments=[environment]) as here:
        with here.play(rate=60.0, rewarded=1.0) as game:
            game.more(150)
        here.wait_drained()
        until(
            lambda: len({row.id for row in here.trainer.rows}) == len(here.journal.acts), "a trainer that has them all"
        )
        here.store.ask("FLUSHALL")
        with here.play(rate=60.0, rewarded=1.0) as game:
            game.more(60)
        report = Report(9, "FLUSHALL after the spool let go", here.settle())
        gaps = here.trainer.gaps
        counted, told = here.counted_lost(), sum(gap.lost or 0 for gap in gaps if gap.reason == "spool")
        missing = any(gap.reason == "group_missing" for gap in gaps)
        report.expect(counted > 0, "nothing was lost: nothing was tried")
        report.expect(missing or told == counted, f"{counted:.0f} events counted lost, a trainer was told of {told}")
        report.notes.append(f"{counted:.0f} events that trainers had read counted lost; Gap told of {told}")
    return report


def trimmed(settings: Settings) -> Report:
    """Trim the stream past a group: it is told how many it has missed."""
    with world(settings) as here:
        with here.play(rate=100.0) as game:
            game.more(100)
        report = Report(9, "stream trimmed past a trainer", here.settle())
        with (
            redis.Redis.from_url(here.store.url) as client,
            transitions(here.policy, "slow", "one", redis_url=here.store.url, batch_size=16, max_wait_s=0.5) as stream,
        ):
            next(stream).ack()
            key = f"sf:{{{here.policy}}}:transitions"
            length, left = int(client.xlen(key)), 20
            client.xtrim(key, maxlen=left, approximate=False)
            missed = _missed(stream)
        report.expect(missed == length - 16 - left, f"{length - 16 - left} entries trimmed, the gap says {missed}")
        report.notes.append(f"Gap told of {missed} of {length - 16 - left} trimmed")
    return report


def _missed(stream: Any) -> int:
    lost = 0
    while True:
        try:
            next(stream)
        except Gap as gap:
            lost += gap.lost or 0
        except StopIteration:
            return lost


ROWS = (
    Row(9, "FLUSHALL", emptied),
    Row(9, "restart without persistence", restarted_empty, in_tests=False),
    Row(9, "lost for good", forgotten_for_good),
    Row(9, "trimmed", trimmed, in_tests=False),
)
