"""Exports that are killed at random points and started again: each transition is there exactly once.

The child counts the lines that it runs in the modules at stake, and sends itself a real SIGKILL at one of them: nothing
is flushed, unlocked or tidied up. Seeds are fixed; which lines come when is up to the two processes.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import redis

from tests.surefoot.stream_entries import add, key
from tests.surefoot.valkey import Valkey

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0
ENTRIES = 60
LINES = 4_000  # about as many as a run that has everything to do

CHILD = textwrap.dedent(
    """
    import os, signal, sys
    from surefoot.export import export_transitions
    from surefoot import export_dsjson, export_parquet  # loaded before lines are counted

    die_at, policy, to, out, url, consumer = int(sys.argv[1]), *sys.argv[2:]
    files = ("export.py", "export_parquet.py", "export_dsjson.py", "rows.py", "consumer.py", "group.py")
    count = 0

    def trace(frame, event, argument):
        global count
        if not frame.f_code.co_filename.endswith(tuple("surefoot/" + each for each in files)):
            return None
        count += event == "line"
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    grouped = {"group": "g", "consumer": consumer, "claim_idle_s": 0.05} if consumer else {"append": True}
    export_transitions(policy, to, out, redis_url=url, batch_size=5, **grouped)
    """
)


def start(die_at: int, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, str(die_at), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)


def codes(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for children: killed by themselves, or done."""
    for child in children:
        _, said = child.communicate(timeout=DEADLINE_S)
        assert child.returncode in (0, -signal.SIGKILL), said.decode()
    return [child.returncode for child in children]


def test_two_consumers_killed_at_random_export_each_transition_once(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path
) -> None:
    chance = random.Random(20261121)
    killed = 0
    for _ in range(8):
        known = store.xlen(key(policy)) if store.exists(key(policy)) else 0
        add(store, policy, range(known, known + ENTRIES))
        pair = [
            start(chance.randrange(1, LINES), policy, "parquet", str(tmp_path), valkey.url, consumer)
            for consumer in ("a", "b")
        ]
        killed += sum(code != 0 for code in codes(pair))
    assert killed >= 4, "the children outlive the test: raise the number of lines"
    assert codes([start(-1, policy, "parquet", str(tmp_path), valkey.url, "c")]) == [0]
    exported = ds.dataset(tmp_path, partitioning="hive").to_table(columns=["id"])["id"].to_pylist()
    assert sorted(exported) == [f"{n:060x}" for n in range(8 * ENTRIES)]
    pending = store.xpending_range(key(policy), "g", min="-", max="+", count=1_000)
    assert pending == []


@pytest.mark.parametrize("to", ["parquet", "dsjson"])
def test_an_export_of_a_stretch_that_is_killed_is_completed_by_the_next(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, to: str
) -> None:
    chance = random.Random(7)
    add(store, policy, range(ENTRIES))
    out = tmp_path / "out"
    for _ in range(5):
        codes([start(chance.randrange(1, 1_500), policy, to, str(out), valkey.url, "")])
    assert codes([start(-1, policy, to, str(out), valkey.url, "")]) == [0]
    if to == "parquet":
        exported = ds.dataset(out, partitioning="hive").to_table(columns=["id"])["id"].to_pylist()
    else:
        exported = [json.loads(line)["EventId"] for line in out.read_text().splitlines()]
    assert sorted(exported) == [f"{n:060x}" for n in range(ENTRIES)]
