"""Why a row falls back. Pure, total."""

from __future__ import annotations

from safety.types import FallbackReason


def reason(*, failure: FallbackReason | None, finite: bool, allowed: int) -> FallbackReason:
    """Name the first thing that went wrong on the way to an action.

    failure: how the network failed to answer, if it did. finite: its answer was a distribution or finite values.
    allowed: how many actions the rules left. What remains is a target distribution without mass on any of them.
    """
    if failure is not None:
        return failure
    if not finite:
        return "not_finite"
    return "nothing_allowed" if allowed == 0 else "no_mass_allowed"
