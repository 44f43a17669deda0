"""Kill switches: what each does, what several do, and that one more never loosens anything."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest

from safety.breaker import INSTEAD, Role, who
from safety.halt import EFFECTS, NOTHING, STRENGTH, Effect, KillSwitch, allowed_strength, combined, halted

SWITCHES: tuple[KillSwitch, ...] = get_args(KillSwitch)
SETS = [chosen for size in range(len(SWITCHES) + 1) for chosen in itertools.combinations(SWITCHES, size)]


def test_every_switch_has_a_row() -> None:
    assert set(EFFECTS) == set(SWITCHES)


@pytest.mark.parametrize(
    ("switches", "effect"),
    [
        ((), Effect(True, "assigned")),
        (("freeze_exploration",), Effect(False, "assigned")),
        (("baseline_only",), Effect(False, "baseline")),
        (("fallback_only",), Effect(False, "fallback")),
        (("baseline_only", "freeze_exploration"), Effect(False, "baseline")),
        (("fallback_only", "baseline_only"), Effect(False, "fallback")),
    ],
)
def test_what_switches_do(switches: tuple[KillSwitch, ...], effect: Effect) -> None:
    assert combined(switches) == effect


@pytest.mark.parametrize("chosen", SETS)
@pytest.mark.parametrize("other", SWITCHES)
def test_one_more_switch_never_loosens(chosen: tuple[KillSwitch, ...], other: KillSwitch) -> None:
    before, after = combined(chosen), combined((*chosen, other))
    assert before.explores or not after.explores
    assert STRENGTH.index(after.answers) >= STRENGTH.index(before.answers)
    assert combined((other, *chosen)) == after, "their order does not matter"


@pytest.mark.parametrize("role", list(INSTEAD))
def test_who_answers_under_a_switch(role: Role) -> None:
    assert halted(NOTHING, role) == role
    assert halted(EFFECTS["freeze_exploration"], role) == role
    assert halted(EFFECTS["baseline_only"], role) == "baseline"
    assert halted(EFFECTS["fallback_only"], role) is None


def test_without_a_baseline_the_fallback_answers_for_it() -> None:
    place = halted(EFFECTS["baseline_only"], "champion")
    assert place is not None
    assert who(place, {"champion"}) == "fallback"


def test_strength_is_zero_or_untouched() -> None:
    epsilon = np.array([0.1, 0.0, 1.0])
    np.testing.assert_array_equal(allowed_strength(NOTHING, epsilon), epsilon)
    for switch in SWITCHES:
        np.testing.assert_array_equal(allowed_strength(EFFECTS[switch], epsilon), np.zeros(3))
