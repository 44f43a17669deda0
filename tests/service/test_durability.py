"""What each tier keeps on this machine: in the page cache, or on disk; and how long what was set aside stays."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from service.adoption import DISCARD_EVERY_S
from service.clock import ManualClock
from service.leftovers import KEEP_BYTES, KEEP_S, discard
from service.rejects import set_aside
from service.salvage import log_of
from service.shipcall import Confirm
from service.slots import take_slot
from service.spool_file import Row, SpoolFile, rebuild
from tests.service.pagecache import unwritten_pages
from tests.service.test_ledger import blobs_on_disk, open_ledger

NOW_MS = 1_800_000_000_000

# Power loss


async def unwritten_after_commits(data_dir: Path, commits: int, **options: Any) -> list[int | None]:
    """Commit rows one by one. Gives how many pages of the spool's files were not on disk after each."""
    found = []
    async with open_ledger(data_dir, **options) as ledger:
        for k in range(commits):
            await ledger.append_nowait("p", 1, b"%d" % k + bytes(3000), 1).committed
            files = [path for path in (data_dir / "spool" / "slot-0").glob("*.db*") if not path.name.endswith("-shm")]
            pages = [unwritten_pages(path) for path in files]
            found.append(None if None in pages else sum(each or 0 for each in pages))
    return found


@pytest.mark.parametrize("rotate_bytes", [64 << 20, 20_000], ids=["one file", "many files"])
def test_in_tier_node_every_commit_is_on_disk_before_it_is_told(tmp_path: Path, rotate_bytes: int) -> None:
    unwritten = asyncio.run(unwritten_after_commits(tmp_path, 20, tier="node", rotate_bytes=rotate_bytes))
    if None in unwritten:
        pytest.skip("this kernel does not tell what is on disk (cachestat)")
    assert unwritten == [0] * 20
    assert [seq for seq, _ in blobs_on_disk(tmp_path)] == list(range(1, 21))


def test_in_tier_process_it_is_not(tmp_path: Path) -> None:
    """That the test above can fail: without an fsync there is something to see."""
    unwritten = asyncio.run(unwritten_after_commits(tmp_path, 20))
    if None in unwritten:
        pytest.skip("this kernel does not tell what is on disk (cachestat)")
    assert any(unwritten)


def test_a_copy_of_what_is_on_disk_has_every_acknowledged_row(tmp_path: Path) -> None:
    """A power loss leaves the files without the shared-memory index, and without anybody having closed them."""

    async def scenario() -> None:
        async with open_ledger(tmp_path / "data", tier="node", rotate_bytes=50_000) as ledger:
            for k in range(40):
                await ledger.append_nowait("p", 1, b"%d" % k + bytes(3000), 1).committed
            without = shutil.ignore_patterns("*-shm", "lock")
            shutil.copytree(tmp_path / "data", tmp_path / "after", ignore=without)

    asyncio.run(scenario())
    kept = {blob.strip(b"\0"): seq for seq, blob in blobs_on_disk(tmp_path / "after")}
    assert kept == {b"%d" % k: k + 1 for k in range(40)}


def test_a_rebuilt_file_is_on_disk_before_it_takes_the_damaged_ones_place(tmp_path: Path) -> None:
    file = SpoolFile.create(tmp_path / "1-1.db")
    for k in range(20):
        file.write([(0, Row("p", k + 1, 1, 5, b"x" * 500))])
    shutil.copytree(tmp_path, tmp_path / "copy")
    file.close()
    path = tmp_path / "copy" / "1-1.db"
    log = bytearray(log_of(path).read_bytes())
    log[len(log) // 2] ^= 1
    log_of(path).write_bytes(log)
    assert rebuild(path)
    assert unwritten_pages(path) in (0, None)


def test_the_ledger_takes_every_tier_and_keeps_rows_in_all_but_memory(tmp_path: Path) -> None:
    async def scenario(tier: str, confirm: Confirm | None) -> None:
        async with open_ledger(tmp_path / tier, tier=tier, confirm=confirm) as ledger:
            ledger.append_nowait("p", 1, b"row", 1)

    for tier, confirm in (("process", None), ("node", None), ("replicated", Confirm(1, 1.0))):
        asyncio.run(scenario(tier, confirm))
        assert blobs_on_disk(tmp_path / tier) == [(1, b"row")]


# What was set aside


def aged(path: Path, age_s: float, size: int = 10) -> Path:
    path.write_bytes(b"")
    os.truncate(path, size)
    os.utime(path, (NOW_MS / 1000 - age_s,) * 2)
    return path


def test_old_leftovers_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    old = [aged(tmp_path / name, KEEP_S + 1) for name in ("1-1.db.corrupt", "1-1.db-wal.corrupt", "2-1.db.rebuilt")]
    old.append(aged(tmp_path / "rejected.db", KEEP_S + 1))
    young = aged(tmp_path / "1-2.db.corrupt", KEEP_S - 1)
    spool = [aged(tmp_path / name, KEEP_S * 9) for name in ("1-3.db", "1-3.db-wal", "1-3.db-shm", "epoch", "lock")]
    assert discard(tmp_path, NOW_MS) == len(old)
    assert not [path for path in old if path.exists()]
    assert all(path.exists() for path in (young, *spool))
    assert discard(tmp_path, NOW_MS) == 0


def test_too_much_is_cut_from_the_oldest_on(tmp_path: Path) -> None:
    sizes = {"a.corrupt": 300.0, "rejected-1.db": 200.0, "b.corrupt": 100.0}
    files = [aged(tmp_path / name, age_s, KEEP_BYTES // 2) for name, age_s in sizes.items()]
    assert discard(tmp_path, NOW_MS) == 1
    assert [path.exists() for path in files] == [False, True, True]


def test_a_file_of_refused_rows_that_has_grown_makes_room_for_another(tmp_path: Path) -> None:
    for seq in range(1, 9):
        set_aside(tmp_path, "w", 1, Row("p", seq, 1, 5, os.urandom(9_000)), "no reason", rotate_bytes=30_000)
    assert len(list(tmp_path.glob("rejected-*.db"))) == 2
    assert (tmp_path / "rejected.db").exists()


def test_a_ledger_discards_what_is_old_in_its_own_slot_and_in_dead_ones(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = ManualClock(NOW_MS)
        other = take_slot(tmp_path)
        async with open_ledger(tmp_path, clock=clock) as ledger:
            slots = [tmp_path / "spool" / f"slot-{n}" for n in range(2)]
            files = [aged(slot / "1-1.db.corrupt", KEEP_S + 1) for slot in slots]
            await ledger.tidy()
            assert [path.exists() for path in files] == [True, False], "who runs in the other looks after it"
            assert ledger.statistics().discarded_files == 1
            other.release()
            await ledger.tidy()
            assert files[0].exists(), "not at every turn"
            clock.advance(int(DISCARD_EVERY_S * 1000))
            await ledger.tidy()
            assert not files[0].exists()
            assert ledger.statistics().discarded_files == 2
            again = take_slot(tmp_path)
            assert again.number == other.number, "it is free again"
            again.release()

    asyncio.run(scenario())
