"""EDGE: the trial itself, in a process of its own: `python -m policies.trial_child`, started by `trial.py` only.

Duty: confine itself, then read the bundle, open its network, hold it against its golden vectors and, when asked, put
it to the probes; say on standard output what happened, one JSON line for each step. With a socket as its argument:
load what a trial needs, and fork one for each order (`trial_template.py` is at the other end).
Strategy: limits first, a stranger's bytes last. A line is written before each step, so that whoever reads them knows
in which step a process ended that could not say so itself.
Promise: a process that has read a bundle reads no second one.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from policies import lean
from policies.confine import Limits, confine

Say = Callable[[dict[str, Any]], None]

# How ONNX Runtime's messages say that a tensor is larger than memory.
STARVED = ("failed to allocate memory", "bad_alloc", "bad allocation", "out of memory", "would require more than")


def serve(link: socket.socket) -> None:
    """Fork a trial for each three files (input, output, complaints) that come, until the other end is closed.

    Says the trial's pid when it runs and its end when it has ended, and takes it down when that was read: till then the
    pid is no other process's.
    """
    _load()
    if len(os.listdir("/proc/self/task")) > 1:
        return  # what another thread holds at this moment, its copy would hold for ever
    while True:
        order, files, _, _ = socket.recv_fds(link, 1, 3)
        if not order:
            return
        pid = os.fork()
        if pid == 0:
            link.close()
            _become_trial(files)
        with suppress(OSError):  # both sides do: whoever kills the group finds it
            os.setpgid(pid, pid)
        for file in files:
            os.close(file)
        link.send(b"%d" % pid)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        link.send(b".")
        if not link.recv(1):
            return
        link.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _become_trial(files: list[int]) -> NoReturn:
    try:
        with suppress(OSError):
            os.setpgid(0, 0)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        main()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _load() -> None:
    """Import what a trial imports."""
    lean.begin()
    import policies.bundle
    import policies.engine  # noqa: F401

    lean.end()


def main() -> None:
    """Answer for the bundle on standard input: a line of JSON, then the files one behind the other."""
    order = json.loads(sys.stdin.buffer.readline())
    confine(Limits(**order["limits"]), sum(order["sizes"].values()))
    say = _sayer()
    try:
        files = {name: sys.stdin.buffer.read(size) for name, size in order["sizes"].items()}
        answer = _try(files, order["probing"], say)
    except MemoryError:
        answer = {"check": "memory"}
    answer |= {"cpu_s": round(time_used_s(), 3), "peak_bytes": peak_bytes()}
    say({"stage": "done", **answer})
    # Nothing of the network runs again, not even what it would do while it is taken down.
    os._exit(0)


def _sayer() -> Say:
    """Keep standard output for answers; whatever else is printed goes to standard error."""
    answers = os.dup(1)
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        os.write(answers, json.dumps(line).encode() + b"\n")

    return say


def _try(files: dict[str, bytes], probing: bool, say: Say) -> dict[str, Any]:
    _load()
    from policies.bundle import read_bundle
    from policies.engine import Engine
    from policies.errors import BundleError

    try:
        say({"stage": "read"})
        bundle = read_bundle(files)
        files.clear()
        say({"stage": "load"})
        engine = Engine(bundle, "cpu")
    except BundleError as error:
        starved = error.check in ("load", "golden") and any(sign in error.detail.lower() for sign in STARVED)
        return {"check": "memory" if starved else error.check, "field": error.field, "detail": error.detail}
    if probing:
        from policies.probes import PROBES

        for probe in PROBES:
            say({"stage": "probe", "promise": probe.promise})
            verdict, detail = _hold(probe.hold, engine)
            say({"stage": "probe", "promise": probe.promise, "verdict": verdict, "detail": detail})
    return {}


def _hold(hold: Callable[[Any], tuple[str, str] | None], engine: Any) -> tuple[str, str]:
    try:
        return hold(engine) or ("idle", "")
    except RuntimeError as error:
        return "warned", f"the network fails when this is tried: {str(error)[:200]}; such calls get the fallback"


def time_used_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_bytes() -> int:
    """The most address space that this process has had; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmPeak:"))
    except (OSError, StopIteration):
        return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        main()
