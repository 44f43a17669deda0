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

HeadKind = Literal["q_values", "logits", "probabilities", "action"]
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
            raise BundleError(f"shape must be positive integers, got {list(self.shape)}", "observation.shape")
        if self.features and self.shape != (len(self.features),):
            raise BundleError(
                f"{len(self.features)} features do not fit shape {list(self.shape)}", "observation.features"
            )
        if len(set(self.names)) != len(self.names):
            raise BundleError("feature names must be unique", "observation.features")

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

    def array(self, states: Sequence[object]) -> npt.NDArray[np.floating]:
        """Stack observations to one array [B, *shape] of the spec's dtype. They must have the right shape already."""
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which `finite_rows` finds
            return np.asarray(states, dtype=self.dtype).reshape(len(states), *self.shape)

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
class ActionSpec:
    """A discrete action space: indices 0 to n - 1, each with a name."""

    n: int
    names: tuple[str, ...]
    kind: Literal["discrete"] = "discrete"

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 65_536:
            raise BundleError(f"n must be 1 to 65536, got {self.n}", "action.n")
        if len(self.names) != self.n or len(set(self.names)) != self.n:
            raise BundleError(f"names must be {self.n} different strings", "action.names")

    @cached_property
    def index_of(self) -> Mapping[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def index(self, action: int | str, where: str = "action") -> int:
        """Turn a name or an index into an index. Raises UnknownAction naming the field."""
        if isinstance(action, str):
            found = self.index_of.get(action)
            if found is None:
                raise UnknownAction(f"there is no action {action!r}; known: {', '.join(self.names[:16])}", where)
            return found
        if not 0 <= action < self.n:
            raise UnknownAction(f"action {action} is not in 0..{self.n - 1}", where)
        return int(action)

    def validate(self, action: int) -> bool:
        """Whether `action` is an index of this space."""
        return 0 <= action < self.n


@dataclass(frozen=True, slots=True)
class Target:
    """What a version's network says about B states, before mask and exploration.

    scores: float64 [B, n]. With `greedy` they are values of which the largest wins, otherwise probabilities that sum
    to one. faulty: bool [B], rows whose network output is not finite (or no distribution); their scores are zeros.
    """

    scores: Floats
    greedy: bool
    faulty: Bools

    def distribution(self) -> Floats:
        """The target distribution π, float64 [B, n]; zeros in faulty rows."""
        if not self.greedy:
            return self.scores
        return _one_hot(np.argmax(self.scores, axis=1), self.scores.shape[1]) * ~self.faulty[:, None]


def _one_hot(actions: Ints, n: int) -> Floats:
    hot = np.zeros((len(actions), n))
    hot[np.arange(len(actions)), actions] = 1.0
    return hot
