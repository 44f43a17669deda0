"""What growth is measured over: series of servers that differ in one number. Pure.

Duty: the table of all points. It starts nothing.
Strategy: the servers of a series run side by side and take turns, so that a point is only ever held against the
smallest one of its series, measured a moment before or after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loadtests.cases import CLOSED, SUREFOOT, Entry, Spec

LOAD = CLOSED[16]
Kind = Literal["versions", "rules", "pending", "keys"]


@dataclass(frozen=True, slots=True)
class Series:
    """Servers that differ in one number, which is brought about through their own doors before anything is measured.

    counted: as many decisions in each measurement, whatever they take, so that measuring changes sizes alike; else wrk.
    rewarded: each decision gets its reward, measured by itself: so what waits stays as many as it was.
    flat: the figures that must not grow with the number. logarithmic: those that may grow as its logarithm does.
    """

    kind: Kind
    about: str
    axis: str
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    counted: bool = False
    rewarded: bool = False
    flat: tuple[str, ...] = ("cpu_us",)
    logarithmic: tuple[str, ...] = ()

    def spec(self, size: int) -> Spec:
        """The server of a point."""
        if self.kind == "rules":
            return replace(SUREFOOT, rules=size)
        return replace(SUREFOOT, limits=1) if self.kind == "keys" else SUREFOOT

    def name(self, size: int) -> str:
        return f"{self.kind}/{size}/{LOAD.name}"

    def entry(self, size: int) -> Entry:
        return Entry(self.kind, str(size), self.spec(size), LOAD)

    def owns(self, name: str) -> bool:
        """Tell whether a point is one of this series."""
        return name.startswith(f"{self.kind}/")


SERIES = (
    Series("versions", "versions of the policy that are loaded; the first decides, the others stand by",
           "versions loaded", (1, 10, 100), (1, 3)),
    Series("rules", "thresholds on a feature", "rules", (0, 5, 10, 20, 35, 50), (0, 20, 50), flat=()),
    Series("pending", "decisions that wait for their reward, in the join in Valkey", "pending decisions",
           (10**3, 10**4, 10**5, 10**6), (10**3, 10**4), counted=True, rewarded=True,
           logarithmic=("store_cpu_us", "reward_store_us")),
    Series("keys", "keys whose executions a rate rule counts, in Valkey; each has a pending decision, too",
           "keys tracked", (10**2, 10**3, 10**4, 10**5, 10**6), (10**2, 10**3), counted=True,
           logarithmic=("store_cpu_us",)),
)  # fmt: skip


def chosen(only: Sequence[str], *, quick: bool = False, largest: int | None = None) -> list[tuple[Series, list[int]]]:
    """The series that are named, all unless any is, with their sizes up to `largest`.

    Raises ValueError for a name that is none.
    """
    unknown = set(only) - {each.kind for each in SERIES}
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))} is no series; there are {', '.join(each.kind for each in SERIES)}"
        )
    found = []
    for each in SERIES:
        sizes = [size for size in (each.quick if quick else each.sizes) if largest is None or size <= largest]
        if sizes and (not only or each.kind in only):
            found.append((each, sizes))
    return found
