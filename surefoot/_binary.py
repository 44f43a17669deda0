"""States as raw numbers: which are sent so, and the request that carries them. Pure.

Duty: everything that this package knows of the service's binary form: the other fields in JSON, and behind them the
array as it lies in memory, little-endian, with dtype and shape in headers.
Strategy: large arrays by themselves, whatever numpy can read if told; what is no array of numbers goes as JSON.
Promise: no number is changed on its way: integers of up to 16 bits become float32, longer ones float64, as the service
would read them from JSON. NaN and Infinity are refused, as in JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from surefoot._values import plain, refuse_not_finite

Wire = Literal["auto", "json", "binary"]

# From so many numbers on, "auto" sends arrays raw: at fewer the service gains nothing (docs/binary-states.md).
LARGE: Final = 256

_encoder = msgspec.json.Encoder()


def request(name: str, state: Any, fields: Mapping[str, Any], wire: Wire) -> tuple[bytes, dict[str, str]]:
    """Give the body of a request and its headers. name: of the field that the state is. Fields with None are left out.

    Raises NotFinite or InvalidField, naming the element.
    """
    given = {field: value for field, value in fields.items() if value is not None}
    array = None if wire == "json" else _array(state, wire)
    if array is None:
        return _encoder.encode({name: plain(state, name), **given}), {}
    refuse_not_finite(array, name)
    front = _encoder.encode(given)
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(front)),
        "Surefoot-Dtype": array.dtype.str,
        "Surefoot-Shape": ",".join(map(str, array.shape)),
    }
    return front + array.tobytes(), headers


def _array(state: Any, wire: Wire) -> npt.NDArray[Any] | None:
    """The state as an array of a dtype that the service takes; None: it goes as JSON."""
    if isinstance(state, Mapping | str) or state is None or not (wire == "binary" or _is_array(state)):
        return None
    try:
        array = np.asarray(state)
    except ValueError:  # ragged: the service says where
        return None
    if array.ndim == 0 or (wire == "auto" and array.size <= LARGE):
        return None
    dtype = _dtype(array.dtype)
    return None if dtype is None else array.astype(dtype, copy=False)


def _is_array(state: Any) -> bool:
    """Whether it is an array, or a sequence of them."""
    if isinstance(state, list | tuple):
        return bool(state) and all(hasattr(each, "__array__") for each in state)
    return hasattr(state, "__array__")


def _dtype(dtype: np.dtype[Any]) -> str | None:
    if dtype == np.uint8:
        return "|u1"
    if dtype.kind == "f" and dtype.itemsize <= 8:
        return "<f8" if dtype.itemsize == 8 else "<f4"
    if dtype.kind in "iu":
        return "<f8" if dtype.itemsize > 2 else "<f4"
    return None
