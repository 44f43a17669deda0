"""A group's network outputs to drawn and checked actions, over choices or in a box. Pure.

    target -> behave -> draw -> check

Duty: put the steps of `policies/` and `safety/` in order for each kind of action space. It reads no clock, records
nothing and knows nothing of requests beyond a `Row`.
Strategy: the two kinds have the same verbs over different arrays; what they share is `Settled`.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from policies.bundle import PolicyBundle
from policies.draw import draw, propose, uniforms
from policies.explore import behave, masked_mass
from policies.heads import target
from policies.types import Box, Choices, Floats
from safety.chain import check, check_box
from safety.types import BoxConstraint, Constraint
from service.judge import Judged
from service.plan import Group, Settled


def settle(group: Group, judged: Judged, epsilon: Floats, draw_key: bytes) -> Settled:
    """Settle a group whose network has answered, or failed. epsilon: float64 [B], in force now."""
    bundle = group.version.bundle
    if isinstance(bundle.action, Box):
        return _points(group, judged, bundle, bundle.action, epsilon, draw_key)
    return _choices(group, judged, bundle, bundle.action, epsilon, draw_key)


def fallback_rows(bundle: PolicyBundle, count: int) -> npt.NDArray[Any]:
    """The declared fallback for each row, [B, F] or [B, D]. Without one any action will do: such rows are refused."""
    if isinstance(bundle.action, Box):
        declared = np.clip(np.zeros(bundle.action.size), *bundle.action.bounds)
        return np.tile(declared if bundle.fallback is None else np.array(bundle.fallback), (count, 1))
    indices = (0,) * len(bundle.action.nvec) if bundle.fallback is None else bundle.fallback
    return np.tile(np.array(indices, dtype=np.int64), (count, 1))


def _outputs(group: Group, bundle: PolicyBundle) -> npt.NDArray[np.floating]:
    return group.outputs if group.outputs is not None else np.full((len(group.rows), bundle.width), np.nan)


def _choices(
    group: Group, judged: Judged, bundle: PolicyBundle, space: Choices, epsilon: Floats, draw_key: bytes
) -> Settled:
    wanted = target(_outputs(group, bundle), bundle.head, bundle.temperature, space.nvec)
    allowed = [cast(tuple[int, ...] | None, row.allowed) for row in group.rows]
    constraint = cast(Constraint, judged.constraint)
    fallback = fallback_rows(bundle, len(group.rows))
    behaviour = behave(wanted, constraint.mask, epsilon, fallback)
    u = uniforms(draw_key, group.ids, 1 + len(space.nvec))
    drawn = draw(behaviour, u)
    passed = check(drawn.actions.tolist(), behaviour.fallback.tolist(), allowed, space.nvec)
    return Settled(
        group=group,
        target=wanted,
        constraint=constraint,
        behaviour=behaviour,
        drawn=drawn,
        proposed=propose(wanted, u),
        masked_mass=masked_mass(wanted, constraint.mask),
        actions=np.where(passed[:, None], drawn.actions, fallback),
        passed=passed,
        denied=judged.denied,
    )


def _points(
    group: Group, judged: Judged, bundle: PolicyBundle, space: Box, epsilon: Floats, draw_key: bytes
) -> Settled:
    import policies.continuous as continuous  # loads scipy: only with the first version that needs it

    wanted = continuous.gaussian(_outputs(group, bundle), bundle.head)
    transform = continuous.Transform.of(bundle.head, bundle.transform, space)
    allowed = [cast(tuple[tuple[float, ...], tuple[float, ...]] | None, row.allowed) for row in group.rows]
    constraint = cast(BoxConstraint, judged.constraint)
    box = constraint.low, constraint.high
    fallback = fallback_rows(bundle, len(group.rows))
    sigma = None if bundle.sigma is None else np.array(bundle.sigma)
    behaviour = continuous.behave(wanted, transform, box, epsilon, sigma, fallback)
    u = uniforms(draw_key, group.ids, 1 + space.size)
    drawn = continuous.draw(behaviour, u)
    passed = check_box(drawn.actions.tolist(), behaviour.fallback.tolist(), allowed, space)
    passed &= np.isfinite(drawn.log_propensity)  # whatever was drawn had a chance to be
    return Settled(
        group=group,
        target=wanted,
        constraint=constraint,
        behaviour=behaviour,
        drawn=drawn,
        proposed=continuous.propose(behaviour, u),
        masked_mass=continuous.masked_mass(wanted, transform, box),
        actions=np.where(passed[:, None], drawn.actions, fallback),
        passed=passed,
        denied=judged.denied,
    )
