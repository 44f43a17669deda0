"""What a row found, and the table of all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.oracle import Verdict

HEADINGS = ("row", "fault", "issued", "acknowledged", "delivered", "lost", "unexpected", "duplicates", "notes")


@dataclass
class Report:
    """Figures are acts + rewards, duplicates before / after the trainer's dedupe."""

    row: int
    fault: str
    verdict: Verdict
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # promises that did not hold, besides those that are counted
    may_lose: str = ""  # why this row's loss is within its promise; empty: nothing may be lost

    def expect(self, holds: object, promise: str) -> None:
        """Note a promise as broken unless it holds."""
        if not holds:
            self.broken.append(promise)

    @property
    def failures(self) -> list[str]:
        """All that is not as promised."""
        verdict, found = self.verdict, list(self.broken)
        counted = {
            "unexpected": verdict.acts.unexpected + verdict.rewards.unexpected,
            "mismatch": verdict.mismatches,
            "violation": verdict.violations,
        }
        if not self.may_lose:
            counted["lost"] = verdict.acts.lost + verdict.rewards.lost
        for what, each in counted.items():
            if each:
                found.append(f"{len(each)} {what}: {'; '.join(each[:3])}")
        if verdict.duplicates_after:
            found.append(f"{verdict.duplicates_after} transitions given to a trainer twice")
        return found

    def cells(self) -> tuple[str, ...]:
        acts, rewards, verdict = self.verdict.acts, self.verdict.rewards, self.verdict
        return (
            str(self.row),
            self.fault,
            f"{acts.issued} + {rewards.issued}",
            f"{acts.acknowledged} + {rewards.acknowledged}",
            f"{acts.delivered} + {rewards.delivered}",
            f"{len(acts.lost)} + {len(rewards.lost)}",
            str(verdict.unexpected),
            f"{verdict.duplicates_before} / {verdict.duplicates_after}",
            "; ".join([*self.notes, *([f"loss allowed: {self.may_lose}"] if self.may_lose else []), *self.failures]),
        )


@dataclass(frozen=True)
class Settings:
    """How large a run is, and what chance does in it."""

    folder: Path
    seed: int
    full: bool = False
    tier: str = "process"

    @property
    def chance(self) -> random.Random:
        return random.Random(self.seed)

    def either(self, quick: float, full: float) -> float:
        return full if self.full else quick

    def count(self, quick: int, full: int) -> int:
        return full if self.full else quick


Scenario = Callable[[Settings], Report]


@dataclass(frozen=True)
class Row:
    """One way to run a row of the fault table."""

    number: int
    name: str
    run: Scenario
    tiers: Sequence[str] = ("process",)
    in_tests: bool = True  # with its last tier; the others are run by hand


def table(reports: Sequence[Report]) -> str:
    """A Markdown table, which aligns in a terminal too."""
    lines = [HEADINGS, *(report.cells() for report in reports)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADINGS) - 1)]
    text = [
        "| " + " | ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join(["---"] * len(HEADINGS)) + "|")
    return "\n".join(text)
