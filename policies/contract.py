"""The contract kit on a user's own bundle: what a bundle promises, one sentence each, and whether it keeps it.

Duty: the report behind `surefoot policy check`. It opens no network: everything that reads or runs the bundle happens
in the trial's child, whose lines become verdicts here.
Strategy: the gate's checks in the order in which a load makes them, then the probes of `probes.py`. The first promise
that is broken refuses the bundle, and what comes after it is not reached; probes only warn.
Promise: whatever the files are, a report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from policies.bundle import check_files, content_digest
from policies.confine import Limits
from policies.errors import BundleError
from policies.trial import LIMITS, Line, Outcome, run_trial

Verdict = Literal["passed", "failed", "warned", "not reached"]
MARKS: dict[str, str] = {"passed": "✓", "failed": "✗", "warned": "!", "not reached": "·"}

# (step of the trial, checks, promise): the order in which a load makes them.
GATE: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("start", ("profile",), "It is known what its network means"),
    ("start", ("files", "links", "archive"), "It has its three files"),
    ("start", ("size",), "No file is over its size cap"),
    ("read", ("manifest",), "Its manifest fits the schema"),
    ("read", ("digest",), "Its network is the one that the manifest was written for"),
    ("read", ("parse",), "Its network is a whole ONNX file"),
    ("read", ("external_data",), "Its network keeps all data in its own file"),
    ("read", ("ir_version", "opset", "operators"), "Its network has standard operators only, of known versions"),
    ("read", ("interface", "batch"), "Its inputs and outputs are those that the manifest names"),
    ("read", ("golden",), "Its golden vectors fit its spaces"),
    ("load", ("load",), "ONNX Runtime opens it"),
    ("load", ("golden",), "It reproduces its golden vectors"),
    ("load", ("finite",), "It answers them with finite numbers"),
    ("load", ("latency",), "It keeps its latency budget"),
    ("load", ("memory", "cpu_time", "wall_time", "crash"), "It stays within a trial's memory and time"),
)
STEPS = ("start", "read", "load", "probe", "done")
# These are made together, when the network first answers.
TOGETHER = frozenset({"golden", "finite"})


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise and how the bundle stands to it. detail: what was found, and what to do."""

    sentence: str
    verdict: Verdict
    detail: str = ""
    check: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All promises in the order in which they are held against the bundle."""

    promises: tuple[Promise, ...]
    digest: str = ""
    cpu_s: float = 0.0
    peak_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether the bundle would be loaded; warnings do not count."""
        return not any(promise.verdict == "failed" for promise in self.promises)

    @property
    def warnings(self) -> tuple[Promise, ...]:
        return tuple(promise for promise in self.promises if promise.verdict == "warned")

    def text(self) -> str:
        """Write the report for a terminal, a line for each promise and its detail below it."""
        lines = []
        for promise in self.promises:
            lines.append(f"{MARKS[promise.verdict]} {promise.sentence}" + _aside(promise))
            lines += [f"    {part}" for part in promise.detail.splitlines()]
        return "\n".join([*lines, "", self._conclusion()])

    def _conclusion(self) -> str:
        if not self.ok:
            broken = next(promise for promise in self.promises if promise.verdict == "failed")
            return f"refused: {broken.check}"
        warned = len(self.warnings)
        warnings = f", {warned} warning{'s' * (warned != 1)}" if warned else ""
        cost = f"tried in {self.cpu_s:.2f} s of CPU time and {self.peak_bytes >> 20} MiB"
        return f"accepted{warnings}: {self.digest[:12]}, {cost}"


def _aside(promise: Promise) -> str:
    return " (not reached)" if promise.verdict == "not reached" else ""


def examine(files: Mapping[str, bytes], limits: Limits = LIMITS) -> Report:
    """Hold a bundle, its files given by name, to every promise. Never raises on what the files say."""
    try:
        check_files(files)
    except BundleError as error:
        return refused(error)
    outcome = run_trial(files, limits, probing=True)
    gate = _gate(outcome)
    return Report((*gate, *_probes(outcome)), content_digest(files), outcome.cpu_s, outcome.peak_bytes)


def refused(error: BundleError, step: str = "start") -> Report:
    """Make the report of a bundle that was refused before a trial, by `archive.py` for instance."""
    outcome = Outcome(step, error, ())
    return Report((*_gate(outcome), *_probes(outcome)))


def _gate(outcome: Outcome) -> list[Promise]:
    refusal = outcome.refusal
    if refusal is None or outcome.stage == "probe":
        return [Promise(sentence, "passed") for _, _, sentence in GATE]
    broken = _broken(refusal.check, outcome.stage)
    promises = []
    for index, (step, checks, sentence) in enumerate(GATE):
        if index == broken:
            promises.append(Promise(sentence, "failed", refusal.detail, refusal.check))
        else:
            held = _held(index, broken, step, checks, outcome.stage)
            promises.append(Promise(sentence, "passed" if held else "not reached"))
    return promises


def _broken(check: str, step: str) -> int:
    """Find the promise that a check stands for; one that no promise knows breaks the last."""
    named = [index for index, (_, checks, _) in enumerate(GATE) if check in checks]
    return next((index for index in named if GATE[index][0] == step), named[0] if named else len(GATE) - 1)


def _held(index: int, broken: int, step: str, checks: tuple[str, ...], reached: str) -> bool:
    """Whether a promise was kept before the broken one ended the trial."""
    if broken == len(GATE) - 1:  # ended from outside: only whole steps are known to have passed
        return STEPS.index(step) < STEPS.index(reached)
    return index < broken and not (step == "load" and TOGETHER & {*checks} and TOGETHER & {*GATE[broken][1]})


def _probes(outcome: Outcome) -> list[Promise]:
    from policies.probes import PROBES  # opens ONNX Runtime's library

    found = {line.promise: line for line in outcome.lines if line.stage == "probe"}
    lines = [(probe.promise, found.get(probe.promise)) for probe in PROBES]
    return [_probe(sentence, line, outcome.refusal) for sentence, line in lines if not line or line.verdict != "idle"]


def _probe(sentence: str, line: Line | None, refusal: BundleError | None) -> Promise:
    if line is None:
        return Promise(sentence, "not reached")
    if line.verdict in ("passed", "warned"):
        return Promise(sentence, "passed" if line.verdict == "passed" else "warned", line.detail)
    ended = "the trial ended here" if refusal is None else refusal.detail
    return Promise(sentence, "warned", f"while this was tried: {ended}")
