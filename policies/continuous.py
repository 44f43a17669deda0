"""Actions in a box: heads, exploration, draw and propensity. Pure, vectorised over the batch.

The maths of design section 4. A network gives a Gaussian N(m, s²) of the raw action z, coordinate by coordinate (s = 0:
a deterministic head); a transform T, increasing in each coordinate, takes z to the units of the executed action; what
leaves is its projection onto the row's box [l, h]:

    none: T(z) = z      unscale: T(z) = low + (z + 1)/2 · (high - low)      tanh: T(z) = unscale(tanh z)
    own   = P_[l,h](T(z)), z ~ N(m, s²)          noise = P_[l,h](y), y ~ N(c, σ²), c = P_[l,h](T(m))
    b     = (1 - ε) · own + ε · noise            one draw decides for all coordinates
    b     = δ(fallback)                          (network fault, empty box)

The base measure of log b is, in each coordinate, Lebesgue plus atoms: at l and h, where projection gathers the tails,
and at c where the head is deterministic. An atom has the mass of what falls on it, a point between has the density.
Where all coordinates are atoms b(a) is a probability (`mass`), where none is it is a `density`, else `mixed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, ndtri

from policies.types import Bools, Box, Floats, HeadKind, Ints, TransformKind

HALF_STEP = 2.0**-54  # centres a 53-bit uniform in its cell: ndtri(0) would be -infinity
LOG_SQRT_2PI = 0.5 * np.log(2.0 * np.pi)
TANH_END = float(np.arctanh(1.0 - 2.0**-53))  # beyond it tanh rounds to 1
KINDS: tuple[Literal["mass"], Literal["mixed"], Literal["density"]] = ("mass", "mixed", "density")


@dataclass(frozen=True, slots=True)
class Transform:
    """T: raw actions to the units of executed ones. low, high: float64 [D], of the whole action space."""

    kind: Literal["none", "unscale", "tanh"]
    low: Floats
    high: Floats

    @classmethod
    def of(cls, head: HeadKind, declared: TransformKind, action: Box) -> Transform:
        return cls("tanh" if head == "squashed_gaussian" else declared, *action.bounds)

    def apply(self, z: Floats) -> Floats:
        """T(z), [B, D]."""
        if self.kind == "none":
            return z
        unit = np.tanh(z) if self.kind == "tanh" else z
        return self.low + (unit + 1.0) * 0.5 * (self.high - self.low)

    def inverse(self, a: Floats) -> Floats:
        """The z with T(z) = a, [B, D]; infinite where none is: beyond the range of tanh, or a side without width."""
        if self.kind == "none":
            return a
        with np.errstate(divide="ignore", invalid="ignore"):
            unit = (a - self.low) / (self.high - self.low) * 2.0 - 1.0
            unit = np.where(np.isnan(unit), 0.0, unit)
            return np.arctanh(np.clip(unit, -1.0, 1.0)) if self.kind == "tanh" else unit

    def log_slope(self, z: Floats) -> Floats:
        """log T'(z), [B, D]; for tanh as 2·(log 2 - |z| - log(1 + exp(-2|z|))), which never takes the log of zero."""
        if self.kind == "none":
            return np.zeros(z.shape)
        with np.errstate(divide="ignore"):
            scale = np.log((self.high - self.low) * 0.5)
        if self.kind == "unscale":
            return np.broadcast_to(scale, z.shape)
        size = np.abs(z)
        return np.asarray(scale + 2.0 * (np.log(2.0) - size - np.log1p(np.exp(-2.0 * size))))


@dataclass(frozen=True, slots=True)
class Gaussian:
    """What a version's network says about B states over a box.

    mean, std: float64 [B, D] of the raw action; std zero where the head is deterministic. faulty: bool [B], rows whose
    output is not finite; they hold zeros.
    """

    mean: Floats
    std: Floats
    faulty: Bools

    @property
    def distribution(self) -> Floats:
        """Means and deviations side by side, float64 [B, 2·D]: what is recorded."""
        return np.concatenate([self.mean, self.std], axis=1)


@dataclass(frozen=True, slots=True)
class PointBehaviour:
    """What B points are drawn from. All float64 [B, D] but epsilon [B] and fallback, bool [B]."""

    target: Gaussian
    transform: Transform
    low: Floats
    high: Floats
    centre: Floats  # c: what the version would do without chance, within the box
    sigma: Floats | None  # [D]; None: nothing is explored
    epsilon: Floats
    fallback: Bools
    declared: Floats  # the declared fallback

    @property
    def probabilities(self) -> Floats:
        """Nothing that could be listed, float64 [B, 0]: target, box, σ and ε say all."""
        return np.empty((len(self.epsilon), 0))


@dataclass(frozen=True, slots=True)
class DrawnPoints:
    """B drawn points.

    actions: float64 [B, D]. explored: bool [B]. propensity: float64 [B], NaN where b(a) is no probability.
    log_propensity: float64 [B]. kinds: one of KINDS for each. raw: float64 [B, D], before squash and projection.
    raw_log_prob: float64 [B], log-density of the raw draw under the part that drew it, from the draw itself, never back
    through the transform. at_bound: int64 [B, D], -1 at the low end, 1 at the high end, 0 between.
    """

    actions: Floats
    explored: Bools
    propensity: Floats
    log_propensity: Floats
    kinds: tuple[Literal["mass", "mixed", "density"], ...]
    raw: Floats
    raw_log_prob: Floats
    at_bound: Ints


def gaussian(outputs: npt.NDArray[np.floating], head: HeadKind) -> Gaussian:
    """Read the network's `outputs` as raw actions: [B, 2·D] means and log deviations, or [B, D] numbers (`action`)."""
    values = outputs.astype(np.float64)
    if head == "action":
        mean, std = values, np.zeros(values.shape)
    else:
        size = values.shape[1] // 2
        with np.errstate(over="ignore"):  # an infinite deviation is a fault, found below
            mean, std = values[:, :size], np.exp(values[:, size:])
    faulty: Bools = np.asarray(~(np.isfinite(mean).all(axis=1) & np.isfinite(std).all(axis=1)))
    if faulty.any():
        mean, std = np.where(faulty[:, None], 0.0, mean), np.where(faulty[:, None], 0.0, std)
    return Gaussian(mean, std, faulty)


def behave(
    target: Gaussian,
    transform: Transform,
    box: tuple[Floats, Floats],
    epsilon: Floats,
    sigma: Floats | None,
    fallback: Floats,
) -> PointBehaviour:
    """Mix the projected target with projected noise.

    box: low and high, float64 [B, D] each. epsilon: float64 [B]. sigma: float64 [D] or None. fallback: float64 [B, D].
    Rows without an answer or with an empty box put all mass on their fallback; the caller says why.
    """
    low, high = box
    fallen = target.faulty | (low > high).any(axis=1)
    if fallen.any():
        low, high = np.where(fallen[:, None], fallback, low), np.where(fallen[:, None], fallback, high)
    if sigma is None or fallen.any():
        epsilon = np.where(fallen | (sigma is None), 0.0, epsilon)
    with np.errstate(over="ignore"):
        centre = np.clip(transform.apply(target.mean), low, high)
    return PointBehaviour(target, transform, low, high, centre, sigma, epsilon, fallen, fallback)


def draw(behaviour: PointBehaviour, u: Floats) -> DrawnPoints:
    """Draw one point per row. u: float64 [B, 1 + D] in [0, 1)."""
    explored = u[:, 0] < behaviour.epsilon
    g = ndtri(u[:, 1:] + HALF_STEP)  # standard normal, by the inverse of its distribution function
    own, std = behaviour.target.mean + behaviour.target.std * g, behaviour.target.std
    raw, log_prob = own, _log_density(g, std)
    if behaviour.sigma is not None and explored.any():
        raw = np.where(explored[:, None], behaviour.centre + behaviour.sigma * g, own)
        log_prob = np.where(explored, _log_density(g, np.broadcast_to(behaviour.sigma, g.shape)), log_prob)
    actions = _project(behaviour, own, raw, explored)
    log_b, kinds, at_bound = _log_propensity(behaviour, actions, own, explored)
    with np.errstate(under="ignore"):
        propensity = np.where(np.array([kind == "mass" for kind in kinds]), np.exp(log_b), np.nan)
    return DrawnPoints(actions, explored, propensity, log_b, kinds, raw, log_prob, at_bound)


def propose(behaviour: PointBehaviour, u: Floats) -> Floats:
    """What the version would have done without rules, float64 [B, D]: its own draw, within the action space."""
    target, transform = behaviour.target, behaviour.transform
    raw = target.mean + target.std * ndtri(u[:, 1:] + HALF_STEP)
    with np.errstate(over="ignore"):
        return np.asarray(np.clip(transform.apply(raw), transform.low, transform.high))


def log_propensity_at(
    behaviour: PointBehaviour, actions: Floats
) -> tuple[Floats, tuple[Literal["mass", "mixed", "density"], ...]]:
    """log b at given points, float64 [B], whoever drew them, and what it is the log of. Fallback rows: as if it were
    the fallback that is given.
    """
    log_b, kinds, _ = _log_propensity(behaviour, actions, actions, np.ones(len(actions), dtype=np.bool_))
    return log_b, kinds


def atoms(behaviour: PointBehaviour, actions: Floats) -> Bools:
    """Coordinates at which points are an atom of b, bool [B, D]; the exploring part has none between the ends."""
    low, high, centre = behaviour.low, behaviour.high, behaviour.centre
    certain = (behaviour.target.std == 0.0) & (actions == centre)
    return np.asarray((low >= high) | (actions <= low) | (actions >= high) | certain)


def masked_mass(target: Gaussian, transform: Transform, box: tuple[Floats, Floats]) -> Floats:
    """Target mass that lies beyond the rules' box, float64 [B]: what projection gathers at its ends. The action space's
    own ends mask nothing. A faulty row has none to lose; a deterministic one all or nothing.
    """
    low, high = (np.where(inside, bound, beyond) for bound, inside, beyond in _rules(transform, box))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        below = (transform.inverse(low) - target.mean) / target.std
        above = (target.mean - transform.inverse(high)) / target.std
    point = transform.apply(target.mean)
    outside = np.where(np.isneginf(low), False, point < low) | np.where(np.isposinf(high), False, point > high)
    lost = np.where(np.isneginf(low), 0.0, np.exp(log_ndtr(below))) + np.where(
        np.isposinf(high), 0.0, np.exp(log_ndtr(above))
    )
    kept = np.prod(1.0 - np.where(target.std > 0.0, np.minimum(lost, 1.0), outside), axis=1)
    return np.where(target.faulty, 0.0, 1.0 - kept)


def _rules(transform: Transform, box: tuple[Floats, Floats]) -> tuple[tuple[Floats, Bools, float], ...]:
    low, high = box
    return (low, low > transform.low, -np.inf), (high, high < transform.high, np.inf)


def _log_density(g: Floats, std: Floats) -> Floats:
    """log N of a draw m + s·g at itself, summed over the coordinates that have a deviation, float64 [B]."""
    with np.errstate(divide="ignore"):
        each = -0.5 * g * g - LOG_SQRT_2PI - np.log(std)
    return np.asarray(np.where(std > 0.0, each, 0.0).sum(axis=1))


def _project(behaviour: PointBehaviour, own: Floats, raw: Floats, explored: Bools) -> Floats:
    """The executed points. An own draw that tanh rounds to an end that it cannot reach is kept just inside it."""
    low, high, transform = behaviour.low, behaviour.high, behaviour.transform
    with np.errstate(over="ignore"):
        moved = np.clip(transform.apply(own), low, high)
    if transform.kind == "tanh":
        room = (low < high) & (behaviour.target.std > 0.0)
        reach_low, reach_high = (np.isinf(transform.inverse(end)) for end in (low, high))
        moved = np.where(room & reach_low & (moved <= low), np.nextafter(low, high), moved)
        moved = np.where(room & reach_high & (moved >= high), np.nextafter(high, low), moved)
    actions = np.where(explored[:, None], np.clip(raw, low, high), moved)
    return np.where(behaviour.fallback[:, None], behaviour.declared, actions)


def _log_propensity(
    behaviour: PointBehaviour, actions: Floats, own_raw: Floats, explored: Bools
) -> tuple[Floats, tuple[Literal["mass", "mixed", "density"], ...], Ints]:
    low, high, centre, epsilon = behaviour.low, behaviour.high, behaviour.centre, behaviour.epsilon
    fixed = low >= high  # a side without width: all mass is there, whatever is drawn
    at_low, at_high = (actions <= low) & ~fixed, (actions >= high) & ~fixed
    certain = (behaviour.target.std == 0.0) & ~fixed
    atom = atoms(behaviour, actions)
    own = _own(behaviour, actions, np.where(explored[:, None], np.nan, own_raw), at_low, at_high)
    own = np.where(fixed, 0.0, np.where(certain, np.where(actions == centre, 0.0, -np.inf), own)).sum(axis=1)
    log_b = own
    if behaviour.sigma is not None and (epsilon > 0.0).any():
        noise = _noise(behaviour, actions, at_low, at_high)
        noise = np.where(fixed, 0.0, np.where(atom & ~at_low & ~at_high, -np.inf, noise)).sum(axis=1)
        with np.errstate(divide="ignore"):
            log_b = np.logaddexp(np.log1p(-epsilon) + own, np.log(epsilon) + noise)
    log_b = np.where(behaviour.fallback, 0.0, log_b)
    counts = np.where(behaviour.fallback, atom.shape[1], atom.sum(axis=1)).tolist()
    kinds = tuple(KINDS[0] if n == atom.shape[1] else KINDS[2] if n == 0 else KINDS[1] for n in counts)
    return log_b, kinds, at_high.astype(np.int64) - at_low.astype(np.int64)


def _own(behaviour: PointBehaviour, actions: Floats, raw: Floats, at_low: Bools, at_high: Bools) -> Floats:
    """log of the own part in each coordinate, [B, D]: tail masses at the ends, density between."""
    target, transform = behaviour.target, behaviour.transform
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inside = transform.inverse(actions)
        inside = np.clip(inside, -TANH_END, TANH_END) if transform.kind == "tanh" else inside
        z = np.where(np.isnan(raw), inside, raw)
        score = (z - target.mean) / target.std
        between = -0.5 * score * score - LOG_SQRT_2PI - np.log(target.std) - transform.log_slope(z)
        below = log_ndtr((transform.inverse(behaviour.low) - target.mean) / target.std)
        above = log_ndtr((target.mean - transform.inverse(behaviour.high)) / target.std)
    return np.asarray(np.where(at_low, below, np.where(at_high, above, between)))


def _noise(behaviour: PointBehaviour, actions: Floats, at_low: Bools, at_high: Bools) -> Floats:
    """log of the exploring part in each coordinate, [B, D]."""
    sigma, centre = behaviour.sigma, behaviour.centre
    assert sigma is not None
    score = (actions - centre) / sigma
    between = -0.5 * score * score - LOG_SQRT_2PI - np.log(sigma)
    below, above = log_ndtr((behaviour.low - centre) / sigma), log_ndtr((centre - behaviour.high) / sigma)
    return np.asarray(np.where(at_low, below, np.where(at_high, above, between)))
