"""EDGE: a bundle is tried in a process of its own before this one believes it.

Duty: `try_bundle`, the one call through which a stranger's files become a `PolicyBundle`; `run_trial` beneath it. It
parses nothing itself before the child has said yes: a file can be hostile to its parser too.
Strategy: files and answers travel in anonymous files, not pipes, so neither side can block or flood the other; the
child has limits on memory, CPU time and output (`confine.py`), an environment without secrets and the lowest
priority, and is killed with all that it started when its time is over.
Promise: a PolicyBundle or a BundleError whose `check` names what refused it and whose detail says what to do. Safe to
call from several threads: two trials run at once, further callers wait for one to end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Struct

from policies.bundle import FILES, PolicyBundle, check_files, read_bundle
from policies.confine import MAX_OUTPUT_BYTES, Limits
from policies.errors import BundleError
from policies.manifest import MODEL
from policies.trial_cache import VerdictCache

LIMITS = Limits()
# What a child keeps of the environment: where libraries lie. Never tokens, keys or URLs.
ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
# Refusals that may be the machine's fault, or the moment's: they are tried again next time.
UNSURE = frozenset({"wall_time", "cpu_time", "crash", "latency"})
# How a process says on its way out that it got no memory: C++, Python, the loader of libraries.
STARVED = ("bad_alloc", "memoryerror", "out of memory", "cannot allocate memory", "failed to map segment")
# From input, output, complaints and the time it may take to the child's exit status, None when the time was over.
Run = Callable[[IO[bytes], IO[bytes], IO[bytes], float], int | None]
# One trial keeps one core busy; more at once would multiply the memory that a flood of uploads can take.
_ROOM = threading.BoundedSemaphore(2)


class Line(Struct, frozen=True):
    """One line of the child: the step it begins (`read`, `load`, `probe`), what a probe found, or the end (`done`)."""

    stage: str
    check: str | None = None
    field: str | None = None
    detail: str = ""
    promise: str = ""
    verdict: str = ""
    cpu_s: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial gave. stage: the last step that was begun; refusal: None when it went through."""

    stage: str
    refusal: BundleError | None
    lines: tuple[Line, ...]
    cpu_s: float = 0.0
    peak_bytes: int = 0


def try_bundle(
    files: Mapping[str, bytes], limits: Limits = LIMITS, cache: Path | None = None, run: Run | None = None
) -> PolicyBundle:
    """Try the files of a bundle, given by name, and build it. Raises BundleError.

    Takes a third of a second, and up to `limits.wall_s`; call it from a thread. cache: a folder for verdicts. run: how
    the process is started (`trial_template.py` knows another way).
    """
    check_files(files)
    kept = VerdictCache(cache, files, limits) if cache is not None else None
    verdict = kept.read() if kept is not None else None
    if verdict is None:
        refusal = run_trial(files, limits, run=run or run_alone).refusal
        if kept is not None and (refusal is None or refusal.check not in UNSURE):
            kept.write(refusal)
    else:
        refusal = verdict.refusal
    if refusal is not None:
        raise refusal
    return read_bundle(files)


def run_alone(given: IO[bytes], answers: IO[bytes], said: IO[bytes], wall_s: float) -> int | None:
    """Give the child's exit status, None when its time was over; in any case nothing of it runs on."""
    child = start_child(given, answers, said)
    try:
        return child.wait(wall_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def start_child(
    given: IO[bytes] | int, answers: IO[bytes] | int, said: IO[bytes] | int, link: int | None = None
) -> subprocess.Popen[bytes]:
    """Start the child, which no terminal's signals reach. link: a socket that it inherits and takes orders from."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | SINGLE
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    return subprocess.Popen(  # noqa: S603  our own program
        [sys.executable, "-P", "-B", "-m", "policies.trial_child", *([] if link is None else [str(link)])],
        stdin=given,
        stdout=answers,
        stderr=said,
        env=environment,
        cwd="/",
        pass_fds=() if link is None else (link,),
        start_new_session=True,
    )


def run_trial(
    files: Mapping[str, bytes], limits: Limits = LIMITS, probing: bool = False, run: Run = run_alone
) -> Outcome:
    """Run the child on the files. probing: put a network that passes to `probes.PROBES` as well."""
    sizes = {name: len(files[name]) for name in FILES}
    order = {"limits": asdict(limits), "probing": probing, "sizes": sizes}
    with _ROOM, _anonymous() as given, _anonymous() as answers, _anonymous() as said:
        given.write(json.dumps(order).encode() + b"\n")
        for name in FILES:
            given.write(files[name])
        given.seek(0)
        status = run(given, answers, said, limits.wall_s)
        lines = _lines(_content(answers))
        complaint = _content(said).decode("utf-8", "replace")
    return _outcome(status, lines, complaint, limits, sum(sizes.values()))


def _anonymous() -> IO[bytes]:
    """Open a file without a name: in memory where the system can, so that a read-only disk does."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("surefoot-trial"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(MAX_OUTPUT_BYTES)


def _lines(raw: bytes) -> tuple[Line, ...]:
    """Read the child's lines up to the first that is not one."""
    lines = []
    for each in raw.splitlines():
        try:
            lines.append(msgspec.json.decode(each, type=Line))
        except msgspec.DecodeError:
            break
    return tuple(lines)


def _outcome(status: int | None, lines: tuple[Line, ...], complaint: str, limits: Limits, bundle_bytes: int) -> Outcome:
    stage = lines[-1].stage if lines else "start"
    memory = limits.memory_for(bundle_bytes)
    if status == 0 and stage == "done":
        last = lines[-1]
        steps = lines[:-1]
        refusal = None
        if last.check is not None:
            detail = _too_much_memory(memory) if last.check == "memory" else last.detail
            refusal = BundleError(detail, MODEL if last.check == "memory" else last.field, last.check)
        stage = "done" if refusal is None else steps[-1].stage if steps else "start"
        return Outcome(stage, refusal, steps, last.cpu_s, last.peak_bytes)
    return Outcome(stage, _ended(status, complaint, limits, memory), lines)


def _ended(status: int | None, complaint: str, limits: Limits, memory: int) -> BundleError:
    """Say why a child that gave no verdict has ended."""
    if status is None or status == -signal.SIGALRM:
        detail = (
            f"trying the network took more than {limits.wall_s:g} s; look for a loop without an end in it, and export "
            "it again. If this machine was busy, try again later"
        )
        return BundleError(detail, MODEL, "wall_time")
    if status == -signal.SIGXCPU:
        detail = (
            f"trying the network took more than {limits.cpu_s} s of CPU time; look for a loop without an end in it, or "
            "export a smaller network"
        )
        return BundleError(detail, MODEL, "cpu_time")
    if any(sign in complaint.lower() for sign in STARVED):
        return BundleError(_too_much_memory(memory), MODEL, "memory")
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
    last = "".join(filter(str.isprintable, (complaint.strip().splitlines() or [""])[-1]))[:300]
    detail = (
        f"the process that tried the network ended with {how}{': ' + last if last else ''}; ONNX Runtime does not "
        "survive this file, so export it again, with standard operators and opset_version=17"
    )
    return BundleError(detail, MODEL, "crash")


def _too_much_memory(memory: int) -> str:
    return (
        f"trying the network took more than {memory >> 20} MiB of memory; look for a tensor that it makes at run time "
        "(ConstantOfShape, Expand, Tile, Range), and export it again with the sizes that it needs"
    )
