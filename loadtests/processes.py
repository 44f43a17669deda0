"""What Linux tells of processes: who started whom, processor time, memory, cores. Linux only, read from /proc.

Duty: look, and pin. Starts and ends nothing.
Promise: a process that leaves while it is looked at counts as nothing; nobody else's process is touched.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
OF_PROCESS = 2  # CPUCLOCK_SCHED of Linux: all threads of a process, also those that have ended
GONE = (FileNotFoundError, ProcessLookupError)


@dataclass(frozen=True, slots=True)
class Cores:
    """Which core does what. Two of a kind may be the same where there are not enough."""

    server: int
    driver: int
    store: int

    @classmethod
    def among(cls, allowed: Iterable[int], store: str = "driver") -> Cores:
        """Deal out cores: the server's own first. store: where it goes without a core of its own."""
        first, *others = sorted(allowed)
        driver = others[0] if others else first
        spare = others[1] if len(others) > 1 else driver
        return cls(first, driver, first if store == "server" else spare)


def tree(pid: int) -> list[int]:
    """A process and all that it and its children have started and that still runs."""
    found = [pid]
    with contextlib.suppress(*GONE):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(*GONE):
                for child in (task / "children").read_text().split():
                    found += tree(int(child))
    return found


def born(pid: int) -> int | None:
    """When a process was started, in ticks since boot; tells it from a later one of its number. None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except GONE:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def is_store(pid: int) -> bool:
    """Tell whether a process is a Valkey or a Redis."""
    try:
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except GONE:
        return False
    return b"valkey-server" in program or b"redis-server" in program


def cpu_s(pids: Iterable[int], *, ended: bool = False) -> float:
    """Processor time that these have used so far, all their threads, in user and in system mode.

    By each process's own clock (clock_getcpuclockid(3)), to the nanosecond: /proc/PID/stat counts in ticks of 10 ms,
    which is some hundred decisions. ended: and what processes have used that they had started, and that are gone, in
    such ticks.
    """
    used_s = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):  # it is gone
            used_s += time.clock_gettime((~pid << 3) | OF_PROCESS)
            if ended:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                used_s += sum(map(int, fields[13:15])) / TICKS_PER_S
    return used_s


def peak_mb(pid: int) -> float:
    """The most memory that a process has had at once (resident; what it shares with others counts in full)."""
    with contextlib.suppress(*GONE):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1000
    return 0.0


def pin(pid: int, core: int) -> None:
    """Bind every thread of a process to one core; threads that it starts later follow."""
    with contextlib.suppress(*GONE):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(*GONE):
                os.sched_setaffinity(int(thread), {core})


def machine_busy_s() -> float:
    """Processor time that the whole machine has spent on something, what its host took away included."""
    names = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, names)
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S
