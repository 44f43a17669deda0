"""What shadows have come to, as a table for people. Pure.

Duty: words and columns. Numbers are those of the JSON; docs/shadows.md says what each means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from service.columns import clean, left, number, row

# Columns of the table: the figure, and its heading.
COLUMNS = {
    "scored": "scored",
    "agreement": "agrees",
    "divergence": "differ",
    "override_rate": "rules",
    "fallback_rate": "falls",
    "fault_rate": "faults",
    "share": "kept",
}
FIGURE = 6
WIDTHS = (10, 8, 9, *[FIGURE] * (len(COLUMNS) - 1), FIGURE)  # at 80 columns


def shadows_text(answer: Mapping[str, Any]) -> str:
    """A line for each shadow. answer: of `GET …/shadows`."""
    here = answer.get("here") or []
    missing = sorted(set(answer.get("shadows") or []) - {each["version"] for each in here})
    lines = [row(("shadow", "status", *COLUMNS.values(), "p99 ms"), WIDTHS, words=2)] if here else []
    for each in here:
        figures = (number(each.get(name), width) for name, width in zip(COLUMNS, WIDTHS[2:], strict=False))
        slowest = number((each.get("latency_ms") or {}).get("p99"), FIGURE)
        lines.append(row((each["version"], str(each.get("status")), *figures, slowest), WIDTHS, words=2))
        if each.get("reason"):
            lines.append(clean(f"  {each['version']}: {each['reason']}"))
    lines += [clean(f"{each}: not watching on this replica yet") for each in missing]
    return "\n".join(lines) or clean(f"no version watches {answer.get('policy')}")


def shadow_text(shadow: Mapping[str, Any]) -> str:
    """All figures of one shadow, one a line."""
    return "\n".join(f"{left(name, 16)} {clean(value)}" for name, value in _figures(shadow))


def _figures(shadow: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in shadow.items():
        if isinstance(value, Mapping):
            yield name, ", ".join(f"{inner} {_figure(each)}" for inner, each in value.items())
        else:
            yield name, _figure(value)


def _figure(value: object) -> str:
    return number(value, 12) if isinstance(value, int | float) else "-" if value is None else str(value)
