"""What rules name, choices and factors, to columns of a row. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policies.errors import SafetyError, UnknownAction
from policies.types import ActionSpec, Bools, Box, Choices
from safety.rules import Choice


def named_factor(name: str | None, space: Choices) -> int | None:
    """The factor of that name, None where none is named. Raises SafetyError."""
    if name is None:
        return None
    if name not in space.factors:
        known = f"known: {', '.join(space.factors[:16])}" if space.factors else "this action is one choice"
        raise SafetyError(f"there is no factor {name!r}; {known}", "factor")
    return space.factors.index(name)


def the_factor(name: str | None, space: Choices) -> int:
    """The factor that a rule about one factor means. Raises SafetyError."""
    factor = named_factor(name, space)
    if factor is None and space.factors:
        raise SafetyError(f"say which factor this is about: {', '.join(space.factors[:16])}", "factor")
    return factor or 0


def chosen(actions: Sequence[Choice], factor: str | None, space: ActionSpec) -> tuple[Bools, slice]:
    """Which columns a rule's `actions` are, bool [N], and where their factor lies. Raises SafetyError."""
    if isinstance(space, Box):
        raise SafetyError("this rule is about choices, but the action is continuous", "kind")
    index = the_factor(factor, space)
    start = space.starts[index]
    among = np.zeros(space.size, dtype=np.bool_)
    for place, action in enumerate(actions):
        try:
            among[start + space.index(action, f"actions[{place}]", index)] = True
        except UnknownAction as error:
            raise SafetyError(error.detail, error.field) from None
    return among, slice(start, start + space.nvec[index])
