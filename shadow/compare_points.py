"""What a shadow would have done, held against what was done, over points in a box. Pure; loads scipy.

Duty: as `compare.py`, for continuous actions: the density of the executed point under the shadow's projected Gaussian,
and distances between Gaussians.
Strategy: log-propensities are with respect to Lebesgue measure plus atoms (`policies/continuous.py`). The ends of the
box are atoms of both versions; what a deterministic head does is an atom of that version alone. Where the log has such
an atom and the shadow has not, the shadow's mass there is zero; where the shadow has one and the log has not, there is
no ratio: such a row says nothing about the shadow.

    divergence = largest |c - c'| of a coordinate, as a share of its side (1 where it has no ends and they differ)
    W2         = √(Σ (m - m')² + Σ (s - s')²) of the raw Gaussians; NaN where the two transform differently
"""

from __future__ import annotations

import numpy as np

from policies.continuous import Gaussian, PointBehaviour, Transform, atoms, behave, draw, log_propensity_at, propose
from policies.types import Bools, Floats
from shadow.compare import Compared
from shadow.shown import PointRows

# Of the side: what an actuator does not notice.
SAME = 0.01


def compare_points(
    wanted: Gaussian, transform: Transform, logged: PointRows, u: Floats, fallback: tuple[float, ...] | None
) -> Compared:
    """Compare a shadow in a box. u: float64 [B, 1 + D], the decisions' own uniforms. fallback: its declared one."""
    mine, theirs = _without_exploring(wanted, transform, logged, fallback), _decided(logged)
    acts, theirs_act = draw(mine, u).actions, draw(theirs, u).actions
    unmasked = propose(mine, u)
    refused = mine.fallback & (fallback is None)
    log_probability = np.where(refused, -np.inf, _log_probability(mine, theirs, logged))
    kinds = log_propensity_at(mine, logged.actions)[1]
    nothing = np.full(len(u), np.nan)
    return Compared(
        target=wanted.distribution,
        log_probability=log_probability,
        kinds=kinds,
        proposed=acts,
        unmasked=unmasked,
        agrees=np.asarray((_apart(acts, theirs_act, transform) <= SAME) & ~refused),
        overridden=_outside(unmasked, logged) & ~wanted.faulty,
        fallen=mine.fallback,
        faulty=wanted.faulty,
        divergence=np.where(refused, 1.0, _apart(_middle(mine), _middle(theirs), transform)),
        kl=nothing,
        w2=_w2(wanted, transform, logged),
        value=nothing,
        expected=nothing,
        difference=nothing,
    )


def _without_exploring(
    wanted: Gaussian, transform: Transform, logged: PointRows, fallback: tuple[float, ...] | None
) -> PointBehaviour:
    declared = np.tile(np.zeros(logged.low.shape[1]) if fallback is None else np.array(fallback), (len(logged.low), 1))
    return behave(wanted, transform, (logged.low, logged.high), np.zeros(len(declared)), None, declared)


def _decided(logged: PointRows) -> PointBehaviour:
    """What decided, without exploration: as it was recorded."""
    fallen = logged.fallen[:, None]
    low, high = np.where(fallen, logged.declared, logged.low), np.where(fallen, logged.declared, logged.high)
    gaussian, none = Gaussian(logged.mean, logged.std, logged.fallen), np.zeros(len(low))
    return PointBehaviour(
        gaussian, logged.transform, low, high, logged.centre, None, none, logged.fallen, logged.declared
    )


def _middle(behaviour: PointBehaviour) -> Floats:
    return np.where(behaviour.fallback[:, None], behaviour.declared, behaviour.centre)


def _log_probability(mine: PointBehaviour, theirs: PointBehaviour, logged: PointRows) -> Floats:
    """log of what the shadow gives the executed point, in the measure of the logged propensity, float64 [B]."""
    log_b, _ = log_propensity_at(mine, logged.actions)
    there = (logged.actions == mine.declared).all(axis=1)
    log_b = np.where(mine.fallback, np.where(there, 0.0, -np.inf), log_b)
    my_atoms, their_atoms = _all_atoms(mine, logged.actions, there), _all_atoms(theirs, logged.actions, None)
    no_mass = (their_atoms & ~my_atoms).any(axis=1)
    no_ratio = (my_atoms & ~their_atoms).any(axis=1) & (log_b > -np.inf)
    return np.where(no_mass, -np.inf, np.where(no_ratio, np.nan, log_b))


def _all_atoms(behaviour: PointBehaviour, actions: Floats, there: Bools | None) -> Bools:
    """Coordinates at which a behaviour has an atom, bool [B, D]; a fallback is one point."""
    fallen = behaviour.fallback if there is None else behaviour.fallback & there
    return np.asarray(atoms(behaviour, actions) | fallen[:, None])


def _apart(one: Floats, two: Floats, transform: Transform) -> Floats:
    """The largest distance of a coordinate as a share of its side, float64 [B] in [0, 1]."""
    gap, side = np.abs(one - two), transform.high - transform.low
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(np.isfinite(side) & (side > 0.0), gap / side, gap > SAME * np.maximum(1.0, np.abs(two)))
    return np.asarray(np.minimum(share.max(axis=1), 1.0), dtype=np.float64)


def _outside(points: Floats, logged: PointRows) -> Bools:
    if logged.ruled_low is None or logged.ruled_high is None:
        return np.zeros(len(points), dtype=np.bool_)
    return np.asarray(((points < logged.ruled_low) | (points > logged.ruled_high)).any(axis=1))


def _w2(wanted: Gaussian, transform: Transform, logged: PointRows) -> Floats:
    if transform.kind != logged.transform.kind:
        return np.full(len(logged.low), np.nan)
    squares = (wanted.mean - logged.mean) ** 2 + (wanted.std - logged.std) ** 2
    return np.where(wanted.faulty | logged.fallen, np.nan, np.sqrt(squares.sum(axis=1)))
