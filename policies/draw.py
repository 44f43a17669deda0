"""The only place where chance becomes an action. Pure.

`u_j = H(draw key, decision id, j)`: a keyed BLAKE2b of the decision id gives eight 53-bit uniforms per block (two are
cut off a shorter one). `u_0` picks the exploring part, `u_1, u_2, …` the action within the part, one for each factor or
coordinate. Anyone who holds the key can draw again and gets the same bits; anyone who does not cannot tell the next
action from the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from policies.explore import Behaviour
from policies.types import Bools, Floats, Ints, Target, columns

UNIFORMS = 2  # u_0 and u_1: what one choice takes
_BLOCK = 8  # uniforms in a whole digest of BLAKE2b
_PERSON = b"surefoot-draw"
_SCALE = 2.0**-53


@dataclass(frozen=True, slots=True)
class Drawn:
    """B drawn actions: actions int64 [B, F], explored bool [B] (the exploring part drew), propensity float64 [B]."""

    actions: Ints
    explored: Bools
    propensity: Floats


def uniforms(draw_key: bytes, decision_ids: Sequence[str], count: int = UNIFORMS) -> Floats:
    """`count` uniforms in [0, 1) for each decision id, float64 [B, count], from the keyed hash."""
    size = 8 * (count if count == UNIFORMS else _BLOCK)
    blocks = range(-(-count // _BLOCK))
    # A copy of a keyed hash costs a third of another one.
    keyed = [blake2b(digest_size=size, key=draw_key, person=_PERSON, salt=bytes([block])) for block in blocks]
    parts = []
    for decision_id in decision_ids:
        text = decision_id.encode()
        for each in keyed:
            one = each.copy()
            one.update(text)
            parts.append(one.digest())
    digests = b"".join(parts)
    bits = np.frombuffer(digests, dtype="<u8").reshape(len(decision_ids), -1)[:, :count]
    return np.asarray((bits >> np.uint64(11)) * _SCALE, dtype=np.float64)


def draw(behaviour: Behaviour, u: Floats) -> Drawn:
    """Draw one action per row. u: float64 [B, 1 + F] in [0, 1).

    The propensity is that of the action whichever part drew it: (1 - ε) · Π own + ε · Π exploring.
    """
    explored = u[:, 0] < behaviour.epsilon
    rows = np.arange(len(u))
    if len(behaviour.nvec) == 1:
        chosen = _one_factor(behaviour, explored, u[:, 1])
        return Drawn(chosen[:, None], explored, behaviour.probabilities[rows, chosen])
    part = np.where(explored[:, None], behaviour.exploring, behaviour.own)
    actions = np.empty((len(part), len(behaviour.nvec)), dtype=np.int64)
    own, exploring = np.ones(len(part)), np.ones(len(part))
    for factor, where in enumerate(columns(behaviour.nvec)):
        actions[:, factor] = invert(part[:, where], u[:, 1 + factor])
        at = where.start + actions[:, factor]
        own *= behaviour.own[rows, at]
        exploring *= behaviour.exploring[rows, at]
    return Drawn(actions, explored, (1.0 - behaviour.epsilon) * own + behaviour.epsilon * exploring)


def _one_factor(behaviour: Behaviour, explored: Bools, u: Floats) -> Ints:
    """One choice for each row, int64 [B]. Where the version's own part is certain, u is not asked for it."""
    if not behaviour.certain:
        return invert(np.where(explored[:, None], behaviour.exploring, behaviour.own), u)
    chosen = behaviour.own.argmax(axis=1)
    by_chance = np.flatnonzero(explored)
    if len(by_chance):
        chosen[by_chance] = invert(behaviour.exploring[by_chance], u[by_chance])
    return np.asarray(chosen, dtype=np.int64)


def propose(wanted: Target, u: Floats) -> Ints:
    """What the version would have done without a mask, int64 [B, F]: the best action, or the same uniform through its
    own target.
    """
    if wanted.greedy:
        return wanted.best
    parts = enumerate(columns(wanted.nvec))
    return np.stack([invert(wanted.scores[:, where], u[:, 1 + factor]) for factor, where in parts], axis=1)


def invert(distribution: Floats, u: Floats) -> Ints:
    """Inverse-CDF sampling: the first action whose cumulative mass exceeds u, int64 [B].

    Rounding can leave the last cumulative sum below u: the last action with mass is taken then, never one without.
    """
    cumulative = distribution.cumsum(axis=1)
    actions = (cumulative <= (u * cumulative[:, -1])[:, None]).sum(axis=1)
    last = distribution.shape[1] - 1 - (distribution[:, ::-1] > 0.0).argmax(axis=1)
    return np.asarray(np.minimum(actions, last), dtype=np.int64)
