"""Processes that are nobody's child are held safely; memory is what the control groups leave."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.valkey_process import Held, Named, ServerProcess, last_words, memory_bytes
from tests.waiting import until

GIB = 1 << 30
KINDS = [pytest.param(Held, marks=pytest.mark.skipif(sys.platform != "linux", reason="pidfd")), Named]


@pytest.mark.parametrize("kind", KINDS)
def test_a_held_process_is_dead_once_it_is_killed_though_nobody_has_waited_for_it(
    kind: Callable[[int], ServerProcess],
) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        held = kind(child.pid)
        assert held.alive()
        held.kill()
        until(lambda: not held.alive())
        held.kill()  # a zombie: nothing happens
        assert child.wait() == -9
        assert not held.alive()
        held.kill()
    with pytest.raises(OSError):
        kind(child.pid)


def test_a_pid_that_has_become_another_programs_is_not_the_process_that_was_held() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        held = Named(child.pid)
        # A pid cannot be recycled at will: so it is what was held that changes.
        held._name = held._name.replace("cat", "valkey-server")
        assert not held.alive()
        held.kill()
        assert child.poll() is None


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/\n", {}, 16 * GIB),
        ("0::/\n", {"memory.max": f"{4 * GIB}\n"}, 4 * GIB),
        ("0::/\n", {"memory.max": f"{64 * GIB}\n"}, 16 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        ("0::/elsewhere/on/the/host\n", {"memory.max": f"{GIB}\n"}, GIB),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": f"{3 * GIB}\n"}, 3 * GIB),
        ("4:cpu,memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 16 * GIB),
        ("4:cpu:/\n", {"memory/memory.limit_in_bytes": "1\n"}, 16 * GIB),
    ],
)
def test_memory_is_the_least_of_the_machine_and_all_groups_above(
    tmp_path: Path, membership: str, limits: dict[str, str], expected: int
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in limits.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert memory_bytes(tmp_path / "cgroup", tmp_path / "fs", 16 * GIB) == expected


def test_memory_is_known_without_control_groups(tmp_path: Path) -> None:
    assert memory_bytes(tmp_path / "none", tmp_path, 16 * GIB) == 16 * GIB
    assert memory_bytes() > 0


def test_the_last_words_are_the_logs_last_line(tmp_path: Path) -> None:
    assert last_words(tmp_path) == ""
    (tmp_path / "valkey.log").write_text("x" * 9000 + "\n12:M 21 Nov 2026 05:49:41.816 # Bad file format: é\n\n")
    assert last_words(tmp_path) == "Bad file format: é"
