"""Rows 4 to 6: Redis is down, silent, slow, or does everything and its reply is lost."""

from __future__ import annotations

import time
from hashlib import sha1

from safety.bank import TERM_S
from service.redis_streams import SCRIPT
from tests.faults.proxy import Toxics
from tests.faults.report import Report, Row, Settings
from tests.faults.world import World, world
from tests.waiting import until

JOIN = sha1(SCRIPT).hexdigest().encode()  # how a call of the join is known among others


def redis_down(settings: Settings) -> Report:
    """Kill Redis under load and start it again later: decisions and rewards go on as if nothing were."""
    away_s = settings.either(4.0, 60.0)
    with world(settings, replicas=2, window_s=settings.either(4.0, 20.0)) as here:
        with here.play(rate=settings.either(60, 200)) as game:
            until(
                lambda: any(act.answer["explored"] for act in here.journal.between(0, 1e18) if act.answer), "exploring"
            )
            here.store.kill()
            ended_s = time.monotonic() + TERM_S  # of the last lease that could have been granted
            game.stop.wait(TERM_S + away_s)
            game.more(20)
            back_s = time.monotonic()
            unshipped = sum(replica.metric("surefoot_ledger_unshipped_events") for replica in here.replicas)
            here.store.start()
            game.more(40)
        verdict = here.settle()
        report = Report(4, f"Redis down for {TERM_S + away_s:.0f} s", verdict)
        alone = here.journal.between(ended_s, back_s)
        explored = [
            act for act in alone if act.answer and (act.answer["explored"] or act.answer["exploration"]["epsilon"])
        ]
        report.expect(alone, "nothing was answered while Redis was away")
        report.expect(not explored, f"{len(explored)} decisions explored without a lease")
        report.expect(unshipped > 0, "nothing waited for Redis")
        _all_answered(report, here)
        report.notes.append(f"{len(alone)} acts without Redis; {unshipped:.0f} events waited")
    return report


def _all_answered(report: Report, here: World) -> None:
    failed = here.journal.failed()
    report.expect(not failed, f"{len(failed)} calls failed: {failed[:3]}")
    report.expect(not verdict_unlogged(report), f"{verdict_unlogged(report)} decisions were not logged")
    report.expect(not here.counted_lost(), f"{here.counted_lost()} events counted lost")


def verdict_unlogged(report: Report) -> int:
    return report.verdict.unlogged


def _damaged(name: str, up: Toxics, down: Toxics, in_tests: bool = False) -> Row:
    def run(settings: Settings) -> Report:
        with world(settings) as here:
            replica = here.replicas[0]
            with here.play(rate=settings.either(60, 200)) as game:
                game.more(60)
                before = replica.rss_bytes()
                here.proxy.set(up, down)
                game.stop.wait(settings.either(3.0, 30.0))
                game.more(30)
                grown = replica.rss_bytes() - before
                here.proxy.heal()
                game.more(40)
            report = Report(5, name, here.settle())
            _all_answered(report, here)
            report.expect(grown < max(0.1 * before, 16 << 20), f"memory grew by {grown >> 20} MiB of {before >> 20}")
            report.notes.append(f"memory {grown / (1 << 20):+.1f} MiB of {before >> 20}")
        return report

    return Row(5, name, run, in_tests=in_tests)


def lost_replies(settings: Settings) -> Report:
    """Cut connections before and within the join's replies and within its calls: some were applied, some not."""
    cuts = settings.count(12, 200)
    with world(settings) as here:
        with here.play(rate=settings.either(60, 200)) as game:
            chance = settings.chance
            for number in range(cuts):
                if number % 3 == 2:
                    here.proxy.cut_after("up", chance.randrange(2000), JOIN)
                else:
                    here.proxy.cut_after("down", chance.choice((0, 1, 5, 20)), JOIN)
                until(lambda number=number: here.proxy.counters.cuts > number, "the cut")  # type: ignore[misc]
                game.more(3)
        report = Report(6, f"{cuts} × a reply of the join lost", here.settle())
        _all_answered(report, here)
        failed = here.replicas[0].metric("surefoot_ship_failures_total")
        report.expect(failed >= cuts * 2 // 3, f"only {failed:.0f} calls of the join failed")
        report.notes.append(f"{failed:.0f} calls of the join failed")
    return report


ROWS = (
    Row(4, "Redis down", redis_down),
    _damaged("black hole", Toxics(hold=True), Toxics(hold=True), in_tests=True),
    _damaged("black hole, one way", Toxics(), Toxics(hold=True)),
    _damaged("latency 2 s", Toxics(), Toxics(latency_s=2.0)),
    _damaged("1 KB/s", Toxics(bytes_per_s=1000.0), Toxics(bytes_per_s=1000.0)),
    _damaged("sliced to 7 bytes", Toxics(slice_bytes=7), Toxics(slice_bytes=7)),
    Row(6, "lost replies", lost_replies),
)
