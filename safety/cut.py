"""The cutting of an expression into parts that are evaluated as seldom as possible. Pure.

Duty: from a checked text and what `action` ranges over to the parts of `parts.py`. Refuses what says nothing.
Strategy: an expression is cut at `&&` and `||`, and at `!` before what cannot fail. A part that holds a feature against
a number is said by arrays for a whole batch; one that names only `action` once, at load; one that names no `action` is
a program that runs once for each row; only a part that mixes both is run for each row and each choice that is still
open, by a program of its own with the choice written into it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, cast

import numpy as np

from policies.errors import SafetyError
from policies.types import Choices, ObservationSpec
from safety.expression import NOTHING, Needs, Program, Text, complaint, probe, program, worth
from safety.parts import All, Any, ByCell, ByRow, Compared, Not, Part, bits_of, fixed
from safety.threshold import OPERATORS, Thresholds
from safety.tokens import Token, Use, split, unwrap

MOST_CELLS = 4_096  # of a joint rule, and programs of one expression that mixes state and action
MEMBERS = ("index", "name")
MIRRORED: Final[Mapping[str, str]] = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}


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


class Cutter:
    """The cutting of one expression. cells: of its domain.

    needs: what its programs read, compares: whether it holds features against numbers; both once it is cut.
    """

    def __init__(self, domain: Domain, observation: ObservationSpec, thresholds: Thresholds) -> None:
        self.cells = domain.cells
        self.needs = Needs()
        self.compares = False
        self._domain = domain
        self._observation = observation
        self._thresholds = thresholds
        self._every = (1 << len(self.cells)) - 1
        self._probe = probe(observation)
        self._programs = 0

    def cut(self, text: Text) -> Part:
        tokens = unwrap(text.tokens)
        if len(split(tokens, "?")) == 1:
            for operator in ("||", "&&"):
                pieces = split(tokens, operator)
                if len(pieces) > 1:
                    return self._together(operator, [self.cut(text.part(piece)) for piece in pieces])
        return self._opposite(text.part(tokens)) or self._compared(text.part(tokens)) or self._leaf(text.part(tokens))

    def _together(self, operator: str, parts: Sequence[Part]) -> Part:
        """Parts joined by `operator`, those that are programs over rows as one program."""
        parts = sorted(parts, key=lambda part: part.cost)
        programs = [part for part in parts if isinstance(part, ByRow)]
        if len(programs) > 1:
            text = operator.join(f"({part.text})" for part in programs)
            joined = ByRow(program(text), text)
            parts = (
                [part for part in parts if part.known]
                + [joined]
                + [part for part in parts if not part.known and not isinstance(part, ByRow)]
            )
        if len(parts) == 1:
            return parts[0]
        kind = Any if operator == "||" else All
        known, certain = all(part.known for part in parts), all(part.certain for part in parts)
        return kind(tuple(parts), known, certain)

    def _opposite(self, text: Text) -> Part | None:
        """What stands in parentheses behind `!`, where it is certain."""
        signs = next(index for index, token in enumerate(text.tokens) if token.text != "!")
        inner = text.tokens[signs:]
        if not signs or len(unwrap(inner)) == len(inner):
            return None
        before = self._programs, self.needs
        try:
            part = self.cut(text.part(inner))
        except SafetyError:  # of a piece that says nothing alone
            part = None
        if part is None or not part.certain:
            self._programs, self.needs = before
            return None
        return Not(part) if signs % 2 else part

    def _compared(self, text: Text) -> Part | None:
        """A feature held against what names nothing and is a number."""
        signs = [sign for sign in OPERATORS if len(split(text.tokens, sign)) > 1]
        others = any(token.text in ("in", "?") for token in text.tokens)
        if len(signs) != 1 or others or len(sides := split(text.tokens, signs[0])) != 2:
            return None
        for (one, other), sign in ((sides, signs[0]), (sides[::-1], MIRRORED[signs[0]])):
            feature = feature_of(text.part(unwrap(one)), self._observation)
            number = None if feature is None else self._number(text.part(other))
            if feature is not None and number is not None:
                self.compares = True
                return Compared(self._thresholds.column(feature, sign, number))
        return None

    def _number(self, text: Text) -> float | None:
        """What a text comes to that names nothing: a finite number that float64 holds exactly, else None."""
        if not text.needs().nothing or text.uses("action"):
            return None
        found = worth(program(text.written()), NOTHING)
        exact = type(found) in (int, float) and math.isfinite(number := float(cast(float, found))) and number == found
        return number if exact else None

    def _leaf(self, text: Text) -> Part:
        found, needs = text.uses("action"), text.needs()
        if found:
            return self._by_cell(text, found, needs)
        compiled = self._compiled(text.written(), needs)
        if needs.nothing:
            said = worth(compiled, NOTHING)
            return fixed(self._every if said is not False else 0, len(self.cells), isinstance(said, bool))
        return ByRow(compiled, text.written())

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
        pairs = list(zip(programs, alike.values(), strict=True))
        if needs.nothing:
            said = [(worth(each, NOTHING), cells) for each, cells in pairs]
            bits = bits_of((cell for found, cells in said if found is not False for cell in cells), len(self.cells))
            return fixed(bits, len(self.cells), all(isinstance(found, bool) for found, _ in said))
        return ByCell(tuple((each, bits_of(cells, len(self.cells))) for each, cells in pairs))

    def _alike(self, places: set[int]) -> dict[tuple[int | None, ...], list[int]]:
        """Cells that are alike in these factors, by what they have there."""
        alike: dict[tuple[int | None, ...], list[int]] = {}
        for number, cell in enumerate(self.cells):
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
        self.needs |= needs
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


def feature_of(text: Text, observation: ObservationSpec) -> int | None:
    """The place in a flat state of the one feature that a text is, by name or by indices; None where it is none."""
    found = text.uses("state")
    if len(found) != 1 or found[0].first:
        return None
    path, behind = found[0].path, text.tokens[found[0].last + 1 :]
    if observation.names:
        return observation.names.index(path[0]) if len(path) == 1 and not behind else None
    written = [token.text for token in behind]
    digits, shape = written[1::3], observation.shape
    if path or len(written) != 3 * len(shape) or set(written[::3]) != {"["} or set(written[2::3]) != {"]"}:
        return None
    if not all(each.isdecimal() and int(each) < size for each, size in zip(digits, shape, strict=True)):
        return None
    return int(np.ravel_multi_index([int(each) for each in digits], shape))


def quoted(text: str) -> str:
    """A CEL string literal. Whatever is not plain is written by its number."""
    return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}" for c in text) + '"'
