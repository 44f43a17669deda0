"""A step's evidence: what it says, what it warns of, and that going on elsewhere counts every unit once."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadow.evidence import EARLY_MS, LATE_MS, Kept, Trial
from shadow.rollout import Stage, Standing
from shadow.rollout_plan import MEASURES, GuardPlan, RolloutPlan
from shadow.units import LIMIT, Outcome, Plan
from shadow.verdicts import Verdict

UNITS = Plan(objective="step", unit_time_ms=1_000, window_ms=500, worst_reward=0.0)
PLAN = RolloutPlan(return_range=(0.0, 1.0), steps=(0.5,), unit_time_s=1.0, max_duration_s=100.0, hold_s=0.0,
                   guards={"return": GuardPlan(margin=0.2)})  # fmt: skip
STANDING = Standing(
    "r1", "v2", "v1", Stage.CANARY, PLAN, returns=(0.0, 1.0), margin=0.2, weight=0.5, since_ms=10_000, generation=5
)


def trial(kept: Kept | None = None, known: dict[str, int] | None = None, standing: Standing = STANDING) -> Trial:
    return Trial(standing, UNITS, b"salt", kept, known or {}, 10_000)


def outcome(number: int, reward: float | None, **changes: object) -> Outcome:
    assigned = "v2" if number % 2 else "v1"
    at = 10_000 + number
    plain = Outcome(unit=f"d{number:06}", id=f"d{number:06}", at_ms=at, assigned=assigned, weight=0.5, generation=5,
                    reward=reward)  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def filled(count: int, challenger: float, champion: float, **changes: object) -> Trial:
    """So many decisions of both versions, in turn, by chance enough for the test's arithmetic."""
    rng, made = np.random.default_rng(7), trial()
    for number in range(count):
        pick = int(rng.integers(0, 2))
        reward = challenger if pick else champion
        own = changes if pick else {}
        made.add(outcome(number, reward, assigned="v2" if pick else "v1", **own))
    made.settle(10**9)
    return made


def test_a_version_that_is_worse_is_found_worse_by_its_return() -> None:
    found = filled(600, 0.1, 0.8).evidence()
    assert found.verdict is Verdict.ROLLBACK
    assert found.reason.startswith("return -0.7")
    assert ";" not in found.reason, "only what decided"


def test_one_as_good_advances_with_the_numbers_and_units() -> None:
    made = filled(2_000, 0.5, 0.5)
    found = made.evidence()
    assert (found.verdict, found.mismatched) == (Verdict.ADVANCE, False)
    assert found.units == made.kept.challengers
    assert made.kept.challengers + made.kept.champions == 2_000
    assert "margin 0.2" in found.reason


def test_few_units_hold_and_say_what_is_missing() -> None:
    found = filled(10, 0.5, 0.5).evidence()
    assert found.verdict is Verdict.HOLD
    assert found.reason.startswith("not shown to be no worse: return")


def test_an_estimate_of_few_units_is_shown_within_what_can_be() -> None:
    made = trial(standing=msgspec.structs.replace(STANDING, weight=0.2))
    made.add(outcome(1, 0.0, error=True, weight=0.2))
    made.settle(10**9)
    assert made.kept.guards["error"].estimate < -1.0, "unbiased, of one unit"
    assert made.readings()["error"].estimate == -1.0


def test_without_a_guard_to_prove_a_person_decides() -> None:
    plan = msgspec.structs.replace(PLAN, guards={"return": GuardPlan(must_prove=False)})
    made = trial(standing=msgspec.structs.replace(STANDING, plan=plan))
    made.settle(10**9)
    assert made.evidence().reason == "no guard is to be proven: a person decides"


@pytest.mark.parametrize(
    ("changes", "measure", "verdict"),
    [
        ({"error": True}, "error", Verdict.ROLLBACK),
        ({"fallback": True}, "fallback", Verdict.ROLLBACK),
        ({"overridden": True}, "override", Verdict.ROLLBACK),
        ({"slow": True}, "latency", Verdict.ROLLBACK),
        ({"quarantined": True}, "quarantine", Verdict.ROLLBACK),  # which its return shows, too
    ],
)
def test_every_rate_has_its_guard(changes: dict[str, object], measure: str, verdict: Verdict) -> None:
    made = filled(800, 0.5, 0.5, **changes)
    assert made.evidence().verdict is verdict
    assert made.readings()[measure].worse


def test_rewards_that_do_not_come_pause() -> None:
    made = trial()
    rng = np.random.default_rng(3)
    for number in range(800):
        pick = int(rng.integers(0, 2))
        made.add(outcome(number, None if pick else 0.0, assigned="v2" if pick else "v1"))
    made.settle(10**9)
    assert made.evidence().verdict is Verdict.PAUSE
    assert made.evidence().reason.startswith("default")


def test_assignments_that_are_not_routings_show() -> None:
    made = trial()
    for number in range(2_000):
        made.add(outcome(number, 0.5, assigned="v1" if number % 5 else "v2"))
    made.settle(10**9)
    assert made.evidence().mismatched
    shown = made.shown(20_000)
    assert (shown.ratio.mismatched, shown.ratio.meant, shown.ratio.challengers) == (True, 0.5, 400)


def test_what_is_shown_goes_through_json() -> None:
    made = filled(20, 0.5, 0.5)
    made.add(outcome(999_999, 0.5))
    shown = msgspec.json.decode(msgspec.json.encode(made.shown(20_000)))
    assert set(shown["guards"]) == set(MEASURES)
    assert (shown["units"]["open"], shown["verdict"], shown["through_ms"]) == (1, "hold", 10**9)


def test_a_step_that_will_see_too_few_units_is_warned_of() -> None:
    made = trial()
    made.add(outcome(1, 0.5))
    made.settle(10**9)
    assert made.shown(10_000 + EARLY_MS - 1).warnings == []
    assert "30 show something" in made.shown(10_000 + EARLY_MS).warnings[0]


def test_values_below_the_range_and_a_full_book_are_warned_of() -> None:
    made = filled(40, -1.0, 0.5)
    assert any("below the declared range" in each for each in made.shown(20_000).warnings)
    full = trial(Kept(**{**msgspec.structs.asdict(trial().kept), "left_out": {"full": 3}}))
    assert any("3 decisions were left out" in each for each in full.shown(20_000).warnings)
    assert LIMIT > 3


def test_event_time_that_stands_still_is_warned_of() -> None:
    made = trial()
    made.settle(20_000)
    assert not any("until" in each for at in (10_000, 20_000 + LATE_MS) for each in made.shown(at).warnings)
    assert "until 61 s ago" in made.shown(20_000 + 61_000).warnings[-1]
    emptied = trial()  # of a Redis that tells no event time yet
    emptied.settle(0)
    assert "until 70 s ago" in emptied.shown(emptied.kept.since_ms + 70_000).warnings[-1]


def test_a_weight_that_assigns_nobody_anew_is_refused() -> None:
    with pytest.raises(ValueError, match="anew"):
        trial(standing=msgspec.structs.replace(STANDING, floor=0.5))


def test_a_step_whose_evidence_was_lost_has_another_place_in_alpha() -> None:
    first, again = trial(), Trial(STANDING, UNITS, b"salt", None, {}, 10_000, again=True)
    assert (first.kept.place, again.kept.place) == (0, 1), "behind the plan's one step"
    for each in (first, again):
        for number in range(60):
            each.add(outcome(number, 0.2 if number % 2 else 0.8))
        each.settle(10**9)
    assert again.readings()["return"].upper > first.readings()["return"].upper
    assert trial(again.kept).readings() == again.readings(), "whoever goes on"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=6), st.integers(0, 2**32 - 1))
def test_going_on_elsewhere_counts_every_unit_once(cuts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [outcome(50 * number, float(rng.random()), unit=f"k{int(rng.integers(0, 25))}") for number in range(60)]
    rows = [msgspec.structs.replace(row, assigned="v2" if int(row.unit[1:]) % 2 else "v1") for row in rows]
    whole = trial()
    for row in rows:
        whole.add(row)
    whole.settle(10**6)
    made = trial()
    known: dict[str, int] = {}
    for cut in sorted(cuts):
        for row in rows[:cut]:
            made.add(row)
        made.settle(rows[cut - 1].at_ms - 500 if cut else 0)
        known |= made.book.take_through()
        raw = msgspec.msgpack.encode(made.kept)
        made = trial(msgspec.msgpack.decode(raw, type=Kept), known)
    for row in rows:
        made.add(row)
    made.settle(10**6)
    assert (made.kept.challengers, made.kept.champions) == (whole.kept.challengers, whole.kept.champions)
    assert made.kept.ratio == whole.kept.ratio
    for name, reading in made.readings().items():
        assert reading.estimate == pytest.approx(whole.readings()[name].estimate, abs=1e-9)
