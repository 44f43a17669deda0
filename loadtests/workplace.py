"""Where measuring happens: cores dealt out, enough descriptors, a folder that goes; and what a figure is read with.

Duty: set this process up and put it back. It measures nothing.
Promise: whatever ends the work, SIGTERM included, the folder is removed and servers' own clean-up runs.
"""

from __future__ import annotations

import os
import platform
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.processes import Cores

# File descriptors: a thousand connections, and what Python holds.
DESCRIPTORS = 4096


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass(frozen=True, slots=True)
class Workplace:
    cores: Cores
    folder: Path
    about: dict[str, Any]


@contextmanager
def workplace(store: str = "driver", folder: Path | None = None) -> Iterator[Workplace]:
    """Take the driver's core, and a folder in `folder`. store: whose core the Valkey shares where there are but two."""
    allowed = os.sched_getaffinity(0)
    cores = Cores.among(allowed, store)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, DESCRIPTORS)), hard))
    about = machine(cores)
    os.sched_setaffinity(0, {cores.driver})
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that servers are stopped then, too
    try:
        with tempfile.TemporaryDirectory(prefix="sf-", dir=folder) as made:
            yield Workplace(cores, Path(made), about)
    finally:
        os.sched_setaffinity(0, allowed)


def machine(cores: Cores) -> dict[str, Any]:
    """What a figure must never be read without."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "pinned": {"server": cores.server, "driver": cores.driver, "store": cores.store},
        "system": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
