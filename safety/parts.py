"""What an expression is cut into, and how the parts are put together again. Pure, total.

Duty: say for which cells a part is not false: for one row, where a program must be run, and for all rows of a batch at
once, where arrays can say it. It reads no text.
Strategy: a part is fixed, a comparison that the batch knows already, or programs. `over` answers for the whole batch
with one answer for all programs: with none and with all of them true it gives what is certainly and what is possibly
not false, for the lattice is monotone. Only rows that lie between are asked one by one. A row's cells are then the bits
of an integer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from policies.types import Bools
from safety.expression import Program, View, denies


class Part(Protocol):
    """A part of an expression.

    cost: how late to ask it. known: whether the batch alone says it, without a program. certain: whether it is known,
    and always either true or false: then it may be negated.
    """

    @property
    def cost(self) -> int: ...

    @property
    def known(self) -> bool: ...

    @property
    def certain(self) -> bool: ...

    def may(self, ever: Sequence[bool]) -> bool:
        """Whether it can be other than false in a batch. ever: for each comparison whether it holds in any row."""
        ...

    def over(self, truth: Bools, programs: bool) -> Bools:
        """Whether it is not false, bool [B or 1, cells or 1], were all programs true, or all false."""
        ...

    def among(self, view: View, truth: Sequence[bool], wanted: int) -> int:
        """The cells among `wanted` for which it is not false in one row. truth: which comparisons hold in it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """The same for all rows. cells: bool [1, cells]."""

    bits: int
    cells: Bools
    certain: bool
    cost: int = 0
    known: bool = True

    def may(self, ever: Sequence[bool]) -> bool:
        return self.bits != 0

    def over(self, truth: Bools, programs: bool) -> Bools:
        return self.cells

    def among(self, view: View, truth: Sequence[bool], wanted: int) -> int:
        return self.bits & wanted


@dataclass(frozen=True, slots=True)
class Compared:
    """A feature held against a number, in this column of what the batch knows."""

    column: int
    cost: int = 0
    known: bool = True
    certain: bool = True

    def may(self, ever: Sequence[bool]) -> bool:
        return ever[self.column]

    def over(self, truth: Bools, programs: bool) -> Bools:
        return truth[:, self.column : self.column + 1]

    def among(self, view: View, truth: Sequence[bool], wanted: int) -> int:
        return wanted if truth[self.column] else 0


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite of a part that is certain."""

    part: Part
    cost: int = 1
    known: bool = True
    certain: bool = True

    def may(self, ever: Sequence[bool]) -> bool:
        return True

    def over(self, truth: Bools, programs: bool) -> Bools:
        return np.logical_not(self.part.over(truth, programs))

    def among(self, view: View, truth: Sequence[bool], wanted: int) -> int:
        return wanted & ~self.part.among(view, truth, wanted)


@dataclass(frozen=True, slots=True)
class _Run:
    """What only programs can say."""

    def may(self, ever: Sequence[bool]) -> bool:
        return True

    def over(self, truth: Bools, programs: bool) -> Bools:
        return np.full((1, 1), programs)


@dataclass(frozen=True, slots=True)
class ByRow(_Run):
    program: Program
    text: str
    cost: int = 2
    known: bool = False
    certain: bool = False

    def among(self, view: View, truth: Sequence[bool], wanted: int) -> int:
        return wanted if denies(self.program, view) else 0


@dataclass(frozen=True, slots=True)
class ByCell(_Run):
    programs: tuple[tuple[Program, int], ...]  # each with the cells it is for
    cost: int = 4
    known: bool = False
    certain: bool = False

    def among(self, view: View, truth: Sequence[bool], wanted: int) -> int:
        found = 0
        for each, cells in self.programs:
            if cells & wanted and denies(each, view):
                found |= cells & wanted
        return found


@dataclass(frozen=True, slots=True)
class All:
    parts: tuple[Part, ...]
    known: bool
    certain: bool
    cost: int = 3

    def may(self, ever: Sequence[bool]) -> bool:
        return all(part.may(ever) for part in self.parts)

    def over(self, truth: Bools, programs: bool) -> Bools:
        found = self.parts[0].over(truth, programs)
        for part in self.parts[1:]:
            found = found & part.over(truth, programs)
        return found

    def among(self, view: View, truth: Sequence[bool], wanted: int) -> int:
        for part in self.parts:
            if not wanted:
                break
            wanted = part.among(view, truth, wanted)
        return wanted


@dataclass(frozen=True, slots=True)
class Any:
    parts: tuple[Part, ...]
    known: bool
    certain: bool
    cost: int = 3

    def may(self, ever: Sequence[bool]) -> bool:
        return any(part.may(ever) for part in self.parts)

    def over(self, truth: Bools, programs: bool) -> Bools:
        found = self.parts[0].over(truth, programs)
        for part in self.parts[1:]:
            found = found | part.over(truth, programs)
        return found

    def among(self, view: View, truth: Sequence[bool], wanted: int) -> int:
        found = 0
        for part in self.parts:
            if found == wanted:
                break
            found |= part.among(view, truth, wanted & ~found)
        return found


def fixed(bits: int, count: int, certain: bool) -> Fixed:
    return Fixed(bits, array_of([bits], count), certain)


def array_of(bits: Sequence[int], count: int) -> Bools:
    """Cells of rows as an array, bool [B, count]."""
    width = -(-count // 8)
    raw = np.frombuffer(b"".join(each.to_bytes(width, "little") for each in bits), dtype=np.uint8)
    spread = np.unpackbits(raw.reshape(len(bits), width), axis=1, count=count, bitorder="little")
    return spread.view(np.bool_)


def bits_of(cells: Iterable[int], count: int) -> int:
    """Cells as the bits of an integer."""
    packed = bytearray(count // 8 + 1)
    for cell in cells:
        packed[cell >> 3] |= 1 << (cell & 7)
    return int.from_bytes(packed, "little")
