"""Masks over choices. Pure, total: every input gives a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policies.types import Bools

Allowed = Sequence[int] | None  # columns a caller allows; None: all; empty: none


def request_mask(allowed: Sequence[Allowed], n: int) -> Bools | None:
    """Mask by the callers' `allowed_actions`, bool [B, n], or None when no row names any.

    Columns outside 0..n - 1 allow nothing: they are refused at the edge, and here they are merely harmless.
    """
    if allowed.count(None) == len(allowed):
        return None
    mask = np.ones((len(allowed), n), dtype=np.bool_)
    for index, row in enumerate(allowed):
        if row is not None:
            mask[index] = False
            mask[index, [column for column in row if 0 <= column < n]] = True
    return mask
