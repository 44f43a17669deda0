"""A group's network outputs to drawn and checked actions, over choices or in a box. Pure.

    allot -> behave -> draw -> check -> charge

Duty: put the steps of `policies/` and `safety/` in order for each kind of action space, between the allotment of a
budget and its charge, which `terms` makes. It reads no clock, records nothing and knows nothing of requests beyond a
`Row`.
Strategy: the two kinds have the same verbs over different arrays; what they share is `Settled`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from policies.bundle import PolicyBundle
from policies.draw import draw, propose, uniforms
from policies.explore import behave, exploring_part, masked_mass, softmax_weights
from policies.types import Bools, Box, Choices, Floats, Target
from safety import budget
from safety.chain import check, check_box
from safety.joint import to_indices, to_tuples
from safety.types import BoxConstraint, Constraint
from service.allowance import Terms
from service.judge import Judged
from service.plan import Group, Settled


def settle(group: Group, judged: Judged, terms: Terms, draw_key: bytes) -> Settled:
    """Settle a group whose network has answered, or failed, on the terms on which it may explore now."""
    bundle = group.version.bundle
    if isinstance(bundle.action, Box):
        return _points(group, judged, bundle.action, terms, draw_key)
    return _choices(group, judged, bundle.action, terms, draw_key)


def fallback_rows(bundle: PolicyBundle, count: int) -> npt.NDArray[Any]:
    """The declared fallback for each row, [B, F] or [B, D]. Without one any action will do: such rows are refused."""
    if isinstance(bundle.action, Box):
        declared = np.clip(np.zeros(bundle.action.size), *bundle.action.bounds)
        return np.tile(declared if bundle.fallback is None else np.array(bundle.fallback), (count, 1))
    indices = (0,) * len(bundle.action.nvec) if bundle.fallback is None else bundle.fallback
    return np.tile(np.array(indices, dtype=np.int64), (count, 1))


def _choices(group: Group, judged: Judged, space: Choices, terms: Terms, draw_key: bytes) -> Settled:
    bundle, constraint = group.version.bundle, cast(Constraint, judged.constraint)
    wanted, mask, nvec = cast(Target, judged.target), constraint.mask, constraint.nvec
    fallback = fallback_rows(bundle, len(group.rows))
    weights = _weights(wanted, mask, constraint.explorable, terms.strength.temperature)
    price = budget.prices(wanted.scores, mask, group.version.scale, wanted.greedy, nvec) if terms.priced else None
    u = uniforms(draw_key, group.ids, 1 + len(nvec))
    spent = terms.allot(u[:, 0], ~wanted.faulty, lambda: _dear(price, mask, weights, nvec))
    frozen = spent.epsilon == 0.0 if terms.strength.mode else None
    inner = to_indices(fallback, constraint.factors)[:, None] if constraint.factors else fallback
    behaviour = behave(wanted, mask, spent.epsilon, inner, weights, frozen)
    drawn = draw(behaviour, u)
    proposed = propose(wanted, u)
    paid = np.zeros(len(u)) if price is None else budget.paid_price(price, drawn.actions, nvec)
    if constraint.factors:
        drawn = replace(drawn, actions=to_tuples(drawn.actions[:, 0], constraint.factors))
        proposed = to_tuples(proposed[:, 0], constraint.factors)
    passed = check(drawn.actions, behaviour.fallback, group.masks, space.nvec)
    passed &= _unbroken(judged, drawn.actions, drawn.explored, behaviour.fallback)
    return Settled(
        group=group,
        judged=judged,
        target=wanted,
        behaviour=behaviour,
        drawn=drawn,
        proposed=proposed,
        masked_mass=masked_mass(wanted, mask),
        actions=np.where(passed[:, None], drawn.actions, fallback),
        passed=passed,
        exploring=weights,
        frozen=frozen,
        paid=paid,
        windows=terms.spend(spent, drawn.explored, paid),
        left=terms.left,
    )


def _unbroken(judged: Judged, actions: npt.NDArray[Any], explored: Bools, fallen: Bools) -> Bools:
    """The last look at rules: bool [B], True where a drawn action breaks none. A fallback is not looked at."""
    if judged.bound is None or judged.facts is None:
        return np.ones(len(actions), dtype=np.bool_)
    return ~judged.bound.recheck.broken_rows(judged.facts, actions, explored, fallen)


def _weights(wanted: Target, mask: Bools, explorable: Bools | None, temperature: float | None) -> Floats | None:
    """In proportion to what exploring draws, float64 [B, N]; None: uniformly over the mask."""
    if temperature is None:
        return None if explorable is None else (explorable & mask).astype(np.float64)
    among = mask if explorable is None else explorable & mask
    return softmax_weights(wanted, among, np.full(len(mask), temperature))


def _dear(price: Floats | None, mask: Bools, weights: Floats | None, nvec: tuple[int, ...]) -> tuple[Floats, Floats]:
    """The worst and the mean price of exploring, float64 [B] each."""
    assert price is not None
    shares, _ = exploring_part(mask, weights, nvec)
    return budget.worst_price(price, shares > 0.0, nvec), budget.expected_price(price, shares, nvec)


def _points(group: Group, judged: Judged, space: Box, terms: Terms, draw_key: bytes) -> Settled:
    import policies.continuous as continuous  # loads scipy: only with the first version that needs it

    bundle, constraint = group.version.bundle, cast(BoxConstraint, judged.constraint)
    wanted = cast(continuous.Gaussian, judged.target)
    transform = continuous.Transform.of(bundle.head, bundle.transform, space)
    box = constraint.low, constraint.high
    fallback = fallback_rows(bundle, len(group.rows))
    sigma = _sigma(bundle, terms.strength.sigma, space.size)
    u = uniforms(draw_key, group.ids, 1 + space.size)
    centre = np.clip(transform.apply(wanted.mean), *space.bounds)
    spent = terms.allot(u[:, 0], ~wanted.faulty, lambda: _dear_point(centre, box, sigma, space))
    behaviour = continuous.behave(wanted, transform, box, spent.epsilon, sigma, fallback)
    drawn = continuous.draw(behaviour, u)
    paid = budget.point_prices(drawn.actions, behaviour.centre, *space.bounds) if terms.priced else np.zeros(len(u))
    passed = check_box(drawn.actions, behaviour.fallback, group.boxes, space)
    passed &= np.isfinite(drawn.log_propensity)  # whatever was drawn had a chance to be
    passed &= _unbroken(judged, drawn.actions, drawn.explored, behaviour.fallback)
    return Settled(
        group=group,
        judged=judged,
        target=wanted,
        behaviour=behaviour,
        drawn=drawn,
        proposed=continuous.propose(behaviour, u),
        masked_mass=continuous.masked_mass(wanted, transform, box),
        actions=np.where(passed[:, None], drawn.actions, fallback),
        passed=passed,
        paid=paid,
        windows=terms.spend(spent, drawn.explored, paid),
        left=terms.left,
    )


def _sigma(bundle: PolicyBundle, scheduled: float | None, size: int) -> Floats | None:
    """The deviation of the exploring part, float64 [D]; None, or zero: there is none."""
    if scheduled is not None:
        return np.full(size, scheduled) if scheduled > 0.0 else None
    return None if bundle.sigma is None else np.array(bundle.sigma)


def _dear_point(centre: Floats, box: tuple[Floats, Floats], sigma: Floats | None, space: Box) -> tuple[Floats, Floats]:
    worst = budget.worst_point_price(centre, box, *space.bounds)
    return worst, worst if sigma is None else budget.expected_point_price(centre, sigma, worst, *space.bounds)
