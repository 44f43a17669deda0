"""Features held against numbers, for all rules of a policy and all rows of a batch at once. Pure, total.

Duty: hold the comparisons that expressions are made of, each one feature, one operator and one number, and say for each
row which are true. It reads no text and knows no rules.
Strategy: what is asked with one operator is one numpy comparison over [B, comparisons], in float64, where every float32
and every integer up to 2^53 is exact, as CEL's numbers are.
Promise: for finite numbers what CEL says of the comparison. What is said where a number is not finite means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from policies.types import Bools, Floats

OPERATORS: Final[Mapping[str, np.ufunc]] = {
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "==": np.equal,
    "!=": np.not_equal,
}


_Group = tuple[np.ufunc, npt.NDArray[np.intp], Floats, npt.NDArray[np.intp]]


class Thresholds:
    """The comparisons of one policy. Ask for columns while rules are built, then for what they say."""

    def __init__(self) -> None:
        self._columns: dict[tuple[int, str, float], int] = {}
        self._groups: list[_Group] | None = None

    def __len__(self) -> int:
        return len(self._columns)

    def column(self, feature: int, sign: str, number: float) -> int:
        """The column of a comparison: a feature by its place in a flat state, a sign of OPERATORS, a finite number."""
        self._groups = None
        return self._columns.setdefault((feature, sign, number), len(self._columns))

    def of(self, states: npt.NDArray[np.floating]) -> Bools:
        """Which comparisons are true of states [B, *shape], bool [B, columns]."""
        groups = self._groups if self._groups is not None else self._grouped()
        flat = states.reshape(len(states), -1) if states.ndim > 2 else states
        if len(groups) == 1:
            compare, features, numbers, _ = groups[0]
            alone: Bools = compare(flat.take(features, axis=1).astype(np.float64), numbers)
            return alone
        found = np.empty((len(flat), len(self._columns)), dtype=np.bool_)
        for compare, features, numbers, columns in groups:
            found[:, columns] = compare(flat.take(features, axis=1).astype(np.float64), numbers)
        return found

    def _grouped(self) -> list[_Group]:
        """By operator: features, numbers and columns; of one operator alone the columns are in order."""
        alike: dict[str, list[tuple[int, float, int]]] = {}
        for (feature, sign, number), column in self._columns.items():
            alike.setdefault(sign, []).append((feature, number, column))
        groups = []
        for sign, members in alike.items():
            features, numbers, columns = zip(*members, strict=True)
            at, among = np.array(columns, dtype=np.intp), np.array(features, dtype=np.intp)
            groups.append((OPERATORS[sign], among, np.array(numbers, dtype=np.float64), at))
        self._groups = groups
        return groups
