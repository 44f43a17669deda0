"""Row 11: the spool that a dead worker left is cut short, or holds flipped bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.carve import FRAME
from service.decision import EpisodeEvent, decode_events
from service.salvage import log_of
from service.slots import SPOOL_FILE, Slot
from service.spool import Spool
from service.spool_file import Row as SpoolRow
from tests.faults.report import Report, Row, Settings
from tests.faults.world import World, world

EVERYTHING = 1 << 30


@dataclass(frozen=True)
class Left:
    """The newest spool file of a dead worker, and its rows."""

    path: Path
    rows: Sequence[SpoolRow]


def flipped(settings: Settings) -> Report:
    """Flip bytes of some rows in every copy that the file holds: those are lost and counted, all others arrive."""
    with world(settings, max_lag_s=5.0) as here:
        left = _left_behind(here)
        chance = settings.chance
        unshipped = [k for k, row in enumerate(left.rows[:-1]) if row.first_seq > _applied(here)]
        victims = chance.sample(unshipped, settings.count(2, 20))
        log = bytearray(log_of(left.path).read_bytes())
        for victim in victims:
            _flip(log, left.rows, victim, chance)
        log_of(left.path).write_bytes(log)
        events = sum(left.rows[victim].count for victim in victims)
        here.proxy.heal()
        here.replicas[0].start()
        report = Report(11, f"bytes of {len(victims)} rows flipped", here.settle(), may_lose="the damaged rows")
        _loses_just(report, here, [left.rows[victim] for victim in victims])
        report.expect(here.counted_lost() == events, f"{events} events damaged, {here.counted_lost():.0f} counted lost")
        rows = here.replicas[0].metric("surefoot_ledger_corrupt_rows")
        report.expect(rows == len(victims), f"{len(victims)} rows damaged, {rows:.0f} counted")
        report.notes.append(f"{events} events damaged, {here.counted_lost():.0f} counted lost")
    return report


def _left_behind(here: World) -> Left:
    """Play while Redis is down, kill the service, and read what its spool holds."""
    with here.play(rate=100.0) as game:
        game.more(30)
        here.proxy.down()
        game.more(120)
    here.replicas[0].kill()
    (folder,) = (here.replicas[0].data_dir / "spool").glob("slot-*")
    newest = max(
        (path for path in folder.iterdir() if SPOOL_FILE.match(path.name)), key=lambda path: path.stat().st_mtime
    )
    return Left(newest, _rows(newest, here.policy, here.settings.folder / "copy"))


def _applied(here: World) -> int:
    """The last seq that Redis has: what lies before it is not read again."""
    with here.store.client() as client:
        marks: Any = client.hvals(f"sf:{{{here.policy}}}:wm")
    return max(int(mark) for mark in marks)


def _rows(path: Path, policy: str, scratch: Path) -> list[SpoolRow]:
    """Read a copy: reading must not touch what the service will find."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for each in (path, log_of(path)):
        if each.exists():
            shutil.copy(each, scratch)
    slot = Slot(scratch, 0, "x.0", 0, -1)
    (epoch,) = slot.epochs()
    spool = Spool.reopen(slot, epoch)
    rows = spool.read(policy, 1, EVERYTHING, EVERYTHING, EVERYTHING)
    spool.close()
    return rows


def _flip(log: bytearray, rows: Sequence[SpoolRow], victim: int, chance: random.Random) -> None:
    """Flip a bit of a row wherever its pages hold it, at a place that no other row resembles."""
    blob = rows[victim].blob
    others = b"|".join(row.blob for k, row in enumerate(rows) if k != victim)
    pieces = (blob[at : at + 24] for at in iter(lambda: chance.randrange(len(blob) - 24), -1))
    piece = next(piece for piece in pieces if piece not in others)
    start = log.find(piece)
    assert start >= 0, "the row lies in the log"
    while start >= 0:
        log[start + 12] ^= 0x20
        start = log.find(piece, start)


def _loses_just(report: Report, here: World, damaged: Sequence[SpoolRow]) -> None:
    ids = {event.id for row in damaged for event in decode_events(row.blob) if not isinstance(event, EpisodeEvent)}
    verdict = report.verdict
    others = [each for each in (*verdict.acts.lost, *verdict.rewards.lost) if not any(i in each for i in ids)]
    report.expect(not others, f"{len(others)} lost that were not damaged: {others[:3]}")


def torn(settings: Settings) -> Report:
    """Cut the log within its last rows: the service starts, and all that lies before the cut arrives."""
    with world(settings, max_lag_s=5.0) as here:
        left = _left_behind(here)
        log = log_of(left.path).read_bytes()
        cut = len(log) - settings.chance.randrange(1, 20_000)
        log_of(left.path).write_bytes(log[:cut])
        kept = _rows(left.path, here.policy, settings.folder / "copy")
        report_of_cuts = _every_byte(settings, left, log, here.policy)
        here.proxy.heal()
        here.replicas[0].start()
        report = Report(11, "log torn", here.settle(), may_lose="the rows behind the cut")
        report.expect(kept == list(left.rows[: len(kept)]), "what is before the cut has changed")
        _loses_just(report, here, left.rows[len(kept) :])
        report.expect(not report_of_cuts, f"cut at {report_of_cuts[:5]} the spool was not as it should be")
        report.notes.append(f"{len(left.rows) - len(kept)} of {len(left.rows)} rows behind the cut")
    return report


def _every_byte(settings: Settings, left: Left, log: bytes, policy: str) -> list[int]:
    """Cut a copy within its last record, in a full run at every byte; give the cuts after which anything is wrong."""
    wrong, before = [], 0
    last = range(len(log) - 2 * FRAME, len(log) + 1)
    for cut in last if settings.full else sorted(settings.chance.sample(last, 40)):
        scratch = settings.folder / "cut"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        shutil.copy(left.path, scratch)
        log_of(scratch / left.path.name).write_bytes(log[:cut])
        rows = _rows(scratch / left.path.name, policy, settings.folder / "copy")
        # All that lies before the cut, and more with each byte that is left: how much exactly is the spool's own test.
        if rows != list(left.rows[: len(rows)]) or len(rows) < before or (cut == len(log) and rows != list(left.rows)):
            wrong.append(cut)
        before = len(rows)
    return wrong


ROWS = (Row(11, "flipped bytes", flipped), Row(11, "torn log", torn, in_tests=False))
