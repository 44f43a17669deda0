"""A Valkey found in the data directory is adopted when it is ours; nobody else's process is ever touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import BusyLoadingError

from policies.errors import ConfigError
from service.valkey import EmbeddedValkey, socket_url
from tests.service.valkeys import SMALL, get, owner_of, put, setting, started_by_hand
from tests.waiting import gone, until

pytestmark = pytest.mark.usefixtures("nothing_stays")


def test_the_orphan_of_a_killed_owner_is_adopted(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    with owner_of(tmp_path / "data") as (owner, pid):
        with pytest.raises(
            ConfigError, match=f"{tmp_path / 'data'} belongs to the service with pid {owner}"
        ) as refused:
            EmbeddedValkey(tmp_path / "data").start()
        assert refused.value.field == "SUREFOOT_DATA_DIR"
        put(socket_url(tmp_path / "data"), "three")
    assert not gone(pid)
    assert get(valkey.start()) == b"three"
    assert valkey.pid == pid
    assert not valkey.ensure()
    os.kill(pid, signal.SIGKILL)
    until(valkey.ensure)
    assert valkey.pid != pid
    assert get(valkey.url) == b"three"


def test_an_adopted_server_is_shut_down_like_a_child(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    with owner_of(tmp_path / "data") as (_, pid):
        pass
    valkey.start()
    valkey.stop()
    assert gone(pid)
    assert "User requested shutdown" in (tmp_path / "data" / "valkey" / "valkey.log").read_text()


def test_an_adopted_server_gets_the_settings_that_the_promise_rests_on(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    with owner_of(tmp_path / "data"), Redis.from_url(valkey.url) as client:
        client.config_set("appendfsync", "no")
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", 2 * SMALL)
    url = valkey.start()
    assert setting(url, "appendfsync") == "always"
    assert setting(url, "maxmemory-policy") == "noeviction"
    assert setting(url, "maxmemory") == str(SMALL)


def test_an_adopted_server_that_nobody_has_waited_for_counts_as_dead(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    with started_by_hand(tmp_path / "data" / "valkey") as pid:
        valkey.start()
        assert valkey.pid == pid
        put(valkey.url, "zombie")
        os.kill(pid, signal.SIGKILL)
        until(valkey.ensure)
        assert get(valkey.url) == b"zombie"
        assert gone(pid)
        os.kill(pid, 0)  # it is a zombie: its pid still exists


def test_a_server_that_is_loading_counts_as_up(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    with Redis.from_url(valkey.start()) as client, client.pipeline(transaction=False) as many:
        for number in range(60_000):
            many.set(f"key:{number}", number)
        many.set("key", "loaded")
        many.execute()
    valkey.stop()
    # 100 µs for each key make 6 s of loading, and it looks up from it ten times a second.
    with started_by_hand(tmp_path / "data" / "valkey", options=["--key-load-delay", "100"]) as pid:
        url = valkey.start()
        assert valkey.pid == pid
        with pytest.raises(BusyLoadingError):
            get(url)
        assert not valkey.ensure()
        with Redis.from_url(url) as client:
            client.config_set("key-load-delay", 0)
            until(lambda: client.info("persistence")["loading"] == 0)
        assert get(url) == b"loaded"
        valkey.stop()


def test_a_server_that_lives_and_does_not_answer_gets_none_beside_it(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    with owner_of(tmp_path / "data") as (_, pid):
        pass
    os.kill(pid, signal.SIGSTOP)
    hasty = EmbeddedValkey(tmp_path / "data", start_timeout_s=0.1)
    with pytest.raises(ConfigError, match=rf"pid {pid}\) lives in .* does not answer"):
        hasty.start()
    os.kill(pid, signal.SIGCONT)
    valkey.start()
    assert valkey.pid == pid


def test_a_pid_in_a_stale_file_is_nobody_of_ours(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as bystander:
        folder = tmp_path / "data" / "valkey"
        folder.mkdir(parents=True)
        for name in ("owner.lock", "server.lock"):
            (folder / name).write_text(f"{bystander.pid}\n")
        valkey.start()
        assert valkey.pid != bystander.pid
        assert (folder / "server.lock").read_text() == f"{valkey.pid}\n"
        assert (folder / "owner.lock").read_text() == f"{os.getpid()}\n"
        valkey.stop()
        assert bystander.poll() is None


def test_a_server_of_another_directory_behind_the_socket_is_not_taken_for_ours(
    tmp_path: Path, valkey: EmbeddedValkey
) -> None:
    other = EmbeddedValkey(tmp_path / "other", maxmemory_bytes=SMALL)
    other.start()
    ours = Path(socket_url(tmp_path / "data").removeprefix("unix://"))
    try:
        ours.parent.mkdir(parents=True)
        ours.symlink_to(socket_url(tmp_path / "other").removeprefix("unix://"))
        valkey.start()
        assert valkey.pid != other.pid
        put(valkey.url, "ours")
        ours.unlink()
        ours.symlink_to(socket_url(tmp_path / "other").removeprefix("unix://"))
        valkey.stop(timeout_s=0.1)
        assert gone(valkey.pid)
        assert get(other.url) is None  # it stands, and has seen nothing
    finally:
        other.stop()
    assert get(valkey.start()) == b"ours"


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs a pid namespace of its own")
def test_a_server_whose_process_cannot_be_named_here_is_not_adopted(tmp_path: Path, valkey: EmbeddedValkey) -> None:
    # It runs below another pid 1 and calls itself by a number that is somebody else's here.
    with started_by_hand(tmp_path / "data" / "valkey", wrap=["unshare", "--pid", "--fork", "--kill-child"]):
        with pytest.raises(ConfigError, match="cannot be seen from here"):
            valkey.start()
        assert get(valkey.url) is None  # it still answers
