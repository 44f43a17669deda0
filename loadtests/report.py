"""What a run says: tables for a terminal, a document for machines. Pure.

Promise: a figure without a measurement is left out, never shown as 0; errors and a busy machine are said where they
were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loadtests.cases import Group
from loadtests.results import Row, references
from loadtests.targets import Verdict

HEADS = (
    "row",
    "decisions/s",
    "ratio",
    "CPU ratio",
    "p50 µs",
    "p99 µs",
    "p99.9 µs",
    "CPU µs",
    "store µs",
    "peak MB",
    "besides",
)
# Of one core. Beyond this somebody else was measured, too.
BUSY = 0.1
LATE = 0.01
AGAINST = ("refused", "failed", "given up", "fell back", "not recorded")
BESIDES = {"ready_s": "ready in {} s", "ready_cpu_s": "{} s of them computing", "goodput": "goodput {} of peak"}
FIGURES = (
    "per_s",
    "p50_us",
    "p99_us",
    "p999_us",
    "cpu_us",
    "store_cpu_us",
    "peak_mb",
    "ready_s",
    "ready_cpu_s",
    "goodput",
)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def with_spread(row: Row, figure: str) -> str:
    spread = row.spread(figure)
    return number(row.median(figure)) + ("" if spread is None else f" ±{100 * spread:.0f}%")


def _ratios(row: Row, labels: Sequence[str], rows: Mapping[str, Row], figure: str = "per_s") -> str:
    found = _all_ratios(row, labels, rows, figure)
    return ", ".join(f"{ratio:.2f} {label}" for label, ratio in found.items())


def _all_ratios(row: Row, labels: Sequence[str], rows: Mapping[str, Row], figure: str) -> dict[str, float]:
    if figure == "per_s" and row.values("rate"):
        return {}  # the rate was given: all that keep up answer as much
    found = {label: row.ratio(other, figure) for label, other in references(row.name, labels, rows).items()}
    return {label: ratio for label, ratio in found.items() if ratio is not None}


def besides(row: Row) -> str:
    """What else there is to know of a row, above all what speaks against it."""
    said = [f"{number(row.total(name))} {name}" for name in AGAINST if row.total(name)]
    for figure, text in BESIDES.items():
        if (value := row.median(figure)) is not None:
            said.append(text.format(f"{value:.2f}"))
    if (row.median("elsewhere") or 0.0) > BUSY:
        said.append(f"BUSY: others took {row.median('elsewhere'):.1f} cores")
    if (row.median("late") or 0.0) > LATE:
        said.append(f"{100 * (row.median('late') or 0):.0f}% sent late")
    return "; ".join(said)


def cells(row: Row, labels: Sequence[str], rows: Mapping[str, Row]) -> list[str]:
    """One line of a table."""
    plain = [number(row.median(name)) for name in FIGURES[1:7]]
    ratios = [_ratios(row, labels, rows, figure) for figure in ("per_s", "cpu_us")]
    return [row.name, with_spread(row, "per_s"), *ratios, *plain, besides(row)]


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; the first to the left, figures to the right, the last as it comes."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    last = len(widths) - 1

    def cell(i: int, text: str) -> str:
        return text.ljust(widths[i]) if i == 0 else text if i == last else text.rjust(widths[i])

    return "\n".join("  ".join(cell(i, text) for i, text in enumerate(line)).rstrip() for line in lines)


def tables(groups: Iterable[Group], rows: Mapping[str, Row]) -> str:
    """All groups, each with what it is about and the commands that measure its rows."""
    parts = []
    for group in groups:
        measured = [rows[entry.name] for entry in group.entries if entry.name in rows]
        if measured:
            lines = [HEADS, *(cells(row, group.references, rows) for row in measured)]
            commands = "\n".join(f"    {each}" for each in dict.fromkeys(row.command for row in measured))
            parts.append(f"{group.name}: {group.about}\n\n{table(lines)}\n\n{commands}\n")
    return "\n".join(parts)


def verdicts_table(what: str, verdicts: Sequence[Verdict]) -> str:
    """What was wanted and what was found. what: the first column's head."""
    words = {True: "pass", False: "FAIL", None: "not measured"}
    lines = [(what, "wanted", "found", "")]
    lines += [(each.what, each.wanted, number(each.found), words[each.reached]) for each in verdicts]
    return table(lines)


def runs_table(runs: Sequence[Sequence[Verdict]]) -> str:
    """Each target in every run; those that were not measured are left out."""
    words = {True: "pass", False: "FAIL", None: "not measured"}
    lines: list[Sequence[str]] = [("target", "wanted", *(f"run {i + 1}" for i in range(len(runs))), "")]
    for each in zip(*runs, strict=True):
        if any(verdict.found is not None for verdict in each):
            reached = [verdict.reached for verdict in each]
            word = words[False if False in reached else None if None in reached else True]
            lines.append((each[0].what, each[0].wanted, *(number(verdict.found) for verdict in each), word))
    return table(lines)


def document(
    machine: Mapping[str, Any], groups: Iterable[Group], rows: Mapping[str, Row], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Everything, the single repetitions included, for JSON."""
    labels = {entry.name: group.references for group in groups for entry in group.entries}
    return {
        "machine": dict(machine),
        "rows": [
            {
                "name": row.name,
                "command": row.command,
                "median": {name: row.median(name) for name in FIGURES if row.values(name)},
                "spread": {name: row.spread(name) for name in FIGURES if row.values(name)},
                "ratio": _all_ratios(row, labels[row.name], rows, "per_s"),
                "cpu_ratio": _all_ratios(row, labels[row.name], rows, "cpu_us"),
                "repetitions": [dict(sample) for sample in row.samples],
            }
            for row in rows.values()
        ],
        "targets": [asdict(each) for each in verdicts],
    }
