"""Parquet exports of a real stream, read back as their users do."""

from __future__ import annotations

import fcntl
import json
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import redis

from surefoot import export_schema
from surefoot.entries import Spec
from surefoot.export import ExportError, Report, export_transitions
from surefoot.export_parquet import ParquetDirectory
from surefoot.rows import GroupReader, RangeReader, Stretch
from surefoot.spaces import Space
from tests.surefoot.stream_entries import MULTI, POINT, RECORD, add, changed, key, state
from tests.surefoot.valkey import Valkey
from tests.waiting import until

DAY_MS = 24 * 3600 * 1000


def export(valkey: Valkey, policy: str, out: Path, **options: Any) -> Report:
    return export_transitions(policy, "parquet", out, redis_url=valkey.url, **options)


def read(out: Path) -> pa.Table:
    return ds.dataset(out, partitioning="hive").to_table()


def ids(out: Path) -> list[str]:
    return sorted(read(out)["id"].to_pylist())


def expected(numbers: range | list[int]) -> list[str]:
    return [f"{n:060x}" for n in numbers]


def files(out: Path) -> list[Path]:
    return sorted(out.rglob("*.parquet"))


def test_partitions_are_discovered_and_every_transition_is_there_once(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, range(7))
    add(store, policy, range(7, 10), t=DAY_MS + 5, record={"version": "v 3/b"})
    report = export(valkey, policy, tmp_path, batch_size=4)
    assert (report.read, report.written, report.files, report.gaps) == (10, 10, 4, [])
    found = read(tmp_path)
    assert sorted(found["id"].to_pylist()) == expected(range(10))
    assert set(found["policy"].to_pylist()) == {policy}
    later = found.filter(pa.compute.equal(found["version"], "v 3/b"))
    assert (later.num_rows, set(later["day"].to_pylist())) == (3, {"1970-01-02"})


def test_discrete_rows_hold_every_column_exactly(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    from service.decision import RewardRecord, encode_record

    brought = encode_record(RewardRecord(metrics={"cost": 0.1, "clicks": 2.0}))
    add(store, policy, [3], a=1, rd=brought, ri="r1", record={"context": {"hour": 10}, "rules": ("cap",)})
    export(valkey, policy, tmp_path)
    (row,) = read(tmp_path).to_pylist()
    assert row["state"] == [3.0, 4.0, 5.0, 6.0]
    assert row["next_state"] == [4.0, 5.0, 6.0, 7.0]
    assert (row["action"], row["action_factors"], row["action_point"]) == (1, None, None)
    assert (row["mask"], row["next_mask"], row["nvec"]) == ([True, True], [True, False], [2])
    assert (row["behaviour"], row["target"]) == ([0.99, 0.01], [1.0, 0.0])
    assert (row["propensity"], row["log_propensity"]) == (0.99, math.log(0.99))
    assert (row["reward"], row["join"], row["reward_delay_ms"], row["reward_id"]) == (3.0, "joined", 50.0, "r1")
    assert dict(row["metrics"]) == {"cost": 0.1, "clicks": 2.0}
    assert json.loads(row["context"]) == {"hour": 10}
    assert row["rules"] == ["cap"]
    assert (row["episode"], row["step"], row["at"].timestamp()) == ("episode", 3, 1.003)
    assert (row["producer"], row["epoch"], row["seq"]) == ("w0", 1, 6)
    assert [row[name] for name in ("end", "bootstrap", "terminated", "order")] == ["none", True, False, "step"]
    assert [row[name] for name in ("box_low", "raw_action", "at_bound", "transform")] == [None] * 4
    assert row["assigned_version"] == "v2"
    assert row["epsilon"] == 0.02


def test_the_other_kinds_of_action_fit_the_same_columns(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, [0])
    add(store, policy, [1], **MULTI)
    add(store, policy, [2], **POINT)
    add(store, policy, [3], **changed(POINT, n=b"", nm=b"", x="lost", b=0, record={"bounds": b""}))
    export(valkey, policy, tmp_path)
    rows = sorted(read(tmp_path).to_pylist(), key=lambda row: row["id"])
    assert [row["action_kind"] for row in rows] == ["discrete", "multi_discrete", "continuous", "continuous"]
    assert (rows[1]["action"], rows[1]["action_factors"], rows[1]["proposed_factors"]) == (None, [2, 0], [1, 0])
    assert json.loads(rows[1]["action_name"]) == ["far", "off"]
    assert rows[2]["action_point"] == [0.5, -0.25]
    assert (rows[2]["box_low"], rows[2]["box_high"]) == ([-1.0, -0.25], [1.0, math.inf])
    assert (rows[2]["bounds_low"], rows[2]["next_box_high"]) == ([-1.0, -math.inf], [0.5, 1.0])
    assert (rows[2]["propensity"], rows[2]["log_propensity"], rows[2]["mask"]) == (None, -1.75, None)
    assert (rows[2]["raw_action"], rows[2]["at_bound"]) == ([0.5, -3.0], [0, -1])
    assert (rows[3]["next_state"], rows[3]["next_box_low"], rows[3]["bounds_low"]) == (None, None, None)


@pytest.mark.parametrize("join", ["void", "quarantined", "of the future"])
def test_a_join_state_without_a_usable_reward_gives_null(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, join: str
) -> None:
    add(store, policy, [0], j=join, r="" if join != "of the future" else "7.5")
    export(valkey, policy, tmp_path)
    (row,) = read(tmp_path).to_pylist()
    assert (row["join"], row["reward"]) == (join, None)


def test_images_are_kept_as_bytes_with_their_shape(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    image = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    add(store, policy, [0], s=image.tobytes(), n=b"", record={"dtype": "|u1", "shape": (2, 3, 4)})
    export(valkey, policy, tmp_path)
    found = ds.dataset(tmp_path, partitioning="hive")
    field = found.schema.field("state")
    assert (field.type, field.metadata) == (pa.binary(), {b"shape": b"2,3,4", b"dtype": b"uint8"})
    (row,) = found.to_table().to_pylist()
    shape = tuple(map(int, field.metadata[b"shape"].split(b",")))
    np.testing.assert_array_equal(np.frombuffer(row["state"], np.uint8).reshape(shape), image)
    assert row["next_state"] is None


@pytest.mark.parametrize(("dtype", "value"), [("<f8", 0.1), ("<i4", 7), ("|b1", True), (">f4", 0.5), ("|u1", 9)])
def test_elements_of_a_state_keep_their_type(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, dtype: str, value: Any
) -> None:
    add(store, policy, [0], s=np.array([value] * 4, dtype).tobytes(), n=b"", record={"dtype": dtype})
    export(valkey, policy, tmp_path)
    assert read(tmp_path).to_pylist()[0]["state"] == [value] * 4


def test_shapes_may_change_within_one_export(valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path) -> None:
    add(store, policy, [0])
    add(store, policy, [1], s=state(1, 2), n=state(2, 2), record={"shape": (2,)})
    export(valkey, policy, tmp_path)
    assert sorted(map(len, read(tmp_path)["state"].to_pylist())) == [2, 4]
    assert len(files(tmp_path)) == 2


def test_a_directory_in_use_is_refused_and_append_adds_what_is_new(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, range(5))
    export(valkey, policy, tmp_path, batch_size=2)
    with pytest.raises(ExportError, match="append"):
        export(valkey, policy, tmp_path)
    add(store, policy, range(5, 9))
    report = export(valkey, policy, tmp_path, batch_size=3, append=True)
    assert (report.read, report.already_there, report.written) == (9, 5, 4)
    assert ids(tmp_path) == expected(range(9))


def test_a_group_is_acknowledged_and_the_next_run_goes_on(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    grouped: dict[str, Any] = {"group": "lake", "consumer": "a", "batch_size": 3}
    add(store, policy, range(7))
    assert export(valkey, policy, tmp_path, **grouped).written == 7
    assert store.xpending(key(policy), "lake")["pending"] == 0
    add(store, policy, range(7, 9))
    report = export(valkey, policy, tmp_path, **grouped)
    assert (report.read, report.written) == (2, 2)
    assert ids(tmp_path) == expected(range(9))


def test_what_was_written_but_not_acknowledged_is_not_written_again(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, policy, range(6))
    with monkeypatch.context() as patched:
        patched.setattr(GroupReader, "ack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(valkey, policy, tmp_path, group="lake", consumer="a", batch_size=4)
    # Another consumer takes over with other batches: some of its rows are in a file, some are not.
    report = export(valkey, policy, tmp_path, group="lake", consumer="b", claim_idle_s=0.001, batch_size=3)
    assert (report.written, report.already_there) == (2, 4)
    assert ids(tmp_path) == expected(range(6))
    assert store.xpending(key(policy), "lake")["pending"] == 0


def test_a_consumer_that_was_slow_finds_its_rows_written_by_another(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, range(6))
    terms: dict[str, Any] = {"start": None, "batch_size": 6, "wait_s": 0.0, "claim_idle_s": 60.0}
    slow = GroupReader(policy, valkey.url, "lake", "slow", **terms)
    (held, *_) = slow.chunks()
    export(valkey, policy, tmp_path, group="lake", consumer="quick", claim_idle_s=0.001, batch_size=4)
    report = Report(policy, "parquet", str(tmp_path))
    with closing(ParquetDirectory(tmp_path, report, append=True)) as directory:
        directory.write(held.rows)
    assert (report.written, report.already_there) == (0, 6)
    assert ids(tmp_path) == expected(range(6))


def test_files_are_compared_and_named_under_the_lock(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    add(store, policy, range(3))
    export(valkey, policy, tmp_path / "other")
    (made,) = files(tmp_path / "other")
    out, report = tmp_path / "out", Report(policy, "parquet", "out")
    (chunk,) = RangeReader(policy, valkey.url, Stretch(), 10, retry_for_s=0.0).chunks()
    with closing(ParquetDirectory(out, report, append=True)) as directory, ThreadPoolExecutor() as pool:
        lock = out / ".surefoot" / "lock"
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            written = pool.submit(directory.write, chunk.rows)
            waiter = re.compile(rf"-> FLOCK .*:{lock.stat().st_ino} ")
            until(lambda: waiter.search(Path("/proc/locks").read_text()), "somebody who waits for the lock")
            place = out / made.relative_to(tmp_path / "other").parent
            place.mkdir(parents=True)
            shutil.copy(made, place / made.name)
        written.result()
    assert (report.written, report.already_there) == (0, 3)
    assert ids(out) == expected(range(3))


def test_copies_are_dropped_and_counted(valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path) -> None:
    add(store, policy, [0, 1, 1, 0, 2])
    report = export(valkey, policy, tmp_path)
    assert (report.read, report.copies) == (3, 2)
    assert ids(tmp_path) == expected(range(3))


def test_what_a_killed_export_left_unfinished_is_removed(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    left = tmp_path / ".surefoot" / "deadbeef"
    left.mkdir(parents=True)
    (left / "unfinished").write_bytes(b"PAR1")
    add(store, policy, [0])
    export(valkey, policy, tmp_path)
    assert [each.name for each in (tmp_path / ".surefoot").iterdir()] == ["lock"]


def test_the_files_can_be_read_by_pandas_and_duckdb(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    pandas, duckdb = pytest.importorskip("pandas"), pytest.importorskip("duckdb")
    add(store, policy, range(6))
    export(valkey, policy, tmp_path, batch_size=4)
    frame = pandas.read_parquet(tmp_path)
    assert sorted(frame["reward"]) == [0, 1, 2, 3, 4, 5]
    assert frame["state"].iloc[0].dtype == np.float32
    pattern = f"{tmp_path}/**/*.parquet"
    with duckdb.connect() as connection:
        found = connection.execute(
            "SELECT version, count(*), sum(reward) FROM read_parquet(?, hive_partitioning = true) GROUP BY version",
            [pattern],
        ).fetchall()
    assert found == [("v2", 6, 15.0)]


def test_the_page_names_the_columns_with_their_types() -> None:
    page = (Path(export_schema.__file__).parents[1] / "docs" / "exports.md").read_text()
    written = re.findall(r"^\| `([a-z_]+)` \| `([^`]+)` \|", page, re.MULTILINE)
    schema = export_schema.schema(Spec(RECORD.dtype, (4,), Space("discrete", (2,))), {})
    columns = [(field.name, str(field.type).replace("element: ", "")) for field in schema]
    assert written == columns
