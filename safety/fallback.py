"""Why a row falls back. Pure, total."""

from __future__ import annotations

from safety.types import FallbackReason


def reason(*, failure: FallbackReason | None, finite: bool, nothing_left: bool) -> FallbackReason:
    """Name the first thing that went wrong on the way to an action.

    failure: how the network failed to answer, if it did. finite: its answer was a distribution or finite values.
    nothing_left: the rules left no action. What remains is a target distribution without mass on any of them.
    """
    if failure is not None:
        return failure
    if not finite:
        return "not_finite"
    return "nothing_allowed" if nothing_left else "no_mass_allowed"
