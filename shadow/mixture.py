"""What an action was drawn from when it is left open which version decided. Pure.

Duty: mixture denominators Σ_v w_v·b_v(a), where every version that could have decided was scored. Logged propensities
are conditional on the version that did, which is right and needs nothing; a mixture has smaller weights: an action that
this version would hardly take, but another one that shares the traffic does, counts for less.
Strategy: for single decisions the balance heuristic (Veach and Guibas 1995; Agarwal, Basu, Schnabel and Joachims 2017,
"Effective evaluation using logged bandit feedback from multiple loggers", balanced IPS). An episode keeps its version,
so the probability of its first t steps is Σ_v w_v·Π b_v, not Π Σ_v w_v·b_v: step t is mixed by how probable each
version has become given the actions before it.
Promise: weights that average to one, if (1) `weights` are those that routing had when the unit was pinned, (2) whether
a row was scored by all depends neither on the version nor on the action (a hash of its id does not), and (3), for
single decisions of one key, states and masks do not depend on what its version did before.
"""

from __future__ import annotations

import numpy as np

from policies.types import Floats, Ints


def single(own: Floats, scored: Floats | None, weights: Floats) -> Floats:
    """Give what decisions were drawn from, float64 [n, A].

    own: float64 [n, A], of the version that decided. scored: float64 [n, V, A], of every version that could have, NaN
    where it was not scored; None if nothing was. weights: float64 [n, V], 0 for a version that could not have. Rows
    that a version of positive weight did not score keep `own`.
    """
    if scored is None:
        return own
    mixed = np.einsum("nv,nva->na", weights, _needed(scored, weights))
    return np.where(np.isnan(mixed).any(axis=1, keepdims=True), own, mixed)


def episode(own: Floats, scored: Floats | None, weights: Floats, actions: Ints) -> Floats:
    """Give what the steps of one episode were drawn from, each given those before it, float64 [T, A].

    own: float64 [T, A]. scored: float64 [T, V, A], or None. weights: float64 [V], at the episode's pin. actions: int64
    [T]. From the first step on that a version of positive weight did not score, steps are given the version that
    decided: the probability of later steps under the others cannot be known any more.
    """
    if scored is None:
        return own
    shares, drawn = np.array(weights, np.float64), own.copy()
    for t, each in enumerate(_needed(scored, np.broadcast_to(weights, scored.shape[:2]))):
        mixed = shares @ each
        if np.isnan(mixed).any():
            break
        if mixed[actions[t]] <= 0.0:
            raise ValueError(f"no version of positive weight could have taken step {t}")
        drawn[t] = mixed
        shares = shares * each[:, actions[t]] / mixed[actions[t]]
    return drawn


def _needed(scored: Floats, weights: Floats) -> Floats:
    """Scores, with zeros for versions that could not have decided."""
    return np.where((weights > 0.0)[..., None], scored, 0.0)
