"""What an export is asked, what it reads, and the commands that ask it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner, Result

from service.cli import app
from surefoot import Unreachable
from surefoot.export import ExportError, Report, export_transitions
from surefoot.export_dsjson import DsjsonFile
from surefoot.export_minari import MinariDirectory
from surefoot.rows import RangeReader, Stretch, bound
from tests.surefoot.stream_entries import add, key
from tests.surefoot.valkey import LossyProxy, Valkey


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["transitions", *map(str, arguments)])


def steps(valkey: Valkey, policy: str, first: str | None = None, last: str | None = None, **options: Any) -> list[int]:
    given: dict[str, Any] = {"batch_size": 100, "retry_for_s": 0.0, **options}
    reader = RangeReader(policy, valkey.url, Stretch(first, last), **given)
    return [row.step for chunk in reader.chunks() for row in chunk.rows]


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("1700000000123-4", "1700000000123-4", "1700000000123-4"),
        ("1700000000123", "1700000000123", "1700000000123"),
        ("2023-11-14T22:13:20Z", "1700000000000-0", "1700000000000"),
        ("2023-11-14T22:13:20.5", "1700000000500-0", "1700000000500"),
        ("2023-11-15T00:13:20+02:00", "1700000000000-0", "1700000000000"),
        ("2023-11-14", "1699920000000-0", "1699920000000"),
    ],
)
def test_an_id_or_a_time_bounds_a_stretch(text: str, first: str, last: str) -> None:
    assert (bound(text, last=False), bound(text, last=True)) == (first, last)


def test_a_bound_that_is_neither_is_refused() -> None:
    with pytest.raises(ExportError, match="neither a stream id nor a time"):
        bound("yesterday", last=False)


def test_both_ends_of_a_stretch_belong_to_it(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    pipe = store.pipeline()
    from tests.surefoot.stream_entries import fields

    for n, stream_id in enumerate(("5-0", "5-1", "6-0", "7-0", "7-9", "8-0")):
        pipe.xadd(key(policy), fields(n), id=stream_id)  # type: ignore[arg-type]
    pipe.execute()
    assert steps(valkey, policy) == list(range(6))
    assert steps(valkey, policy, "5-1", "7-0") == [1, 2, 3]
    assert steps(valkey, policy, "6", "7") == [2, 3, 4]
    assert steps(valkey, policy, "1970-01-01T00:00:00.006", "1970-01-01T00:00:00.007") == [2, 3, 4]
    assert steps(valkey, policy, "9") == []


def test_a_stream_is_read_page_by_page_up_to_where_it_stood(
    valkey: Valkey, store: redis.Redis, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surefoot.rows._PAGE", 4)
    add(store, policy, range(8))
    found = []
    reader = RangeReader(policy, valkey.url, Stretch(), 3, retry_for_s=0.0)
    for chunk in reader.chunks():
        found.append([row.step for row in chunk.rows])
        add(store, policy, [100 + len(found)])
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_trim_while_reading_is_noticed(
    valkey: Valkey, store: redis.Redis, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surefoot.rows._PAGE", 2)
    ids = add(store, policy, range(8))
    reader = RangeReader(policy, valkey.url, Stretch(), 2, retry_for_s=0.0)
    chunks = reader.chunks()
    next(chunks)
    store.xtrim(key(policy), minid=ids[1], approximate=False)  # of what was read
    assert [row.step for row in next(chunks).rows] == [2, 3]
    assert reader.losses.gaps == []
    store.xtrim(key(policy), minid=ids[6], approximate=False)
    assert [row.step for row in next(chunks).rows] == [6, 7]
    assert list(chunks) == []
    assert reader.losses.gaps == [
        f"the stream was trimmed while it was read: entries behind {ids[3].decode()} may be missing"
    ]


def test_large_states_make_small_chunks(
    valkey: Valkey, store: redis.Redis, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surefoot.rows._CHUNK_BYTES", 1)
    add(store, policy, range(3))
    reader = RangeReader(policy, valkey.url, Stretch(), 100, retry_for_s=0.0)
    assert [len(chunk.rows) for chunk in reader.chunks()] == [1, 1, 1]


def test_a_lost_reply_is_asked_for_again(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(3))
    proxy = LossyProxy(valkey.socket_path)
    try:
        proxy.lose = b"XRANGE"
        reader = RangeReader(policy, proxy.url, Stretch(), 100, retry_for_s=60.0)
        assert [row.step for chunk in reader.chunks() for row in chunk.rows] == [0, 1, 2]
        proxy.lose = b"XRANGE"
        with pytest.raises(Unreachable):
            list(RangeReader(policy, proxy.url, Stretch(), 100, retry_for_s=0.0).chunks())
    finally:
        proxy.close()


@pytest.mark.parametrize(
    ("wrong", "options"),
    [
        ("formats are", {"to": "csv"}),
        ("batch_size", {"batch_size": 0}),
        ("the name of its consumer", {"group": "g"}),
        ("the name of its consumer", {"consumer": "c"}),
        ("parquet only", {"to": "dsjson", "group": "g", "consumer": "c"}),
        ("leave out until", {"group": "g", "consumer": "c", "until": "5-0"}),
        ("no transitions of policy", {}),
    ],
)
def test_what_cannot_be_done_is_refused(
    valkey: Valkey, policy: str, tmp_path: Path, wrong: str, options: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"to": "parquet", "out": tmp_path / "out", "redis_url": valkey.url, **options}
    with pytest.raises(ExportError, match=wrong):
        export_transitions(policy, **given)


@pytest.mark.parametrize(("to", "missing"), [("parquet", "pyarrow"), ("minari", "minari"), ("minari", "PIL")])
def test_a_missing_library_names_the_extra(tmp_path: Path, to: str, missing: str) -> None:
    script = f"""
        import sys
        sys.modules[{missing!r}] = None  # as if it were not installed
        from surefoot.export import export_transitions
        try:
            export_transitions("p", {to!r}, {str(tmp_path / "x-v0")!r})
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{missing} is needed and missing: pip install 'surefoot[exports]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["dsjson", "minari"])
def test_two_exports_do_not_write_the_same_thing(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, to: str
) -> None:
    add(store, policy, [0])
    kind: Any = {"dsjson": DsjsonFile, "minari": MinariDirectory}[to]
    first = closing(kind(tmp_path / "x-v0", Report(policy, to, ""), append=False))
    with first, pytest.raises(ExportError, match="another export is writing"):
        export_transitions(policy, to, tmp_path / "x-v0", redis_url=valkey.url)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_group_can_begin_at_an_id(valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path) -> None:
    ids = add(store, policy, range(5))
    grouped: dict[str, Any] = {"redis_url": valkey.url, "group": "g", "consumer": "c"}
    report = export_transitions(policy, "parquet", tmp_path, from_=ids[2].decode(), **grouped)
    assert (report.written, report.first_id) == (3, ids[2].decode())


def test_a_gap_of_a_group_is_reported_and_the_export_goes_on(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    ids = add(store, policy, range(4))
    grouped: dict[str, Any] = {"redis_url": valkey.url, "group": "g", "consumer": "c"}
    export_transitions(policy, "parquet", tmp_path, **grouped)
    add(store, policy, range(4, 8))
    store.xtrim(key(policy), maxlen=1, approximate=False)
    report = export_transitions(policy, "parquet", tmp_path, **grouped)
    assert (report.written, len(report.gaps)) == (1, 1)
    assert "3 entries lost" in report.gaps[0]
    assert ids


def test_the_command_exports_and_prints_a_report(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    ids = add(store, policy, range(5))
    for to, out in (("parquet", "lake"), ("minari", "toy-v0"), ("dsjson", "x.dsjson")):
        done = run(
            "export", policy, "--to", to, "--out", tmp_path / out, "--until", ids[3].decode(), "--redis-url", valkey.url
        )
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert (report["format"], report["written"], report["last_id"]) == (to, 4, ids[3].decode())
        assert (tmp_path / out).exists()


def test_what_goes_wrong_is_one_line_and_exit_code_1(valkey: Valkey, policy: str, tmp_path: Path) -> None:
    done = run("export", policy, "--to", "csv", "--out", tmp_path / "x", "--redis-url", valkey.url)
    assert (done.exit_code, done.stderr) == (1, "surefoot: the formats are parquet, minari, dsjson, not 'csv'\n")
    done = run("stats", policy, "--redis-url", "unix:///nowhere/at/all.sock")
    assert done.exit_code == 1
    assert done.stderr.startswith("surefoot: Redis does not answer")


def test_the_command_describes_transitions(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(5))
    store.xgroup_create(key(policy), "trainers", "0")
    done = run("stats", policy, "--redis-url", valkey.url)
    assert done.exit_code == 0
    assert f"policy {policy}  transitions 5" in done.stdout
    assert "by.join:                   joined 5" in done.stdout
    assert "groups:                    name trainers" in done.stdout
    done = run("stats", policy, "--json", "--redis-url", valkey.url)
    assert json.loads(done.stdout)["reward"]["mean"] == 2.0


def test_tail_still_prints_lines(valkey: Valkey, store: redis.Redis, policy: str) -> None:
    add(store, policy, range(3))
    done = run("tail", policy, "--limit", 2, "--redis-url", valkey.url)
    assert [json.loads(line)["step"] for line in done.stdout.splitlines()] == [0, 1]
    assert run("tail", policy, "--count", "--redis-url", valkey.url).stdout == "3\n"
