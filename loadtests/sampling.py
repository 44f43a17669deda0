"""Samples of a running Python process, by py-spy, and what they say of its stages. EDGE: starts py-spy.

Duty: record call stacks from outside for some seconds, and share out processor time by them. It changes nothing in what
it looks at, but for stopping it for an instant at each sample.
Strategy: how much processor time each thread uses, Linux says, while nobody samples: being stopped costs a thread time,
too, also one that sleeps. What for, the samples say. Not every kernel tells py-spy which threads sleep, so of a
thread's samples those in places where it waits for work count only as far as Linux saw it at work more often than the
other samples do.
"""

from __future__ import annotations

import re
import shutil
import subprocess  # py-spy is a program
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadtests.processes import GONE, TICKS_PER_S
from loadtests.stage_map import Frame, stage_of, waits

MISSING = "py-spy is not installed, and stages are sampled with it. Install it with `pip install py-spy`."
RATE = 250  # a second; each sample stops the server for a millisecond or so
FRAME = re.compile(r"(?P<function>.*?) \((?P<file>[^()]*?)(?::\d+)?\)")
THREAD = re.compile(r"thread \((?P<id>\d+)\)(?:: .*)?")


class PySpyMissingError(Exception):
    """py-spy is not installed. Install it, as the text says."""


@dataclass(frozen=True, slots=True)
class Stack:
    """One call stack, outermost frame first, and how often it was seen."""

    thread: int
    frames: tuple[Frame, ...]
    seen: int


@dataclass(frozen=True, slots=True)
class Busy:
    """A thread while nobody samples: the cores that it uses; how often it is at work, or waits for a core to be."""

    cores: float
    at_work: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What was seen in so many seconds."""

    stacks: Sequence[Stack]
    seconds: float


def find() -> str:
    """Give the path of py-spy, of this environment before any other. Raises PySpyMissingError."""
    found = shutil.which("py-spy", path=Path(sys.executable).parent) or shutil.which("py-spy")
    if found is None:
        raise PySpyMissingError(MISSING)
    return found


def record(pid: int, seconds: float, file: Path) -> Profile:
    """Sample a process. Raises RuntimeError with what py-spy says when it cannot."""
    command = [find(), "record", "--pid", str(pid), "--format", "raw", "--threads", "--rate", str(RATE)]
    command += ["--duration", str(max(1, round(seconds))), "--output", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own command
    if done.returncode != 0 or not file.exists():
        raise RuntimeError(f"py-spy cannot look into {pid} (it needs root, or ptrace allowed): {done.stderr[-500:]}")
    return Profile(list(read(file.read_text().splitlines())), max(1, round(seconds)))


def watch(pid: int, seconds: float) -> dict[int, Busy]:
    """Look at a process's threads for so long, without stopping them."""
    looks, at_work = 0, Counter[int]()
    before, began_s = threads(pid), time.perf_counter()
    while (lasted_s := time.perf_counter() - began_s) < seconds or not looks:
        looks += 1
        at_work.update(thread for thread, (state, _) in threads(pid).items() if state == "R")
        time.sleep(1 / RATE)
    found = {}
    for thread, (_, used_s) in threads(pid).items():
        cores = (used_s - before.get(thread, ("", 0.0))[1]) / lasted_s
        found[thread] = Busy(cores, max(cores, at_work[thread] / looks))
    return found


def threads(pid: int) -> dict[int, tuple[str, float]]:
    """The state of each thread of a process, and its processor time so far."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(*GONE):
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            found[int(task.name)] = (fields[0], (int(fields[11]) + int(fields[12])) / TICKS_PER_S)
    return found


def read(lines: Iterable[str]) -> Iterable[Stack]:
    """Read py-spy's raw format: `thread (7): name;function (file:line);… COUNT`. Other lines are passed over."""
    for line in lines:
        stack, _, seen = line.rpartition(" ")
        first, *rest = stack.split(";")
        thread = THREAD.fullmatch(first)
        if thread is None or not seen.isdigit():
            continue
        found = (FRAME.fullmatch(frame) for frame in rest)
        frames = tuple(Frame(each["function"], each["file"]) for each in found if each)
        yield Stack(int(thread["id"]), frames, int(seen))


def shares(profile: Profile, busy: Mapping[int, Busy]) -> dict[str, float]:
    """Share out a process's processor time over stages; all of them come to 1. Empty where none was used."""
    samples = profile.seconds * _pace(profile)
    found: defaultdict[str, float] = defaultdict(float)
    for thread, its in busy.items():
        stacks = [stack for stack in profile.stacks if stack.thread == thread]
        if not its.cores or not stacks:
            continue
        weights = _working(stacks, its.at_work * samples)
        whole = sum(weights.values())
        for name, weight in weights.items():
            found[name] += its.cores * weight / whole
    seen = sum(found.values())
    return {name: share / seen for name, share in found.items()}


def _pace(profile: Profile) -> float:
    """How many samples of one thread were really taken in a second."""
    each = Counter[int]()
    for stack in profile.stacks:
        each[stack.thread] += stack.seen
    return max(each.values(), default=0) / profile.seconds


def _working(stacks: Sequence[Stack], samples: float) -> dict[str, float]:
    """Samples by stage. samples: as many as met the thread at work; waiting counts for those that others leave over."""
    busy: Counter[str] = Counter()
    idle: Counter[str] = Counter()
    for stack in stacks:
        (idle if waits(stack.frames) else busy)[stage_of(stack.frames)] += stack.seen
    left = min(max(samples - busy.total(), 0.0), idle.total())
    if not busy and not left:
        left = float(idle.total())
    weights = {name: float(seen) for name, seen in busy.items()}
    for name, seen in idle.items():
        weights[name] = weights.get(name, 0.0) + left * seen / idle.total()
    return weights
