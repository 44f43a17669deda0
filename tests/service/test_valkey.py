"""The embedded Valkey: owned by one, kept through everything, never anyone else's process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from policies.errors import ConfigError
from service.valkey import EmbeddedValkey, socket_url


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    mine = EmbeddedValkey(tmp_path / "data", maxmemory_bytes=64 << 20)
    yield mine
    mine.stop()


def put(url: str, value: str) -> None:
    with Redis.from_url(url) as client:
        client.set("key", value)


def get(url: str) -> object:
    with Redis.from_url(url) as client:
        return client.get("key")


def test_data_stays_between_runs_and_the_configuration_is_in_force(valkey: EmbeddedValkey) -> None:
    url = valkey.start()
    expected = {
        "appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": "", "port": "0",
        "maxmemory": str(64 << 20),
    }  # fmt: skip
    with Redis.from_url(url) as client:
        for name, value in expected.items():
            assert client.config_get(name)[name] == value
    put(url, "one")
    valkey.stop()
    assert gone(valkey.pid)
    assert get(valkey.start()) == b"one"


def test_a_server_that_is_killed_comes_back_with_its_data(valkey: EmbeddedValkey) -> None:
    url = valkey.start()
    assert not valkey.ensure()
    put(url, "two")
    os.kill(valkey.pid, signal.SIGKILL)
    until(valkey.ensure)
    assert get(url) == b"two"


OWNER = """
import os, sys
from pathlib import Path
from service.valkey import EmbeddedValkey
valkey = EmbeddedValkey(Path(sys.argv[1]), maxmemory_bytes=64 << 20)
valkey.start()
print("pid", valkey.pid, flush=True)
sys.stdin.read()
"""


def test_the_orphan_of_a_killed_owner_is_adopted(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path / "data")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = next(int(line.split()[1]) for line in owner.stdout if line.startswith("pid "))
        with pytest.raises(ConfigError, match=str(owner.pid)) as refused:
            EmbeddedValkey(tmp_path / "data").start()
        assert refused.value.field == "SUREFOOT_DATA_DIR"
        put(socket_url(tmp_path / "data"), "three")
        owner.kill()
    assert not gone(pid)
    assert get(valkey.start()) == b"three"
    assert valkey.pid == pid
    assert not valkey.ensure()
    os.kill(pid, signal.SIGKILL)
    until(valkey.ensure)
    assert valkey.pid != pid
    assert get(valkey.url) == b"three"


def test_a_server_that_lives_and_does_not_answer_gets_none_beside_it(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path / "data")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = next(int(line.split()[1]) for line in owner.stdout if line.startswith("pid "))
        owner.kill()
    os.kill(pid, signal.SIGSTOP)
    hasty = EmbeddedValkey(tmp_path / "data", start_timeout_s=0.1)
    with pytest.raises(ConfigError, match="does not answer"):
        hasty.start()
    os.kill(pid, signal.SIGCONT)
    valkey.start()
    assert valkey.pid == pid


def test_a_server_of_another_directory_behind_the_socket_is_not_taken_for_ours(
    tmp_path: Path, valkey: EmbeddedValkey
) -> None:
    other = EmbeddedValkey(tmp_path / "other", maxmemory_bytes=64 << 20)
    other.start()
    try:
        ours = Path(socket_url(tmp_path / "data").removeprefix("unix://"))
        ours.parent.mkdir(parents=True)
        ours.symlink_to(socket_url(tmp_path / "other").removeprefix("unix://"))
        valkey.start()
        assert valkey.pid != other.pid
        put(valkey.url, "ours")
        assert get(other.url) is None
    finally:
        other.stop()
    assert get(valkey.url) == b"ours"


def test_a_path_too_long_for_a_socket_is_shortened(tmp_path: Path) -> None:
    long = EmbeddedValkey(tmp_path / ("x" * 120), maxmemory_bytes=64 << 20)
    try:
        put(long.start(), "four")
        assert get(long.url) == b"four"
        assert len(long.url) < 100
    finally:
        long.stop()


def test_a_server_that_cannot_start_says_where_to_look(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "valkey"
    (folder / "appendonlydir").mkdir(parents=True)
    (folder / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense")
    broken = EmbeddedValkey(tmp_path / "data", maxmemory_bytes=64 << 20, start_timeout_s=5)
    with pytest.raises(ConfigError, match=r"valkey\.log"):
        broken.start()
    again = EmbeddedValkey(tmp_path / "data", maxmemory_bytes=64 << 20)
    (folder / "appendonlydir" / "appendonly.aof.manifest").unlink()
    again.start()  # the lock is free again
    again.stop()
