"""What was measured, row by row: medians, spreads, and ratios within a repetition. Pure.

Strategy: repetition i of one row is only ever held against repetition i of another, measured a moment before or after;
a ratio is the median of those. Two medians of different moments are never divided.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Sample = Mapping[str, float]  # what one repetition gave, by name of the figure


@dataclass(slots=True)
class Row:
    """All repetitions of one row."""

    name: str
    command: str
    samples: list[Sample] = field(default_factory=list)

    def values(self, figure: str) -> list[float]:
        return [sample[figure] for sample in self.samples if figure in sample]

    def median(self, figure: str) -> float | None:
        """None where the row has no such figure."""
        found = self.values(figure)
        return statistics.median(found) if found else None

    def total(self, figure: str) -> float:
        return sum(self.values(figure))

    def spread(self, figure: str) -> float | None:
        """Half of what lies between least and most, as a share of the median; None for a single repetition."""
        found = self.values(figure)
        middle = self.median(figure)
        return (max(found) - min(found)) / 2 / middle if len(found) > 1 and middle else None

    def against(self, other: Row, figure: str, how: Callable[[float, float], float]) -> float | None:
        """The median over repetitions of how(ours, theirs); None where either lacks the figure."""
        pairs = [
            (mine[figure], theirs[figure])
            for mine, theirs in zip(self.samples, other.samples, strict=False)
            if figure in mine and theirs.get(figure)
        ]
        return statistics.median([how(mine, theirs) for mine, theirs in pairs]) if pairs else None

    def ratio(self, other: Row, figure: str = "per_s") -> float | None:
        return self.against(other, figure, lambda mine, theirs: mine / theirs)

    def more(self, other: Row, figure: str) -> float | None:
        return self.against(other, figure, lambda mine, theirs: mine - theirs)


def references(name: str, labels: Sequence[str], rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows of the same group and load that a row is held against, by label; without itself."""
    group, label, load = name.split("/")
    found = {each: rows.get(f"{group}/{each}/{load}") for each in labels if each != label}
    return {each: row for each, row in found.items() if row is not None}
