"""What a policy is made of: observation and action specs, distributions, versions. Pure leaf module.

Everything is frozen and checks itself. Arrays have a leading batch axis `B` wherever they hold more than one state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from policies.errors import BundleError, InvalidField, MissingField, NotFinite, UnknownAction, UnknownField

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

HeadKind = Literal["q_values", "logits", "probabilities", "action", "gaussian", "squashed_gaussian"]
ActionKind = Literal["discrete", "multi_discrete", "continuous"]
PropensityKind = Literal["mass", "density", "mixed"]
TransformKind = Literal["none", "unscale"]
WireAction = int | list[int | float]  # an index, one index for each factor, or the coordinates of a point
Role = Literal["champion", "challenger", "baseline", "shadow"]


@dataclass(frozen=True, slots=True)
class Feature:
    """One element of a vector observation, and what training has seen of it. `None` bounds are unbounded."""

    name: str
    low: float | None = None
    high: float | None = None
    quantiles: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ObservationSpec:
    """Shape and dtype of one observation, without the batch axis."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "float64"] = "float32"
    features: tuple[Feature, ...] = ()

    def __post_init__(self) -> None:
        if not self.shape or any(n < 1 for n in self.shape):
            detail = f"the shape is {list(self.shape)}; give one or more positive integers, without the batch axis"
            raise BundleError(detail, "observation.shape")
        if self.features and self.shape != (len(self.features),):
            detail = (
                f"{len(self.features)} features do not fit shape {list(self.shape)}; name each element of a vector, or "
                "leave features out"
            )
            raise BundleError(detail, "observation.features")
        if len(set(self.names)) != len(self.names):
            raise BundleError("two features have one name; give each its own", "observation.features")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(feature.name for feature in self.features)

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def wire_dtype(self) -> str:
        """Little-endian numpy notation, as recorded with each decision."""
        return np.dtype(self.dtype).newbyteorder("<").str

    def order(self, state: Mapping[str, float]) -> list[float]:
        """Put an observation given by feature name into the spec's order.

        Raises MissingField or UnknownField naming the feature, InvalidField if the features have no names.
        """
        if not self.features:
            raise InvalidField("this policy's features have no names: send a list", "state")
        missing = next((name for name in self.names if name not in state), None)
        if missing is not None:
            raise MissingField(f"feature {missing!r} is missing", f"state.{missing}")
        if len(state) != len(self.names):
            unknown = next(name for name in state if name not in self.names)
            raise UnknownField(f"there is no feature {unknown!r}", f"state.{unknown}")
        return [state[name] for name in self.names]

    def array(self, states: Sequence[object] | npt.NDArray[np.generic]) -> npt.NDArray[np.floating]:
        """Stack observations to one array [B, *shape] of the spec's dtype. They must have the right shape already."""
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which `finite_rows` finds
            return np.asarray(states, dtype=self.dtype).reshape(len(states), *self.shape)

    def within(self, states: npt.NDArray[np.floating]) -> Bools:
        """Whether each of B observations [B, *shape] is finite and within the features' declared bounds, bool [B]."""
        flat = states.reshape(len(states), -1)
        within: Bools = np.isfinite(flat).all(axis=1)
        if self.features:
            low, high = self.bounds
            within &= ((low <= flat) & (flat <= high)).all(axis=1)
        return within

    @cached_property
    def bounds(self) -> tuple[Floats, Floats]:
        """The features' low and high, float64 [size] each, infinite where they declare none."""
        low = [-math.inf if feature.low is None else feature.low for feature in self.features]
        high = [math.inf if feature.high is None else feature.high for feature in self.features]
        return np.array(low), np.array(high)

    def label(self, index: int) -> str:
        """Name the element at flat `index` as a caller would: `state.cpu`, `state[2][0]`."""
        if self.features:
            return f"state.{self.names[index]}"
        return "state" + "".join(f"[{i}]" for i in np.unravel_index(index, self.shape))

    def first_not_finite(self, states: npt.NDArray[np.floating]) -> int | None:
        """Index of the first of B observations [B, *shape] that is not finite in the spec's dtype, or None."""
        finite = np.isfinite(states)
        if finite.all():
            return None
        return int(np.flatnonzero(~finite.reshape(len(states), -1).all(axis=1))[0])

    def refuse_not_finite(self, row: npt.NDArray[np.floating]) -> NotFinite:
        """Say which element of one observation [*shape] is not finite in the spec's dtype."""
        index = int(np.flatnonzero(~np.isfinite(row.reshape(-1)))[0])
        return NotFinite(f"the value is not finite as {self.dtype}", self.label(index))


@dataclass(frozen=True)
class Choices:
    """A space of choices: one for `discrete`, one for each factor for `multi_discrete`.

    An action is a tuple of indices, one for each factor. Arrays over the space have N = sum(nvec) columns, the factors
    side by side.
    """

    names: tuple[tuple[str, ...], ...]  # of the choices of each factor
    factors: tuple[str, ...] = ()  # names of the factors; none for `discrete`

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 65_536 or not all(self.names):
            detail = f"the factors have {list(self.nvec)} choices; give each at least one, and 65536 in all at most"
            raise BundleError(detail, "action.n")
        if any(len(set(names)) != len(names) for names in self.names):
            raise BundleError("two choices of one factor have one name; give each its own", "action.names")
        if self.factors and len(set(self.factors)) != len(self.names):
            raise BundleError(f"{len(self.names)} factors need as many names; name each differently", "action.factors")

    @property
    def kind(self) -> ActionKind:
        return "multi_discrete" if self.factors else "discrete"

    @cached_property
    def nvec(self) -> tuple[int, ...]:
        """How many choices each factor has."""
        return tuple(len(names) for names in self.names)

    @cached_property
    def size(self) -> int:
        """N, the width of a row of scores or of a mask."""
        return sum(len(names) for names in self.names)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The column at which each factor begins."""
        return tuple(sum(self.nvec[:index]) for index in range(len(self.nvec)))

    @cached_property
    def index_of(self) -> tuple[Mapping[str, int], ...]:
        return tuple({name: index for index, name in enumerate(names)} for names in self.names)

    def index(self, choice: object, where: str = "action", factor: int = 0) -> int:
        """Turn a name or an index of one factor into an index. Raises UnknownAction naming the field."""
        names = self.names[factor]
        if isinstance(choice, str):
            found = self.index_of[factor].get(choice)
            if found is None:
                raise UnknownAction(f"there is no action {choice!r}; known: {', '.join(names[:16])}", where)
            return found
        if not isinstance(choice, int) or not 0 <= choice < len(names):
            raise UnknownAction(f"action {choice} is not in 0..{len(names) - 1}", where)
        return int(choice)

    def parse(self, action: object, where: str = "action") -> tuple[int, ...]:
        """Read an action as callers write it: an index or a name, or a list with one for each factor.

        Raises UnknownAction naming the field.
        """
        if not self.factors:
            if isinstance(action, list):
                raise UnknownAction("the action is one index or name", where)
            return (self.index(action, where),)
        if not isinstance(action, list) or len(action) != len(self.factors):
            raise UnknownAction(f"the action is a list, one choice for each of {', '.join(self.factors)}", where)
        return tuple(self.index(choice, f"{where}[{f}]", f) for f, choice in enumerate(action))

    def label(self, action: Sequence[float]) -> str | list[str]:
        """Name an action."""
        named = [self.names[f][int(choice)] for f, choice in enumerate(action)]
        return named if self.factors else named[0]

    def labels(self, actions: Sequence[Sequence[int]]) -> list[str | list[str]]:
        """Name actions of integers, as `label` does."""
        if self.factors:
            return [self.label(action) for action in actions]
        (names,) = self.names
        return [names[choice] for (choice,) in actions]

    def wire(self, action: Sequence[float]) -> WireAction:
        """Write an action as answers hold it: an index, or a list of them."""
        return [int(choice) for choice in action] if self.factors else int(action[0])

    def wires(self, actions: Sequence[Sequence[int]]) -> list[WireAction]:
        """Write actions of integers, as `wire` does."""
        return [list(action) for action in actions] if self.factors else [choice for (choice,) in actions]

    def validate(self, action: Sequence[float]) -> bool:
        """Whether `action` is an action of this space."""
        return len(action) == len(self.names) and all(
            choice == int(choice) and 0 <= choice < n for choice, n in zip(action, self.nvec, strict=True)
        )


@dataclass(frozen=True)
class Box:
    """A continuous space: D coordinates between `low` and `high`, infinite where unbounded. An action is D numbers."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= len(self.low) <= 4_096 or len(self.low) != len(self.high):
            detail = (
                f"low has {len(self.low)} numbers, high {len(self.high)}; give one for each coordinate, null where "
                "there is no bound; 4096 coordinates at most"
            )
            raise BundleError(detail, "action.low")
        if not all(low <= high for low, high in zip(self.low, self.high, strict=True)):
            raise BundleError("low is above high, or one is NaN; exchange or correct them", "action.low")
        if math.inf in self.low or -math.inf in self.high:
            detail = "a coordinate begins at infinity or ends at -infinity; write null where there is no bound"
            raise BundleError(detail, "action.low")
        if self.names and (len(self.names) != self.size or len(set(self.names)) != self.size):
            detail = (
                f"{self.size} coordinates have {len(self.names)} names, or two alike; name each differently, or none"
            )
            raise BundleError(detail, "action.names")

    @property
    def kind(self) -> ActionKind:
        return "continuous"

    @property
    def size(self) -> int:
        """D, the number of coordinates."""
        return len(self.low)

    @cached_property
    def bounds(self) -> tuple[Floats, Floats]:
        """low and high, float64 [D] each."""
        return np.array(self.low), np.array(self.high)

    @property
    def bounded(self) -> bool:
        return all(map(math.isfinite, self.low + self.high))

    def parse(self, action: object, where: str = "action") -> tuple[float, ...]:
        """Read an action as callers write it: D finite numbers. Raises UnknownAction naming the field."""
        if not isinstance(action, list) or len(action) != self.size:
            raise UnknownAction(f"the action is a list of {self.size} numbers", where)
        for d, value in enumerate(action):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UnknownAction(f"{value!r} is not a finite number", f"{where}[{d}]")
        return tuple(float(value) for value in action)

    def label(self, action: Sequence[float]) -> None:
        """Give None: points have no names."""

    def labels(self, actions: Sequence[Sequence[float]]) -> list[None]:
        """Give None for each: points have no names."""
        return [None] * len(actions)

    def wire(self, action: Sequence[float]) -> WireAction:
        """Write an action as answers hold it."""
        return [float(value) for value in action]

    def wires(self, actions: Sequence[Sequence[float]]) -> list[WireAction]:
        """Write actions as answers hold them."""
        return [self.wire(action) for action in actions]

    def validate(self, action: Sequence[float]) -> bool:
        """Whether `action` is a point of this space."""
        return len(action) == self.size and all(
            low <= value <= high for low, value, high in zip(self.low, action, self.high, strict=True)
        )


ActionSpec = Choices | Box


@dataclass(frozen=True)
class Target:
    """What a version's network says about B states over choices, before mask and exploration.

    scores: float64 [B, N]. With `greedy` they are values of which the largest of each factor wins, otherwise
    probabilities that sum to one in each factor; factors are independent. faulty: bool [B], rows whose network output
    is not finite (or no distribution); their scores are zeros. nvec: the factors' sizes.
    """

    scores: Floats
    greedy: bool
    faulty: Bools
    nvec: tuple[int, ...]
    logits: Floats | None = None  # where `scores` are their softmax: masks apply before it, so that no mass is lost

    @cached_property
    def distribution(self) -> Floats:
        """The target distribution π by factor, float64 [B, N]; zeros in faulty rows."""
        if not self.greedy:
            return self.scores
        hot = np.zeros(self.scores.shape)
        rows = np.arange(len(hot))
        for factor, part in enumerate(columns(self.nvec)):
            hot[rows, part.start + self.best[:, factor]] = 1.0
        if self.faulty.any():
            hot[self.faulty] = 0.0
        return hot

    @cached_property
    def best(self) -> Ints:
        """The choice of each factor with the largest score, the first of several, int64 [B, F]."""
        if len(self.nvec) == 1:
            return np.asarray(self.scores.argmax(axis=1)[:, None], dtype=np.int64)
        return np.stack([self.scores[:, part].argmax(axis=1) for part in columns(self.nvec)], axis=1)


def columns(nvec: Sequence[int]) -> list[slice]:
    """Say where each factor's columns lie in a row of N."""
    if len(nvec) == 1:
        return [slice(0, nvec[0])]
    ends = np.cumsum(nvec).tolist()
    return [slice(end - n, end) for end, n in zip(ends, nvec, strict=True)]
