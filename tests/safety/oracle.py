"""What rules mean, once more: slow, one row and one action at a time, in plain Python.

It shares no code with `safety/` and reads the rules' structs as data. Expressions are no text here but functions, which
`worlds.py` makes together with the text.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Truth = Callable[[Mapping[str, float], Mapping[str, Any], Any], bool]  # state, context, action; raises where CEL fails


@dataclass(frozen=True)
class Seen:
    """One row."""

    state: dict[str, float]
    context: dict[str, Any] | None = None
    previous: tuple[float, ...] | None = None
    past: bool = True
    scores: tuple[float, ...] | None = None
    greedy: bool = True
    faulty: bool = False


@dataclass(frozen=True)
class Factors:
    """A space of choices: names of each factor's choices, by the factor's name; one factor without a name."""

    names: dict[str | None, list[str]]


@dataclass(frozen=True)
class Feature:
    """low, high: None where unknown. quantiles: values."""

    name: str
    low: float | None = None
    high: float | None = None
    quantiles: tuple[float, ...] = ()


def true_or_failing(truth: Truth, seen: Seen, action: Any) -> bool:
    try:
        return truth(seen.state, seen.context or {}, action) is not False
    except ArithmeticError:
        return True
    except LookupError:
        return True
    except TypeError:
        return True


def allows(rule: Any, space: Factors | int, seen: Seen, action: Sequence[float], truth: Truth | None = None) -> bool:
    """Whether a rule allows an action: indices in the order of factors, or the numbers of a point."""
    kind = type(rule).__name__
    if kind == "Forbid":
        assert truth is not None
        return not true_or_failing(truth, seen, _shown(rule, space, action))
    if kind == "Bounds":
        return _bounds(rule, seen, action, truth)
    if kind == "MaxStep":
        return _max_step(rule, space, seen, action)
    return True


def _shown(rule: Any, space: Factors | int, action: Sequence[float]) -> Any:
    if isinstance(space, int):
        return None
    shown = {}
    for (factor, names), choice in zip(space.names.items(), action, strict=True):
        shown[factor] = {"index": int(choice), "name": names[int(choice)]}
    if list(shown) == [None]:
        return shown[None]
    return shown if rule.factor is None else shown[rule.factor]


def _bounds(rule: Any, seen: Seen, action: Sequence[float], truth: Truth | None) -> bool:
    if truth is not None and not true_or_failing(truth, seen, None):
        return True
    for d, value in enumerate(action):
        if rule.low is not None and rule.low[d] is not None and value < rule.low[d]:
            return False
        if rule.high is not None and rule.high[d] is not None and value > rule.high[d]:
            return False
    return True


def _max_step(rule: Any, space: Factors | int, seen: Seen, action: Sequence[float]) -> bool:
    if not seen.past:
        return False
    if isinstance(space, int):
        return _near_point(rule, space, seen, action)
    place = list(space.names).index(rule.factor)
    names = space.names[rule.factor]
    if seen.previous is not None:
        before = int(seen.previous[place])
    elif rule.initial is not None:
        before = names.index(rule.initial) if isinstance(rule.initial, str) else rule.initial
    else:
        return False
    worth = [rule.values[name] for name in names] if isinstance(rule.values, dict) else rule.values
    return bool(abs(worth[int(action[place])] - worth[before]) <= rule.limit)


def _near_point(rule: Any, size: int, seen: Seen, action: Sequence[float]) -> bool:
    last = seen.previous
    if last is None and rule.initial is not None:
        last = tuple(rule.initial) if isinstance(rule.initial, list) else (rule.initial,)
    if last is None:
        return False
    limits = rule.limit if isinstance(rule.limit, list) else [rule.limit] * size
    return all(abs(action[d] - last[d]) <= limits[d] for d in range(size))


def replaces(rule: Any, space: Factors, features: Sequence[Feature], seen: Seen, dtype: str = "float64") -> bool:
    """Whether a rule takes a row away from the version."""
    if type(rule).__name__ == "Support":
        return _support(rule, features, seen, dtype)
    if type(rule).__name__ == "Confidence" and not seen.faulty:
        return _confidence(rule, space, seen)
    return False


def _support(rule: Any, features: Sequence[Feature], seen: Seen, dtype: str) -> bool:
    if not all(math.isfinite(seen.state[feature.name]) for feature in features):
        return True
    outside = 0
    distances = []
    for feature in features:
        value = seen.state[feature.name]
        low, high = _ends(rule, feature)
        half = high / 2 - low / 2 if math.isfinite(low) and math.isfinite(high) else 0.0
        bottom, top = _as(low - rule.margin * 2 * half, dtype), _as(high + rule.margin * 2 * half, dtype)
        outside += value < bottom or value > top
        if math.isfinite(low) and math.isfinite(high):
            away = abs(value - (low / 2 + high / 2))
            distances.append(0.0 if away == 0 else math.inf if half == 0 else away / half)
    if outside > rule.max_outside:
        return True
    return rule.max_distance is not None and math.fsum(distances) / len(distances) > rule.max_distance


def _ends(rule: Any, feature: Feature) -> tuple[float, float]:
    if rule.by == "quantiles":
        if len(feature.quantiles) < 2:
            return -math.inf, math.inf
        return min(feature.quantiles), max(feature.quantiles)
    return -math.inf if feature.low is None else feature.low, math.inf if feature.high is None else feature.high


def _as(number: float, dtype: str) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0]) if dtype == "float32" else number


def _confidence(rule: Any, space: Factors, seen: Seen) -> bool:
    if seen.scores is None:
        return True
    rest = list(seen.scores)
    entropy = 0.0
    for names in space.names.values():
        scores, rest = rest[: len(names)], rest[len(names) :]
        entropy += math.fsum(-p * math.log(p) for p in scores if p > 0)
        best = max(range(len(scores)), key=scores.__getitem__)
        others = scores[:best] + scores[best + 1 :]
        if rule.min_gap is not None and others and scores[best] - max(others) < rule.min_gap:
            return True
    return rule.max_entropy is not None and (seen.greedy or entropy > rule.max_entropy)


def explorable(rule: Any, space: Factors, action: Sequence[float]) -> bool:
    """Whether a rule lets exploration draw an action."""
    place = list(space.names).index(rule.factor)
    name = space.names[rule.factor][int(action[place])]
    listed = name in rule.actions or int(action[place]) in rule.actions
    return listed if type(rule).__name__ == "ExploreOnly" else not listed
