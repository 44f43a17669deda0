"""One row and what was drawn in it, as the last look sees them. Pure leaf beside `facts.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from safety.facts import Facts

if TYPE_CHECKING:
    from safety.expression import View

Action = Sequence[float]  # one index for each factor, or D numbers


class Row(NamedTuple):
    """One row of `Facts`, as Python values. state: numbers, nested as the observation's shape."""

    state: list[object]
    context: Mapping[str, object] | None
    previous: tuple[float, ...] | None
    past: bool
    scores: list[float] | None
    greedy: bool
    faulty: bool

    @classmethod
    def of(cls, facts: Facts, index: int) -> Row:
        """Take one row out of a batch."""
        return cls(
            facts.states[index].tolist(),
            facts.contexts[index],
            facts.previous[index],
            bool(facts.past[index]),
            None if facts.scores is None else facts.scores[index].tolist(),
            facts.greedy,
            bool(facts.faulty[index]),
        )


@dataclass(slots=True)
class Drawn:
    """One row, the action drawn in it, and whether exploring drew it.

    views: what CEL was shown of them, by the factor that `action` stands for; kept here for who asks next.
    """

    row: Row
    action: Action
    explored: bool
    views: dict[str | None, View | None] = field(default_factory=dict)


Broken = Callable[[Drawn], bool]  # whether a rule is
