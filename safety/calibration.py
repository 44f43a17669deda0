"""Whether executed actions come as often as their recorded probabilities say. Pure.

Duty: sum, by bin, how often an event happened and how probable it was recorded to be; raise an alarm when the two
cannot be reconciled. It knows no records: `calibration_choices.py` and `calibration_points.py` say what the events are.
Strategy: in one bin every decision is one toss: an event of recorded probability P (the mass of the bin's actions) that
happened (H = 1) or not. With S = Σ(H - P) and a tilt λ, exp(λ·ΣH - Σ ln(1 - P + P·e^λ)) is a martingale that starts at
one if and only if the probabilities are true, whatever chose them; a mixture of such over a grid of λ is one too. By
Ville's inequality it ever reaches 1/α with probability α at most, so looking after every decision costs nothing.
Promise: an honest log raises an alarm with probability `alpha` at most over its whole life, all bins and looks
together. An event of probability zero that happened raises it at once. Reasons and figures: docs/calibration.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from policies.types import Bools, Floats

# Tilts: the odds of an event multiplied by 2^±8, 2^±4, 2^±2, 2^±1, 2^±½, … Neighbours differ by a factor of two, which
# loses a sixth of the evidence at worst; the smallest finds errors of 1 ‰ after millions of decisions.
_STEPS = np.arange(-3, 10)
_SIZES = np.log(2.0) * 2.0**-_STEPS
_WORTH = 1.0 / (1.0 + np.abs(_STEPS)) ** 2  # most of it on odds that are doubled or halved: a wrong ε, counted twice
TILTS: Floats = np.concatenate([_SIZES, -_SIZES])
LOG_WEIGHTS: Floats = np.log(np.concatenate([_WORTH, _WORTH]) / (2.0 * _WORTH.sum()))
_TOSSES, _HITS, _EXPECTED, _VARIANCE, _IMPOSSIBLE, _COST = 0, 1, 2, 3, 4, 5  # columns of a table of sums; _COST and on
_WIDTH = _COST + len(TILTS)


@dataclass(frozen=True, slots=True)
class Bin:
    """One toss for each decision. Groups share α evenly, and so do the bins of a group."""

    group: str
    name: str


@dataclass(frozen=True, slots=True)
class Tosses:
    """B decisions in K bins.

    masses: float64 [B, K] in [0, 1], the recorded probability of the bin's event; 0 where the bin has no part in the
    decision. hits: bool [B, K], it happened. unknown: decisions left out for want of a probability. broken: decisions
    left out because what is recorded is no distribution, or contradicts itself.
    """

    masses: Floats
    hits: Bools
    unknown: int = 0
    broken: int = 0


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a monitor knows, of bounded size; `merge` adds those of replicas up.

    ever, recent: float64 [K, 5 + tilts], since the beginning and since the last `window` decisions began.
    """

    ever: bytes
    recent: bytes
    started: int = 1  # how many windows have begun: the recent one's share of α falls with it
    decisions: int = 0
    recent_decisions: int = 0
    unknown: int = 0
    broken: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """One bin in one scope: `ever`, or `recent`, the running window.

    s, v: Σ(H - P) and Σ P·(1 - P), its variance if the probabilities are true, covariance within a decision included.
    evidence, threshold: nats; the alarm is raised where evidence reaches the threshold.
    """

    scope: str
    bin: Bin
    tosses: int  # decisions in which the event was neither impossible nor certain
    hits: int
    expected: float
    s: float
    v: float
    evidence: float
    threshold: float
    impossible: int  # events of probability zero that happened

    @property
    def alarmed(self) -> bool:
        return self.impossible > 0 or self.evidence >= self.threshold


@dataclass(frozen=True, slots=True)
class Report:
    """What a monitor says now. `alarms`: the lines that are over their threshold."""

    decisions: int
    unknown: int
    broken: int
    lines: tuple[Line, ...]

    @property
    def alarms(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.alarmed)

    @property
    def calibrated(self) -> bool:
        return not self.alarms and self.broken == 0


class Calibration:
    """The monitor of one policy.

    `observe` adds decisions, `report` judges; judging less often than after each decision only makes it milder, and a
    caller that acts on an alarm remembers it, for evidence may sink again.
    A fault may begin late: evidence since the beginning would first have to make up for all the honest decisions, so a
    second process starts anew every `window` decisions, the i-th with α/2 · 1/(i(i + 1)).
    """

    def __init__(
        self, bins: Sequence[Bin], *, alpha: float = 0.05, window: int = 5_000, sums: Sums | None = None
    ) -> None:
        if not (bins and 0.0 < alpha < 1.0 and window >= 1):
            raise ValueError("a monitor needs bins, an alpha between 0 and 1, and a window of at least one decision")
        self.bins = tuple(bins)
        self._window = window
        self._log_share = np.log(alpha / 2.0) - _log_sizes(self.bins)
        self._sums = sums or fresh(self.bins)
        self._ever, self._recent = (_table(raw, len(self.bins)) for raw in (self._sums.ever, self._sums.recent))

    def observe(self, tosses: Tosses) -> None:
        """Add decisions."""
        count, before = len(tosses.masses), self._sums
        if before.recent_decisions >= self._window:
            before = msgspec.structs.replace(before, started=before.started + 1, recent_decisions=0)
            self._recent = np.zeros(self._recent.shape)
        added = _added(np.clip(tosses.masses, 0.0, 1.0), tosses.hits)
        self._ever, self._recent = self._ever + added, self._recent + added
        self._sums = msgspec.structs.replace(
            before,
            decisions=before.decisions + count,
            recent_decisions=before.recent_decisions + count,
            unknown=before.unknown + tosses.unknown,
            broken=before.broken + tosses.broken,
        )

    @property
    def sums(self) -> Sums:
        """What to keep, and to merge."""
        return msgspec.structs.replace(self._sums, ever=self._ever.tobytes(), recent=self._recent.tobytes())

    def report(self) -> Report:
        """Judge all bins, the strongest evidence first."""
        started = self._sums.started
        lines = [
            *self._lines("ever", self._ever, -self._log_share),
            *self._lines("recent", self._recent, np.log(started * (started + 1.0)) - self._log_share),
        ]
        lines.sort(key=lambda line: (line.impossible, line.evidence - line.threshold), reverse=True)
        return Report(self._sums.decisions, self._sums.unknown, self._sums.broken, tuple(lines))

    def _lines(self, scope: str, table: Floats, thresholds: Floats) -> list[Line]:
        columns = zip(self.bins, table.tolist(), evidence(table).tolist(), thresholds.tolist(), strict=True)
        return [
            Line(
                scope=scope,
                bin=each,
                tosses=int(row[_TOSSES]),
                hits=int(row[_HITS]),
                expected=row[_EXPECTED],
                s=row[_HITS] - row[_EXPECTED],
                v=row[_VARIANCE],
                evidence=found,
                threshold=threshold,
                impossible=int(row[_IMPOSSIBLE]),
            )
            for each, row, found, threshold in columns
        ]


def evidence(table: Floats) -> Floats:
    """Log of the mixture martingale of each bin, float64 [K]: ln Σ w_λ · exp(λ·ΣH - Σ ln(1 - P + P·e^λ))."""
    exponents = LOG_WEIGHTS + table[:, _HITS, None] * TILTS - table[:, _COST:]
    largest = exponents.max(axis=1)
    return np.asarray(largest + np.log(np.exp(exponents - largest[:, None]).sum(axis=1)))


def fresh(bins: Sequence[Bin]) -> Sums:
    """Sums of nothing yet."""
    nothing = np.zeros((len(bins), _WIDTH)).tobytes()
    return Sums(ever=nothing, recent=nothing)


def merge(one: Sums, two: Sums) -> Sums:
    """Add up the sums of two replicas with the same bins: the product of their martingales is one.

    Judge the merged sums alone: replicas that judge for themselves each spend their own alpha.
    """
    if len(one.ever) != len(two.ever):
        raise ValueError("the sums are of different bins")
    return Sums(
        ever=_plus(one.ever, two.ever),
        recent=_plus(one.recent, two.recent),
        started=one.started + two.started,
        decisions=one.decisions + two.decisions,
        recent_decisions=one.recent_decisions + two.recent_decisions,
        unknown=one.unknown + two.unknown,
        broken=one.broken + two.broken,
    )


def _added(masses: Floats, hits: Bools) -> Floats:
    """Sums over the decisions of a batch, [K, 5 + tilts]."""
    table = np.empty((masses.shape[1], _WIDTH))
    open_to = (masses > 0.0) & (masses < 1.0)
    counted = hits & (masses > 0.0)  # what cannot happen has no place in a sum of logs
    table[:, _TOSSES] = open_to.sum(axis=0)
    table[:, _HITS] = counted.sum(axis=0)
    table[:, _EXPECTED] = masses.sum(axis=0)
    table[:, _VARIANCE] = (masses * (1.0 - masses)).sum(axis=0)
    table[:, _IMPOSSIBLE] = (hits & ~counted).sum(axis=0) + (~hits & (masses >= 1.0)).sum(axis=0)
    for at, tilt in enumerate(TILTS):
        table[:, _COST + at] = np.log1p(masses * np.expm1(tilt)).sum(axis=0)
    return table


def _log_sizes(bins: Sequence[Bin]) -> Floats:
    """Log of how many shares α is cut into for each bin."""
    groups = [each.group for each in bins]
    return np.log([float(len(set(groups)) * groups.count(group)) for group in groups])


def _table(raw: bytes, bins: int) -> Floats:
    if len(raw) != bins * _WIDTH * 8:
        raise ValueError("the sums are of other bins")
    return np.frombuffer(raw, "<f8").reshape(bins, _WIDTH)


def _plus(one: bytes, two: bytes) -> bytes:
    return bytes((np.frombuffer(one, "<f8") + np.frombuffer(two, "<f8")).tobytes())
