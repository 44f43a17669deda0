"""The audit log: a chain that shows what was changed in it, and statements that no death of a process loses."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from policies.errors import AuditBroken, GenerationMoved, InvalidField
from service.audit import GENESIS, MAX_TEXT, Broken, Entry, Head, Statement, chain, check, clipped, line_of, verify
from service.audit_chain import APPEND, KEY, Chain
from service.audit_files import Line, Mirror, Segment, leftovers, read_segment
from service.audit_log import SYSTEM, AuditLog, Who, by_itself, noted
from service.clock import ManualClock, SystemClock
from service.metrics import Metrics
from service.redis_streams import RedisStreams, connect
from service.valkey import EmbeddedValkey
from tests.service.valkeys import SMALL

ME = Who("t-1", "ops", "10.0.0.1")


def statement(number: int, **fields: Any) -> Statement:
    given: dict[str, Any] = {"segment": "s", "number": number, "at_ms": 5, "actor": "a", "owner": "o", "address": ""}
    return Statement(**given | {"action": "deploy"} | fields)


def chained(count: int, head: Head = Head()) -> list[bytes]:  # noqa: B008
    lines = []
    for number in range(count):
        entry = chain(statement(number, policy="é ✓", before=number), head)
        head = Head(entry.seq, entry.hash)
        lines.append(line_of(entry))
    return lines


# -- The chain as values ----------------------------------------------------------------------------------------------


def test_a_chain_verifies_and_gives_its_head() -> None:
    lines = chained(5)
    last = json.loads(lines[-1])
    assert json.loads(lines[0])["prev_hash"] == GENESIS
    assert verify([]) == Head(0, GENESIS)
    assert verify(lines) == Head(5, last["hash"]) == verify(lines, Head(5, last["hash"]))


def test_the_hash_is_the_one_the_page_explains() -> None:
    from hashlib import sha256

    fields = json.loads(chained(2)[1])
    told = fields.pop("hash")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert sha256(text.encode()).hexdigest() == told


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_change_of_a_chain_is_found_where_it_begins(data: st.DataObject) -> None:
    lines = chained(6)
    at = data.draw(st.integers(0, 5))
    kind = data.draw(st.sampled_from(["field", "remove", "swap", "again", "rehash", "not json"]))
    fields = json.loads(lines[at])
    if kind == "field":
        name = data.draw(st.sampled_from(sorted(fields)))
        fields[name] = {"seq": 77, "before": 99}.get(name, "other")
        lines[at] = line_of(fields)
    elif kind == "rehash":  # somebody who changes an entry and its hash
        entry = chain(statement(99), Head(at, fields["prev_hash"]))
        lines[at] = line_of(entry)
        at += 1
    elif kind == "swap":
        at = min(at, 4)
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
    elif kind == "again":
        lines.insert(at, lines[at])
        at += 1
    elif kind == "not json":
        lines[at] = lines[at][: data.draw(st.integers(0, len(lines[at]) - 1))]
    else:
        del lines[at]
    if at == len(lines):  # the end is gone, or was written anew: what was noted down shows it
        with pytest.raises(Broken):
            verify(lines, Head(6, json.loads(chained(6)[5])["hash"]))
        return
    with pytest.raises(Broken) as broken:
        verify(lines)
    assert broken.value.seq == at + 1


def test_what_was_noted_down_must_stand_in_the_chain() -> None:
    lines = chained(4)
    with pytest.raises(Broken, match="ends before entry 5") as cut:
        verify(lines, Head(5, GENESIS))
    with pytest.raises(Broken, match="noted down") as other:
        verify(lines, Head(2, GENESIS))
    assert (cut.value.seq, other.value.seq) == (5, 2)


def test_names_of_any_length_are_shortened() -> None:
    assert clipped("x" * MAX_TEXT) == "x" * MAX_TEXT
    assert len(clipped("x" * 10_000)) == MAX_TEXT


# -- On disk ----------------------------------------------------------------------------------------------------------


def test_a_mirror_comes_back_as_it_was(tmp_path: Path) -> None:
    lines = chained(4)
    mirror = Mirror(tmp_path)
    mirror.append(lines, verify(lines))
    beside = Mirror(tmp_path)  # a worker that starts before the one before it has ended
    assert (mirror.path.name, beside.path.name) == ("chain-0.jsonl", "chain-1.jsonl")
    mirror.close()
    beside.close()
    again = Mirror(tmp_path)
    again.load()
    assert again.head == verify(lines)
    assert list(again.lines(1, 2)) == lines[1:3]
    assert again.hash_at(4) == again.head.hash
    assert again.hash_at(0) == GENESIS
    again.append(lines[2:], verify(lines))  # by somebody who was cancelled while it was written
    assert list(again.lines()) == lines
    assert (tmp_path / "chain-0.jsonl").stat().st_mode & 0o777 == 0o600
    again.close()


def test_a_line_cut_off_by_a_power_loss_is_dropped(tmp_path: Path) -> None:
    lines = chained(3)
    for cut in range(1, len(lines[2])):
        (tmp_path / "chain-0.jsonl").write_bytes(lines[0] + b"\n" + lines[1] + b"\n" + lines[2][:cut])
        mirror = Mirror(tmp_path)
        mirror.load()
        assert (mirror.head, mirror.broken) == (verify(lines[:2]), None)
        mirror.append(lines[2:], verify(lines))
        assert list(mirror.lines()) == lines
        mirror.close()


def test_a_damaged_mirror_is_kept_aside_and_goes_on_before_the_damage(tmp_path: Path) -> None:
    lines = chained(4)
    file = tmp_path / "chain-0.jsonl"
    whole = b"\n".join(lines).replace(b'"before":2', b'"before":7') + b"\n"
    file.write_bytes(whole)
    mirror = Mirror(tmp_path)
    mirror.load()
    assert mirror.head == verify(lines[:2])
    assert mirror.broken is not None
    assert mirror.broken.seq == 3
    (aside,) = tmp_path.glob("broken-3-*.jsonl")
    assert aside.read_bytes() == whole
    mirror.close()


def test_a_segment_tells_what_was_begun_and_what_was_done(tmp_path: Path) -> None:
    segment = Segment(tmp_path, "one")
    assert leftovers(tmp_path) == {}
    segment.append([Line(intent=statement(1)), Line(intent=statement(2))])
    segment.append([Line(done=statement(1, outcome="done"))])
    assert leftovers(tmp_path) == {}  # its worker lives
    segment.close(remove=False)
    with segment.path.open("ab") as file:
        file.write(b'{"done":{"segm')
    told = {segment.path: [statement(1, outcome="done"), statement(2)]}
    assert leftovers(tmp_path) == told
    assert told[segment.path][1].outcome == "unknown"


def test_a_living_segment_is_at_no_moment_taken_for_one_that_was_left(tmp_path: Path) -> None:
    stop, taken = threading.Event(), list[Path]()

    def look() -> None:
        while not stop.is_set():
            taken.extend(leftovers(tmp_path))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for number in range(200):
            segment = Segment(tmp_path, f"s{number}")
            segment.append([Line(done=statement(1))])
            segment.close(remove=True)
    finally:
        stop.set()
        looking.join()
    assert taken == []


def test_a_write_that_failed_spoils_no_later_one(tmp_path: Path) -> None:
    segment = Segment(tmp_path, "one")
    segment.append([Line(intent=statement(1))])
    os.write(os.open(segment.path, os.O_WRONLY | os.O_APPEND), b'{"intent":{"seg')
    segment._torn = True  # what `append` notes before it writes
    segment.append([Line(done=statement(1, outcome="done"))])
    assert read_segment(segment.path) == [statement(1, outcome="done")]
    segment.close(remove=True)
    assert not segment.path.exists()


# -- The log ----------------------------------------------------------------------------------------------------------


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(bounded())


def new_log(folder: Path, name: str = "me") -> AuditLog:
    log = AuditLog(folder, name, ManualClock())
    log.reachable = False  # nobody chains here
    return log


def test_a_change_is_on_disk_before_it_is_made_and_before_it_is_answered(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = new_log(tmp_path)
        path = tmp_path / "open" / "me.jsonl"
        async with log.change(ME, "deploy", "toy") as note:
            assert [each.outcome for each in read_segment(path)] == ["unknown"]
            note.moved(3, 4, "d1")
        (done,) = read_segment(path)
        assert (done.outcome, done.before, done.after, done.digest, done.actor) == ("done", 3, 4, "d1", "t-1")
        assert list(log.pending.values()) == [done]
        await log.aclose()

    run(scenario)


def test_a_refused_change_tells_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = new_log(tmp_path)
        for raised, outcome in (
            (GenerationMoved("x"), "generation_moved"),
            (InvalidField("x"), "invalid_field"),
            (ZeroDivisionError(), "internal"),
        ):
            with pytest.raises(type(raised)):
                async with log.change(ME, "deploy", "toy"):
                    raise raised
            assert list(log.pending.values())[-1].outcome == outcome
        await log.aclose()

    run(scenario)


def test_a_change_of_a_document_is_its_caller_s_or_the_service_s_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = new_log(tmp_path)
        async with log.change(ME, "deploy", "toy"):
            async with log.document("toy", 1, 2, "d2"):
                pass
            with by_itself("trip"):
                async with log.document("other", 7, 8, "d8") as note:
                    note.outcome = "generation_moved"
            noted().told("v1", "d3")
        async with log.document("toy", 2, 3, "d4"):
            pass
        found = [(e.actor, e.action, e.policy, e.before, e.after, e.outcome) for e in log.pending.values()]
        assert found == [
            ("system", "trip", "other", None, None, "generation_moved"),
            ("t-1", "deploy", "toy", 1, 2, "done"),
            ("system", "change", "toy", 2, 3, "done"),
        ]
        await log.aclose()

    run(scenario)


def test_changes_at_the_same_time_keep_their_notes_apart_and_share_the_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = new_log(tmp_path)

        async def change(number: int) -> None:
            async with log.change(Who(str(number)), "deploy", "toy"):
                await asyncio.sleep(0)
                async with log.document("toy", number, number + 1, ""):
                    await asyncio.sleep(0)

        await asyncio.gather(*(change(number) for number in range(50)))
        assert {each.actor: each.before for each in log.pending.values()} == {str(n): n for n in range(50)}
        assert len(read_segment(tmp_path / "open" / "me.jsonl")) == 50
        await log.aclose()

    run(scenario)


def test_without_a_disk_nothing_is_changed_but_a_halt(tmp_path: Path) -> None:
    (tmp_path / "open").write_text("a file where a folder should be")

    async def scenario() -> None:
        log, made = new_log(tmp_path), []
        with pytest.raises(AuditBroken):
            async with log.change(ME, "deploy", "toy"):
                made.append("deploy")
        with pytest.raises(AuditBroken):
            async with log.change(ME, "halt", "toy", urgent=True):
                made.append("halt")
        assert made == ["halt"]
        assert not log.pending
        (tmp_path / "open").unlink()
        await log.record(SYSTEM, "trip")
        assert [each.action for each in read_segment(tmp_path / "open" / "me.jsonl")] == ["trip"]
        await log.aclose()

    run(scenario)


DIES = """
import asyncio, os, signal, sys
from pathlib import Path
from service.audit_log import AuditLog, Who
from service.clock import SystemClock

async def main():
    log = AuditLog(Path(sys.argv[1]), "dying", SystemClock())
    log.reachable = False
    await log.record(Who("somebody"), "first")
    async with log.change(Who("somebody"), "second"):
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_a_killed_process_leaves_what_it_had_begun(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (found,) = leftovers(tmp_path).values()
    assert [(each.action, each.outcome) for each in found] == [("first", "done"), ("second", "unknown")]


# -- One chain over replicas ------------------------------------------------------------------------------------------


class Replica:
    """One worker's log and its part in the chain."""

    def __init__(self, folder: Path, url: str) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self.streams = RedisStreams(connect(url))
        self.log = AuditLog(folder, f"segment-{secrets.token_hex(4)}", SystemClock())
        self.log.reachable = False  # rounds are made by hand
        self.mirror = Mirror(folder)
        self.chain = Chain(self.streams, self.mirror, self.log, self.metrics)

    async def state(self, *actions: str) -> None:
        for action in actions:
            self.log.reachable = False
            await self.log.record(Who("somebody"), action)

    async def close(self) -> None:
        await self.chain.aclose()
        await self.streams.aclose()

    @property
    def lines(self) -> list[bytes]:
        return list(self.mirror.lines())

    @property
    def actions(self) -> list[str]:
        return [json.loads(line)["action"] for line in self.lines]


@asynccontextmanager
async def replicas(tmp_path: Path, url: str, *names: str) -> AsyncIterator[list[Replica]]:
    found = [Replica(tmp_path / name, url) for name in names]
    try:
        yield found
    finally:
        for each in found:
            await each.close()


@pytest.fixture
def url(tmp_path: Path) -> Any:
    valkey = EmbeddedValkey(tmp_path / "valkey", maxmemory_bytes=SMALL)
    yield valkey.start()
    valkey.stop()


@pytest.fixture
def store(url: str) -> Any:
    with redis.Redis.from_url(url, protocol=2) as client:
        yield client


def stream(store: redis.Redis) -> list[tuple[bytes, dict[Any, Any]]]:
    found: Any = store.xrange(KEY)
    return list(found)


def in_redis(store: redis.Redis) -> list[bytes]:
    return [fields[b"e"] for _, fields in stream(store)]


def write_anew(store: redis.Redis, entries: list[tuple[bytes, dict[Any, Any]]]) -> None:
    store.delete(KEY)
    for seq, fields in entries:
        store.xadd(KEY, fields, seq)


def test_replicas_append_to_one_chain(tmp_path: Path, url: str, store: redis.Redis) -> None:
    async def scenario() -> None:
        async with replicas(tmp_path, url, "one", "two") as (one, two):
            for round_ in range(10):
                await asyncio.gather(
                    one.state(*(f"one-{round_}-{n}" for n in range(round_))),
                    two.state(*(f"two-{round_}-{n}" for n in range(70 if round_ == 5 else 3))),
                )
                await asyncio.gather(one.chain.run_once(), two.chain.run_once())
            await one.chain.run_once()
            await two.chain.run_once()
            assert one.lines == two.lines == in_redis(store)
            assert verify(one.lines) == one.chain.head
            assert len(set(one.actions)) == len(one.actions) == 45 + 9 * 3 + 70
            for name in ("one", "two"):  # each replica's own in the order in which they were stated
                own = [action for action in one.actions if action.startswith(name)]
                assert own == sorted(own, key=lambda each: [int(part) for part in each.split("-")[1:]])

    run(scenario)


def test_what_is_stated_while_redis_is_away_is_chained_when_it_is_back(tmp_path: Path, store: redis.Redis) -> None:
    url = f"unix://{tmp_path / 'later' / 'valkey.sock'}"

    async def scenario() -> None:
        async with replicas(tmp_path, url, "one") as (one,):
            await one.state("a", "b")
            await one.chain.run_once()
            assert not one.log.reachable
            assert one.lines == []
            assert len(one.log.pending) == 2
        assert len(list((tmp_path / "one" / "open").iterdir())) == 1  # closed, and it stays

    run(scenario)


def test_the_next_life_chains_what_the_last_one_left(tmp_path: Path, url: str, store: redis.Redis) -> None:
    away = f"unix://{tmp_path}/nothing.sock"

    async def scenario() -> None:
        async with replicas(tmp_path, away, "one") as (one,):
            await one.state("a", "b")
        async with replicas(tmp_path, url, "one", "two") as (one, two):
            await two.state("c")
            await two.chain.run_once()
            await one.state("d")
            await one.chain.run_once()
            assert one.actions == ["c", "a", "b", "d"] or one.actions == ["c", "d", "a", "b"]
            assert verify(in_redis(store)).seq == 4
            assert len(list((tmp_path / "one" / "open").iterdir())) == 1  # the living one's
        assert list((tmp_path / "one" / "open").iterdir()) == []

    run(scenario)


def test_what_stands_in_the_chain_is_not_chained_again(tmp_path: Path, url: str, store: redis.Redis) -> None:
    """A process that dies after Redis has taken its entries, and before it knows."""

    async def scenario() -> None:
        kept = tmp_path / "kept.jsonl"
        async with replicas(tmp_path, url, "one") as (one,):
            await one.state("a", "b")
            (segment,) = (tmp_path / "one" / "open").iterdir()
            kept.write_bytes(segment.read_bytes())
            await one.chain.run_once()
        for mirror_too in (False, True):
            kept_in = tmp_path / "one" / "open" / segment.name
            kept_in.write_bytes(kept.read_bytes())
            if mirror_too:  # the disk's copy is gone, too: Redis's says it
                (tmp_path / "one" / "chain-0.jsonl").unlink()
            async with replicas(tmp_path, url, "one") as (one,):
                await one.chain.run_once()
                assert one.actions == ["a", "b"]
                assert not kept_in.exists()

    run(scenario)


def test_a_redis_that_has_lost_entries_gets_them_back(tmp_path: Path, url: str, store: redis.Redis) -> None:
    async def scenario() -> None:
        async with replicas(tmp_path, url, "one", "two") as (one, two):
            await one.state(*(f"a{n}" for n in range(300)))
            await one.chain.run_once()
            await two.chain.run_once()
            whole = in_redis(store)
            store.delete(KEY)
            await two.state("b")
            await asyncio.gather(one.chain.run_once(), two.chain.run_once())
            await one.chain.run_once()
            assert in_redis(store)[:300] == whole
            assert one.actions[300:] == ["b"]
            # Restored from a backup that is older by some entries.
            write_anew(store, stream(store)[:100])
            await one.chain.run_once()
            assert in_redis(store) == one.lines
            assert verify(one.lines).seq == 301

    run(scenario)


def test_of_two_chains_redis_s_goes_on_and_nothing_that_was_stated_is_lost(
    tmp_path: Path, url: str, store: redis.Redis
) -> None:
    async def scenario() -> None:
        async with replicas(tmp_path, url, "one", "two", "three") as (one, two, three):
            await one.state("a", "b")
            for each in (one, two):
                await each.chain.run_once()
            await one.state("c", "d")
            await one.chain.run_once()
            mine = one.lines
            # Redis comes back without the last two, and others are faster than the replica that has them.
            write_anew(store, stream(store)[:2])
            await two.state("x", "y", "z")
            await two.chain.run_once()
            await three.chain.run_once()
            await one.chain.run_once()
            await asyncio.gather(*(each.chain.run_once() for each in (one, two, three)))
            assert one.chain._stating is not None
            await one.chain._stating
            for each in (one, two, three, one):
                await each.chain.run_once()
            assert one.lines == two.lines == three.lines == in_redis(store)
            assert one.actions == ["a", "b", "x", "y", "z", "c", "d", "audit_forked"]
            assert verify(one.lines).seq == 8
            (aside,) = (tmp_path / "one").glob("fork-*.jsonl")
            assert aside.read_bytes() == b"".join(line + b"\n" for line in mine[2:])
            assert json.loads(one.lines[-1])["subject"] == f"4:{json.loads(mine[-1])['hash']}"
        async with replicas(tmp_path, url, "one") as (one,):  # what was set aside is looked at again, and stands
            await one.chain.run_once()
            assert len(one.actions) == 8

    run(scenario)


def test_a_chain_that_was_changed_in_redis_is_not_followed(tmp_path: Path, url: str, store: redis.Redis) -> None:
    async def scenario() -> None:
        async with replicas(tmp_path, url, "one", "two") as (one, two):
            await one.state("a", "b", "c")
            await one.chain.run_once()
            entries = stream(store)
            entries[1][1][b"e"] = entries[1][1][b"e"].replace(b'"b"', b'"B"')
            write_anew(store, entries)
            await two.state("d")
            await two.chain.run_once()
            assert two.actions == []
            assert not two.log.reachable  # changes are answered all the same: they are on disk
            assert two.metrics.registry.get_sample_value("surefoot_audit_stopped") == 1.0
            # What the page says: the stream goes aside, and the copy on a disk comes back.
            store.rename(KEY, "sf:audit:broken")
            await one.chain.run_once()
            await two.chain.run_once()
            assert two.actions == ["a", "b", "c", "d"]
            assert two.metrics.registry.get_sample_value("surefoot_audit_stopped") == 0.0

    run(scenario)


def test_entries_deleted_at_the_end_stop_the_chain_instead_of_being_replaced(
    tmp_path: Path, url: str, store: redis.Redis
) -> None:
    async def scenario() -> None:
        async with replicas(tmp_path, url, "one") as (one,):
            await one.state("a", "b")
            await one.chain.run_once()
            store.xdel(KEY, "2-0")
            await one.state("c")
            await one.chain.run_once()
            assert one.actions == ["a", "b"]
            assert one.metrics.registry.get_sample_value("surefoot_audit_stopped") == 1.0
            store.rename(KEY, "sf:audit:broken")
            await one.chain.run_once()
            assert one.actions == ["a", "b", "c"]

    run(scenario)


def test_an_append_names_the_number_and_the_hash_that_it_follows(tmp_path: Path, url: str, store: redis.Redis) -> None:
    async def scenario() -> None:
        async with replicas(tmp_path, url, "one") as (one,):
            await one.state("a")
            await one.chain.run_once()
            head = one.chain.head
            entry = chain(statement(2), head)
            for other in (Head(0, GENESIS), Head(1, GENESIS), Head(2, head.hash)):
                reply = await one.streams.script(APPEND, KEY, other.seq, other.hash, line_of(entry), entry.hash)
                assert reply == [b"1", head.hash.encode()]
            assert in_redis(store) == one.lines
            assert await one.streams.script(APPEND, KEY, head.seq, head.hash, line_of(entry), entry.hash) == []

    run(scenario)


def test_a_key_of_another_kind_holds_up_the_chain_and_nothing_else(
    tmp_path: Path, url: str, store: redis.Redis
) -> None:
    async def scenario() -> None:
        store.set(KEY, "not a stream")
        async with replicas(tmp_path, url, "one") as (one,):
            await one.state("a")
            await one.chain.run_once()
            assert not one.log.reachable
            assert one.metrics.registry.get_sample_value("surefoot_audit_unchained") == 1.0
            store.delete(KEY)
            await one.chain.run_once()
            assert one.actions == ["a"]

    run(scenario)


def test_a_chain_is_read_from_redis_or_from_the_disk(tmp_path: Path, url: str, store: redis.Redis) -> None:
    async def scenario() -> None:
        async with replicas(tmp_path, url, "one") as (one,):
            await one.state(*"abcdef")
            await one.chain.run_once()
            for source in ("redis", "disk"):
                assert await one.chain.read(2, 3, source) == (source, one.lines[2:5])
            assert await one.chain.read(6, 3) == ("redis", [])

    run(scenario)


def test_an_entry_says_what_it_is() -> None:
    entry = chain(statement(1), Head())
    assert isinstance(entry, Entry)
    assert check(line_of(entry), Head()) == Head(1, entry.hash)
