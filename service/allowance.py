"""How much a group may explore: strengths wanted, what the budget leaves of them, what it was charged.

Duty: between the pipeline, which has rows and uniforms, and the holder of a lease, which has a window and counts.
Prices are computed only where a regret budget asks for them.
Promise: without a lease nothing is explored; whatever is charged is at least what was explored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from policies.types import Bools, Floats
from safety.exploration import Exploration
from safety.lease import Holder, Settled
from safety.schedule import strength

Priced = Callable[[], tuple[Floats, Floats]]  # worst and expected price of exploring, float64 [B] each


@dataclass(frozen=True, slots=True)
class Strength:
    """What a policy's exploration is like at this moment.

    epsilon: wanted, before any budget. temperature: exploring draws from softmax(q/T) instead of uniformly. sigma: the
    deviation of exploring points, in place of the version's own. mode: rows that do not explore answer with the mode.
    """

    epsilon: float
    temperature: float | None = None
    sigma: float | None = None
    mode: bool = False


@dataclass(slots=True)
class Spent:
    """What was allotted to a group, until the draw says what of it was used."""

    epsilon: Floats
    settled: Settled | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a group explores. wanted: ε before any budget, float64 [B]. allowance: None if none is declared."""

    wanted: Floats
    strength: Strength
    allowance: Allowance | None = None

    @property
    def priced(self) -> bool:
        """Whether anybody asks what exploring costs."""
        return self.allowance is not None and self.allowance.exploration.regret is not None

    @property
    def left(self) -> int | None:
        """Explored decisions that the lease still holds; None: nothing counts them."""
        return None if self.allowance is None else self.allowance.left

    def allot(self, u0: Floats, possible: Bools, priced: Priced) -> Spent:
        """Settle ε for each row. u0: float64 [B], first uniforms. possible: bool [B], rows that have a target."""
        wanted = np.where(possible, self.wanted, 0.0)
        return Spent(wanted) if self.allowance is None else self.allowance.allot(wanted, u0, priced)

    def spend(self, spent: Spent, explored: Bools, paid: Floats) -> str:
        """Charge what was explored, float64 [B] each its price. Gives the windows that it was charged to."""
        if self.allowance is None or spent.settled is None:
            return ""
        self.allowance.spend(spent.settled, explored, paid)
        return ",".join(f"{kind}:{window}" for kind, window in spent.settled.windows.items())


class Allowance:
    """One policy's exploration in this worker: its document, and its lease."""

    def __init__(self, exploration: Exploration, holder: Holder, now_s: Callable[[], float]) -> None:
        self.exploration = exploration
        self._holder = holder
        self._now_s = now_s

    def strength(self, own_epsilon: float) -> Strength:
        """Say what schedules want now. own_epsilon: the version's."""
        declared, progress = self.exploration, self._holder.standing(self._now_s()).progress
        passed = progress.decisions, progress.elapsed_ms / 1000
        return Strength(
            declared.wanted(own_epsilon, *passed),
            None if declared.temperature is None else strength(declared.temperature, *passed),
            None if declared.sigma is None else strength(declared.sigma, *passed),
            declared.when_frozen == "mode",
        )

    def allot(self, wanted: Floats, u0: Floats, priced: Priced) -> Spent:
        """Settle ε for rows in their order, and set aside what they take at most."""
        worst = expected = np.ones(len(wanted))
        if self.exploration.regret is not None:
            worst, expected = priced()
        settled = self._holder.allot(self._now_s(), wanted, u0, worst, expected)
        return Spent(settled.epsilon, settled)

    def spend(self, settled: Settled, explored: Bools, paid: Floats) -> None:
        """Give back what the draw did not take. paid: float64 [B], prices of what was drawn."""
        self._holder.spend(settled, explored, paid)

    @property
    def left(self) -> int | None:
        """Explored decisions that this worker may still make on its lease; None: nothing counts them."""
        if self.exploration.rate is None and self.exploration.share is None:
            return None
        left = self._holder.standing(self._now_s()).left
        return min(left.rate, left.share)
