"""What safety says about a batch of rows. Pure leaf module of the package.

A rule speaks by a mask over choices, bool [B, N], True for allowed, or by a box over continuous actions, low and high,
float64 [B, D]. Masks and boxes intersect: order does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from policies.types import Bools, Floats, columns

FallbackReason = Literal[
    "inference_failed",
    "inference_timeout",
    "not_finite",
    "nothing_allowed",
    "no_mass_allowed",
    "check_failed",
    "fallback_only",
    "no_baseline",
    "outside_support",
    "breaker_open",
]

REQUEST_RULE: Final = "request"  # the name under which a caller's `allowed_actions` shows among the rules


@dataclass(frozen=True, slots=True)
class Constraint:
    """The safety filter's answer over choices for B rows.

    mask: bool [B, N], what every rule allows. by_rule: for each rule that masked anything, what it alone allows.
    nvec: the factors' sizes, with sum N.
    """

    mask: Bools
    nvec: tuple[int, ...]
    by_rule: tuple[tuple[str, Bools], ...] = ()

    def rules_against(self, row: int, action: Sequence[float]) -> tuple[str, ...]:
        """Names of the rules that forbid `action`, one index for each factor, in `row`."""
        if not self.by_rule:
            return ()
        at = [part.start + int(choice) for part, choice in zip(columns(self.nvec), action, strict=True)]
        return tuple(name for name, allowed in self.by_rule if not allowed[row, at].all())

    def nothing_left(self, row: int) -> bool:
        """Whether some factor has no choice left in `row`."""
        return not all(self.mask[row, part].any() for part in columns(self.nvec))

    def recorded(self) -> npt.NDArray[np.generic]:
        """One byte for each choice, [B, N]."""
        return self.mask


@dataclass(frozen=True, slots=True)
class BoxConstraint:
    """The safety filter's answer over a box for B rows.

    low, high: float64 [B, D], what every rule allows; empty where low is above high. by_rule: what each rule that
    narrowed anything allows alone.
    """

    low: Floats
    high: Floats
    by_rule: tuple[tuple[str, Floats, Floats], ...] = ()

    def rules_against(self, row: int, action: Sequence[float]) -> tuple[str, ...]:
        """Names of the rules that forbid `action`, D numbers, in `row`."""
        return tuple(
            name
            for name, low, high in self.by_rule
            if not ((low[row] <= np.asarray(action)) & (np.asarray(action) <= high[row])).all()
        )

    def nothing_left(self, row: int) -> bool:
        """Whether the box of `row` is empty."""
        return bool((self.low[row] > self.high[row]).any())

    def recorded(self) -> npt.NDArray[np.generic]:
        """low and high side by side, float64 [B, 2·D]."""
        return np.concatenate([self.low, self.high], axis=1)
