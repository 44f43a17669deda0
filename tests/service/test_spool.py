"""The spool keeps what it committed, reads it back in order, and gives up no more than what was damaged."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.errors import ConfigError
from service.carve import FRAME, PAGE
from service.salvage import examine, log_of
from service.slots import Slot, abandoned_slots, hold_free_slot, take_slot
from service.spool import Damage, Spool
from service.spool_file import Row, SpoolFile

AT_MS = 1_800_000_000_000
EVERYTHING = 1 << 30


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[Slot]:
    slot = take_slot(tmp_path)
    yield slot
    slot.release()


def make_rows(policy: str, sizes: list[int], first: int = 1, seed: int = 1) -> list[Row]:
    chance = random.Random(seed)
    rows = []
    for size in sizes:
        count = chance.randint(1, 5)
        rows.append(Row(policy, first, count, AT_MS + first, chance.randbytes(size)))
        first += count
    return rows


def read_all(spool: Spool, policy: str, seq: int = 1) -> list[Row]:
    return spool.read(policy, seq, EVERYTHING, EVERYTHING, EVERYTHING)


def written(slot: Slot, rows: list[Row]) -> Path:
    """Write each row in a commit of its own, close, and return the file."""
    spool = Spool(slot.path, slot.producer, slot.epoch)
    for row in rows:
        spool.write([row])
    spool.close()
    return slot.path / f"{slot.epoch}-1.db"


def reopened(slot: Slot) -> Spool:
    return Spool.reopen(slot, slot.epoch)


# Slots


def test_workers_get_different_slots_of_one_producer(tmp_path: Path) -> None:
    first, second = take_slot(tmp_path), take_slot(tmp_path)
    assert (first.number, second.number) == (0, 1)
    assert first.producer.split(".") == [(tmp_path / "producer").read_text(), "0"]
    assert second.producer == first.producer.replace(".0", ".1")
    first.release()
    again = take_slot(tmp_path)
    assert (again.number, again.producer, again.epoch) == (0, first.producer, first.epoch + 1)
    again.release()
    second.release()


@pytest.mark.parametrize("damage", [None, "", "seven"])
def test_a_lost_epoch_number_never_leads_to_an_epoch_used_before(tmp_path: Path, damage: str | None) -> None:
    slot = take_slot(tmp_path)
    slot.release()
    if damage is None:
        (slot.path / "epoch").unlink()
    else:
        (slot.path / "epoch").write_text(damage)
    again = take_slot(tmp_path)
    assert again.epoch > 1_000_000
    again.release()


def test_a_damaged_host_id_is_refused(tmp_path: Path) -> None:
    (tmp_path / "producer").write_text("not hex")
    with pytest.raises(ConfigError):
        take_slot(tmp_path)


def test_only_slots_with_files_and_without_a_worker_are_abandoned(tmp_path: Path) -> None:
    slots = [take_slot(tmp_path) for _ in range(3)]
    for slot in slots[:2]:
        written(slot, make_rows("p", [10]))
    slots[1].release()
    slots[2].release()
    assert abandoned_slots(tmp_path) == {1}
    assert hold_free_slot(tmp_path, 0) is None
    assert hold_free_slot(tmp_path, 9) is None
    slots[0].release()


# Writing and reading


def test_rows_of_several_policies_come_back_in_order(slot: Slot) -> None:
    spool = Spool(slot.path, slot.producer, slot.epoch)
    a, b = make_rows("a", [100, 9000, 0, 5]), make_rows("über", [1, 20_000])
    spool.write([a[0], b[0], a[1]])
    spool.write([b[1], *a[2:]])
    assert read_all(spool, "a") == a
    assert read_all(spool, "über") == b
    assert read_all(spool, "nobody") == []
    spool.close()
    again = reopened(slot)
    assert {policy: (span.first, span.end) for policy, span in again.spans().items()} == {
        "a": (1, a[-1].end),
        "über": (1, b[-1].end),
    }
    assert read_all(again, "a") == a
    assert again.damage == Damage()
    again.close()


def test_reading_begins_at_the_row_that_holds_the_seq_and_keeps_its_limits(slot: Slot) -> None:
    spool = Spool(slot.path, slot.producer, slot.epoch)
    rows = [Row("p", 1 + 10 * k, 10, AT_MS, bytes(100)) for k in range(20)]
    spool.write(rows)
    assert spool.read("p", 15, EVERYTHING, 25, EVERYTHING) == rows[1:3]
    assert spool.read("p", 11, EVERYTHING, EVERYTHING, 350) == rows[1:4]
    assert spool.read("p", 11, EVERYTHING, 1, 1) == rows[1:2]
    assert spool.read("p", 181, 191, EVERYTHING, EVERYTHING) == rows[18:19]
    assert spool.read("p", 201, EVERYTHING, 1, 1) == []
    spool.close()


def test_files_rotate_and_are_deleted_once_shipped_and_old(slot: Slot) -> None:
    spool = Spool(slot.path, slot.producer, slot.epoch, rotate_bytes=100_000, keep_s=120)
    rows = make_rows("p", [20_000] * 20)
    for row in rows:
        spool.write([row])
    files = spool.files
    assert files > 3
    assert read_all(spool, "p") == rows
    assert spool.expire({}, 1000.0) == 0
    half = rows[10].first_seq
    assert spool.expire({"p": half}, 1000.0) == 0, "shipped, not old"
    assert spool.expire({"p": 1}, 1100.0) == 0, "Redis lost it all: to be shipped again"
    assert spool.expire({"p": half}, 1150.0) == 0
    assert spool.expire({"p": half}, 1269.0) == 0
    assert spool.expire({"p": half}, 1270.0) > 0
    assert read_all(spool, "p", half) == rows[10:]
    spool.expire({"p": rows[-1].end}, 1300.0)
    spool.expire({"p": rows[-1].end}, 1500.0)
    assert spool.files <= 1, "only the one being written"
    assert len([path for path in slot.path.iterdir() if ".db" in path.name]) <= 3
    spool.close()


def test_shipped_files_are_deleted_early_when_they_are_too_many(slot: Slot) -> None:
    spool = Spool(slot.path, slot.producer, slot.epoch, rotate_bytes=100_000, keep_bytes=250_000)
    rows = make_rows("p", [20_000] * 40)
    for row in rows:
        spool.write([row])
    spool.expire({"p": rows[-1].end}, 0.0)
    kept = sum(path.stat().st_size for path in slot.path.glob("*.db*") if not path.name.endswith("-shm"))
    assert kept <= 250_000 + 130_000
    assert read_all(spool, "p")[-1] == rows[-1]
    spool.close()


def test_a_later_file_wins_where_two_hold_the_same_seqs(slot: Slot) -> None:
    spool = Spool(slot.path, slot.producer, slot.epoch)
    spool.write([Row("p", 1, 2, AT_MS, b"kept"), Row("p", 3, 2, AT_MS, b"ghost")])
    spool.start_new_file()
    spool.write([Row("p", 3, 1, AT_MS, b"right")])
    for again in (spool, reopened(slot)):
        assert [row.blob for row in read_all(again, "p")] == [b"kept", b"right"]
        again.close()


# Damage


def test_a_log_cut_anywhere_keeps_all_rows_before_the_cut(slot: Slot) -> None:
    rows = make_rows("p", [300, 5000, 40, 12_000, 700, 90])
    path = written(slot, rows)
    log = log_of(path).read_bytes()
    sizes = []  # of the log after each commit
    chance = random.Random(5)
    cuts = sorted({*range(32, len(log), FRAME), *(chance.randrange(len(log)) for _ in range(150)), 0, 31, len(log)})
    intact = dict.fromkeys(cuts, 0)
    for cut in cuts:
        shutil.rmtree(slot.path / "cut", ignore_errors=True)
        (slot.path / "cut").mkdir()
        copy = Path(shutil.copy(path, slot.path / "cut"))
        log_of(copy).write_bytes(log[:cut])
        spool = Spool.reopen(Slot(slot.path / "cut", 0, "x.0", 0, -1), slot.epoch)
        found = read_all(spool, "p")
        assert found == rows[: len(found)], f"cut at {cut}"
        assert spool.damage.rows == spool.damage.files == 0, f"cut at {cut}"
        intact[cut] = len(found)
        sizes.append(len(found))
        spool.close()
    assert sizes == sorted(sizes)
    assert intact[len(log)] == len(rows)
    # Exact: a row is there from the cut at which SQLite itself says that its commit is whole.
    commits = [32 + k * FRAME + FRAME for k in range((len(log) - 32) // FRAME) if any(log[32 + k * FRAME + 4 :][:4])]
    ends = commits[-len(rows) :]
    assert all(count == sum(end <= cut for end in ends) for cut, count in intact.items())


def test_flipped_bytes_in_blobs_cost_exactly_their_rows(slot: Slot) -> None:
    rows = make_rows("p", [6000] * 30)
    path = written(slot, rows)
    log = bytearray(log_of(path).read_bytes())
    for victim in (0, 7, 8, 29):
        position = log.find(rows[victim].blob[3000:3016])
        assert position > 0
        log[position + 3] ^= 0x40
    log_of(path).write_bytes(log)
    spool = reopened(slot)
    assert read_all(spool, "p") == [row for k, row in enumerate(rows) if k not in (0, 7, 8, 29)]
    assert spool.damage == Damage(rows=4, files=1)
    assert read_all(spool, "p", rows[8].first_seq) == [row for k, row in enumerate(rows) if k > 8 and k != 29]
    assert spool.damage == Damage(rows=4, files=1), "the same damage is counted once"
    assert spool.spans()["p"].end == rows[-1].end
    spool.close()


def test_flipped_bytes_anywhere_never_raise_and_never_invent_a_row(slot: Slot) -> None:
    rows = make_rows("p", [100] * 200) + make_rows("q", [3000] * 20)
    path = written(slot, rows)
    log, start = log_of(path).read_bytes(), path.read_bytes()
    chance = random.Random(11)
    lost = []
    for turn in range(200):
        broken = bytearray(log)
        at = 32 + chance.randrange(len(log) - 32) if turn else chance.randrange(32)
        broken[at] ^= 1 << chance.randrange(8)
        path.write_bytes(start)
        log_of(path).write_bytes(broken)
        spool = reopened(slot)
        found = read_all(spool, "p") + read_all(spool, "q")
        assert set(map(hash_of, found)) <= set(map(hash_of, rows))
        damage = spool.damage
        missing = len(rows) - len(found)
        assert not missing or damage != Damage(), f"{missing} rows vanished without a trace (byte {at})"
        lost.append(missing)
        spool.close()
        for aside in slot.path.glob("*.corrupt"):
            aside.unlink()
    assert max(lost) <= 1, "SQLite alone would lose all that follows the byte"
    assert lost.count(0) > 100, "most rows stand in several versions of their page"


def hash_of(row: Row) -> int:
    return hash((row.policy, row.first_seq, row.count, row.at_ms, row.blob))


def test_a_damaged_log_header_costs_nothing(slot: Slot) -> None:
    rows = make_rows("p", [500] * 5)
    path = written(slot, rows)
    log = log_of(path)
    log.write_bytes(os.urandom(32) + log.read_bytes()[32:])
    assert examine(path).damaged
    spool = reopened(slot)
    assert read_all(spool, "p") == rows
    assert spool.damage == Damage(files=1)
    spool.close()


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_a_cut_database_gets_its_first_page_back_from_the_log(slot: Slot, keep: int) -> None:
    rows = make_rows("p", [500] * 5)
    path = written(slot, rows)
    path.write_bytes(path.read_bytes()[:keep])
    spool = reopened(slot)
    assert read_all(spool, "p") == rows
    spool.close()


def test_a_file_that_is_no_database_is_set_aside_and_counted(slot: Slot) -> None:
    rows = make_rows("p", [500] * 5)
    written(slot, rows)
    (slot.path / f"{slot.epoch}-2.db").write_bytes(b"something else entirely" * 500)
    spool = reopened(slot)
    assert spool.damage == Damage(files=1)
    assert read_all(spool, "p") == rows
    assert [path.name for path in slot.path.glob("*.corrupt")] == [f"{slot.epoch}-2.db.corrupt"]
    spool.close()
    again = reopened(slot)
    assert again.damage == Damage()
    again.close()


def test_a_file_killed_while_it_was_made_is_no_damage(slot: Slot) -> None:
    (slot.path / f"{slot.epoch}-1.db").write_bytes(b"")
    spool = reopened(slot)
    assert (spool.files, spool.damage) == (0, Damage())
    assert not list(slot.path.glob("*.db*"))


def test_closing_and_deleting_copy_nothing_into_the_database(slot: Slot) -> None:
    path = written(slot, make_rows("p", [5000] * 50))
    assert path.stat().st_size == PAGE
    assert log_of(path).stat().st_size > 250_000
    file = SpoolFile.reopen(path)
    file.delete()
    assert not list(slot.path.glob("*.db*"))
