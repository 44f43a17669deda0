"""The ledger acknowledges only what it keeps, keeps it over SIGKILL, and is bounded in memory and on disk."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from policies.errors import LedgerBroken, LedgerFull
from service.clock import ManualClock, SystemClock
from service.lanes import Lane
from service.ledger import Ledger
from service.shipcall import Confirm
from service.slots import Slot, hold_free_slot, take_slot
from service.spool import Spool

DEADLINE_S = 20.0


@asynccontextmanager
async def open_ledger(data_dir: Path, **options: Any) -> AsyncIterator[Ledger]:
    slot = take_slot(data_dir)
    ledger = Ledger(slot, options.pop("clock", SystemClock()), **{"min_free_bytes": 0, "probe_s": 0.01} | options)
    try:
        yield ledger
    finally:
        await ledger.aclose()
        slot.release()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


def blobs_on_disk(data_dir: Path, number: int = 0, policy: str = "p") -> list[tuple[int, bytes]]:
    """Read everything that dead workers left in a slot, over all epochs."""
    slot = hold_free_slot(data_dir, number)
    assert slot is not None
    found = []
    for epoch in slot.epochs():
        spool = Spool.reopen(slot, epoch)
        found += [(row.first_seq, row.blob) for row in spool.read(policy, 1, 1 << 40, 1 << 40, 1 << 40)]
        spool.close()
    slot.release()
    return found


# Appending


def test_seqs_count_events_by_policy_and_rows_become_durable(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path) as ledger:
            first = ledger.append_nowait("p", 3, b"abc", 10)
            second = ledger.append_nowait("p", 1, b"d", 11)
            other = ledger.append_nowait("q", 2, b"xy", 11)
            assert (first.first_seq, second.first_seq, other.first_seq) == (1, 4, 1)
            assert not first.committed.done(), "nothing is durable before the writer said so"
            await asyncio.gather(first.committed, second.committed, other.committed)
            lane = ledger.lanes()[0]
            assert (lane.end, lane.assigned, lane.unshipped) == (5, 5, 4)
            statistics = ledger.statistics()
            assert (statistics.state, statistics.unshipped_events, statistics.held_bytes) == ("ok", 6, 6)
            assert (statistics.oldest_unshipped_ms, statistics.files, statistics.waiting_rows) == (10, 1, 0)

    asyncio.run(scenario())
    assert blobs_on_disk(tmp_path) == [(1, b"abc"), (4, b"d")]
    assert blobs_on_disk(tmp_path, policy="q") == [(1, b"xy")]


def test_what_is_queued_together_is_committed_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path) as ledger:
            await ledger.append_nowait("p", 1, b"x", 1).committed
            before = ledger.statistics().commits
            done = [ledger.append_nowait("p", 1, b"x", 1).committed for _ in range(1000)]
            await asyncio.gather(*done)
            assert ledger.statistics().commits - before < 500

    asyncio.run(scenario())


def test_closing_commits_what_is_queued_and_refuses_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path) as ledger:
            done = [ledger.append_nowait("p", 1, b"%d" % k, 1).committed for k in range(50)]
            await ledger.aclose()
            assert all(future.done() and not future.exception() for future in done)
            assert ledger.statistics().state == "closed"
            assert not ledger.accepting
            with pytest.raises(LedgerBroken):
                ledger.append_nowait("p", 1, b"", 1)

    asyncio.run(scenario())
    assert len(blobs_on_disk(tmp_path)) == 50


def test_tier_memory_is_durable_at_once_and_bounded() -> None:
    async def scenario() -> None:
        ledger = Ledger(None, ManualClock(), tier="memory", max_buffer_bytes=100)
        appended = ledger.append_nowait("p", 2, bytes(60), 1)
        assert appended.committed.done()
        assert ledger.accepting
        with pytest.raises(LedgerFull):
            ledger.append_nowait("p", 1, bytes(60), 1)
        lane = ledger.lanes()[0]
        lane.ack(2)
        assert ledger.append_nowait("p", 1, bytes(60), 1).first_seq == 3
        assert await ledger.read(lane, 10, 10) == []
        await ledger.tidy()
        await ledger.aclose()

    asyncio.run(scenario())


def test_a_tier_and_a_slot_belong_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="slot"):
            Ledger(None, ManualClock(), tier="process")
        with pytest.raises(ValueError, match="whom"):
            Ledger(take_slot(tmp_path), ManualClock(), tier="replicated")
        with pytest.raises(ValueError, match="nobody"):
            Ledger(None, ManualClock(), tier="memory", confirm=Confirm(1, 1.0))

    asyncio.run(scenario())


# Bounds


def test_a_full_buffer_refuses_and_takes_again_after_the_commit(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path, max_buffer_bytes=100_000) as ledger:
            # No turn of the loop in between: nothing can be committed meanwhile.
            done = [ledger.append_nowait("p", 1, bytes(1000), 1).committed for _ in range(100)]
            with pytest.raises(LedgerFull):
                ledger.append_nowait("p", 1, bytes(1000), 1)
            assert not ledger.accepting
            assert ledger.statistics().state == "full"
            await asyncio.gather(*done)
            assert ledger.accepting, "what is committed is held in half the buffer, the rest on disk alone"
            assert ledger.append_nowait("p", 1, b"", 1).first_seq == 101

    asyncio.run(scenario())


def test_rows_beyond_the_memory_window_are_read_back_from_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path, max_buffer_bytes=20_000, rotate_bytes=50_000) as ledger:
            blobs = [random.Random(k).randbytes(1000) for k in range(200)]
            for blob in blobs:
                await ledger.append_nowait("p", 1, blob, 5).committed
            lane = ledger.lanes()[0]
            assert ledger.statistics().held_bytes <= 10_000
            assert lane.stored
            got = []
            while lane.next_seq < lane.end:
                rows = await ledger.read(lane, 16, 1 << 20) if lane.stored else lane.from_window(16, 1 << 20)
                assert rows[0].first_seq == lane.next_seq
                assert lane.through_ms(rows, 9) in (4, 8), "never past an unshipped event"
                got += [row.blob for row in rows]
                lane.ack(rows[-1].end - 1)
            assert got == blobs
            assert lane.through_ms([], 9) == 8
            assert ledger.statistics().held_bytes == 0

    asyncio.run(scenario())


def test_the_watermark_stays_below_every_unshipped_event() -> None:
    lane = Lane("p", "x.0", 1)
    assert lane.through_ms([], 100) == 99
    for at_ms in (10, 20, 30):
        lane.append(1, at_ms, b"x")
    assert lane.through_ms([], 100) == 9, "rows that wait for their commit count"
    lane.commit()
    lane.commit()
    batch = lane.from_window(1, 100)
    assert lane.through_ms(batch, 100) == 19
    assert lane.through_ms(lane.from_window(9, 100), 100) == 29
    lane.evict()
    assert (lane.stored, lane.through_ms([], 100), lane.oldest_ms) == (True, 9, 10)
    lane.ack(2)
    assert (lane.stored, lane.through_ms([], 100), lane.oldest_ms) == (False, 29, 30)
    lane.abort()
    assert (lane.assigned, lane.through_ms([], 100), lane.oldest_ms) == (3, 99, None)


def test_a_hole_is_counted_once_however_often_it_is_met() -> None:
    lane = Lane("p", "x.0", 1, next_seq=1, end=20, assigned=20)
    assert lane.skip(5) == 4
    lane.rewind(0)
    assert lane.skip(8) == 3
    assert lane.lost == 7


# A spool that cannot be written


def test_low_disk_is_refused_before_it_is_full(tmp_path: Path) -> None:
    async def scenario() -> None:
        reports: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
        async with open_ledger(tmp_path, min_free_bytes=1 << 60) as ledger:
            appended = [ledger.append_nowait("p", 1, b"x", 1) for _ in range(3)]
            for each in appended[:2]:
                with pytest.raises(LedgerBroken, match="reserve"):
                    await each.committed
            del appended, each  # the third is never awaited
            gc.collect()
            assert not reports
            assert not ledger.accepting
            assert ledger.statistics().state == "broken"
            with pytest.raises(LedgerBroken, match="reserve"):
                ledger.append_nowait("p", 1, b"x", 1)

    asyncio.run(scenario())
    assert blobs_on_disk(tmp_path) == []


def test_scarce_disk_is_known_before_a_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        disk = os.statvfs(tmp_path)
        free = disk.f_bavail * disk.f_frsize
        monkeypatch.setattr("service.writer.SCARCE_BYTES", free)
        async with open_ledger(tmp_path, min_free_bytes=free // 4) as ledger:
            assert ledger.recording("p")
            await ledger.append_nowait("p", 1, b"x", 1).committed
            assert ledger.accepting
            assert not ledger.recording("p"), "the next commit may be refused: nothing should be explored on it"
            monkeypatch.setattr("service.writer.SCARCE_BYTES", 0)
            await ledger.append_nowait("p", 1, b"x", 1).committed
            assert ledger.recording("p")

    asyncio.run(scenario())


LIMITED = """
import asyncio, os, resource, sys
from pathlib import Path
from policies.errors import LedgerBroken
from service.clock import SystemClock
from service.ledger import Ledger
from service.shipcall import Confirm
from service.slots import take_slot

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main():
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: os._exit(3))
    ledger = Ledger(take_slot(Path(sys.argv[1])), SystemClock(), min_free_bytes=0, probe_s=0.01)
    async def append(count):
        for k in range(count):
            appended = ledger.append_nowait("p", 1, b"%d" % k + bytes(3000), 1)
            extra = ledger.append_nowait("p", 1, b"extra", 1)
            await appended.committed
            await extra.committed
            print("acked", appended.first_seq, k, flush=True)
            print("acked", extra.first_seq, "extra", flush=True)
    async def recovered():
        async with asyncio.timeout(20):
            while not ledger.accepting:
                await asyncio.sleep(0.005)
    await append(5)
    limit(200_000)          # less than one file
    try:
        await append(1000)
    except LedgerBroken:
        print("broken", flush=True)
    await recovered()       # a fresh file has room
    await append(5)
    # One that does not fit, and behind it more than one commit's worth of rows that would.
    doomed = [ledger.append_nowait("p", 1, bytes(size), 1) for size in (300_000, *[10] * 3000)]
    for each in doomed:
        try:
            await each.committed
        except LedgerBroken:
            continue
        print("acked", each.first_seq, "never", flush=True)
    await recovered()
    await append(5)
    limit(0)                # nothing can be written at all
    try:
        await append(5)
    except LedgerBroken:
        print("broken", flush=True)
    for _ in range(20):
        assert not ledger.accepting
        await asyncio.sleep(0.005)
    limit(resource.RLIM_INFINITY)
    await recovered()
    await append(5)
    await ledger.aclose()

asyncio.run(main())
"""


def test_a_disk_that_refuses_breaks_the_ledger_until_it_takes_again(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("broken") == 2
    acked = {int(line.split()[1]): line.split()[2] for line in lines if line.startswith("acked")}
    kept = {seq: blob.strip(b"\0").decode() for seq, blob in blobs_on_disk(tmp_path)}
    assert kept.keys() >= acked.keys()
    assert all(kept[seq] == what for seq, what in acked.items())
    assert sorted(acked) == list(range(1, len(acked) + 1)), "seqs that were never acknowledged are given out again"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# SIGKILL

APPENDING = """
import asyncio, sys
from pathlib import Path
from service.clock import SystemClock
from service.ledger import Ledger
from service.shipcall import Confirm
from service.slots import take_slot

async def main():
    slot = take_slot(Path(sys.argv[1]))
    ledger = Ledger(slot, SystemClock(), min_free_bytes=0, rotate_bytes=300_000)
    k = 0
    while True:
        batch = []
        for _ in range(1 + k % 7):
            k += 1
            batch.append((k, ledger.append_nowait("p", 1, b"%d.%d" % (slot.epoch, k) + bytes(k % 3000), 1)))
        for k, appended in batch:
            await appended.committed
            print(slot.epoch, appended.first_seq, k, flush=True)

asyncio.run(main())
"""


def test_sigkill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    acked: list[tuple[int, int, int]] = []
    for turn in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", APPENDING, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            for _ in range(40 + 61 * turn):
                acked.append(parse(worker.stdout.readline()))
            worker.send_signal(signal.SIGKILL)
            acked += [parse(line) for line in worker.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    kept = {(blob.split(b"\0")[0], seq) for seq, blob in blobs_on_disk(tmp_path)}
    assert len(acked) > 5 * 40
    assert {epoch for epoch, _, _ in acked} == {1, 2, 3, 4, 5}
    missing = [each for each in acked if (b"%d.%d" % (each[0], each[2]), each[1]) not in kept]
    assert not missing


def parse(line: str) -> tuple[int, int, int]:
    epoch, seq, number = line.split()
    return int(epoch), int(seq), int(number)


# Adoption


def test_a_dead_workers_slot_is_adopted_once_it_has_lain_free_and_let_go_when_shipped(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with open_ledger(tmp_path, clock=clock) as ledger:
            dead = await left_behind(tmp_path, [b"one", b"two"])
            await ledger.tidy()
            assert ledger.lanes() == [], "it may be restarting"
            await ledger.tidy()
            (lane,) = ledger.lanes()
            assert (lane.producer, lane.epoch, lane.live, lane.known) == (dead.producer, dead.epoch, False, False)
            assert hold_free_slot(tmp_path, dead.number) is None, "nobody else may touch it"
            rows = await ledger.read(lane, 10, 1000)
            assert [row.blob for row in rows] == [b"one", b"two"]
            assert ledger.statistics().unshipped_events == 2
            await ledger.tidy()
            assert ledger.lanes() == [lane], "what is not shipped stays"
            lane.ack(2)
            await ledger.tidy()
            clock.advance(119_000)
            await ledger.tidy()
            assert ledger.lanes() == [lane], "kept for a failover"
            clock.advance(1_000)
            await ledger.tidy()
            assert ledger.lanes() == []
            assert not list(dead.path.glob("*.db*"))
            again = hold_free_slot(tmp_path, dead.number)
            assert again is not None
            again.release()

    asyncio.run(scenario())


def test_closing_lets_go_of_slots_that_are_not_shipped_yet(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path) as ledger:
            dead = await left_behind(tmp_path, [b"one"])
            await ledger.tidy()
            await ledger.tidy()
            assert hold_free_slot(tmp_path, dead.number) is None
        again = hold_free_slot(tmp_path, dead.number)
        assert again is not None
        assert again.epochs()
        again.release()

    asyncio.run(scenario())


def test_earlier_epochs_of_the_own_slot_are_adopted_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        for k in range(3):
            await left_behind(tmp_path, [b"%d" % k])
        async with open_ledger(tmp_path) as ledger:
            await ledger.tidy()
            await ledger.tidy()
            assert [lane.epoch for lane in ledger.lanes()] == [1, 2, 3]
            assert (await ledger.read(ledger.lanes()[1], 10, 1000))[0].blob == b"1"

    asyncio.run(scenario())


async def left_behind(data_dir: Path, blobs: list[bytes]) -> Slot:
    async with open_ledger(data_dir) as ledger:
        for blob in blobs:
            await ledger.append_nowait("p", 1, blob, 7).committed
        assert ledger._slot is not None
        return ledger._slot


# In the caller's thread


class SlowDisk:
    """Makes every write to the spool take longer than a caller should wait."""

    def __init__(self, ledger: Ledger) -> None:
        assert ledger._spool is not None
        self._write = ledger._spool.write
        self.threads: list[str] = []
        self.clock_s = 0.0
        self.takes_s = 0.0
        ledger._spool.write = self.write  # type: ignore[method-assign]
        ledger._writer._monotonic_s = lambda: self.clock_s

    def write(self, rows: Any) -> None:
        self.threads.append(threading.current_thread().name)
        self.clock_s += self.takes_s
        self._write(rows)


def test_a_row_alone_is_committed_by_whoever_brings_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path) as ledger:
            disk = SlowDisk(ledger)
            for number in range(10):  # the first goes to the thread, which makes the file
                appended = ledger.append_nowait("p", 1, b"%d" % number, 10 + number)
                assert appended.committed.done() == (number > 0)
                await appended.committed
                await asyncio.sleep(0)  # the next turn of the event loop
            assert disk.threads == ["spool-writer", *["MainThread"] * 9]
            assert ledger.statistics().commits == 10

    asyncio.run(scenario())
    assert blobs_on_disk(tmp_path) == [(number + 1, b"%d" % number) for number in range(10)]


def test_a_slow_disk_holds_up_one_caller_and_then_only_the_thread(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path) as ledger:
            disk = SlowDisk(ledger)
            await ledger.append_nowait("p", 1, b"file", 10).committed
            disk.takes_s = 0.01
            for _ in range(3):
                await ledger.append_nowait("p", 1, b"x", 11).committed
                await asyncio.sleep(0)
            assert disk.threads[1:] == ["MainThread", "spool-writer", "spool-writer"]
            disk.takes_s, disk.clock_s = 0.0, disk.clock_s + 2.0
            await ledger.append_nowait("p", 1, b"y", 12).committed
            assert disk.threads[4:] == ["MainThread"], "it is tried again after a while"

    asyncio.run(scenario())
    assert len(blobs_on_disk(tmp_path)) == 5


def test_nothing_overtakes_a_row_that_waits_for_the_thread(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path) as ledger:
            disk = SlowDisk(ledger)
            both = [ledger.append_nowait("p", 1, name, 10) for name in (b"a", b"b")]  # no file has been made yet
            assert not any(each.committed.done() for each in both)
            await asyncio.gather(*(each.committed for each in both))
            assert "MainThread" not in disk.threads

    asyncio.run(scenario())
    assert blobs_on_disk(tmp_path) == [(1, b"a"), (2, b"b")]


def test_a_full_file_is_closed_and_followed_by_another_in_the_thread(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path, rotate_bytes=1) as ledger:
            disk = SlowDisk(ledger)
            for number in range(4):
                await ledger.append_nowait("p", 1, b"x", 10 + number).committed
            assert disk.threads == ["spool-writer"] * 4
            assert ledger.statistics().files == 4

    asyncio.run(scenario())
    assert len(blobs_on_disk(tmp_path)) == 4


def test_of_many_rows_in_one_turn_the_first_is_written_there_and_the_others_together(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path) as ledger:
            await ledger.append_nowait("p", 1, b"file", 10).committed
            disk = SlowDisk(ledger)
            several = [ledger.append_nowait("p", 1, b"x", 11).committed for _ in range(50)]
            assert [each.done() for each in several] == [True, *[False] * 49]
            await asyncio.gather(*several)
            assert disk.threads[0] == "MainThread"
            assert set(disk.threads[1:]) == {"spool-writer"}
            assert len(disk.threads) < 30

    asyncio.run(scenario())
    assert [seq for seq, _ in blobs_on_disk(tmp_path)] == list(range(1, 52))


def test_what_must_reach_the_disk_itself_is_the_threads(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path, tier="node") as ledger:
            disk = SlowDisk(ledger)
            for _ in range(3):
                await ledger.append_nowait("p", 1, b"x", 10).committed
            assert disk.threads == ["spool-writer"] * 3

    asyncio.run(scenario())


def test_a_commit_that_fails_in_the_callers_thread_breaks_the_ledger_as_in_the_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_ledger(tmp_path) as ledger:
            await ledger.append_nowait("p", 1, b"file", 10).committed
            spool, good = ledger._spool, ledger._spool.write  # type: ignore[union-attr]
            spool.write = Mock(side_effect=OSError("the disk is gone"))  # type: ignore[method-assign, union-attr]
            with pytest.raises(LedgerBroken, match="the disk is gone"):
                await ledger.append_nowait("p", 1, b"lost", 11).committed
            spool.write = good  # type: ignore[method-assign, union-attr]
            await until(lambda: ledger.accepting)
            appended = ledger.append_nowait("p", 1, b"again", 12)
            assert appended.first_seq == 2
            await appended.committed

    asyncio.run(scenario())
    assert blobs_on_disk(tmp_path) == [(1, b"file"), (2, b"again")]
