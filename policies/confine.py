"""EDGE: what a trial may take of the machine, and how a process binds itself to that.

Duty: limits as a value, and one call that sets them on the process that calls it. It knows nothing of bundles.
Strategy: the process confines itself before it reads a stranger's first byte, so nothing runs between fork and exec in
a parent that has threads. Standard library only: it is imported before everything else.
Promise: after `confine` this process cannot exceed the limits nor lift them.
"""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from dataclasses import dataclass

# An answer is a few lines; whatever a network prints beside it is cut here.
MAX_OUTPUT_BYTES = 1 << 20
# Below everything that serves: a trial takes what is left over.
NICENESS = 10


@dataclass(frozen=True, slots=True)
class Limits:
    """What a trial may take. Memory is address space: a base, and so many bytes for each byte of the bundle.

    Measured: 171 MiB with a small network, and 3 bytes more for each byte of a network of 240 MiB, while it is read,
    checked and opened. The rest is for golden vectors as Python's numbers, and for what a network computes with.
    """

    memory_bytes: int = 512 << 20
    memory_factor: int = 8
    cpu_s: int = 20
    wall_s: float = 60.0

    def memory_for(self, bundle_bytes: int) -> int:
        """The most address space that a trial of so many bytes may take, in bytes."""
        return self.memory_bytes + self.memory_factor * bundle_bytes


def confine(limits: Limits, bundle_bytes: int) -> None:
    """Bind this process to the limits, for good."""
    memory = limits.memory_for(bundle_bytes)
    for kind, value, more in (
        (resource.RLIMIT_AS, memory, 0),
        (resource.RLIMIT_CPU, limits.cpu_s, 1),  # at the first a signal that says why, at the second the end
        (resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, 64, 0),
    ):
        ceiling = resource.getrlimit(kind)[1]
        hard = value + more if ceiling == resource.RLIM_INFINITY else min(value + more, ceiling)
        resource.setrlimit(kind, (min(value, hard), hard))
    # The parent ends this process at the limit; the alarm does where there is no parent any more.
    signal.setitimer(signal.ITIMER_REAL, limits.wall_s + 1.0)
    with suppress(OSError):
        os.nice(NICENESS)
    # Where memory runs out for the whole machine or container, this process is the one to end.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")
