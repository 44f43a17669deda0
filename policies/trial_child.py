"""EDGE: the trial itself, in a process of its own: `python -m policies.trial_child`, started by `trial.py` only.

Duty: confine itself, then read the bundle, open its network, hold it against its golden vectors and, when asked, put
it to the probes; say on standard output what happened, one JSON line for each step.
Strategy: limits first, imports second, a stranger's bytes last. A line is written before each step, so that whoever
reads them knows in which step a process ended that could not say so itself.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from policies.confine import Limits, confine

Say = Callable[[dict[str, Any]], None]

# How ONNX Runtime's messages say that a tensor is larger than memory.
STARVED = ("failed to allocate memory", "bad_alloc", "bad allocation", "out of memory", "would require more than")


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
    main()
