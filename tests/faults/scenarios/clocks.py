"""Row 15: replicas whose clocks are wrong, disagree, or step back while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.faults.report import Report, Row, Settings
from tests.faults.skipping import Impossible
from tests.faults.world import BUDGET, World, world

LIBRARIES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib/*/faketime/libfaketime.so.1")


def _faked(folder: Path, name: str, offset: str) -> dict[str, str]:
    """An environment in which the wall clock is off by what the file says; the monotonic one is not."""
    library = next((str(path) for each in LIBRARIES for path in Path("/").glob(each[1:])), None)
    if library is None:
        raise Impossible("libfaketime is not installed (apt-get install faketime)")
    (folder / name).write_text(offset)
    return {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(folder / name),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _skewed(name: str, offsets: Sequence[str], step: str = "", in_tests: bool = False) -> Row:
    """Replicas with these offsets; `step` is the first one's offset later."""

    def run(settings: Settings) -> Report:
        environments = [_faked(settings.folder, f"clock-{k}", offset) for k, offset in enumerate(offsets)]
        with world(settings, replicas=len(offsets), window_s=30.0) as here:  # wider than a step of the clock
            # Started once in true time, since the child that tries a bundle cannot sleep under libfaketime.
            for replica, environment in zip(here.replicas, environments, strict=True):
                replica.stop()
                replica.environment = environment
                replica.start()
            with here.play(rate=settings.either(60, 150), rewarded=1.0) as game:
                game.more(settings.count(100, 400))
                if step:
                    (settings.folder / "clock-0").write_text(step)
                game.more(settings.count(100, 400))
            report = Report(15, name, here.settle(rewarded=1.0))
            _as_promised(report, here)
        return report

    return Row(15, name, run, in_tests=in_tests)


def _as_promised(report: Report, here: World) -> None:
    failed = here.journal.failed()
    report.expect(not failed, f"{len(failed)} calls failed: {failed[:3]}")
    ids = Counter(str(act.answer["decision_id"]) for act in here.journal.acts.values() if act.answer)
    report.expect(max(ids.values()) == 1, "a decision id was given twice")
    most = max(report.verdict.explored_by_window.values(), default=0)
    report.expect(0 < most <= BUDGET, f"{most} explored in a window of {BUDGET}")
    statuses = Counter(status for reward in here.journal.rewards.values() for status in reward.statuses)
    late = statuses["late"]
    report.expect(not late, f"{late} rewards were called late although their decisions were fresh")
    for replica in here.replicas:
        total = replica.metric("surefoot_reward_delay_seconds_sum")
        report.expect(total >= 0, f"a delay of {total} s")
    report.notes.append(f"at most {most} of {BUDGET} explored in a window; rewards {dict(statuses)}")


ROWS = (
    _skewed("clocks an hour apart", ("+3600", "+0")),
    _skewed("clock an hour behind", ("-3600",)),
    _skewed("replicas disagree by 5 min", ("+300", "+0")),
    _skewed("clock steps back 10 s", ("+0", "+0"), "-10", in_tests=True),
    _skewed("clock steps ahead 10 s", ("+0", "+0"), "+10"),
)
