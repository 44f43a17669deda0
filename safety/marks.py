"""YAML as it is written: its values, and at which line and column each stands. Pure.

Duty: bytes become plain values (text, numbers, booleans, null, lists, maps with text keys). It knows nothing of rules.
Strategy: PyYAML composes the nodes; they are read here, because its constructors guess. What YAML 1.1 and 1.2 read
differently (`on`, `010`, `1:30`), keys that stand twice, aliases, merge keys, tags and numbers that are not finite are
refused where they stand, so that a reader, an editor and this program read the same rules.
Promise: whatever the bytes are, a Document or a SafetyError with the line and column of everything that is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import yaml

from policies.errors import SafetyError, SafetyFault

# 1,000 rules with their reasons.
MAX_BYTES: Final = 256 << 10
# A rule's list stands at depth 4.
MAX_DEPTH: Final = 16
# Where doubles stop counting by one.
MAX_WHOLE: Final = 1 << 53
DECIMAL: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
STEP: Final = re.compile(r"(?:^|\.)(\w[\w /:-]*)|\[(\d+)\]")
TAG: Final = "tag:yaml.org,2002:"

Path = tuple[str | int, ...]  # keys and indices from the top: ("rules", 0, "limit")


class Spot(NamedTuple):
    """Where something begins, counted from 1."""

    line: int
    column: int


class Complaint(NamedTuple):
    """What is wrong with the value at `path`. key: what is wrong is its key, so that is where to look."""

    path: Path
    detail: str
    key: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """What was read. spots: where each value begins. keys: where the key of each value in a map begins."""

    where: str
    value: object
    spots: Mapping[Path, Spot]
    keys: Mapping[Path, Spot]

    def refusal(self, complaints: Iterable[Complaint]) -> SafetyError:
        """Build the error for what is wrong. A path that does not stand in the file is shown where it is missing."""
        faults = [SafetyFault(field_of(each.path), each.detail, *self._spot(each)) for each in complaints]
        return refused(self.where, sorted(faults, key=lambda fault: (fault.line, fault.column)))

    def _spot(self, complaint: Complaint) -> Spot:
        path = complaint.path
        if complaint.key and path in self.keys:
            return self.keys[path]
        while path not in self.spots:
            path = path[:-1]
        return self.spots[path]


def field_of(path: Path) -> str:
    """Write a path as errors show it: `rules[0].limit`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def path_of(field: str) -> Path:
    """Read a path as errors show it. Keys are taken as far as they look like names."""
    return tuple(name or int(index) for name, index in STEP.findall(field))


def refused(where: str, faults: list[SafetyFault]) -> SafetyError:
    """Build the error whose text is the first fault's, with its place in the file."""
    first = faults[0]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return SafetyError(f"{line_of(where, first)}{more}", first.field or None, faults)


def line_of(where: str, fault: SafetyFault) -> str:
    """Write a fault as compilers do, so that editors find the place."""
    return f"{where}:{fault.line}:{fault.column}: " + (f"{fault.field}: " if fault.field else "") + fault.detail


def read_yaml(raw: bytes, where: str) -> Document:
    """Read a document. Raises SafetyError."""
    node = _compose(_text(raw, where), where)
    reading = _Reading()
    value = reading.value(node, ())
    document = Document(where, value, reading.spots, reading.keys)
    if reading.complaints:
        raise document.refusal(reading.complaints)
    return document


def _text(raw: bytes, where: str) -> str:
    if len(raw) > MAX_BYTES:
        raise _at(where, f"the file has {len(raw)} bytes, the cap is {MAX_BYTES}; write fewer rules", Spot(1, 1))
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        raise _at(where, "this is not UTF-8; save the file as UTF-8", _end(before)) from None


def _compose(text: str, where: str) -> yaml.Node:
    """Read the one document of a file as nodes. Raises SafetyError."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        detail = f"the character {error.character:#x} cannot stand in a file; remove it"
        raise _at(where, detail, _end(text[: error.position])) from None
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        detail = " ".join(part for part in (error.context, error.problem) if part)
        spot = _spot(error.problem_mark or loader.get_mark())
        raise _at(where, f"this is not YAML that is read here: {detail}", spot) from None
    except (ValueError, OverflowError):  # an escape beyond Unicode
        raise _at(where, "this stands for no character; correct it", _spot(loader.get_mark())) from None
    if node is None:
        raise _at(where, "the file is empty; it needs at least schema and policy", Spot(1, 1))
    return node


def _at(where: str, detail: str, spot: Spot) -> SafetyError:
    return refused(where, [SafetyFault("", detail, *spot)])


def _end(before: str) -> Spot:
    return Spot(before.count("\n") + 1, len(before) - before.rfind("\n"))


def _spot(mark: yaml.Mark) -> Spot:
    return Spot(mark.line + 1, mark.column + 1)


class _Loader(yaml.SafeLoader):
    """Composes nodes, none of them twice and none very deep: what is small to read stays small."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self._refuse("aliases are refused; write the value out")
        if self._depth == MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} levels are refused; no rule is so deep")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def _refuse(self, problem: str) -> None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        raise yaml.composer.ComposerError(None, None, problem, mark)


class _Reading:
    """Values and their places, gathered from the top down."""

    def __init__(self) -> None:
        self.spots: dict[Path, Spot] = {}
        self.keys: dict[Path, Spot] = {}
        self.complaints: list[Complaint] = []

    def value(self, node: yaml.Node, path: Path) -> object:
        self.spots[path] = _spot(node.start_mark)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
            return self._map(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
            return [self.value(each, (*path, index)) for index, each in enumerate(node.value)]
        try:
            return _scalar(node)
        except ValueError as error:
            self.complaints.append(Complaint(path, str(error)))
            return None

    def _map(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        read: dict[str, object] = {}
        for key, value in node.value:
            inner = (*path, name := _name(key))
            if wrong := self._wrong_key(key, inner):
                self.complaints.append(Complaint(inner, wrong, key=True))
            self.keys[inner] = _spot(key.start_mark)
            read[name] = self.value(value, inner)
        return read

    def _wrong_key(self, key: yaml.Node, path: Path) -> str | None:
        if path in self.keys:
            return f"this key stands already in line {self.keys[path].line}; keep one of the two"
        if key.tag == f"{TAG}merge":
            return "merge keys are refused; write the fields out"
        if key.tag != f"{TAG}str" or not _encodes(key.value):
            return f'keys are text, and this is read as something else; write it in quotes: "{path[-1]}"'
        return None


def _name(key: yaml.Node) -> str:
    """Write a key as errors can show it, whatever it is."""
    return key.value.encode(errors="replace").decode() if isinstance(key.value, str) else "?"


def _scalar(node: yaml.Node) -> str | float | bool | None:
    """Read what all versions of YAML read alike. Raises ValueError saying what to write instead."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(_remedy("", ""))
    kind, text = node.tag.removeprefix(TAG), node.value
    if kind == "str" and _encodes(text):
        # PyYAML reads 1e3, without a point, as text.
        return _number(text) if node.style is None and DECIMAL.fullmatch(text) else str(text)
    if kind in SCALARS and SCALARS[kind][0].fullmatch(text):
        return SCALARS[kind][1](text)
    raise ValueError(_remedy(kind, text))


def _whole(text: str) -> int:
    if len(text) > len(str(MAX_WHOLE)) + 1 or abs(int(text)) > MAX_WHOLE:
        raise ValueError(f"the number has more digits than are read exactly; the largest is {MAX_WHOLE}")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number; write a smaller one")
    return number


# By YAML's kind: what it may look like, and how that is read.
SCALARS: Final[Mapping[str, tuple[re.Pattern[str], Callable[[str], float | bool | None]]]] = {
    "null": (re.compile(r"|~|null|Null|NULL"), lambda _: None),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    "int": (re.compile(r"[-+]?(0|[1-9][0-9]*)"), _whole),
    "float": (DECIMAL, _number),
}


def _remedy(kind: str, text: str) -> str:
    if kind == "bool":
        return f'YAML reads {text} as a boolean; write true or false, or "{text}" in quotes where it is a name'
    if kind in ("int", "float"):
        return f'{text} is not a finite decimal number; write one like 12 or 0.5, or "{text}" in quotes for text'
    if kind == "timestamp":
        return f'YAML reads {text} as a date; write it in quotes: "{text}"'
    return "this is neither text, number, boolean, null, list nor map; write it without a tag, text in quotes"


def _encodes(text: object) -> bool:
    """Whether text can leave in an answer: halves of surrogate pairs cannot."""
    try:
        return isinstance(text, str) and text.encode() is not None
    except UnicodeEncodeError:
        return False
