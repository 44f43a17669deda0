"""The only place where chance becomes an action. Pure.

`u_j = H(draw key, decision id, j)`: a keyed BLAKE2b of the decision id gives eight 53-bit uniforms per block. `u_0`
picks the exploring part, `u_1` the action within the part. Anyone who holds the key can draw again and gets the same
bits; anyone who does not cannot tell the next action from the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from policies.explore import Behaviour
from policies.types import Bools, Floats, Ints

UNIFORMS = 2  # u_0 and u_1
_PERSON = b"surefoot-draw"
_SCALE = 2.0**-53


@dataclass(frozen=True, slots=True)
class Drawn:
    """B drawn actions: actions int64 [B], explored bool [B] (the exploring part drew), propensity float64 [B]."""

    actions: Ints
    explored: Bools
    propensity: Floats


def uniforms(draw_key: bytes, decision_ids: Sequence[str]) -> Floats:
    """Two uniforms in [0, 1) for each decision id, float64 [B, 2], from the keyed hash."""
    digests = b"".join(
        blake2b(decision_id.encode(), digest_size=16, key=draw_key, person=_PERSON).digest()
        for decision_id in decision_ids
    )
    bits = np.frombuffer(digests, dtype="<u8").reshape(-1, UNIFORMS)
    return np.asarray((bits >> np.uint64(11)) * _SCALE, dtype=np.float64)


def draw(behaviour: Behaviour, u: Floats) -> Drawn:
    """Draw one action per row. u: float64 [B, 2] in [0, 1)."""
    explored = u[:, 0] < behaviour.epsilon
    part = np.where(explored[:, None], behaviour.uniform, behaviour.own)
    actions = invert(part, u[:, 1])
    return Drawn(actions, explored, behaviour.probabilities[np.arange(len(actions)), actions])


def invert(distribution: Floats, u: Floats) -> Ints:
    """Inverse-CDF sampling: the first action whose cumulative mass exceeds u, int64 [B].

    Rounding can leave the last cumulative sum below u: the last action with mass is taken then, never one without.
    """
    cumulative = distribution.cumsum(axis=1)
    actions = (cumulative <= (u * cumulative[:, -1])[:, None]).sum(axis=1)
    last = distribution.shape[1] - 1 - (distribution[:, ::-1] > 0.0).argmax(axis=1)
    return np.asarray(np.minimum(actions, last), dtype=np.int64)
