"""What a shadow would have done, held against what was done, over choices. Pure, vectorised over the batch.

Duty: for B decisions: the shadow's distribution under the logged mask without exploration, its probability of the
executed action, what it would have done, how far it is from the version that decided. Points in a box are
`compare_points.py`'s.
Strategy: the live pipeline's own functions, with ε = 0: where the mask is empty, the network has no usable answer or no
mass is left, a version falls back, and so does its shadow. Both versions draw with the uniforms of the decision, so two
that agree do the same. A deciding version's part is likewise without exploration.

For distributions p (shadow) and q (decided) under the mask M:

    TV = 1/2 Σ |p - q|            several factors: 1 - Π(1 - TV_f), which bounds the joint one from above
    KL = Σ p log(p / q)           several factors: the sum, which is exact; infinite where q has no mass and p has
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from policies.draw import draw, propose
from policies.explore import Behaviour, behave
from policies.types import Bools, Floats, Ints, PropensityKind, Target, columns
from safety.joint import lift_target, marginals, to_indices, to_tuples
from shadow.shown import ChoiceRows

MASS: Final[PropensityKind] = "mass"


@dataclass(frozen=True, slots=True)
class Compared:
    """One shadow on B decisions. Float64 [B] where nothing else is said; NaN where something does not exist.

    target: [B, N], its distribution by factor; or [B, 2·D], mean and deviation of the raw action. log_probability: of
    the executed action under it, -inf for zero; NaN: it has mass where the log has density, so there is no ratio.
    kinds: what log_probability is the log of. proposed: [B, F] or [B, D], what it would have done; unmasked: the same
    without mask or box. agrees: bool, the deciding version would have done the same. overridden: bool, rules (not
    callers) forbid `unmasked`. fallen: bool, it would have answered with its fallback. faulty: bool, because its
    network has no usable answer. divergence: in [0, 1], 0 for the same. kl, w2. value: what it says the executed action
    is worth; expected: what it says its own distribution is worth; difference: `value` less what the deciding version
    says.
    """

    target: Floats
    log_probability: Floats
    kinds: tuple[PropensityKind, ...]
    proposed: Floats | Ints
    unmasked: Floats | Ints
    agrees: Bools
    overridden: Bools
    fallen: Bools
    faulty: Bools
    divergence: Floats
    kl: Floats
    w2: Floats
    value: Floats
    expected: Floats
    difference: Floats


def compare_choices(
    wanted: Target, logged: ChoiceRows, u: Floats, fallback: tuple[float, ...] | None, values: Floats | None = None
) -> Compared:
    """Compare a shadow over choices.

    wanted: what its network says, by factor. u: float64 [B, uniforms_of(logged)], the decisions' own uniforms.
    fallback: the one that it declares. values: [B, sum of sizes], what it says each choice is worth.
    """
    said = lift_target(wanted) if logged.factors else wanted
    mine = _without_exploring(said, logged, fallback)
    acts, theirs = draw(mine, u).actions, draw(_decided(logged), u).actions
    acts[mine.fallback] = _index(fallback, logged)
    unmasked = propose(said, u)
    own = _no_mass_without_fallback(mine, fallback)
    divergence, kl = _distances(own, logged.own, logged.nvec)
    by_factor = marginals(own, logged.factors) if logged.factors else own
    value, expected, difference = _values(values, logged, by_factor)
    overridden = np.zeros(len(u), dtype=np.bool_)
    if logged.ruled is not None:
        overridden = ~_mass(logged.ruled, unmasked, logged.nvec).astype(np.bool_) & ~wanted.faulty
    with np.errstate(divide="ignore"):
        log_probability = np.log(_mass(own, _executed(logged), logged.nvec))
    return Compared(
        target=by_factor,
        log_probability=log_probability,
        kinds=tuple(MASS for _ in u),
        proposed=_as_tuples(acts, logged),
        unmasked=_as_tuples(unmasked, logged),
        agrees=np.asarray((acts == theirs).all(axis=1) & ~_refused(mine, fallback)),
        overridden=overridden,
        fallen=mine.fallback,
        faulty=wanted.faulty,
        divergence=divergence,
        kl=kl,
        w2=np.full(len(u), np.nan),
        value=value,
        expected=expected,
        difference=difference,
    )


def uniforms_of(logged: ChoiceRows) -> int:
    """How many uniforms each decision took."""
    return 1 + len(logged.nvec)


def _without_exploring(wanted: Target, logged: ChoiceRows, fallback: tuple[float, ...] | None) -> Behaviour:
    count = len(logged.mask)
    declared = np.tile(_index(fallback, logged), (count, 1))
    return behave(wanted, logged.mask, np.zeros(count), declared)


def _decided(logged: ChoiceRows) -> Behaviour:
    return Behaviour(logged.own, logged.own, logged.own, np.zeros(len(logged.own)), logged.fallen, logged.nvec)


def _index(fallback: tuple[float, ...] | None, logged: ChoiceRows) -> Ints:
    """The declared fallback as the mask has it, int64 [F]; without one any index, of which nothing is used."""
    sizes = logged.factors or logged.nvec
    declared = np.array((0,) * len(sizes) if fallback is None else fallback, dtype=np.int64)
    return to_indices(declared[None, :], logged.factors) if logged.factors else declared


def _refused(mine: Behaviour, fallback: tuple[float, ...] | None) -> Bools:
    return mine.fallback & (fallback is None)


def _no_mass_without_fallback(mine: Behaviour, fallback: tuple[float, ...] | None) -> Floats:
    """What it would draw from; nothing in rows that it would refuse."""
    return np.where(_refused(mine, fallback)[:, None], 0.0, mine.own)


def _executed(logged: ChoiceRows) -> Ints:
    return to_indices(logged.actions, logged.factors)[:, None] if logged.factors else logged.actions


def _as_tuples(actions: Ints, logged: ChoiceRows) -> Ints:
    return to_tuples(actions[:, 0], logged.factors) if logged.factors else actions


def _mass(weights: Floats | Bools, actions: Ints, nvec: tuple[int, ...]) -> Floats:
    """Product over factors of what each row's action weighs, float64 [B]."""
    found, rows = np.ones(len(actions)), np.arange(len(actions))
    for factor, part in enumerate(columns(nvec)):
        found *= weights[rows, part.start + actions[:, factor]]
    return found


def _distances(p: Floats, q: Floats, nvec: tuple[int, ...]) -> tuple[Floats, Floats]:
    apart, kl = np.ones(len(p)), np.zeros(len(p))
    for part in columns(nvec):
        one, two = p[:, part], q[:, part]
        apart *= 1.0 - np.minimum(1.0, 0.5 * np.abs(one - two).sum(axis=1) + 0.5 * np.abs(1.0 - one.sum(axis=1)))
        with np.errstate(divide="ignore", invalid="ignore"):
            kl += np.where(one > 0.0, one * np.log(one / two), 0.0).sum(axis=1)
    return 1.0 - apart, np.maximum(kl, 0.0)


def _values(values: Floats | None, logged: ChoiceRows, own: Floats) -> tuple[Floats, Floats, Floats]:
    """What the executed action is worth, what the distribution is, and the former less what the other version says."""
    sizes, unknown = logged.factors or logged.nvec, np.full(len(own), np.nan)
    if values is None:
        return unknown, unknown, unknown
    with np.errstate(invalid="ignore", over="ignore"):  # values may be anything that a network gives
        value, expected = _sum_at(values, logged.actions, sizes), np.where(own > 0.0, own * values, 0.0).sum(axis=1)
        if logged.values is None:
            return value, expected, unknown
        return value, expected, value - _sum_at(logged.values.astype(np.float64), logged.actions, sizes)


def _sum_at(values: Floats, actions: Ints, sizes: tuple[int, ...]) -> Floats:
    rows = np.arange(len(actions))
    each = [values[rows, part.start + actions[:, factor]] for factor, part in enumerate(columns(sizes))]
    return np.asarray(np.sum(each, axis=0), dtype=np.float64)


def finite(compared: Compared) -> Compared:
    """The same with NaN for values that a faulty network gave."""
    value, expected, difference = (
        np.where(compared.faulty, np.nan, each) for each in (compared.value, compared.expected, compared.difference)
    )
    return replace(compared, value=value, expected=expected, difference=difference)
