"""Target distribution to behaviour distribution, over choices. Pure, vectorised over the batch.

The maths of design section 4, for a target π, a mask M and a strength ε:

    π_M ∝ π · 1[M]           (a greedy target: all mass on argmax over M, ties to the lowest index)
    b   = (1 - ε) · π_M + ε · U(M)
    b   = δ(fallback)        (network fault, empty M, or no target mass on M)

With several factors π_M and U(M) are products over them, and M is a product of masks; b mixes the two products, so one
draw decides for all factors whether they explore.

Invariant: each factor of a row sums to one, and is zero outside M unless the row fell back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.heads import softmax
from policies.types import Bools, Floats, Ints, Target, columns


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What B actions are drawn from.

    own, uniform, probabilities: float64 [B, N], with probabilities = (1 - ε) · own + ε · uniform: for each factor its
    marginal. epsilon: float64 [B], in force for the row: zero where the fallback answers.
    fallback: bool [B], rows that answer with the declared fallback.
    """

    own: Floats
    uniform: Floats
    probabilities: Floats
    epsilon: Floats
    fallback: Bools
    nvec: tuple[int, ...]


def behave(target: Target, mask: Bools, epsilon: Floats, fallback: Ints) -> Behaviour:
    """Mix the masked target with uniform exploration.

    mask: bool [B, N], True for allowed. epsilon: float64 [B] in [0, 1]. fallback: int64 [B, F], the declared fallback.
    Rows where nothing can be computed or nothing is left put all mass on their fallback; the caller says why.
    """
    fallback = fallback.reshape(len(mask), -1)
    own = _masked(target, mask)
    uniform = np.empty(mask.shape)
    fallen = target.faulty.copy()
    parts = columns(target.nvec)
    for part in parts:
        mass = own[:, part].sum(axis=1)
        empty = ~(mass > 0.0)
        fallen |= empty
        own[:, part] /= np.where(empty, 1.0, mass)[:, None]
        uniform[:, part] = mask[:, part] / np.maximum(mask[:, part].sum(axis=1), 1)[:, None]
    if fallen.any():
        own[fallen] = 0.0
        for factor, part in enumerate(parts):
            own[fallen, part.start + fallback[fallen, factor]] = 1.0
        uniform[fallen] = own[fallen]
        epsilon = np.where(fallen, 0.0, epsilon)
    strength = epsilon[:, None]
    return Behaviour(own, uniform, (1.0 - strength) * own + strength * uniform, epsilon, fallen, target.nvec)


def _masked(target: Target, mask: Bools) -> Floats:
    if not target.greedy:
        return target.scores * mask if target.logits is None or mask.all() else _softmax_within(target, mask)
    own = np.zeros(mask.shape)
    rows = np.arange(len(mask))
    for part in columns(target.nvec):
        best = part.start + np.where(mask[:, part], target.scores[:, part], -np.inf).argmax(axis=1)
        own[rows, best] = mask[rows, best]  # an empty mask leaves no mass
    return own


def _softmax_within(target: Target, mask: Bools) -> Floats:
    """softmax over M alone: π_M, exact also where all of π's mass, as far as floats can tell, lies outside M."""
    assert target.logits is not None
    own = np.zeros(mask.shape)
    for part in columns(target.nvec):
        (some,) = np.nonzero(mask[:, part].any(axis=1) & ~target.faulty)
        own[some, part] = softmax(np.where(mask[some, part], target.logits[some, part], -np.inf))
    return own


def masked_mass(target: Target, mask: Bools) -> Floats:
    """Target mass that the mask took away, float64 [B]. A faulty row has none to lose."""
    distribution = target.distribution()
    if len(target.nvec) == 1:
        return np.asarray((distribution * ~mask).sum(axis=1), dtype=np.float64)
    kept = np.ones(len(mask))
    for part in columns(target.nvec):
        kept *= (distribution[:, part] * mask[:, part]).sum(axis=1)
    return np.where(target.faulty, 0.0, np.maximum(0.0, 1.0 - kept))
