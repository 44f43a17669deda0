"""What safety says about a batch of rows. Pure leaf module of the package.

A rule speaks by a mask over discrete actions, bool [B, n], True for allowed. Masks intersect: order does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from policies.types import Bools

FallbackReason = Literal[
    "inference_failed", "inference_timeout", "not_finite", "nothing_allowed", "no_mass_allowed", "check_failed"
]

REQUEST_RULE: Final = "request"  # the name under which a caller's `allowed_actions` shows among the rules


@dataclass(frozen=True, slots=True)
class Constraint:
    """The safety filter's answer for B rows.

    mask: bool [B, n], what every rule allows. by_rule: for each rule that masked anything, what it alone allows.
    """

    mask: Bools
    by_rule: tuple[tuple[str, Bools], ...] = ()

    def rules_against(self, row: int, action: int) -> tuple[str, ...]:
        """Names of the rules that forbid `action` in `row`."""
        return tuple(name for name, allowed in self.by_rule if not allowed[row, action])
