"""Turn what callers hold (lists, dicts, numpy arrays and scalars, tensors) into what JSON can carry. Pure.

Promise: nothing is rounded, and NaN and Infinity never leave: JSON has no way to say them, and an encoder that writes
null instead would change a state silently. The refusal names the element as the service would: `state.cpu`, `state[2]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from surefoot.errors import FieldProblem, InvalidField, NotFinite


def plain(value: Any, path: str) -> Any:
    """Give `value` as dicts, lists, strings and numbers. Raises NotFinite or InvalidField, naming the element."""
    if isinstance(value, float):
        return _finite(float(value), path)
    if value is None or isinstance(value, str | bool | int):
        return value if not isinstance(value, np.generic) else value.item()
    if isinstance(value, list | tuple):
        return [plain(element, f"{path}[{index}]") for index, element in enumerate(value)]
    if isinstance(value, Mapping):
        return {_name(name, path): plain(element, f"{path}.{name}") for name, element in value.items()}
    if hasattr(value, "__array__"):
        return _from_array(np.asarray(value), path)
    raise _refused(f"a {type(value).__name__} cannot be sent", path)


def number(value: Any, path: str) -> float | int:
    """Give `value` as one finite number."""
    found = plain(value, path)
    if isinstance(found, bool) or not isinstance(found, float | int):
        raise _refused(f"a number is needed, not {type(value).__name__}", path)
    return found


def allowed(value: Any, path: str) -> Any:
    """Give `allowed_actions` as plain values. An infinity that leaves an end of a box open becomes null."""
    if not isinstance(value, Mapping):
        return plain(value, path)
    open_ends = {"low": -math.inf, "high": math.inf}
    return {name: _ends(end, f"{path}.{name}", open_ends.get(name)) for name, end in value.items()}


def allowed_by_row(column: Any, path: str) -> Any:
    """Give a column of `allowed_actions`, one element for each state."""
    if column is None:
        return None
    if isinstance(column, Mapping):
        raise _refused("one element for each state is needed, not one for all", path)
    return [allowed(each, f"{path}[{row}]") for row, each in enumerate(column)]


def _ends(ends: Any, path: str, open_end: float | None) -> Any:
    found = np.asarray(ends).tolist() if hasattr(ends, "__array__") else ends
    if not isinstance(found, list | tuple):
        return plain(found, path)
    return [None if end == open_end else plain(end, f"{path}[{index}]") for index, end in enumerate(found)]


def refuse_not_finite(array: np.ndarray[Any, Any], path: str) -> None:
    """Raise NotFinite, naming the first element of an array of numbers that is not finite."""
    finite = np.isfinite(array)
    if not finite.all():
        first = np.argwhere(~finite)[0]
        _finite(float(array[tuple(first)]), path + "".join(f"[{index}]" for index in first))


def _from_array(array: np.ndarray[Any, Any], path: str) -> Any:
    if array.dtype.kind == "f":
        refuse_not_finite(array, path)
        return array.tolist()
    if array.dtype.kind in "biuU":
        return array.tolist()
    if array.dtype.kind == "O":
        return plain(array.tolist(), path)
    raise _refused(f"an array of {array.dtype} cannot be sent", path)


def _finite(value: float, path: str) -> float:
    if math.isfinite(value):
        return value
    detail = f"the value is {value}; it was not sent"
    raise NotFinite(detail, status=422, title="A number is not finite", errors=[FieldProblem(path, detail)])


def _name(name: Any, path: str) -> str:
    if isinstance(name, str):
        return str(name)
    raise _refused(f"names must be strings, not {type(name).__name__}", path)


def _refused(detail: str, path: str) -> InvalidField:
    detail = f"{detail}; it was not sent"
    title = "A field has the wrong type, shape or value"
    return InvalidField(detail, status=422, title=title, errors=[FieldProblem(path, detail)])
