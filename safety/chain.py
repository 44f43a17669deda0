"""The safety filter: all rules over a batch, and an independent last look at what was drawn. Pure, total.

`constrain` works on arrays before anything is drawn; `check` goes row by row over what callers sent, sharing no code
with it, so that a mistake in one is seen by the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policies.types import Bools
from safety.mask import Allowed, request_mask
from safety.types import REQUEST_RULE, Constraint


def constrain(allowed: Sequence[Allowed], n: int) -> Constraint:
    """Give the mask of allowed actions for B rows of an action space with n actions."""
    request = request_mask(allowed, n)
    if request is None:
        return Constraint(np.ones((len(allowed), n), dtype=np.bool_))
    return Constraint(request, ((REQUEST_RULE, request),))


def check(actions: Sequence[int], fallen: Sequence[bool], allowed: Sequence[Allowed], n: int) -> Bools:
    """Look once more at drawn actions: bool [B], True where an action may leave.

    A row that fell back answers with the declared fallback, which rules do not mask; it must still exist.
    """
    return np.array(
        [
            0 <= action < n and (fell or row is None or action in row)
            for action, fell, row in zip(actions, fallen, allowed, strict=True)
        ],
        dtype=np.bool_,
    )
