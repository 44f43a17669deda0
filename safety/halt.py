"""Kill switches: what each does to exploration and to who answers. Pure.

Duty: the meaning of `freeze_exploration`, `baseline_only` and `fallback_only`, alone and together. Who throws them, and
how a replica hears of it, is known elsewhere.
Strategy: each switch is a row of EFFECTS; of several, each column has its own strongest entry, so that adding a switch
never loosens anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from policies.types import Floats
from safety.breaker import Role

KillSwitch = Literal["freeze_exploration", "baseline_only", "fallback_only"]
Answers = Literal["assigned", "baseline", "fallback"]


@dataclass(frozen=True, slots=True)
class Effect:
    """explores: ε may be above zero. answers: who does, in place of the assigned version."""

    explores: bool
    answers: Answers


# Rows that the baseline answers in place of another have ε = 0 (design section 4), so that is what a switch does too.
EFFECTS: dict[KillSwitch, Effect] = {
    "freeze_exploration": Effect(explores=False, answers="assigned"),
    "baseline_only": Effect(explores=False, answers="baseline"),
    "fallback_only": Effect(explores=False, answers="fallback"),
}
NOTHING = Effect(explores=True, answers="assigned")
STRENGTH: tuple[Answers, ...] = ("assigned", "baseline", "fallback")  # later entries win


def combined(switches: Iterable[KillSwitch]) -> Effect:
    """What several switches do together; none at all do nothing."""
    effects = [EFFECTS[switch] for switch in switches]
    return Effect(
        explores=all(effect.explores for effect in effects),
        answers=max((effect.answers for effect in effects), key=STRENGTH.index, default="assigned"),
    )


def halted(effect: Effect, assigned: Role) -> Role | None:
    """Whose place in the breaker's `who` a row takes; None: the fallback answers, whoever could.

    Where no baseline is loaded `baseline_only` is answered by the fallback, as `who` has it.
    """
    if effect.answers == "fallback":
        return None
    return "baseline" if effect.answers == "baseline" else assigned


def allowed_strength(effect: Effect, epsilon: Floats) -> Floats:
    """ε that the switches leave, float64 [B]. Stochastic heads keep sampling at zero unless `when_frozen: mode`."""
    return epsilon if effect.explores else np.zeros(epsilon.shape)
