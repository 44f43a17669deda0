"""Target distribution to behaviour distribution, over choices. Pure, vectorised over the batch.

The maths of design section 4, for a target π, a mask M and a strength ε:

    π_M ∝ π · 1[M]           (a greedy target: all mass on argmax over M, ties to the lowest index)
    b   = (1 - ε) · π_M + ε · X
    b   = δ(fallback)        (network fault, empty M, or no target mass on M)

The exploring part X is U(M), uniform over M, unless rules or the exploration's kind say otherwise: U(M ∩ E) where only
E may be explored, softmax(q/T) over M ∩ E for softmax exploration. With several factors π_M and X are products over
them, and M is a product of masks; b mixes the two products, so one draw decides for all factors whether they explore.

Invariant: each factor of a row sums to one, and is zero outside M unless the row fell back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from policies.heads import softmax
from policies.types import Bools, Floats, Ints, Target, columns


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What B actions are drawn from.

    own, exploring, probabilities: float64 [B, N], with probabilities = (1 - ε) · own + ε · exploring: for each factor
    its marginal. epsilon: float64 [B], in force for the row: zero where the fallback answers, or nothing may be
    explored. fallback: bool [B], rows that answer with the declared fallback.
    """

    own: Floats
    exploring: Floats
    probabilities: Floats
    epsilon: Floats
    fallback: Bools
    nvec: tuple[int, ...]
    certain: bool = False  # own has all mass of a factor on one choice, in every row


def behave(
    target: Target,
    mask: Bools,
    epsilon: Floats,
    fallback: Ints,
    weights: Bools | Floats | None = None,
    frozen: Bools | None = None,
) -> Behaviour:
    """Mix the masked target with exploration.

    mask: bool [B, N], True for allowed. epsilon: float64 [B] in [0, 1]. fallback: int64 [B, F], the declared fallback.
    weights: [B, N], not negative: X in proportion to them within M; None: uniform. Where they leave a factor nothing,
    the row does not explore. frozen: bool [B], rows whose own part is the mode of π_M instead of a sample from it.
    Rows where nothing can be computed or nothing is left put all mass on their fallback; the caller says why.
    """
    fallback = fallback.reshape(len(mask), -1)
    own, some = _masked(target, mask)
    exploring, barred = exploring_part(mask, weights, target.nvec)
    fallen = target.faulty | ~some
    parts = columns(target.nvec)
    if frozen is not None:
        for part in parts:
            own[frozen, part] = _mode(own[frozen, part])
    if (barred := barred | fallen).any():
        own[fallen] = 0.0
        for factor, part in enumerate(parts):
            own[fallen, part.start + fallback[fallen, factor]] = 1.0
        exploring[barred] = own[barred]
        epsilon = np.where(barred, 0.0, epsilon)
    strength = epsilon[:, None]
    probabilities = (1.0 - strength) * own + strength * exploring
    return Behaviour(own, exploring, probabilities, epsilon, fallen, target.nvec, target.greedy)


def exploring_part(mask: Bools, weights: Bools | Floats | None, nvec: tuple[int, ...]) -> tuple[Floats, Bools]:
    """What exploring draws from, float64 [B, N]: in proportion to the weights within M, or uniform; and bool [B], rows
    of which they leave some factor nothing.
    """
    barred = np.zeros(len(mask), dtype=np.bool_)
    if weights is None and mask.all():
        return uniform(tuple(nvec)).repeat(len(mask), axis=0), barred
    exploring = np.asarray(mask if weights is None else weights * mask, dtype=np.float64)
    for part in columns(nvec):
        barred |= ~_normalise(exploring[:, part])
    return exploring, barred


@lru_cache
def uniform(nvec: tuple[int, ...]) -> Floats:
    """One row: U over all choices, factor by factor, float64 [1, N]."""
    return np.concatenate([np.full(n, 1.0 / n) for n in nvec])[None]


def _mode(own: Floats) -> Floats:
    """All of a row's mass on its most probable choice, ties to the lowest index; a row without mass keeps none."""
    mode = np.zeros(own.shape)
    rows, best = np.arange(len(own)), own.argmax(axis=1)
    mode[rows, best] = own[rows, best] > 0.0
    return mode


def _normalise(weights: Floats) -> Bools:
    """Scale rows to a sum of one, in place; bool [B], False for a row that has nothing to scale."""
    mass = weights.sum(axis=1)
    some: Bools = mass > 0.0
    weights /= np.where(some, mass, 1.0)[:, None]
    return some


def softmax_weights(target: Target, mask: Bools, temperature: Floats) -> Floats:
    """Weights exp(q/T) within each factor's mask, for softmax exploration, float64 [B, N].

    temperature: float64 [B], above zero. Of a head that is stochastic itself q is its logits, or logarithms.
    """
    with np.errstate(divide="ignore"):
        scores = target.scores if target.greedy else np.log(target.scores) if target.logits is None else target.logits
    weights = np.zeros(mask.shape)
    for part in columns(target.nvec):
        (some,) = np.nonzero((mask[:, part] & np.isfinite(scores[:, part])).any(axis=1) & ~target.faulty)
        open_to = np.where(mask[some, part], scores[some, part] / temperature[some, None], -np.inf)
        weights[some, part] = softmax(open_to)
    return weights


def _masked(target: Target, mask: Bools) -> tuple[Floats, Bools]:
    """π_M, float64 [B, N], and bool [B]: whether each factor has any mass."""
    parts = columns(target.nvec)
    if target.greedy:
        own, rows = np.zeros(mask.shape), np.arange(len(mask))
        some = np.ones(len(mask), dtype=np.bool_)
        for factor, part in enumerate(parts):
            best = part.start + target.best[:, factor]
            if not mask[rows, best].all():
                best = part.start + np.where(mask[:, part], target.scores[:, part], -np.inf).argmax(axis=1)
            left = mask[rows, best]
            own[rows, best] = left  # an empty mask leaves no mass
            some &= left
        return own, some
    own = target.scores * mask if target.logits is None or mask.all() else _softmax_within(target, mask)
    some = np.ones(len(mask), dtype=np.bool_)
    for part in parts:
        some &= _normalise(own[:, part])
    return own, some


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
    if mask.all():
        return np.zeros(len(mask))
    if target.greedy and len(target.nvec) == 1:
        return np.asarray(~(mask[np.arange(len(mask)), target.best[:, 0]] | target.faulty), dtype=np.float64)
    distribution = target.distribution
    if len(target.nvec) == 1:
        return np.asarray((distribution * ~mask).sum(axis=1), dtype=np.float64)
    kept = np.ones(len(mask))
    for part in columns(target.nvec):
        kept *= (distribution[:, part] * mask[:, part]).sum(axis=1)
    return np.where(target.faulty, 0.0, np.maximum(0.0, 1.0 - kept))
