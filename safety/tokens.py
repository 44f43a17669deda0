"""CEL text to tokens, and what an expression names. Pure.

Duty: enough of CEL's lexical grammar to see which variables, members, functions and macros an expression uses, where
its parentheses are, and what lies between top-level `&&` and `||`. It does not parse: the library does, and has
accepted the text before. It knows nothing of actions or features.
Strategy: one regular expression; what it does not know is an error, so a misreading cannot pass in silence.
Precedent: cel-spec, doc/langdef.md, section "Syntax".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Kind = Literal["string", "number", "name", "operator"]

MACROS = frozenset({"all", "exists", "exists_one", "existsOne", "filter", "map"})
KEYWORDS = frozenset({"true", "false", "null", "in"})

_TOKEN = re.compile(
    r"""
    (?P<space>   [\s\f]+ | //[^\n]* )
  | (?P<string>  [bB]?[rR][bB]?(?:\"{3}.*?\"{3} | '{3}.*?'{3} | "[^"\n]*" | '[^'\n]*')
               | [bB]?(?:\"{3}(?:\\.|[^\\])*?\"{3} | '{3}(?:\\.|[^\\])*?'{3}
                        | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'))
  | (?P<number>  0[xX][0-9a-fA-F]+[uU]? | \d*\.\d+(?:[eE][+-]?\d+)? | \d+(?:[eE][+-]?\d+|[uU])? )
  | (?P<name>    [A-Za-z_][A-Za-z0-9_]* )
  | (?P<operator> && | \|\| | == | != | <= | >= | [-+*/%<>!?:.,()\[\]{}] )
    """,
    re.VERBOSE | re.DOTALL,
)
_PLAIN = re.compile(r"""^"([^"\\\n]*)"$|^'([^'\\\n]*)'$""")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, slots=True)
class Token:
    kind: Kind
    text: str
    start: int
    end: int

    @property
    def plain(self) -> str | None:
        """The value of a string literal without prefix and escapes, None for all else."""
        found = _PLAIN.match(self.text) if self.kind == "string" else None
        return None if found is None else next(group for group in found.groups() if group is not None)


@dataclass(frozen=True, slots=True)
class Use:
    """A variable and the members that are taken of it: `action.speed.name` is action, (speed, name).

    first, last: the tokens it spans. Members end before a call, `state.size()` takes none of `state`, and at an index
    that is no plain string.
    """

    variable: str
    path: tuple[str, ...]
    first: int
    last: int


def tokenize(source: str) -> tuple[Token, ...]:
    """Split an expression. Raises ValueError saying what is no token."""
    tokens, at = [], 0
    while at < len(source):
        found = _TOKEN.match(source, at)
        if found is None:
            raise ValueError(f"{source[at : at + 16]!r} is no part of an expression")
        if found.lastgroup != "space":
            tokens.append(Token(found.lastgroup, found[0], at, found.end()))  # type: ignore[arg-type]
        at = found.end()
    return tuple(tokens)


def uses(tokens: Sequence[Token]) -> Iterator[Use]:
    """Every variable that is named, with its members; macro variables among them."""
    for index, token in enumerate(tokens):
        if token.kind != "name" or token.text in KEYWORDS or _member(tokens, index) or called(tokens, index):
            continue
        path, last = [], index
        while (step := _step(tokens, last + 1)) is not None:
            path.append(step[0])
            last = step[1]
        yield Use(token.text, tuple(path), index, last)


def functions(tokens: Sequence[Token]) -> Iterator[str]:
    """Every function, method and macro that is called."""
    return (token.text for index, token in enumerate(tokens) if called(tokens, index))


def called(tokens: Sequence[Token], index: int) -> bool:
    return tokens[index].kind == "name" and tokens[index].text not in KEYWORDS and _text(tokens, index + 1) == "("


def macros(tokens: Sequence[Token]) -> Iterator[tuple[str, int]]:
    """Every macro by its variable and how many macros it lies in."""
    enclosing: list[bool] = []
    for index, token in enumerate(tokens):
        if token.text in _CLOSING and token.kind == "operator":
            macro = index > 1 and called(tokens, index - 1) and tokens[index - 1].text in MACROS
            if macro and _member(tokens, index - 1):
                yield _text(tokens, index + 1), sum(enclosing)
                enclosing.append(True)
            else:
                enclosing.append(False)
        elif token.kind == "operator" and token.text in ")]}" and enclosing:
            enclosing.pop()


def split(tokens: Sequence[Token], operator: str) -> list[Sequence[Token]]:
    """Cut at every `operator` that lies in no parentheses; one part where there is none."""
    parts, depth, start = [], 0, 0
    for index, token in enumerate(tokens):
        depth += _depth(token)
        if depth == 0 and token.kind == "operator" and token.text == operator:
            parts.append(tokens[start:index])
            start = index + 1
    return [*parts, tokens[start:]]


def unwrap(tokens: Sequence[Token]) -> Sequence[Token]:
    """Take off parentheses that enclose the whole."""
    while tokens[0].text == "(" and all(accumulate(_depth(token) for token in tokens[:-1])):
        tokens = tokens[1:-1]
    return tokens


def _depth(token: Token) -> int:
    if token.kind != "operator":
        return 0
    return 1 if token.text in "([{" else -1 if token.text in ")]}" else 0


def _text(tokens: Sequence[Token], index: int) -> str:
    return tokens[index].text if 0 <= index < len(tokens) else ""


def _member(tokens: Sequence[Token], index: int) -> bool:
    return _text(tokens, index - 1) == "."


def _step(tokens: Sequence[Token], index: int) -> tuple[str, int] | None:
    """The member that is taken at `index`, `.name` or `["name"]`, and its last token."""
    if _text(tokens, index) == "." and index + 1 < len(tokens) and not called(tokens, index + 1):
        return tokens[index + 1].text, index + 1
    if _text(tokens, index) == "[" and _text(tokens, index + 2) == "]" and tokens[index + 1].plain is not None:
        return str(tokens[index + 1].plain), index + 2
    return None
