"""Expressions that Python can say as CEL does: for the last look alone. Pure.

Duty: from the text of an expression to what it comes to for one action: true, false, a function of the state's numbers,
or None, where CEL must say. A reading of its own: it shares no code with `cut.py` and `tokens.py`, and reads less.
Strategy: it knows `&&`, `||`, `!`, parentheses, features held against numbers, and the action held against literals.
Of all else it knows where it ends; what that comes to it leaves open, and a text whose ends it cannot be sure of (a
condition by `?`, comments, escapes, long strings) it does not read. Integers beyond 2^53 are left to CEL, which rounds
them. A state whose numbers are not all finite must not come here.
Promise: where it gives an answer, it is whether CEL's is other than false.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from policies.types import ObservationSpec

Values = Sequence[float]  # of the features that are read
Test = Callable[[Values], bool]
Answer = bool | Test | None
Reading = Callable[[Any], Answer]  # of `action`, as CEL sees it

_PIECE = re.compile(
    r"""\s*(?:
    (?P<text>"[^"\n]*"|'[^'\n]*')
  | (?P<number>\d*\.\d+(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<sign>&&|\|\||[=!<>]=|[-+*/%<>!:.,()\[\]{}])
    )""",
    re.VERBOSE | re.ASCII,
)
_UNSURE: Final = ("\\", "//", '"""', "'''", "?")
_EXACT: Final = 2**53

_HOLDS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "<": lambda one, other: one < other,
    "<=": lambda one, other: one <= other,
    ">": lambda one, other: one > other,
    ">=": lambda one, other: one >= other,
    "==": lambda one, other: one == other,
    "!=": lambda one, other: one != other,
    "in": lambda one, among: one in among,
}
_TURNED: Final = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_TESTS: Final[Mapping[str, Callable[[int, float], Test]]] = {
    "<": lambda place, number: lambda values: values[place] < number,
    "<=": lambda place, number: lambda values: values[place] <= number,
    ">": lambda place, number: lambda values: values[place] > number,
    ">=": lambda place, number: lambda values: values[place] >= number,
    "==": lambda place, number: lambda values: values[place] == number,
    "!=": lambda place, number: lambda values: values[place] != number,
}


@dataclass(frozen=True, slots=True)
class _Path:
    """A variable and its members, names and indices."""

    members: tuple[str | int, ...]


class Reader:
    """Readings of expressions over one observation. features: places in a flat state, in the order of `Values`."""

    def __init__(self, observation: ObservationSpec) -> None:
        self.features: list[int] = []
        self._observation = observation

    def read(self, source: str) -> Reading:
        """What an expression, which CEL has accepted, comes to."""
        pieces = None if any(each in source for each in _UNSURE) else _pieces(source)
        return _open if pieces is None else self._whole(pieces)

    def _whole(self, pieces: Sequence[str]) -> Reading:
        for sign, join in (("||", _either), ("&&", _both)):
            parts = _parts(pieces, sign)
            if len(parts) > 1:
                readings = [self._whole(part) for part in parts]
                return lambda action: join([reading(action) for reading in readings])
        if _enclosed(pieces):
            return self._whole(pieces[1:-1])
        if pieces[0] == "!" and (pieces[1] == "!" or _enclosed(pieces[1:])):
            inner = self._whole(pieces[1:])
            return lambda action: _not(inner(action))
        if list(pieces) in (["true"], ["false"]):
            constant = pieces[0] == "true"
            return lambda action: constant
        return self._comparison(pieces)

    def _comparison(self, pieces: Sequence[str]) -> Reading:
        signs = [at for at, piece in enumerate(pieces) if piece in _HOLDS]
        if len(signs) != 1:
            return _open
        (at,) = signs
        sign, one, other = pieces[at], _operand(pieces[:at]), _operand(pieces[at + 1 :])
        if isinstance(other, _Path) and sign in _TURNED:
            sign, one, other = _TURNED[sign], other, one
        if not isinstance(one, _Path) or other is None or isinstance(other, _Path):
            return _open
        if one.members[0] == "state":
            return self._test(one.members[1:], sign, other)
        return _choice(one.members, sign, other)

    def _test(self, members: tuple[str | int, ...], sign: str, number: object) -> Reading:
        """A feature held against a number."""
        place = self._place(members)
        if place is None or sign not in _TESTS or not isinstance(number, int | float):
            return _open
        if place not in self.features:
            self.features.append(place)
        test = _TESTS[sign](self.features.index(place), number)
        return lambda action: test

    def _place(self, members: tuple[str | int, ...]) -> int | None:
        """Where a feature stands in a flat state."""
        shape, names = self._observation.shape, self._observation.names
        if names:
            return names.index(str(members[0])) if len(members) == 1 and members[0] in names else None
        if len(members) != len(shape):
            return None
        place = 0
        for member, size in zip(members, shape, strict=True):
            if not isinstance(member, int) or member >= size:
                return None
            place = place * size + member
        return place


def _pieces(source: str) -> list[str] | None:
    """The pieces of a text; None where it holds something else."""
    found, at, source = [], 0, source.rstrip()
    while at < len(source):
        piece = _PIECE.match(source, at)
        if piece is None:
            return None
        found.append(piece[0].strip())
        at = piece.end()
    return found


def _parts(pieces: Sequence[str], sign: str) -> list[Sequence[str]]:
    """What lies between signs outside of all brackets."""
    parts, depth, start = [], 0, 0
    for at, piece in enumerate(pieces):
        depth += (piece in ("(", "[", "{")) - (piece in (")", "]", "}"))
        if piece == sign and not depth:
            parts.append(pieces[start:at])
            start = at + 1
    return [*parts, pieces[start:]]


def _enclosed(pieces: Sequence[str]) -> bool:
    """Whether the first bracket is closed by the last."""
    depth = 0
    for at, piece in enumerate(pieces):
        depth += (piece == "(") - (piece == ")")
        if not depth:
            return piece == ")" and at == len(pieces) - 1
    return False


def _operand(pieces: Sequence[str]) -> object:
    """A path, a number, a text or a list of these; None for all else."""
    if pieces and pieces[0] == "[" and pieces[-1] == "]":
        inner = [_literal([piece]) for piece in pieces[1:-1:2]]
        return None if None in inner or set(pieces[2:-1:2]) - {","} else inner
    if pieces and pieces[0] in ("state", "action"):
        return _path(pieces)
    return _literal(pieces)


def _literal(pieces: Sequence[str]) -> float | str | None:
    if len(pieces) == 2 and pieces[0] == "-":
        number = _literal(pieces[1:])
        return -number if isinstance(number, int | float) else None
    if len(pieces) != 1:
        return None
    piece = pieces[0]
    if piece[0] in "\"'":
        return piece[1:-1]
    if piece.isdecimal():
        return int(piece) if int(piece) <= _EXACT else None
    if not piece[0].isdecimal() and piece[0] != ".":
        return None
    return number if piece[-1].isdecimal() and math.isfinite(number := float(piece)) else None


def _path(pieces: Sequence[str]) -> _Path | None:
    members: list[str | int] = [pieces[0]]
    at = 1
    while at < len(pieces):
        if pieces[at] == "." and at + 1 < len(pieces) and pieces[at + 1].isidentifier():
            members.append(pieces[at + 1])
            at += 2
            continue
        member = _literal(pieces[at + 1 : at + 2])
        if pieces[at] != "[" or pieces[at + 2 : at + 3] != ["]"] or not isinstance(member, str | int):
            return None
        members.append(member)
        at += 3
    return _Path(tuple(members))


def _choice(members: tuple[str | int, ...], sign: str, literal: object) -> Reading:
    """A choice's name held against texts, or its index against integers."""
    kind = {"name": str, "index": int}.get(str(members[-1]))
    each = literal if isinstance(literal, list) else [literal]
    if kind is None or (sign == "in") != isinstance(literal, list) or not all(type(one) is kind for one in each):
        return _open
    if kind is str and sign not in ("==", "!=", "in"):
        return _open
    holds = _HOLDS[sign]

    def reading(action: Any) -> Answer:
        for member in members[1:]:
            action = action[member]
        return holds(action, literal)

    return reading


def _open(action: Any) -> Answer:
    return None


def _not(answer: Answer) -> Answer:
    if callable(answer):
        test = answer
        return lambda values: not test(values)
    return None if answer is None else not answer


def _both(answers: Sequence[Answer]) -> Answer:
    """CEL's `&&`: what is false decides, whatever the others are."""
    if False in answers:
        return False
    if None in answers:
        return None
    tests = [answer for answer in answers if callable(answer)]
    if len(tests) < 2:
        return tests[0] if tests else True
    if len(tests) == 2:
        one, other = tests
        return lambda values: one(values) and other(values)
    return lambda values: all(test(values) for test in tests)


def _either(answers: Sequence[Answer]) -> Answer:
    """CEL's `||`: what is true decides."""
    if True in answers:
        return True
    if None in answers:
        return None
    tests = [answer for answer in answers if callable(answer)]
    if len(tests) < 2:
        return tests[0] if tests else False
    if len(tests) == 2:
        one, other = tests
        return lambda values: one(values) or other(values)
    return lambda values: any(test(values) for test in tests)
