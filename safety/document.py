"""A policy's `safety.yaml`: bytes to rules, and rules held against a policy. Pure.

Duty: everything that can be found wrong with rules before they meet a request, each at its field, line and column, with
what to write instead. What rules allow is said elsewhere: this file knows their shape, not their meaning.
Strategy: `marks.py` reads values and places, msgspec holds them against the structs of `rules.py`, rule by rule so that
one slip does not hide the next; `fits.py` holds a rule against what a policy has.
Promise: two documents that say the same have the same digest, whatever their comments and the order of their keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import numpy.typing as npt

from policies.errors import SafetyError
from policies.types import ActionSpec, ObservationSpec
from safety.fits import Fitting, check, nearest_to_zero
from safety.marks import Complaint, Path, path_of, read_yaml
from safety.rules import Bounds, Forbid, Rule, Rules
from safety.tokens import macros, tokenize, uses
from safety.types import REQUEST_RULE

SAFETY: Final = "safety.yaml"
KINDS: Final[Mapping[str, type[msgspec.Struct]]] = {str(kind.__struct_config__.tag): kind for kind in get_args(Rule)}
UNNAMED: Final = "[...]"  # how msgspec writes that some value of a map is wrong

_PLACE: Final = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")
_FIELD: Final = re.compile(r"Object (missing required|contains unknown) field `(.*)`", re.S)


@dataclass(frozen=True, slots=True)
class RuleSet:
    """The rules of one policy. digest: sha256 of what they say. source: the file, to find places in."""

    rules: Rules
    digest: str
    source: bytes


def read_rules(raw: bytes, where: str = SAFETY) -> RuleSet:
    """Read a `safety.yaml`. Raises SafetyError; `where` names the file in it."""
    document = read_yaml(raw, where)
    if complaints := list(_complaints(document.value)):
        raise document.refusal(complaints)
    rules = msgspec.convert(document.value, Rules)
    if complaints := [*_names(rules), *_expressions(rules)]:
        raise document.refusal(complaints)
    return RuleSet(rules, sha256(msgspec.json.encode(document.value, order="sorted")).hexdigest(), raw)


def bind(
    ruleset: RuleSet,
    action: ActionSpec,
    observation: ObservationSpec,
    fallback: tuple[float, ...] | None,
    *,
    policy: str | None = None,
    sample_states: npt.NDArray[np.floating] | None = None,
    where: str = SAFETY,
) -> None:
    """Check that rules fit a policy, and leave its fallback alone. Raises SafetyError.

    policy: its name; None: not compared. sample_states: states [S, *shape] in which each `forbid` is tried on the
    fallback, such as a bundle's golden states; None: the one nearest to zero in the features' range.
    """
    states = nearest_to_zero(observation) if sample_states is None else sample_states
    fitting = Fitting(action, observation, fallback, states)
    complaints = []
    if policy is not None and ruleset.rules.policy != policy:
        detail = f"these rules are for {ruleset.rules.policy!r}, the policy is {policy!r}; correct the name"
        complaints.append(Complaint(("policy",), detail))
    for index, rule in enumerate(ruleset.rules.rules):
        try:
            check(rule, fitting)
        except SafetyError as error:
            path = path_of(error.field or "")
            named = len(path) > 1 and isinstance(path[-1], str)  # a name in a map, such as costs
            complaints.append(Complaint(("rules", index, *path), error.detail, key=named))
    if complaints:
        raise read_yaml(ruleset.source, where).refusal(complaints)


def _names(rules: Rules) -> Iterator[Complaint]:
    first: dict[str, int] = {}
    for index, rule in enumerate(rules.rules):
        field = ("rules", index, "name")
        if rule.name == REQUEST_RULE:
            yield Complaint(field, f"{REQUEST_RULE!r} stands for the caller's allowed_actions; choose another name")
        elif rule.name in first:
            yield Complaint(field, f"rules[{first[rule.name]}] is called {rule.name!r} already; choose another name")
        first.setdefault(rule.name, index)


def _expressions(rules: Rules) -> Iterator[Complaint]:
    for index, rule in enumerate(rules.rules):
        if isinstance(rule, Forbid | Bounds) and rule.when is not None:
            wrong = _wrong_expression(rule.when)
            if wrong:
                yield Complaint(("rules", index, "when"), wrong)


def _wrong_expression(source: str) -> str | None:
    """Say what is wrong with an expression for every policy; what a policy lacks is found when it is bound."""
    from safety.expression import TYPES, VARIABLES, program  # imports CEL, which takes a while and few policies need

    try:
        program(source)
        tokens = tokenize(source)
    except (SafetyError, ValueError) as error:
        return _syntax(str(error))
    bound = {variable for variable, _ in macros(tokens)}
    unknown = sorted({use.variable for use in uses(tokens)} - VARIABLES - TYPES - bound)
    return f"there is no {unknown[0]!r}; an expression reads {', '.join(sorted(VARIABLES))}" if unknown else None


def _syntax(report: str) -> str:
    """Shorten the CEL library's report, which draws arrows, to its first line that speaks of syntax."""
    places = _PLACE.findall(report) or [("1", "1", report)]
    line, column, what = min(places, key=lambda place: not place[2].startswith("Syntax"))
    return f"this is not CEL: {what.partition(' expecting ')[0]}, line {line}, column {column} of the expression"


# What msgspec says, at the place that it means.


def _complaints(value: object) -> Iterator[Complaint]:
    """Find what does not have the shape of a document: the first thing at the top, and the first in each rule."""
    if not isinstance(value, dict):
        yield Complaint((), "the file holds fields such as schema, policy and rules; write `schema: 1` first")
        return
    listed = value.get("rules")
    rules = listed if isinstance(listed, list) else []
    top = {**value, "rules": []} if isinstance(listed, list) else value
    yield from _converted(top, Rules, Rules, ())
    for index, rule in enumerate(rules):
        tag = rule.get("kind") if isinstance(rule, dict) else None
        yield from _converted(rule, Rule, KINDS.get(tag) if isinstance(tag, str) else None, ("rules", index))


def _converted(value: object, wanted: Any, kind: type[msgspec.Struct] | None, prefix: Path) -> Iterator[Complaint]:
    try:
        msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        message, _, tail = str(error).partition(" - at `$")
        path = path_of(tail)
        if UNNAMED in tail:
            path = (*path, _culprit(value, wanted, path))
        if about := _FIELD.fullmatch(message):
            yield _about_field(about[1], about[2], kind, (*prefix, *path))
        else:
            yield Complaint((*prefix, *path), f"{message}, {_found(value, path)}{_choices(kind, path)}")


def _about_field(problem: str, name: str, kind: type[msgspec.Struct] | None, path: Path) -> Complaint:
    if problem == "missing required":
        remedy = f"; known: {', '.join(KINDS)}" if name == "kind" else ""
        return Complaint((*path, name), f"this field is missing; add it{remedy}")
    known = ", ".join(_fields(kind)) if kind else ""
    return Complaint((*path, name), f"there is no such field; known: {known}", key=True)


def _fields(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    return (*(() if kind is Rules else ("kind",)), *kind.__struct_fields__)


def _culprit(value: Any, wanted: Any, path: Path) -> str:
    """Find the key of the value that is wrong: the one that is refused when it stands alone."""
    holder = value
    for step in path:
        holder = holder[step]
    return next(str(key) for key in holder if not _converts({**value, str(path[0]): {key: holder[key]}}, wanted))


def _converts(value: object, wanted: Any) -> bool:
    try:
        msgspec.convert(value, wanted)
    except msgspec.ValidationError:
        return False
    return True


def _found(value: Any, path: Path) -> str:
    for step in path:
        value = value[step]
    text = msgspec.json.encode(value).decode()
    return f"the file says {text if len(text) <= 60 else text[:60] + '…'}"


def _choices(kind: type[msgspec.Struct] | None, path: Path) -> str:
    """List what may stand in a field, where that is a list of words."""
    if path == ("kind",):
        return f"; known: {', '.join(KINDS)}"
    if kind is None or len(path) != 1:
        return ""
    words = [str(word) for word in _literals(get_type_hints(kind).get(str(path[0])))]
    return f"; known: {', '.join(words)}" if words else ""


def _literals(hint: Any) -> Iterator[object]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for inner in get_args(hint):
            yield from _literals(inner)
