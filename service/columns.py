"""Text that fits a terminal's columns, and numbers for people. Pure.

Duty: clean, clip, pad and wrap what others wrote; write numbers, shares and spans of time in few characters. It knows
neither a terminal's escape codes nor what the text is about.
Strategy: width is counted in cells as terminals draw them: two for wide letters, none for combining marks.
Promise: no control character comes through, so what a caller gave as a reason cannot move the reader's cursor; nothing
is wider than it was allowed to be, whatever the value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import accumulate
from typing import Literal, NamedTuple
from unicodedata import category, east_asian_width

Tone = Literal["plain", "head", "good", "bad", "dim"]
LABEL = 11  # cells before a field's text
CUT = ".."  # stands where text was cut


class Line(NamedTuple):
    """One line, and how loud it is."""

    text: str
    tone: Tone = "plain"


def clean(text: str) -> str:
    """Replace what is no letter, mark, number, sign or space: line breaks by spaces, all else by `?`."""
    return "".join(" " if each.isspace() else "?" if category(each)[0] == "C" else each for each in text)


def cells(text: str) -> int:
    """How many cells a cleaned text takes."""
    return sum(map(_width, text))


def _width(letter: str) -> int:
    if category(letter) in ("Mn", "Me"):
        return 0
    return 2 if east_asian_width(letter) in ("W", "F") else 1


def fit(text: str, width: int) -> str:
    """Clean a text, and cut it where it is wider."""
    text = clean(text)
    if cells(text) <= width:
        return text
    room = width - len(CUT)
    if room < 1:
        return CUT[:width]
    taken = accumulate(map(_width, text))
    return "".join(letter for letter, so_far in zip(text, taken, strict=True) if so_far <= room) + CUT


def left(text: str, width: int) -> str:
    """Fill up with spaces behind."""
    text = fit(text, width)
    return text + " " * (width - cells(text))


def right(text: str, width: int) -> str:
    """Fill up with spaces in front."""
    text = fit(text, width)
    return " " * (width - cells(text)) + text


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines at its spaces; a word that is wider than a line is cut into pieces."""
    lines = [""]
    for word in (piece for each in clean(text).split() for piece in _pieces(each, width)):
        if lines[-1] and cells(lines[-1]) + 1 + cells(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _pieces(word: str, width: int) -> Iterator[str]:
    piece, taken = "", 0
    for letter in word:
        if taken + _width(letter) > width:
            yield piece
            piece, taken = "", 0
        piece += letter
        taken += _width(letter)
    yield piece


def field(label: str, text: str, width: int, tone: Tone = "plain") -> list[Line]:
    """A label and its text, wrapped behind it."""
    first, *rest = wrap(text, width - LABEL)
    return [Line(left(label, LABEL) + first, tone), *(Line(" " * LABEL + each, tone) for each in rest)]


def row(texts: Sequence[str], widths: Sequence[int], words: int = 1) -> str:
    """One line of a table: the first columns are words, to the left, the others numbers, to the right."""
    pairs = enumerate(zip(texts, widths, strict=True))
    return " ".join(left(text, width) if at < words else right(text, width) for at, (text, width) in pairs).rstrip()


def finite(value: float | None) -> float | None:
    """The number, where it is one."""
    return value if value is not None and (isinstance(value, int) or math.isfinite(value)) else None


def number(value: float | None, width: int = 7) -> str:
    """Four digits or all before the point, fewer where they do not fit; `-` for what is no number.

    Any finite one fits 7 characters.
    """
    if value is None or finite(value) is None:
        return "-"
    exact = Decimal(value) if isinstance(value, int) else value
    texts = [f"{exact:.{digits}g}" for digits in (4, 3, 2, 1)]
    if 1_000 <= abs(value) < 10**width:
        texts.insert(0, f"{exact:.0f}")
    return next((text for text in texts if len(text) <= width), fit(texts[-1], width))


def count(value: int, what: str = "") -> str:
    """A number of things: `1,232 units`."""
    digits = f"{value:,}" if abs(value) < 10**18 else f"{Decimal(value):.3g}"  # Python writes no endless integers
    return f"{digits} {what}{'s' * (value != 1)}" if what else digits


def percent(share: float | None) -> str:
    """A share for people: `5.1 %`."""
    return "-" if share is None or finite(share) is None else f"{100 * share:.3g} %"


def span(seconds: float) -> str:
    """How long something lasts, in its two largest units; below zero, where clocks disagree, as nothing."""
    if not seconds < 1e15:
        return "ever"
    whole = int(max(0, seconds))
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    place = next((at for at, (_, size) in enumerate(units) if whole >= size), len(units) - 1)
    name, size = units[place]
    text = f"{count(whole // size)} {name}"
    for small, part in units[place + 1 : place + 2]:
        text += f" {whole % size // part} {small}" if whole % size >= part else ""
    return text
