"""The safety filter: all rules over a batch, and an independent last look at what was drawn. Pure, total.

`constrain` and `constrain_box` work on arrays before anything is drawn; `check` and `check_box` go row by row over what
callers sent, sharing no code with them, so that a mistake in one is seen by the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policies.types import Bools, Box, Choices
from safety.bounds import Bounds, request_box
from safety.mask import Allowed, request_mask
from safety.types import REQUEST_RULE, BoxConstraint, Constraint


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
    actions: Sequence[Sequence[int]], fallen: Sequence[bool], allowed: Sequence[Allowed], nvec: Sequence[int]
) -> Bools:
    """Look once more at drawn actions: bool [B], True where an action may leave.

    A row that fell back answers with the declared fallback, which rules do not mask; it must still exist.
    """
    passed = []
    for action, fell, row in zip(actions, fallen, allowed, strict=True):
        start, good = 0, len(action) == len(nvec)
        for choice, n in zip(action, nvec, strict=False):
            good = good and 0 <= choice < n and (fell or row is None or start + choice in row)
            start += n
        passed.append(good)
    return np.array(passed, dtype=np.bool_)


def check_box(
    actions: Sequence[Sequence[float]], fallen: Sequence[bool], allowed: Sequence[Bounds], space: Box
) -> Bools:
    """Look once more at drawn points: bool [B], True where a point may leave: within the space and the caller's box."""
    passed = []
    for action, fell, row in zip(actions, fallen, allowed, strict=True):
        good = space.validate(action)
        if good and not fell and row is not None:
            good = all(low <= value <= high for low, value, high in zip(row[0], action, row[1], strict=True))
        passed.append(good)
    return np.array(passed, dtype=np.bool_)
