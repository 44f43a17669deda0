"""Columns of numbers as torch tensors: the one place in this package that imports torch, and only when asked to.

Promise: on the CPU nothing is copied; nothing is rounded or widened anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


def as_tensors(columns: Mapping[str, npt.NDArray[Any]], device: Any) -> dict[str, Any]:
    """Give each column that is not one of strings as a tensor. Raises ImportError and TypeError."""
    try:
        import torch
    except ImportError as error:
        raise ImportError("tensors need PyTorch, which is not installed: pip install torch") from error
    found = {name: _tensor(torch, name, column) for name, column in columns.items() if column.dtype != np.object_}
    return found if device is None else {name: tensor.to(device) for name, tensor in found.items()}


def _tensor(torch: Any, name: str, column: npt.NDArray[Any]) -> Any:
    # torch has one byte order, the machine's own.
    native = column.astype(column.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(native)
    except TypeError as error:
        raise TypeError(f"torch has no dtype for {name}, {column.dtype}: convert the column yourself") from error
