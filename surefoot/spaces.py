"""The action space of a transition: how its actions, masks and distributions lie in bytes and text. Pure.

Duty: the one place in this package that knows the layouts of the three kinds. It knows nothing of entries or streams.
    discrete        one of n choices
    multi_discrete  one choice for each factor; a row has sum(nvec) elements, factors side by side
    continuous      D float64 coordinates; a mask is the box, its D low ends and then its D high ends
Promise: text and bytes are read without rounding; what does not fit the space raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["discrete", "multi_discrete", "continuous"]
Action = int | tuple[int, ...] | tuple[float, ...]

FLOAT = 8  # bytes of a float64


class Space(NamedTuple):
    """`sizes` are (n,), nvec, or (D,)."""

    kind: Kind
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, kind: Kind, nvec: tuple[int, ...], mask: bytes) -> Space:
        """Tell the space from what is recorded of it."""
        if kind == "discrete":
            return cls(kind, (len(mask),))
        if kind == "multi_discrete":
            _expect(len(mask), sum(nvec), "a mask")
            return cls(kind, nvec)
        size, rest = divmod(len(mask), 2 * FLOAT)
        if rest or not size:
            raise ValueError(f"a box of {len(mask)} bytes")
        return cls(kind, (size,))

    @property
    def continuous(self) -> bool:
        return self.kind == "continuous"

    @property
    def width(self) -> int:
        """Elements of a row of masks or distributions; none over a box."""
        return 0 if self.continuous else sum(self.sizes)

    @property
    def coordinates(self) -> int:
        """D over a box; no coordinates otherwise."""
        return self.sizes[0] if self.continuous else 0

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one action: () for an index, else (F,) or (D,)."""
        return {"discrete": (), "multi_discrete": (len(self.sizes),), "continuous": self.sizes}[self.kind]

    @property
    def target_width(self) -> int:
        """A probability for each choice, or D means and D deviations."""
        return self.width + 2 * self.coordinates

    @property
    def action_dtype(self) -> str:
        return "<f8" if self.continuous else "<i8"

    def read(self, text: str) -> Action:
        """Read an action: "3", "1,0" or "0.5,-0.25"."""
        parts = text.split(",")
        if self.continuous:
            point = tuple(float(part) for part in parts)
            _expect(len(point), self.coordinates, "an action", "coordinates")
            if not all(map(math.isfinite, point)):
                raise ValueError(f"an action that is not finite: {text}")
            return point
        chosen = tuple(int(part) for part in parts)
        _expect(len(chosen), len(self.sizes), "an action", "factors")
        for index, n in zip(chosen, self.sizes, strict=True):
            if not 0 <= index < n:
                raise ValueError(f"action {text} is not one of {self.sizes}")
        return chosen if self.kind == "multi_discrete" else chosen[0]

    def check(self, target: bytes, behaviour: bytes, proposed: int | Sequence[float]) -> None:
        """Refuse distributions, or a proposed action, that do not fit."""
        _expect(len(target), FLOAT * self.target_width, "a target")
        _expect(len(behaviour), FLOAT * self.width, "a behaviour")
        shape = () if isinstance(proposed, int) else (len(proposed),)
        if shape != self.action_shape:
            raise ValueError(f"a proposed action of shape {shape}")

    def by_factor(self, row: list[Any]) -> list[Any]:
        """A row as it is, or cut by factor."""
        if self.kind != "multi_discrete":
            return row
        ends = np.cumsum(self.sizes).tolist()
        return [row[end - n : end] for end, n in zip(ends, self.sizes, strict=True)]


def finite(value: Any) -> Any:
    """The same value as JSON can hold it: None for each number that is not finite."""
    if isinstance(value, list | tuple):
        return [finite(element) for element in value]
    if isinstance(value, dict):
        return {name: finite(element) for name, element in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def floats(raw: bytes) -> list[float]:
    """Read float64s."""
    return list(np.frombuffer(raw, "<f8").tolist())


def _expect(found: int, wanted: int, what: str, unit: str = "bytes") -> None:
    if found != wanted:
        raise ValueError(f"{what} of {found} {unit}, {wanted} expected")
