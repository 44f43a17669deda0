"""Recorded decisions in a box, as the calibration monitor tosses them. Pure; loads scipy.

Duty: turn recorded heads, boxes and draws into bins:
    explored    the exploring part drew, of probability ε
    end         the coordinate landed on the low (or high) end of its box, of the mass that projection gathers there
    own, noise  the distribution function of the part that drew, at its draw, lies in this eighth
Strategy: coordinates of one decision depend on each other (they explore together), so each decision shows one of them,
in turn. The part that drew is recorded, so its raw draw is a known normal and its probability integral transform
uniform: eighths have 1/8 each, given the part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from policies.continuous import Transform
from policies.types import Bools, Floats, Ints
from safety.calibration import Bin, Tosses

EIGHTHS = 8
BINS = (
    Bin("explored", "explored"),
    Bin("end", "low end"),
    Bin("end", "high end"),
    *(Bin(part, f"{part} u in [{at}/8, {at + 1}/8)") for part in ("own", "noise") for at in range(EIGHTHS)),
)


@dataclass(frozen=True, slots=True)
class Points:
    """B recorded decisions of versions with the same transform; names as in a trainer's `Batch`.

    target: float64 [B, 2·D], raw means and then deviations. boxes: float64 [B, 2, D]. sigmas, raw_actions:
    float64 [B, D]. at_bound: int64 [B, D]. epsilons, log_propensities: float64 [B], the latter NaN where not known.
    explored, fallback: bool [B].
    """

    target: Floats
    boxes: Floats
    sigmas: Floats
    raw_actions: Floats
    at_bound: Ints
    epsilons: Floats
    log_propensities: Floats
    explored: Bools
    fallback: Bools
    transform: Transform


def toss(points: Points, before: int) -> Tosses:
    """Give the decisions' tosses. before: decisions tossed so far. The fallback's decisions are no draws: left out."""
    unknown = np.isnan(points.log_propensities)
    broken = ~unknown & ~((points.epsilons >= 0.0) & (points.epsilons <= 1.0) & np.isfinite(points.target).all(axis=1))
    (rows,) = np.nonzero(~(unknown | broken | points.fallback))
    size = points.raw_actions.shape[1]
    turn = (before + np.arange(len(rows))) % size
    mean, std = points.target[rows, turn], points.target[rows, size + turn]
    low, high = points.boxes[rows, 0, turn], points.boxes[rows, 1, turn]
    sigma, raw = points.sigmas[rows, turn], points.raw_actions[rows, turn]
    explored, epsilons = points.explored[rows], points.epsilons[rows]
    here = _at(points.transform, turn)
    with np.errstate(over="ignore"):
        centre = np.clip(here.apply(mean), low, high)
    masses, hits = np.zeros((len(rows), len(BINS))), np.zeros((len(rows), len(BINS)), np.bool_)
    masses[:, 0], hits[:, 0] = epsilons, explored
    wide = low < high  # a side without width has no ends
    for column, end, side in ((1, low, -1), (2, high, 1)):
        own = _beyond(here.inverse(end), mean, std, side)
        noise = _beyond(end, centre, sigma, side)
        masses[:, column] = np.where(wide, (1.0 - epsilons) * own + epsilons * noise, 0.0)
        hits[:, column] = points.at_bound[rows, turn] == side
    spread = np.where(explored, sigma, std)
    random = spread > 0.0
    u = ndtr((raw - np.where(explored, centre, mean)) / np.where(random, spread, 1.0))
    eighth = np.minimum((u * EIGHTHS).astype(np.int64), EIGHTHS - 1)
    for first, drew in ((3, random & ~explored), (3 + EIGHTHS, random & explored)):
        for at in range(EIGHTHS):
            masses[:, first + at], hits[:, first + at] = drew / EIGHTHS, drew & (eighth == at)
    return Tosses(masses, hits, int(unknown.sum()), int(broken.sum()))


def _at(transform: Transform, turn: Ints) -> Transform:
    """The transform of one coordinate for each row."""
    return Transform(transform.kind, transform.low[turn], transform.high[turn])


def _beyond(end: Floats, mean: Floats, spread: Floats, side: int) -> Floats:
    """Probability of N(mean, spread²) at or beyond an end, float64 [B]; all or nothing without spread."""
    random = spread > 0.0
    with np.errstate(invalid="ignore"):
        away = side * (mean - end)
        return np.asarray(np.where(random, ndtr(away / np.where(random, spread, 1.0)), away >= 0.0))
