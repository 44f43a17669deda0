"""CEL: text to checked programs, and what may be shown to them. Pure; the only importer of the library.

Duty: refuse at load what could not mean anything (unknown names and functions, `action` used as a value, macros within
macros), and run programs so that whatever fails denies. What an expression forbids is `forbid.py`'s.
Strategy: the library parses, `tokens.py` tells what the text names. Conversion to CEL values is what costs (a
microsecond for each), so it says what is named, and who shows rows shows no more.
Promise: `denies` returns for every program and every view; False only where the program says false.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

import cel
import numpy as np

from policies.errors import SafetyError
from policies.types import ObservationSpec
from safety.tokens import MACROS, Token, Use, functions, macros, tokenize, uses

MOST_CHARACTERS: Final = 4_096
# A context is the caller's, and a macro may compare each of its values with each: 1,000 of them take some 10 ms then.
MOST_VALUES: Final = 1_000
MOST_TEXT: Final = 65_536
FEW: Final = 16
SHORT: Final = 256
DEEPEST: Final = 16  # the library converts by recursion

VARIABLES = frozenset({"state", "context", "action"})
TYPES = frozenset({"bool", "bytes", "double", "int", "list", "map", "null_type", "string", "type", "uint"})
CALLS = frozenset({"bytes", "double", "duration", "dyn", "has", "int", "size", "string", "timestamp", "type", "uint"})
METHODS = frozenset(
    {"contains", "endsWith", "matches", "size", "startsWith"}
    | {f"get{part}" for part in ("FullYear", "Month", "Date", "DayOfMonth", "DayOfWeek", "DayOfYear")}
    | {f"get{part}" for part in ("Hours", "Minutes", "Seconds", "Milliseconds")}
)

View = cel.Context
Program = cel.Program
NOTHING: Final = cel.Context()  # a view of nothing


@dataclass(frozen=True, slots=True)
class Needs:
    """What of a row is named: features, keys of the context. None: all of it, empty: none."""

    state: frozenset[str] | None = frozenset()
    context: frozenset[str] | None = frozenset()

    @property
    def nothing(self) -> bool:
        return self.state == self.context == frozenset()

    def __or__(self, other: Needs) -> Needs:
        return Needs(_union(self.state, other.state), _union(self.context, other.context))


@dataclass(frozen=True, slots=True)
class Text:
    """An expression, or a part of one: its source and its tokens, which point into the source."""

    source: str
    tokens: tuple[Token, ...]

    def part(self, tokens: Sequence[Token]) -> Text:
        return Text(self.source, tuple(tokens))

    def uses(self, variable: str) -> list[Use]:
        return [use for use in uses(self.tokens) if use.variable == variable]

    def written(self, instead: Mapping[int, tuple[int, str]] | None = None) -> str:
        """The text of these tokens; `instead` puts a text in place of the tokens from one to another."""
        pieces, index = [], 0
        while index < len(self.tokens):
            last, piece = (instead or {}).get(index, (index, self.source[self.tokens[index].start : self._to(index)]))
            pieces.append(piece)
            index = last + 1
        return "".join(pieces)

    def needs(self) -> Needs:
        return Needs(_named(self.uses("state")), _named(self.uses("context")))

    def _to(self, index: int) -> int:
        """Where a token ends, white space and comments behind it included."""
        return self.tokens[index + 1].start if index + 1 < len(self.tokens) else self.tokens[index].end


def read(source: str, observation: ObservationSpec, field: str = "when") -> Text:
    """Check an expression. Raises SafetyError saying what cannot be in it."""
    if len(source) > MOST_CHARACTERS:
        raise SafetyError(f"an expression has at most {MOST_CHARACTERS} characters", field)
    try:
        text = Text(source, tokenize(source))
    except ValueError as error:
        raise SafetyError(str(error), field) from None
    program(source, field)
    fault = _fault(text, observation)
    if fault is not None:
        raise SafetyError(fault, field)
    return text


def program(source: str, field: str = "when") -> Program:
    """Compile. Raises SafetyError with the library's words."""
    try:
        return cel.compile(source)
    except BaseException as error:
        let_through(error)
        raise SafetyError(f"this is not CEL: {error}", field) from None


def let_through(error: BaseException) -> None:
    """Raise what is not the library's: it panics by a BaseException, and that is caught, a request to stop is not."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error


def denies(compiled: Program, view: View) -> bool:
    """Whether an expression is true, or no bool, or fails: all but false."""
    try:
        return compiled.execute(view) is not False
    except BaseException as error:
        let_through(error)
        return True


def worth(compiled: Program, view: View) -> object:
    """What an expression says; None, too, where it fails."""
    try:
        return compiled.execute(view)
    except BaseException as error:
        let_through(error)
        return None


def complaint(compiled: Program, view: View) -> str | None:
    """What is wrong with an expression whatever the values: it mixes types, or does not say true or false."""
    try:
        found = compiled.execute(view)
    except (TypeError, RuntimeError) as error:
        return str(error)
    except BaseException as error:
        let_through(error)
        return None  # depends on the values
    return None if isinstance(found, bool) else f"this is {found!r}, neither true nor false"


def probe(observation: ObservationSpec) -> View:
    """A view of a state of numbers between 1 and 2, all different: quotients and differences of them are numbers."""
    state = 1.0 + np.modf(0.6180339887 * np.arange(1, observation.size + 1))[0]
    numbers = state.reshape(observation.shape).tolist()
    return cel.Context({"state": dict(zip(observation.names, numbers, strict=True)) if observation.names else numbers})


def view_of(variables: dict[str, object]) -> View | None:
    """Show variables to programs; None where one cannot be."""
    try:
        return cel.Context(variables)
    except BaseException as error:  # a value that CEL does not know
        let_through(error)
        return None


def narrowed(context: Mapping[str, object] | None, keys: frozenset[str] | None) -> dict[str, object]:
    """What of a context is named."""
    if context is None:
        return {}
    return dict(context) if keys is None else {key: context[key] for key in keys if key in context}


def simple(context: Mapping[str, object]) -> bool:
    """Whether a context is certainly modest, and made of values that CEL knows: most are a few short scalars."""
    if len(context) > FEW:
        return False
    for key, value in context.items():
        if type(key) is not str or not _short(key):
            return False
        kind = type(value)
        good = (
            (kind is str and _short(cast(str, value)))
            or (kind is int and -(2**63) <= cast(int, value) < 2**63)
            or (kind is float and math.isfinite(cast(float, value)))
            or kind is bool
        )
        if not good:
            return False
    return True


def _short(text: str) -> bool:
    return len(text) <= SHORT and text.isascii()


def modest(value: object) -> bool:
    """Whether a value can be shown to a program: not too many values, too much text, too deep, nor NaN."""
    level: list[object] = [value]
    values = text = 0
    for _ in range(DEEPEST):
        values += len(level)
        text += sum(len(each) for each in level if isinstance(each, str))
        if values > MOST_VALUES or text > MOST_TEXT or any(_not_finite(each) for each in level):
            return False
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return True
    return False


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _inside(value: object) -> Sequence[object]:
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    return value if isinstance(value, list | tuple) else ()


def _union(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    return None if one is None or other is None else one | other


def _named(found: Sequence[Use]) -> frozenset[str] | None:
    return None if any(not use.path for use in found) else frozenset(use.path[0] for use in found)


def _fault(text: Text, observation: ObservationSpec) -> str | None:
    return _macro_fault(text) or _name_fault(text) or _feature_fault(text, observation)


def _macro_fault(text: Text) -> str | None:
    for variable, within in macros(text.tokens):
        if within:
            return "a macro within a macro can take very long; put what it looks up into the request's context"
        if variable in VARIABLES | TYPES:
            return f"{variable!r} cannot be the variable of a macro: it has a meaning of its own"
    return None


def _name_fault(text: Text) -> str | None:
    bound = {variable for variable, _ in macros(text.tokens)}
    unknown = sorted({use.variable for use in uses(text.tokens)} - VARIABLES - TYPES - bound)
    if unknown:
        return f"there is no {unknown[0]!r}; an expression reads state, context and action"
    unknown = sorted(set(functions(text.tokens)) - CALLS - METHODS - MACROS)
    return f"there is no function {unknown[0]!r}; known: {', '.join(sorted(CALLS | METHODS))}" if unknown else None


def _feature_fault(text: Text, observation: ObservationSpec) -> str | None:
    for use in text.uses("state"):
        if not use.path:
            if observation.features and _indexed(text, use):
                return f"features have names here: write state.{observation.names[0]}, not state[…]"
            continue
        if not observation.features:
            return f"features have no names here: write state[0], not state.{use.path[0]}"
        if use.path[0] not in observation.names:
            return f"there is no feature {use.path[0]!r}; known: {', '.join(observation.names[:16])}"
    return None


def _indexed(text: Text, use: Use) -> bool:
    behind = text.tokens[use.last + 1 : use.last + 3]
    return len(behind) == 2 and behind[0].text == "[" and behind[1].kind == "number"
