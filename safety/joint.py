"""Several factors as one: the product of their choices, the last factor fastest. Pure.

A rule over tuples of choices leaves no product of masks, so where one is in force the whole decision is made over the
tuples: marginal masks and targets are lifted to [B, P], P = Π nvec, and one drawn index is a tuple again.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np

from policies.types import Bools, Floats, Ints, Target, columns


@lru_cache(maxsize=64)
def tuples(nvec: tuple[int, ...]) -> Ints:
    """Every tuple of choices in order, int64 [P, F]."""
    count = prod(nvec)
    found = np.empty((count, len(nvec)), dtype=np.int64)
    rest = np.arange(count)
    for factor in reversed(range(len(nvec))):
        rest, found[:, factor] = np.divmod(rest, nvec[factor])
    found.setflags(write=False)
    return found


def to_tuples(indices: Ints, nvec: tuple[int, ...]) -> Ints:
    """Indices int64 [B] as tuples of choices, int64 [B, F]."""
    return tuples(nvec)[indices]


def to_indices(actions: Ints, nvec: tuple[int, ...]) -> Ints:
    """Tuples of choices int64 [B, F] as indices, int64 [B]."""
    found = np.zeros(len(actions), dtype=np.int64)
    for factor, n in enumerate(nvec):
        found = found * n + actions[:, factor]
    return found


def lift_mask(mask: Bools, nvec: tuple[int, ...]) -> Bools:
    """A mask by factor, bool [B, N], as a mask of tuples, bool [B, P]: all of whose choices are allowed."""
    return np.asarray(mask[:, _columns_of(nvec)].all(axis=2))


def lift_target(target: Target) -> Target:
    """The same target distribution over tuples: products of probabilities, sums of values and of logits.

    The best tuple is that of the best choices, as far as sums of float64 can tell.
    """
    at = _columns_of(target.nvec)
    scores = target.scores[:, at].sum(axis=2) if target.greedy else target.scores[:, at].prod(axis=2)
    logits = None if target.logits is None else target.logits[:, at].sum(axis=2)
    return Target(scores, target.greedy, target.faulty, (scores.shape[1],), logits)


def marginals(probabilities: Floats, nvec: tuple[int, ...]) -> Floats:
    """Probabilities of tuples, float64 [B, P], as those of each factor's choices, float64 [B, N]."""
    found = np.zeros((len(probabilities), sum(nvec)))
    for column, tuple_ in enumerate(_columns_of(nvec)):
        found[:, tuple_] += probabilities[:, column, None]
    return found


@lru_cache(maxsize=64)
def _columns_of(nvec: tuple[int, ...]) -> Ints:
    """The columns of each tuple's choices, int64 [P, F]."""
    found: Ints = tuples(nvec) + np.array([part.start for part in columns(nvec)])
    found.setflags(write=False)
    return found
