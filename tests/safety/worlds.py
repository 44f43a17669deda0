"""Random spaces, rows, expressions and rules, for property tests. Expressions come as text and as a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from policies.types import ActionSpec, Box, Choices, Feature, ObservationSpec
from safety.facts import Facts
from tests.safety.oracle import Factors, Seen, Truth

FEATURES = ("cpu", "rps", "replicas")
OBSERVATION = ObservationSpec((3,), "float64", tuple(Feature(name) for name in FEATURES))
ONE = Choices((("hold", "up_1", "up-2", 'da"y'),))
TWO = Choices((("hold", "up"), ("x", "y", "z")), ("speed", "zone"))
POINTS = Box((-2.0, -1.0), (2.0, 1.0))

Expression = tuple[str, Truth]
numbers = st.sampled_from([-1.5, -1.0, 0.0, 0.25, 0.5, 1.0, 3.0])


def factors(space: Choices) -> Factors:
    keys: tuple[str | None, ...] = space.factors or (None,)
    return Factors({key: list(names) for key, names in zip(keys, space.names, strict=True)})


def facts_of(rows: Sequence[Seen], names: Sequence[str] = FEATURES, dtype: str = "float64") -> Facts:
    scores = [row.scores for row in rows]
    return Facts(
        states=np.array([[row.state[name] for name in names] for row in rows], dtype=dtype).reshape(
            len(rows), len(names)
        ),
        contexts=[row.context for row in rows],
        keys=[None] * len(rows),
        previous=[row.previous for row in rows],
        past=np.array([row.past for row in rows], dtype=np.bool_),
        scores=None if not scores or scores[0] is None else np.array(scores, dtype=np.float64),
        greedy=bool(rows) and rows[0].greedy,
        faulty=np.array([row.faulty for row in rows], dtype=np.bool_),
    )


def contexts() -> st.SearchStrategy[dict[str, Any] | None]:
    values = st.one_of(st.integers(-2, 4), numbers, st.sampled_from(["gold", "hold"]), st.none(), st.booleans())
    listed = st.lists(st.one_of(st.integers(0, 3), st.just("gold")), max_size=3)
    fields = {"hour": values, "tier": values, "list": st.one_of(listed, values), "flag": st.booleans()}
    return st.one_of(st.none(), st.fixed_dictionaries({}, optional=fields))


def seen(previous: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Seen]:
    return st.builds(
        Seen,
        state=st.fixed_dictionaries(dict.fromkeys(FEATURES, numbers)),
        context=contexts(),
        previous=st.none() if previous is None else st.one_of(st.none(), previous),
        past=st.sampled_from([True, True, True, False]),
    )


class CelError(ArithmeticError):
    """CEL fails here."""


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CelError
    return value


def truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise CelError
    return value


def same(one: Any, other: Any) -> bool:
    """CEL's ==: numbers across kinds, all else only with its like."""
    if isinstance(one, bool) or isinstance(other, bool):
        return type(one) is type(other) and bool(one == other)
    return bool(one == other)


def greater(one: Any, other: Any) -> bool:
    left, right = number(one), number(other)
    if math.isnan(left) or math.isnan(right):
        raise CelError
    return left > right


def divided(one: float, other: float) -> float:
    if other != 0.0:
        return one / other
    return math.nan if one == 0.0 else math.copysign(math.inf, one) * math.copysign(1.0, other)


def listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise CelError
    return value


def state_atoms() -> st.SearchStrategy[Expression]:
    name = st.sampled_from(FEATURES)
    return st.one_of(
        st.builds(lambda n, c: (f"state.{n} > {c!r}", lambda s, x, a: greater(s[n], c)), name, numbers),
        st.builds(lambda n, c: (f'{c!r} >= state["{n}"]', lambda s, x, a: not greater(s[n], c)), name, numbers),
        st.builds(lambda n, m: (f"state.{n} / state.{m} > 0.5", lambda s, x, a: greater(divided(s[n], s[m]), 0.5)),
                  name, name),
        st.just(("state.all(k, state[k] > -1.25)", lambda s, x, a: all(s[k] > -1.25 for k in s))),
        st.just(("size(state) == 3", lambda s, x, a: True)),
        st.sampled_from([("true", lambda s, x, a: True), ("(false)", lambda s, x, a: False)]),
    )  # fmt: skip


def context_atoms() -> st.SearchStrategy[Expression]:
    return st.one_of(
        st.builds(lambda c: (f"context.hour > {c}", lambda s, x, a: greater(x["hour"], c)), st.integers(-1, 3)),
        st.just(("context.tier == 'gold'", lambda s, x, a: same(x["tier"], "gold"))),
        st.just(('has(context.tier) && context["tier"] == "gold"',
                 lambda s, x, a: "tier" in x and same(x["tier"], "gold"))),
        st.just(("context.flag", lambda s, x, a: truth(x["flag"]))),
        st.just(("size(context) > 1", lambda s, x, a: len(x) > 1)),
        st.just(("context.list.exists(y, y == 'gold')",
                 lambda s, x, a: any(same(y, "gold") for y in listed(x["list"])))),
    )  # fmt: skip


def action_atoms(
    path: str, names: Sequence[str], pick: Callable[[Any], Mapping[str, Any]]
) -> st.SearchStrategy[Expression]:
    """Atoms over one factor. path: how it is written. pick: its {index, name} of an action."""
    name = st.sampled_from(names)
    some = st.lists(name, min_size=1, max_size=3)
    index = st.integers(0, len(names))

    def text(value: str) -> str:
        return '"' + value.replace('"', '\\"') + '"'

    return st.one_of(
        st.builds(lambda n: (f"{path}.name == {text(n)}", lambda s, x, a: pick(a)["name"] == n), name),
        st.builds(lambda n: (f"{text(n)} != {path}['name']", lambda s, x, a: pick(a)["name"] != n), name),
        st.builds(lambda n: (f"{path}.name in [{', '.join(map(text, n))}]",
                             lambda s, x, a: pick(a)["name"] in n), some),
        st.builds(lambda n: (f"{path}.index > {n}", lambda s, x, a: pick(a)["index"] > n), index),
        st.just((f"{path}.name.startsWith('up')", lambda s, x, a: pick(a)["name"].startswith("up"))),
        st.builds(lambda c: (f"state.cpu + double({path}.index) > {c!r}",
                             lambda s, x, a: s["cpu"] + pick(a)["index"] > c), numbers),
        st.just((f"context.tier == {path}.name", lambda s, x, a: same(x["tier"], pick(a)["name"]))),
        st.just((f"context.list.all(y, y != {path}.name)",
                 lambda s, x, a: all(not same(y, pick(a)["name"]) for y in listed(x["list"])))),
    )  # fmt: skip


def both(one: Expression, other: Expression) -> Expression:
    def joined(s: Any, x: Any, a: Any) -> bool:
        return _either(one[1], other[1], False, s, x, a)

    return f"{_wrapped(one[0])} && {_wrapped(other[0])}", joined


def either(one: Expression, other: Expression) -> Expression:
    def joined(s: Any, x: Any, a: Any) -> bool:
        return _either(one[1], other[1], True, s, x, a)

    return f"{_wrapped(one[0])}||{_wrapped(other[0])} // or", joined


def _either(one: Truth, other: Truth, wins: bool, s: Any, x: Any, a: Any) -> bool:
    """CEL's && (False wins) and || (True wins), which absorb the failure of the other side."""
    found: list[object] = []
    for each in (one, other):
        try:
            found.append(each(s, x, a))
        except (ArithmeticError, LookupError, TypeError):
            found.append("failed")
    if wins in found:
        return wins
    if "failed" in found:
        raise CelError
    return not wins


def negated(one: Expression) -> Expression:
    return f"!({one[0]}\n)", lambda s, x, a: not truth(one[1](s, x, a))


def chosen(one: Expression, two: Expression, three: Expression) -> Expression:
    def picked(s: Any, x: Any, a: Any) -> bool:
        return two[1](s, x, a) if truth(one[1](s, x, a)) else three[1](s, x, a)

    return f"({one[0]}\n) ? ({two[0]}\n) : ({three[0]}\n)", picked


def _wrapped(text: str) -> str:
    return f"({text}\n)"


def expressions(*atoms: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    def grown(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        return st.one_of(
            st.builds(both, inner, inner),
            st.builds(either, inner, inner),
            st.builds(negated, inner),
            st.builds(chosen, inner, inner, inner),
        )

    return st.recursive(st.one_of(*atoms), grown, max_leaves=6)


def about_rows() -> st.SearchStrategy[Expression]:
    return expressions(state_atoms(), context_atoms())


def about(space: ActionSpec, factor: str | None = None) -> st.SearchStrategy[Expression]:
    """Expressions of a forbid rule over a space."""
    if isinstance(space, Box):
        return about_rows()
    rows = (state_atoms(), context_atoms())
    if not space.factors or factor is not None:
        names = space.names[space.factors.index(factor) if factor else 0]
        return expressions(*rows, action_atoms("action", names, lambda a: a))
    each = [
        action_atoms(f"action.{name}", names, itemgetter(name))
        for name, names in zip(space.factors, space.names, strict=True)
    ]
    return expressions(*rows, *each)
