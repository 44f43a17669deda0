"""`allowed_actions` of a request, to what the safety filter reads. Pure.

Choices become columns of a row of N, factors side by side; a box becomes its low and high. Complaints name the element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from policies.errors import InvalidField
from policies.types import ActionSpec, Box, Choices
from service.wire import Allowed, AllowedBox

Columns = tuple[int, ...]
Ends = tuple[tuple[float, ...], tuple[float, ...]]


def read_allowed(allowed: Allowed | None, action: ActionSpec, where: str) -> Columns | Ends | None:
    """Read what a caller allows. Raises InvalidField or UnknownAction naming the element below `where`."""
    if allowed is None:
        return None
    if isinstance(action, Box):
        if not isinstance(allowed, AllowedBox):
            raise InvalidField('the action is continuous: send {"low": […], "high": […]}', where)
        return _end(allowed.low, action, -math.inf, f"{where}.low"), _end(
            allowed.high, action, math.inf, f"{where}.high"
        )
    if isinstance(allowed, AllowedBox):
        raise InvalidField("the action is a choice: send a list of indices or names", where)
    if not action.factors:
        return tuple(action.index(choice, f"{where}[{i}]") for i, choice in enumerate(allowed))
    if len(allowed) != len(action.factors):
        raise InvalidField(f"send one list, or null, for each of {', '.join(action.factors)}", where)
    return tuple(column for f, each in enumerate(allowed) for column in _factor(each, action, f, f"{where}[{f}]"))


def _factor(choices: object, action: Choices, factor: int, where: str) -> Sequence[int]:
    start = action.starts[factor]
    if choices is None:
        return range(start, start + action.nvec[factor])
    if not isinstance(choices, list):
        raise InvalidField("send a list of this factor's choices, or null for all", where)
    return [start + action.index(choice, f"{where}[{i}]", factor) for i, choice in enumerate(choices)]


def _end(given: list[float | None] | None, action: Box, open_end: float, where: str) -> tuple[float, ...]:
    if given is None:
        return (open_end,) * action.size
    if len(given) != action.size:
        raise InvalidField(f"there are {action.size} coordinates, but {len(given)} numbers", where)
    return tuple(open_end if value is None else value for value in given)
