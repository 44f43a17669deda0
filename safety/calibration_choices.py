"""Recorded decisions over choices, as the calibration monitor tosses them. Pure.

Duty: turn whole recorded behaviour distributions and drawn actions into bins:
    explored       the exploring part drew, of probability ε
    probability    the drawn action is one whose recorded probability lies in this range
    action         this action was drawn; the 64 most probable ones, and all others together
Strategy: a bin's mass is the sum over its actions, so that V = P(1 - P) has the covariance within a decision. Factors
of one decision depend on each other (they explore together): bins that mix factors look at one at a time, in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from policies.types import Bools, Floats, Ints, columns
from safety.calibration import Bin, Tosses

# Ranges of probability, (low, high]; the first is zero itself, whose actions are never drawn.
EDGES = (0.0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.7, 0.9, 0.97, 0.99, 0.999, 1.0)
TRACKED = 64
WARM_UP = 1_000  # decisions after which the most probable actions are chosen, where there are more than TRACKED
TOLERANCE = 1e-6  # of sums and propensities, as the promise has it

_EXPLORED = Bin("explored", "explored")
_RANGES = tuple(
    Bin("probability", "p = 0" if not at else f"p in ({EDGES[at - 1]:g}, {high:g}]") for at, high in enumerate(EDGES)
)
_FIRST_ACTION = 1 + len(_RANGES)


@dataclass(frozen=True, slots=True)
class Choices:
    """B recorded decisions over the same N choices; names as in a trainer's `Batch`.

    behaviour: float64 [B, N]. actions: int64 [B, F], drawn. epsilons: float64 [B]. explored: bool [B].
    propensities: float64 [B], NaN where it is not known: such decisions are left out. nvec: the factors' sizes.
    """

    behaviour: Floats
    actions: Ints
    epsilons: Floats
    explored: Bools
    propensities: Floats
    nvec: tuple[int, ...]


class Tracked(msgspec.Struct, frozen=True):
    """Which actions have a bin of their own. seen: float64 [N], probability summed so far; empty once chosen."""

    columns: tuple[int, ...]
    decisions: int = 0
    seen: bytes = b""

    @classmethod
    def of(cls, n: int) -> Tracked:
        """At the beginning, for N choices."""
        return cls(tuple(range(n))) if n <= TRACKED else cls((), 0, np.zeros(n).tobytes())


def bins(tracked: Tracked, n: int) -> tuple[Bin, ...]:
    """The monitor's bins for N choices; as many while the tracked actions are not chosen yet."""
    names = [f"action {column}" for column in tracked.columns] or [f"action #{rank}" for rank in range(TRACKED)]
    return (_EXPLORED, *_RANGES, *(Bin("action", name) for name in names), Bin("action", "other actions"))


def toss(decisions: Choices, tracked: Tracked) -> tuple[Tosses, Tracked]:
    """Give the decisions' tosses, and what is tracked from then on."""
    unknown = np.isnan(decisions.propensities)
    broken = ~unknown & ~_sound(decisions)
    good = ~(unknown | broken)
    behaviour, actions = decisions.behaviour[good], decisions.actions[good]
    drawn, looked_at = _drawn(decisions.nvec, behaviour.shape, actions, tracked.decisions)
    own = list(tracked.columns)
    width = len(own) or TRACKED
    masses, hits = np.zeros((len(behaviour), _FIRST_ACTION + width + 1)), np.zeros((len(behaviour), 1), np.bool_)
    hits = np.repeat(hits, masses.shape[1], axis=1)
    masses[:, 0], hits[:, 0] = decisions.epsilons[good], decisions.explored[good]
    ranges = np.searchsorted(EDGES, behaviour)
    for at in range(len(_RANGES)):
        inside = looked_at & (ranges == at)
        masses[:, 1 + at] = (behaviour * inside).sum(axis=1)
        hits[:, 1 + at] = (drawn & inside).any(axis=1)
    if own:
        masses[:, _FIRST_ACTION:-1], hits[:, _FIRST_ACTION:-1] = behaviour[:, own], drawn[:, own]
        rest = looked_at.copy()
        rest[:, own] = False
        masses[:, -1], hits[:, -1] = (behaviour * rest).sum(axis=1), (drawn & rest).any(axis=1)
    tosses = Tosses(_settle(masses), hits, int(unknown.sum()), int(broken.sum()))
    return tosses, _track(tracked, behaviour)


def _sound(decisions: Choices) -> Bools:
    """Rows that hold a distribution for each factor, and the propensity that this gives the action, bool [B]."""
    behaviour, epsilons = decisions.behaviour, decisions.epsilons
    sound: Bools = np.asarray(((behaviour >= 0.0) & (behaviour <= 1.0 + TOLERANCE)).all(axis=1))
    sound &= (epsilons >= 0.0) & (epsilons <= 1.0)
    for factor, part in enumerate(columns(decisions.nvec)):
        sound &= np.abs(behaviour[:, part].sum(axis=1) - 1.0) <= TOLERANCE
        sound &= (decisions.actions[:, factor] >= 0) & (decisions.actions[:, factor] < part.stop - part.start)
    if len(decisions.nvec) == 1:  # of several factors it is no product of what is recorded
        at = np.clip(decisions.actions[:, 0], 0, behaviour.shape[1] - 1)
        logged = behaviour[np.arange(len(behaviour)), at]
        sound &= ~(np.abs(decisions.propensities - logged) > TOLERANCE * logged)
    return sound


def _drawn(nvec: tuple[int, ...], shape: tuple[int, ...], actions: Ints, before: int) -> tuple[Bools, Bools]:
    """Drawn columns, and the columns of the factor whose turn it is, bool [B, N] each."""
    drawn, looked_at = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    rows = np.arange(shape[0])
    turn = (before + rows) % len(nvec)
    for factor, part in enumerate(columns(nvec)):
        drawn[rows, part.start + actions[:, factor]] = True
        looked_at[turn == factor, part] = True
    return drawn, looked_at


def _settle(masses: Floats) -> Floats:
    """Masses within rounding of one are one."""
    return np.where(masses > 1.0 - 1e-12, 1.0, masses)


def _track(tracked: Tracked, behaviour: Floats) -> Tracked:
    decisions = tracked.decisions + len(behaviour)
    if not tracked.seen:
        return Tracked(tracked.columns, decisions)
    seen = np.frombuffer(tracked.seen, "<f8") + behaviour.sum(axis=0)
    if decisions < WARM_UP:
        return Tracked((), decisions, seen.tobytes())
    chosen = np.sort(np.argsort(-seen, kind="stable")[:TRACKED])
    return Tracked(tuple(chosen.tolist()), decisions)
