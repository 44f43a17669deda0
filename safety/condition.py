"""Expressions over rows and choices, cut into parts that are evaluated as seldom as possible. Pure, total.

Duty: say for which cells an expression is not false. A cell is one thing that `action` may be: a choice of one factor,
or a tuple of choices. It knows no rules and gives no verdicts.
Strategy: whatever fails denies, so the only question is "false or not", and in that lattice CEL's `&&` and `||`, which
absorb errors, are plain AND and OR. So an expression is cut at them. A part that names no `action` is run once for each
row; one that names only `action` once at load; only a part that mixes both is run for each row and each choice that is
still open, by a program of its own with the choice written into it. A row's cells are the bits of an integer.
Promise: the same answer as the whole expression, evaluated for each row and cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np

from policies.errors import SafetyError
from policies.types import Bools, Choices, ObservationSpec
from safety.expression import NOTHING, Needs, Program, Text, View, Views, complaint, denies, probe, program, read
from safety.facts import Facts
from safety.tokens import Token, Use, split, unwrap

MOST_CELLS = 4_096  # of a joint rule, and programs of one expression that mixes state and action
MEMBERS = ("index", "name")


@dataclass(frozen=True, slots=True)
class Domain:
    """What `action` ranges over: all tuples over these factors, the last fastest. Without factors: one cell, all."""

    space: Choices | None = None
    factors: tuple[int, ...] = ()
    named: bool = False  # `action` holds its factors by name

    @property
    def cells(self) -> list[tuple[int, ...]]:
        space = self.space
        return list(product(*(range(space.nvec[factor]) for factor in self.factors))) if space else [()]

    def factor(self, use: Use) -> int:
        """The place in `factors` that a use of `action` is about. Raises SafetyError."""
        members = use.path[1:] if self.named else use.path
        place = self._place(use.path[0]) if self.named and use.path else 0
        if place is None or len(members) != 1 or members[0] not in MEMBERS:
            raise SafetyError(
                f"`action` is read as {self._forms()}, here it is {'.'.join(('action', *use.path))}", "when"
            )
        return place

    def _place(self, name: str) -> int | None:
        space = self.space
        return next((i for i, f in enumerate(self.factors) if space and space.factors[f] == name), None)

    def _forms(self) -> str:
        if not self.named or self.space is None:
            return "action.name or action.index"
        return " or ".join(f"action.{name}.name" for name in self.space.factors[:4])


class Part(Protocol):
    """A part of an expression."""

    @property
    def cost(self) -> int:
        """How late to ask it."""
        ...

    def among(self, view: View, wanted: int) -> int:
        """The cells among `wanted` for which the part is not false."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    bits: int
    cost: int = 0

    def among(self, view: View, wanted: int) -> int:
        return self.bits & wanted


@dataclass(frozen=True, slots=True)
class ByRow:
    program: Program
    cost: int = 1

    def among(self, view: View, wanted: int) -> int:
        return wanted if denies(self.program, view) else 0


@dataclass(frozen=True, slots=True)
class ByCell:
    programs: tuple[tuple[Program, int], ...]  # each with the cells it is for
    cost: int = 3

    def among(self, view: View, wanted: int) -> int:
        found = 0
        for each, cells in self.programs:
            if cells & wanted and denies(each, view):
                found |= cells & wanted
        return found


@dataclass(frozen=True, slots=True)
class All:
    parts: tuple[Part, ...]
    cost: int = 2

    def among(self, view: View, wanted: int) -> int:
        for part in self.parts:
            if not wanted:
                break
            wanted = part.among(view, wanted)
        return wanted


@dataclass(frozen=True, slots=True)
class Any:
    parts: tuple[Part, ...]
    cost: int = 2

    def among(self, view: View, wanted: int) -> int:
        found = 0
        for part in self.parts:
            if found == wanted:
                break
            found |= part.among(view, wanted & ~found)
        return found


class Condition:
    """A compiled expression over a domain."""

    def __init__(self, text: Text, domain: Domain, observation: ObservationSpec, views: Views) -> None:
        """Compile. Raises SafetyError."""
        cells = domain.cells
        self.count = len(cells)
        self._every = (1 << self.count) - 1
        self._needs = text.needs()
        self._views = views
        views.want(self._needs)
        self._root = _Cutter(domain, cells, observation).cut(text)
        self._fixed = self._root.among(NOTHING, self._every) if self._needs.nothing else None

    def bits(self, facts: Facts) -> list[int]:
        """For each row the cells for which the expression is true, or fails, as the bits of an integer."""
        if self._fixed is not None:
            return [self._fixed] * len(facts.states)
        views = self._views.of(facts, self._needs)
        return [self._every if view is None else self._root.among(view, self._every) for view in views]

    def array(self, bits: Sequence[int]) -> Bools:
        """Bits as an array, bool [B, cells]."""
        width = -(-self.count // 8)
        raw = np.frombuffer(b"".join(each.to_bytes(width, "little") for each in bits), dtype=np.uint8)
        spread = np.unpackbits(raw.reshape(len(bits), width), axis=1, count=self.count, bitorder="little")
        return spread.view(np.bool_)


def row_condition(source: str, observation: ObservationSpec, views: Views) -> Condition:
    """Compile an expression that is about rows alone. Raises SafetyError."""
    text = read(source, observation)
    if text.uses("action"):
        raise SafetyError("this expression is about the row: it cannot name `action`", "when")
    return Condition(text, Domain(), observation, views)


class _Cutter:
    """The cutting of one expression."""

    def __init__(self, domain: Domain, cells: Sequence[tuple[int, ...]], observation: ObservationSpec) -> None:
        self._domain = domain
        self._cells = cells
        self._every = (1 << len(cells)) - 1
        self._probe = probe(observation)
        self._programs = 0

    def cut(self, text: Text) -> Part:
        tokens = unwrap(text.tokens)
        if len(split(tokens, "?")) == 1:
            for operator, kind in (("||", Any), ("&&", All)):
                pieces = split(tokens, operator)
                if len(pieces) > 1:
                    return kind(self._parts(text, pieces))
        return self._leaf(text.part(tokens))

    def _parts(self, text: Text, pieces: Iterable[Sequence[Token]]) -> tuple[Part, ...]:
        return tuple(sorted((self.cut(text.part(piece)) for piece in pieces), key=lambda part: part.cost))

    def _leaf(self, text: Text) -> Part:
        found, needs = text.uses("action"), text.needs()
        if found:
            return self._by_cell(text, found, needs)
        compiled = self._compiled(text.written(), needs)
        if needs.nothing:
            return Fixed(self._every if denies(compiled, NOTHING) else 0)
        return ByRow(compiled)

    def _by_cell(self, text: Text, found: Sequence[Use], needs: Needs) -> Part:
        places = [self._domain.factor(use) for use in found]
        for use, place in zip(found, places, strict=True):
            self._check_names(text, use, place)
        alike = self._alike(set(places))
        if not needs.nothing:
            self._programs += len(alike)
            if self._programs > MOST_CELLS:
                detail = f"an expression that mixes state and action over more than {MOST_CELLS} choices takes too long"
                raise SafetyError(detail, "when")
        programs = [self._compiled(text.written(self._instead(found, places, key)), needs) for key in alike]
        if needs.nothing:
            denied = [cells for each, cells in zip(programs, alike.values(), strict=True) if denies(each, NOTHING)]
            return Fixed(bits_of((cell for cells in denied for cell in cells), len(self._cells)))
        pairs = zip(programs, alike.values(), strict=True)
        return ByCell(tuple((each, bits_of(cells, len(self._cells))) for each, cells in pairs))

    def _alike(self, places: set[int]) -> dict[tuple[int | None, ...], list[int]]:
        """Cells that are alike in these factors, by what they have there."""
        alike: dict[tuple[int | None, ...], list[int]] = {}
        for number, cell in enumerate(self._cells):
            key = tuple(choice if place in places else None for place, choice in enumerate(cell))
            alike.setdefault(key, []).append(number)
        return alike

    def _instead(
        self, found: Sequence[Use], places: Sequence[int], key: Sequence[int | None]
    ) -> Mapping[int, tuple[int, str]]:
        """What stands in place of each use of `action` where it is the choice of `key`."""
        written = {}
        for use, place in zip(found, places, strict=True):
            choice = key[place]
            assert choice is not None
            literal = f"({choice})" if use.path[-1] == "index" else quoted(self._names(place)[choice])
            written[use.first] = use.last, literal
        return written

    def _names(self, place: int) -> tuple[str, ...]:
        assert self._domain.space is not None
        return self._domain.space.names[self._domain.factors[place]]

    def _compiled(self, source: str, needs: Needs) -> Program:
        compiled = program(source)
        fault = complaint(compiled, self._probe) if needs.context == frozenset() else None
        if fault is not None:
            raise SafetyError(f"{source!r} cannot be decided: {fault}", "when")
        return compiled

    def _check_names(self, text: Text, use: Use, place: int) -> None:
        """A name that is no action's would be a rule that never holds."""
        if use.path[-1] != "name":
            return
        for name in compared(text.tokens, use):
            if name not in self._names(place):
                raise SafetyError(f"there is no action {name!r}; known: {', '.join(self._names(place)[:16])}", "when")


def compared(tokens: Sequence[Token], use: Use) -> list[str]:
    """The string literals that a use is held against: by == or !=, from either side, or by `in` a list."""
    before, behind = [*reversed(tokens[: use.first])], tokens[use.last + 1 :]
    found = _literal(before) + _literal(behind)
    if len(behind) > 1 and behind[0].text == "in" and behind[1].text == "[":
        close = next((index for index, token in enumerate(behind) if token.text == "]"), len(behind))
        found += [token.plain for token in behind[2:close] if token.plain is not None]
    return found


def _literal(outward: Sequence[Token]) -> list[str]:
    """The literal behind == or !=, seen outward from a use; not where it is a piece of a longer text."""
    if len(outward) < 2 or outward[0].text not in ("==", "!=") or outward[1].plain is None:
        return []
    return [] if len(outward) > 2 and outward[2].text in ("+", ".") else [str(outward[1].plain)]


def bits_of(cells: Iterable[int], count: int) -> int:
    """Cells as the bits of an integer."""
    packed = bytearray(count // 8 + 1)
    for cell in cells:
        packed[cell >> 3] |= 1 << (cell & 7)
    return int.from_bytes(packed, "little")


def quoted(text: str) -> str:
    """A CEL string literal. Whatever is not plain is written by its number."""
    return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}" for c in text) + '"'
