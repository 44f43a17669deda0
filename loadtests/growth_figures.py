"""What growth comes to: each point against the smallest, the price of a rule, flat or not. Pure.

Strategy: as in `results.py`, repetition i of one point is held against repetition i of another, a moment before or
after; a figure is the median of those.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtests.growth_cases import Series
from loadtests.report import besides, number, table, with_spread
from loadtests.results import Row
from loadtests.targets import Verdict

Rows = Mapping[str, Row]

# Of the smallest point; what repetitions of one server differ by on a quiet machine is half of that.
FLAT = 1.1
RULE_US = 5.0
# A rule's price in the upper half against that in the lower half. Twice as many rules at a quadratic cost: 3.
LINEAR = 1.5
FIGURES = {
    "cpu_us": "service, a decision",
    "store_cpu_us": "Valkey, a decision",
    "reward_us": "service, a reward",
    "reward_store_us": "Valkey, a reward",
}


@dataclass(frozen=True, slots=True)
class Growth:
    """One series, measured: its points by size, smallest first."""

    series: Series
    points: Mapping[int, Row]

    @classmethod
    def of(cls, series: Series, sizes: Sequence[int], rows: Rows) -> Growth:
        """Take the points that were measured."""
        return cls(series, {size: rows[series.name(size)] for size in sizes if series.name(size) in rows})

    @property
    def smallest(self) -> Row:
        return self.points[min(self.points)]

    def figures(self) -> list[str]:
        return [figure for figure in FIGURES if any(row.values(figure) for row in self.points.values())]

    def relative(self, figure: str) -> dict[int, float]:
        """Each point over the smallest, 1 for that itself."""
        found = {size: row.ratio(self.smallest, figure) for size, row in self.points.items()}
        return {size: ratio for size, ratio in found.items() if ratio is not None}

    def repetitions(self, figure: str) -> list[tuple[int, float]]:
        """Each repetition of each point over that of the smallest."""
        return [
            (size, mine / theirs)
            for size, row in self.points.items()
            for mine, theirs in zip(row.values(figure), self.smallest.values(figure), strict=False)
            if theirs
        ]

    def more(self, figure: str) -> dict[int, float]:
        """Microseconds that each point takes beyond the smallest."""
        found = {size: row.more(self.smallest, figure) for size, row in self.points.items()}
        return {size: extra for size, extra in found.items() if extra is not None}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Give the slope of the line through points by least squares. Raises ValueError for fewer than two places."""
    try:
        return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope
    except statistics.StatisticsError as error:
        raise ValueError(str(error)) from None


def findings(growth: Growth) -> list[Verdict]:
    """Hold a series against what is promised of it."""
    low, high = min(growth.points), max(growth.points)
    found = [_held(growth, figure, FLAT) for figure in growth.series.flat]
    if low > 1:
        found += [_held(growth, figure, math.log(high) / math.log(low)) for figure in growth.series.logarithmic]
    return found + _rules(growth) if growth.series.kind == "rules" else found


def _held(growth: Growth, figure: str, limit: float) -> Verdict:
    low, high = min(growth.points), max(growth.points)
    ratio = growth.relative(figure).get(high) if high > low else None
    what = f"{FIGURES[figure]}: {high:,} {growth.series.axis} against {low:,}"
    return Verdict(what, f"at most {limit:.3g} ×", ratio, None if ratio is None else ratio <= limit)


def _rules(growth: Growth) -> list[Verdict]:
    extra = sorted(growth.more("cpu_us").items())
    wanted = f"at most {RULE_US:g} µs"
    if len(extra) < 2:
        return [Verdict("service, each rule", wanted, None, None)]
    price = slope(extra)
    found = [Verdict("service, each rule", wanted, price, price <= RULE_US)]
    if len(extra) > 2:
        half = len(extra) // 2
        lower, upper = slope(extra[: half + 1]), slope(extra[half:])
        bend = upper / lower if lower > 0 else None
        reached = None if bend is None else bend <= LINEAR
        found.append(Verdict("service, a rule among many over one among few", f"at most {LINEAR:g} ×", bend, reached))
    return found


def growth_table(growth: Growth) -> str:
    """A line for each point: medians, spreads, and how many times the smallest."""
    figures = growth.figures()
    heads = [growth.series.axis]
    for figure in figures:
        heads += [f"{FIGURES[figure]}, µs", "×"]
    lines: list[Sequence[str]] = [[*heads, "peak MB", "besides"]]
    for size, row in growth.points.items():
        line = [f"{size:,}"]
        for figure in figures:
            line += [with_spread(row, figure), number(growth.relative(figure).get(size))]
        lines.append([*line, number(row.median("peak_mb")), besides(row)])
    return table(lines)
