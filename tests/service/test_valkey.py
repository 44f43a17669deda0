"""The embedded Valkey: started, kept and stopped by one owner, with everything that it has answered."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from policies.errors import ConfigError
from service.valkey import EmbeddedValkey, socket_url
from tests.service.valkeys import SMALL, get, put, setting, started_by_hand
from tests.waiting import gone, until

pytestmark = pytest.mark.usefixtures("nothing_stays")


def test_data_stays_between_runs_and_the_configuration_is_in_force(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    url = valkey.start()
    expected = {
        "appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": "", "port": "0",
        "aof-load-truncated": "yes", "maxmemory": str(SMALL),
    }  # fmt: skip
    assert {name: setting(url, name) for name in expected} == expected
    put(url, "one")
    valkey.stop()
    assert gone(valkey.pid)
    assert "User requested shutdown" in (tmp_path / "data" / "valkey" / "valkey.log").read_text()
    assert get(valkey.start()) == b"one"


def test_the_server_stands_alone(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    valkey.start()
    folder = tmp_path / "data" / "valkey"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.getsid(valkey.pid) == valkey.pid  # Ctrl-C in our terminal does not reach it
    files = [os.readlink(entry) for entry in Path(f"/proc/{valkey.pid}/fd").iterdir()]
    assert str(folder / "owner.lock") not in files
    assert str(folder / "server.lock") in files
    for output in (1, 2):  # a pipe that reads our output ends with us
        assert os.readlink(f"/proc/{valkey.pid}/fd/{output}") == str(folder / "valkey.log")


def test_a_server_that_is_killed_comes_back_with_its_data(valkey: EmbeddedValkey) -> None:
    url = valkey.start()
    assert not valkey.ensure()
    put(url, "two")
    os.kill(valkey.pid, signal.SIGKILL)
    until(valkey.ensure)
    assert get(url) == b"two"


def test_a_server_that_does_not_leave_is_killed_and_what_it_answered_stays(valkey: EmbeddedValkey) -> None:
    put(valkey.start(), "five")
    os.kill(valkey.pid, signal.SIGSTOP)
    valkey.stop(timeout_s=0.1)
    assert gone(valkey.pid)
    assert get(valkey.start()) == b"five"


def test_stopping_twice_leaves_the_next_owner_alone(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    valkey.start()
    valkey.stop()
    following = EmbeddedValkey(tmp_path / "data", maxmemory_bytes=SMALL)
    following.start()
    valkey.stop()
    put(following.url, "six")
    following.stop()


@pytest.mark.parametrize("name", ["x" * 120, "with space", "a#b", "a?b", "a%41b", 'q"uo\\te', "ångström"])
def test_any_name_of_a_data_directory_will_do(tmp_path: Path, name: str) -> None:
    valkey = EmbeddedValkey(tmp_path / name, maxmemory_bytes=SMALL)
    try:
        put(valkey.start(), "four")
        assert get(socket_url(tmp_path / name)) == b"four"
        assert setting(valkey.url, "dir") == str(tmp_path / name / "valkey")
    finally:
        valkey.stop()


def test_a_path_too_long_for_a_socket_gets_a_short_and_private_one(tmp_path: Path) -> None:
    long = EmbeddedValkey(tmp_path / ("x" * 120), maxmemory_bytes=SMALL)
    folder = Path(long.url.removeprefix("unix://")).parent
    (tmp_path / "link").symlink_to(tmp_path / ("x" * 120))
    assert socket_url(tmp_path / "link") == long.url  # however the directory is spelt
    assert socket_url(tmp_path / ("y" * 120)) != long.url
    folder.symlink_to(tmp_path)
    try:
        with pytest.raises(ConfigError, match="not ours"):
            long.start()
    finally:
        folder.unlink()
    try:
        long.start()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(long.url) < 100
    finally:
        long.stop()
    assert not folder.exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    manifest = tmp_path / "data" / "valkey" / "appendonlydir" / "appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("nonsense")
    with pytest.raises(ConfigError, match=r"manifest.*valkey\.log"):
        valkey.start()
    manifest.unlink()
    valkey.start()  # the lock is free again


def test_a_restart_that_fails_is_told_and_may_be_tried_again(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    put(valkey.start(), "seven")
    manifest = tmp_path / "data" / "valkey" / "appendonlydir" / "appendonly.aof.manifest"
    good = manifest.read_text()
    manifest.write_text("nonsense")
    os.kill(valkey.pid, signal.SIGKILL)
    os.waitid(os.P_PID, valkey.pid, os.WEXITED | os.WNOWAIT)  # dead, and left for the owner to find
    for _ in range(2):
        with pytest.raises(ConfigError, match="does not start"):
            valkey.ensure()
    manifest.write_text(good)
    assert valkey.ensure()
    assert get(valkey.url) == b"seven"


def test_a_data_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        EmbeddedValkey(tmp_path / "file").start()


def test_every_thread_runs_on_the_given_cores(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    valkey = EmbeddedValkey(tmp_path / "data", maxmemory_bytes=SMALL, cpu={core})

    def check() -> None:
        threads = os.listdir(f"/proc/{valkey.pid}/task")
        assert len(threads) > 1
        assert all(os.sched_getaffinity(int(thread)) == {core} for thread in threads)

    try:
        valkey.start()
        check()
        valkey.stop()
        with started_by_hand(tmp_path / "data" / "valkey") as pid:
            valkey.start()
            assert valkey.pid == pid
            check()
    finally:
        valkey.stop()


def test_an_owner_pinned_to_one_core_does_not_keep_its_server_there(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(ours)})
    try:
        valkey.start()
    finally:
        os.sched_setaffinity(0, ours)
    for thread in os.listdir(f"/proc/{valkey.pid}/task"):
        assert os.sched_getaffinity(int(thread)) >= ours


def test_cores_that_do_not_exist_are_no_reason_not_to_start(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / "data", maxmemory_bytes=SMALL, cpu={1023})
    try:
        put(valkey.start(), "eight")
    finally:
        valkey.stop()
