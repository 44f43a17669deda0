"""Which stage of a decision a function works for. Pure: file names and nothing else, no module of the service.

Duty: from a call stack to a stage. It knows no times.
Strategy: from the innermost frame outwards, the first file that belongs to a stage decides, so that what a library does
is its caller's, and functions may move within a file. Files that several stages share are passed over: their caller
says whose work it is. What is the project's and stands in no list goes to `other`, by name, so that a new file is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

OTHER = "other"
LOOP = "event loop"


@dataclass(frozen=True, slots=True)
class Frame:
    """A function, and its file as imports name it: `service/act.py`."""

    function: str
    file: str


# In the order in which a decision meets them. A pattern is a file, or file:function, which goes before its file's own.
STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (LOOP, (
        "asyncio/runners.py", "asyncio/base_events.py", "asyncio/events.py", "uvicorn/server.py", "service/worker.py",
    )),
    ("read and parse HTTP", (
        "uvicorn/protocols/*", "httptools/*", "service/body.py", "service/slow_heads.py", "service/short_way.py",
        "service/door.py", "service/upload.py",
    )),
    ("decode the body", (
        "service/questions.py", "service/forms.py", "service/states.py", "service/packed.py", "service/allowed.py",
        "service/wire.py:*decode*",
    )),
    ("admit", ("service/overload.py", "service/waiting_room.py", "service/limit_gradient.py")),
    ("route and name", (
        "service/app.py", "service/hot.py", "service/callers.py", "service/coalesce.py", "service/act.py",
        "service/arrivals.py", "service/pins.py", "service/ids.py", "service/plan.py", "service/absence.py",
        "service/admission.py", "service/throttle.py", "service/idempotency.py", "policies/route.py",
    )),
    ("infer", (
        "service/inference.py", "service/breakers.py", "service/memory*.py", "policies/engine.py",
        "policies/network.py", "policies/cuda.py", "policies/watchdog.py", "safety/breaker.py", "onnxruntime/*",
    )),
    ("last look", (
        "safety/recheck*.py", "safety/plain.py", "safety/drawn.py", "service/settle.py:_unbroken",
        "service/settle.py:*check*",
    )),
    ("explore and draw", (
        "service/settle.py", "service/allowance.py", "policies/heads.py", "policies/explore.py", "policies/draw.py",
        "policies/continuous.py", "safety/exploration.py", "safety/exploring.py", "safety/budget.py", "safety/pace.py",
        "safety/lease.py", "safety/schedule.py",
    )),
    ("rules", (
        "service/judge.py", "service/ruling.py", "service/holding.py", "service/limit*.py", "service/safeguards.py",
        "safety/*",
    )),
    ("record", (
        "service/record.py", "service/settled_*.py", "service/decision.py", "service/scalar.py",
        "service/reward_events.py",
    )),
    ("commit", ("service/ledger.py", "service/writer.py", "service/spool*.py", "service/lanes.py", "sqlite3/*")),
    ("answer and write", (
        "uvicorn/protocols/*:RequestResponseCycle.send", "service/body.py:respond", "service/wire.py",
        "service/short_way.py:*write*",
        "service/hot.py:_columns*", "service/problems.py",
    )),
    ("count and trace", ("service/metrics.py", "service/tracing.py", "service/boards.py", "prometheus_client/*",
                         "opentelemetry/*")),
    ("ship to Redis", (
        "service/shipper.py", "service/shipcall.py", "service/redis_*.py", "service/confirmation.py", "service/acks.py",
        "redis/*",
    )),
    ("watch: calibration, shadows, estimates", (
        "service/calibration*.py", "service/logged.py", "service/shadow*.py", "service/estimat*.py",
        "service/outcomes.py", "service/burning.py", "shadow/*", "safety/calibration*.py",
    )),
    ("loops behind", (
        "service/catalog.py", "service/control.py", "service/hearing.py", "service/opening.py", "service/loading.py",
        "service/serving.py", "service/standing.py", "service/leases.py", "service/leader.py", "service/roll*.py",
        "service/trimming.py", "service/store_*.py", "service/audit*.py", "service/token*.py", "service/runtime.py",
        "service/team.py", "service/keys.py", "service/adoption.py", "service/leftovers.py",
        "service/slots.py", "service/guarding.py", "service/api.py", "anyio/*",
        "concurrent/futures/*", "fastapi/*", "starlette/*",
    )),
)  # fmt: skip
# What several stages use: whoever called it decides.
SHARED = (
    "safety/expression.py", "safety/condition.py", "safety/facts.py", "safety/types.py", "policies/types.py",
    "policies/bundle.py", "policies/deployment.py", "policies/manifest.py", "service/clock.py",
)  # fmt: skip
OURS = ("service/*", "safety/*", "policies/*", "shadow/*")
# Where a thread that has nothing to do waits.
WAITING = (
    Frame("run", "asyncio/runners.py"), Frame("_worker", "concurrent/futures/thread.py"), Frame("wait", "threading.py"),
    Frame("get", "queue.py"), Frame("_take", "service/writer.py"), Frame("select", "selectors.py"),
)  # fmt: skip


def stage_of(stack: Sequence[Frame]) -> str:
    """Name the stage of a stack, outermost frame first. `other: FILE` for what is in no list."""
    for frame in reversed(stack):
        found = _stage(frame)
        if found is not None:
            return found
    return f"{OTHER}: {stack[-1].file}" if stack else OTHER


def waits(stack: Sequence[Frame]) -> bool:
    """Tell whether the thread may be waiting for work: `Writer._take` is `_take` as much as a plain one."""
    if not stack:
        return False
    last = stack[-1]
    return any(last.file == each.file and last.function.rpartition(".")[2] == each.function for each in WAITING)


@cache
def _stage(frame: Frame) -> str | None:
    if any(fnmatchcase(frame.file, pattern) for pattern in SHARED):
        return None
    named = f"{frame.file}:{frame.function}"
    rules = [(pattern, name) for name, patterns in STAGES for pattern in patterns]
    for wanted, said in ((True, named), (False, frame.file)):
        exact = [name for pattern, name in rules if (":" in pattern) is wanted and fnmatchcase(said, pattern)]
        if exact:
            return exact[0]
    return f"{OTHER}: {frame.file}" if any(fnmatchcase(frame.file, pattern) for pattern in OURS) else None
