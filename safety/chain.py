"""The safety filter: all rules over a batch, and an independent last look at what was drawn. Pure, total.

`constrain` and `constrain_box` work on masks and boxes before anything is drawn; `check` and `check_box` hold what was
drawn against the space and against what callers sent. They share no code: a mistake in one is seen by the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from policies.types import Bools, Box, Choices
from safety.bounds import Bounds, request_box
from safety.mask import Allowed, request_mask
from safety.types import REQUEST_RULE, BoxConstraint, Constraint

Said = TypeVar("Said")


def constrain(allowed: Sequence[Allowed], space: Choices) -> Constraint:
    """Give the mask of allowed choices for B rows. A row of `allowed` holds columns, factors side by side."""
    request = request_mask(allowed, space.size)
    if request is None:
        return Constraint(np.ones((len(allowed), space.size), dtype=np.bool_), space.nvec)
    return Constraint(request, space.nvec, ((REQUEST_RULE, request),))


def constrain_box(allowed: Sequence[Bounds], space: Box) -> BoxConstraint:
    """Give the box of allowed points for B rows: the action space, within what the callers allow."""
    low, high = (np.broadcast_to(end, (len(allowed), space.size)) for end in space.bounds)
    request = request_box(allowed, space.size)
    if request is None:
        return BoxConstraint(low, high)
    narrowed = np.maximum(low, request[0]), np.minimum(high, request[1])
    return BoxConstraint(*narrowed, ((REQUEST_RULE, *request),))


def check(
    actions: npt.ArrayLike, fallen: Sequence[bool] | Bools, allowed: Sequence[Allowed], nvec: Sequence[int]
) -> Bools:
    """Look once more at drawn actions, [B, F]: bool [B], True where an action may leave.

    A row that fell back answers with the declared fallback, which rules do not mask; it must still exist.
    """
    drawn = np.asarray(actions)
    if drawn.shape != (len(allowed), len(nvec)):
        return np.zeros(len(allowed), dtype=np.bool_)
    passed: Bools = np.asarray(((drawn >= 0) & (drawn < np.array(nvec))).all(axis=1))
    for index, row in _said(allowed):
        if not fallen[index]:
            passed[index] &= all(place in row for place in _places(drawn[index].tolist(), nvec))
    return passed


def check_box(actions: npt.ArrayLike, fallen: Sequence[bool] | Bools, allowed: Sequence[Bounds], space: Box) -> Bools:
    """Look once more at drawn points, [B, D]: bool [B], True where a point may leave: within the space and the caller's
    box.
    """
    points = np.asarray(actions, dtype=np.float64)
    if points.shape != (len(allowed), space.size):
        return np.zeros(len(allowed), dtype=np.bool_)
    lowest, highest = space.bounds
    passed: Bools = np.asarray(((points >= lowest) & (points <= highest)).all(axis=1))
    for index, (low, high) in _said(allowed):
        if not fallen[index]:
            each = zip(low, points[index].tolist(), high, strict=True)
            passed[index] &= all(bottom <= value <= top for bottom, value, top in each)
    return passed


def _said(allowed: Sequence[Said | None]) -> list[tuple[int, Said]]:
    """Rows of which the caller says something, and what."""
    if allowed.count(None) == len(allowed):
        return []
    return [(index, row) for index, row in enumerate(allowed) if row is not None]


def _places(action: Sequence[int], nvec: Sequence[int]) -> list[int]:
    """The columns of an action, one for each factor."""
    return [sum(nvec[:factor]) + choice for factor, choice in enumerate(action)]
