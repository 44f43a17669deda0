"""Decisions as shadows are shown them: what was asked, what was allowed, what was done, with which probability. Pure.

Duty: frozen arrays with a leading axis B, subsets of them, and several as one. It knows no version that watches.
Strategy: arrays are those of the decision itself, not copies. Invariant: nobody writes to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from policies.types import Bools, Floats, Ints

if TYPE_CHECKING:
    from policies.continuous import Transform

# What a row costs besides its numbers: ids, names, and its share of the arrays' heads.
OVERHEAD_BYTES = 500
Block = TypeVar("Block", "ChoiceRows", "PointRows", "Rows")


@dataclass(frozen=True, slots=True)
class ChoiceRows:
    """B decisions over choices.

    nvec: sizes of the factors, with sum N; where rules spoke of tuples of choices one number, and `factors` holds the
    sizes. mask: bool [B, N], what was allowed. ruled: bool [B, N], what rules alone leave, without what callers allow;
    None: all. own: float64 [B, N], what the action would have been drawn from without exploration; the fallback in rows
    that are `fallen`, bool [B]. actions: int64 [B, F], executed. propensity: float64 [B], NaN where it is not known.
    values: [B, sum of the factors' sizes], what the deciding version says each choice is worth; None where its head
    does not tell.
    """

    COMMON: ClassVar = ("nvec", "factors")
    nvec: tuple[int, ...]
    factors: tuple[int, ...]
    mask: Bools
    ruled: Bools | None
    own: Floats
    fallen: Bools
    actions: Ints
    propensity: Floats
    values: npt.NDArray[np.floating] | None


@dataclass(frozen=True, slots=True)
class PointRows:
    """B decisions in a box. Float64 [B, D] but for fallen, bool [B], and log_propensity, float64 [B].

    low, high: what was allowed. ruled_low, ruled_high: what rules alone leave; None: all. mean, std: what the deciding
    version said of the raw action. centre: what it would have done without chance. declared: its fallback, which
    answered rows that are `fallen`. actions: executed. log_propensity: NaN where it is not known.
    """

    COMMON: ClassVar = ("transform",)
    transform: Transform
    low: Floats
    high: Floats
    ruled_low: Floats | None
    ruled_high: Floats | None
    mean: Floats
    std: Floats
    centre: Floats
    declared: Floats
    fallen: Bools
    actions: Floats
    log_propensity: Floats


@dataclass(frozen=True, slots=True)
class Rows:
    """B decisions of one policy that one version made.

    states: [B, *shape]. asked: bool [B, N], what callers allow, for networks that want to know; None: everything.
    offered_s: float64 [B], monotonic, when the answers left. share: float64 [B], with which probability each row was
    kept where not all could be.
    """

    COMMON: ClassVar = ("version",)
    version: str
    ids: list[str]
    episodes: list[str | None]
    steps: list[int | None]
    states: npt.NDArray[np.floating]
    asked: Bools | None
    logged: ChoiceRows | PointRows
    offered_s: Floats
    share: Floats

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def units(self) -> list[str]:
        """What is kept or dropped as a whole: a row's episode, or the decision where it has none."""
        return [
            decision if episode is None else episode for decision, episode in zip(self.ids, self.episodes, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """What the rows take of memory, about."""
        return len(self.ids) * OVERHEAD_BYTES + self.states.nbytes + _nbytes(self.logged)

    def some(self, rows: Sequence[int]) -> Rows:
        """The same for some of the rows."""
        return _some(self, np.asarray(rows, dtype=np.int64))

    def at_share(self, share: float) -> Rows:
        """The same, kept with this probability."""
        return replace(self, share=np.full(len(self.ids), share))


def joined(parts: Sequence[Rows]) -> list[Rows]:
    """The same rows in as few parts as may be scored together, those of each part in their order."""
    alike: dict[Any, list[Rows]] = {}
    for part in parts:
        alike.setdefault(_kind(part), []).append(part)
    return [_concatenated(each) for each in alike.values()]


def _kind(rows: Any) -> tuple[object, ...]:
    """What rows must have alike to become one: what they share, and which arrays are missing."""
    found: list[object] = [type(rows)]
    for each in fields(rows):
        value = getattr(rows, each.name)
        if each.name in rows.COMMON:
            found.append(_bytes(value) if each.name == "transform" else value)
        elif isinstance(value, ChoiceRows | PointRows):
            found.append(_kind(value))
        else:
            found.append(value is None)
    return tuple(found)


def _bytes(transform: Transform) -> tuple[str, bytes, bytes]:
    return transform.kind, transform.low.tobytes(), transform.high.tobytes()


def _concatenated(parts: Sequence[Block]) -> Block:
    if len(parts) == 1:
        return parts[0]
    changed: dict[str, Any] = {}
    for each in fields(parts[0]):
        values = [getattr(part, each.name) for part in parts]
        if isinstance(values[0], np.ndarray):
            changed[each.name] = np.concatenate(values)
        elif isinstance(values[0], list):
            changed[each.name] = [item for value in values for item in value]
        elif isinstance(values[0], ChoiceRows | PointRows):
            changed[each.name] = _concatenated(values)
    return replace(parts[0], **changed)


def _some(rows: Block, at: Ints) -> Block:
    changed: dict[str, Any] = {}
    for each in fields(rows):
        value = getattr(rows, each.name)
        if isinstance(value, np.ndarray):
            changed[each.name] = value[at]
        elif isinstance(value, list):
            changed[each.name] = [value[i] for i in at.tolist()]
        elif each.name == "logged":
            changed[each.name] = _some(value, at)
    return replace(rows, **changed)


def _nbytes(rows: ChoiceRows | PointRows) -> int:
    values = (getattr(rows, each.name) for each in fields(rows))
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))
