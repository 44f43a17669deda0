"""Target distribution to behaviour distribution. Pure, vectorised over the batch.

The maths of design section 4, for a target π, a mask M and a strength ε:

    π_M ∝ π · 1[M]           (a greedy target: all mass on argmax over M, ties to the lowest index)
    b   = (1 - ε) · π_M + ε · U(M)
    b   = δ(fallback)        (network fault, empty M, or no target mass on M)

Invariant: each row of `probabilities` sums to one, and is zero outside M unless the row fell back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.types import Bools, Floats, Ints, Target


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What B actions are drawn from.

    own, uniform, probabilities: float64 [B, n], with probabilities = (1 - ε) · own + ε · uniform.
    epsilon: float64 [B], in force for the row: zero where the fallback answers.
    fallback: bool [B], rows that answer with the declared fallback.
    """

    own: Floats
    uniform: Floats
    probabilities: Floats
    epsilon: Floats
    fallback: Bools


def behave(target: Target, mask: Bools, epsilon: Floats, fallback: Ints) -> Behaviour:
    """Mix the masked target with uniform exploration.

    mask: bool [B, n], True for allowed. epsilon: float64 [B] in [0, 1]. fallback: int64 [B], the declared fallback.
    Rows where nothing can be computed or nothing is left put all mass on their fallback; the caller says why.
    """
    own = _masked(target, mask)
    mass = own.sum(axis=1)
    fallen = target.faulty | ~(mass > 0.0)
    own = own / np.where(fallen, 1.0, mass)[:, None]
    allowed = mask.sum(axis=1)
    uniform = mask / np.maximum(allowed, 1)[:, None]
    if fallen.any():
        own[fallen] = 0.0
        own[fallen, fallback[fallen]] = 1.0
        uniform[fallen] = own[fallen]
        epsilon = np.where(fallen, 0.0, epsilon)
    strength = epsilon[:, None]
    return Behaviour(own, uniform, (1.0 - strength) * own + strength * uniform, epsilon, fallen)


def _masked(target: Target, mask: Bools) -> Floats:
    if not target.greedy:
        return target.scores * mask
    best = np.where(mask, target.scores, -np.inf).argmax(axis=1)
    own = np.zeros(mask.shape)
    rows = np.arange(len(best))
    own[rows, best] = mask[rows, best]  # an empty mask leaves no mass
    return own


def masked_mass(target: Target, mask: Bools) -> Floats:
    """Target mass that the mask took away, float64 [B]."""
    return np.asarray((target.distribution() * ~mask).sum(axis=1), dtype=np.float64)
