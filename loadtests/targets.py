"""The targets, and which of them were reached. Pure.

A target whose rows were not measured is neither reached nor missed. What each row means stands in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from loadtests.results import Row

Rows = Mapping[str, Row]
DEADLINE_US = 1e6  # a request's own, unless its caller says otherwise
MANY_RULES = 20


@dataclass(frozen=True, slots=True)
class Target:
    what: str
    bound: Literal["at least", "at most"]
    limit: float
    unit: str
    found: Callable[[Rows], float | None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """reached: None where it was not measured."""

    what: str
    wanted: str
    found: float | None
    reached: bool | None


def _ratio(load: str, reference: str) -> Callable[[Rows], float | None]:
    def found(rows: Rows) -> float | None:
        mine, theirs = rows.get(f"base/surefoot/{load}"), rows.get(f"base/{reference}/{load}")
        return mine.ratio(theirs) if mine and theirs else None

    return found


def _median(name: str, figure: str, scale: float = 1.0) -> Callable[[Rows], float | None]:
    def found(rows: Rows) -> float | None:
        value = rows[name].median(figure) if name in rows else None
        return None if value is None else value * scale

    return found


def _latency_over_empty(rows: Rows) -> float | None:
    mine, theirs = rows.get("base/surefoot/c1"), rows.get("base/empty/c1")
    return mine.more(theirs, "p50_us") if mine and theirs else None


def _rule(rows: Rows) -> float | None:
    many, none = rows.get(f"rules/{MANY_RULES}/c16"), rows.get("rules/0/c16")
    more = many.more(none, "cpu_us") if many and none else None
    return None if more is None else more / MANY_RULES


TARGETS = (
    Target("throughput of the empty app, 16 connections", "at least", 0.45, "×", _ratio("c16", "empty")),
    Target("throughput of idiomatic FastAPI, 16 connections", "at least", 3.0, "×", _ratio("c16", "fastapi")),
    Target("throughput of the empty app, 64 connections", "at least", 0.55, "×", _ratio("c64", "empty")),
    Target("median latency beyond the empty app, 1 connection", "at most", 250.0, "µs", _latency_over_empty),
    Target("decisions by batches of 64", "at least", 60_000, "/s", _median("batch/of-64/c4", "per_s")),
    Target("goodput of the peak, 10 times overload", "at least", 0.7, "×", _median("overload/surefoot/10x", "goodput")),
    Target("p99 of what is accepted, 10 times overload", "at most", DEADLINE_US / 1e6, "s",
           _median("overload/surefoot/10x", "service_p99_us", 1e-6)),
    Target("processor time of each rule", "at most", 5.0, "µs", _rule),
    Target("ready from cold, 3 policies", "at most", 3.0, "s", _median("start/surefoot/cold", "ready_s")),
    Target("memory of a worker, 3 policies", "at most", 200.0, "MB", _median("start/surefoot/cold", "peak_mb")),
)  # fmt: skip

# What they are about, and nothing that they are not.
ROWS = (
    "base/empty/c1", "base/surefoot/c1", "base/empty/c16", "base/fastapi/c16", "base/surefoot/c16", "base/empty/c64",
    "base/surefoot/c64", "rules/0/c16", f"rules/{MANY_RULES}/c16", "batch/of-64/c4", "overload/surefoot/10x",
    "start/surefoot/cold",
)  # fmt: skip


def verdicts(rows: Rows) -> list[Verdict]:
    """Hold what was measured against every target."""
    given = []
    for target in TARGETS:
        found = target.found(rows)
        reached = None
        if found is not None:
            reached = found >= target.limit if target.bound == "at least" else found <= target.limit
        given.append(Verdict(target.what, f"{target.bound} {target.limit:,.6g} {target.unit}", found, reached))
    return given
