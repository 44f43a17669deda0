"""Which decisions make a unit, when it is ripe, and what it is worth."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np
import pytest

from policies.route import Routes, assign
from shadow.ratio import Ratio
from shadow.units import Book, Outcome, Plan, Step, Unit

SALT = b"rollout 7"
PLAN = Plan(objective="episode", unit_time_ms=1_000, window_ms=500)
STEP = Step(champion="v1", challenger="v2", weight=0.1, since_ms=10_000, generations=(5, None), salt=SALT)


def outcome(at_ms: int, unit: str = "e1", **changes: object) -> Outcome:
    plain = Outcome(
        unit=unit, id=f"d{at_ms:06}", at_ms=at_ms, assigned="v1", weight=0.9, generation=5, episode=unit, reward=1.0
    )
    return msgspec.structs.replace(plain, **changes)


def units_of(*outcomes: Outcome, plan: Plan = PLAN, step: Step = STEP) -> list[Unit]:
    book = Book(plan, step)
    for each in outcomes:
        book.add(each)
    return book.ripe(10**9)


def only(*outcomes: Outcome, plan: Plan = PLAN) -> Unit:
    (unit,) = units_of(*outcomes, plan=plan)
    return unit


def left_out(*outcomes: Outcome, step: Step = STEP) -> dict[str, int]:
    book = Book(PLAN, step)
    for each in outcomes:
        book.add(each)
    assert book.ripe(10**9) == []
    return dict(book.left_out)


# What begins in a step


def test_a_key_that_was_there_before_the_step_takes_part_with_its_first_decision_in_it() -> None:
    """Keys that come all the time would take part in no step at all: each of them was there just before."""
    before = [outcome(9_990, "k1", episode=""), outcome(10_050, "k1", episode="old", generation=4, reward=7.0)]
    inside = [outcome(10_100, "k1", episode=""), outcome(10_200, "k1", episode="")]
    plan = msgspec.structs.replace(PLAN, objective="step")
    for rows in (before + inside, inside + before):
        unit = only(*rows, plan=plan)
        assert (unit.start_ms, unit.decisions, unit.value) == (10_100, 2, 1.0)
    assert left_out(*before) == {}


# Ripeness


def test_a_unit_is_ripe_when_it_is_older_than_its_time_and_the_reward_window_and_not_before() -> None:
    book = Book(PLAN, STEP)
    book.add(outcome(10_000, ended=True))
    assert book.ripe(11_500) == []
    assert [unit.start_ms for unit in book.ripe(11_501)] == [10_000]
    assert book.ripe(11_501) == []


@pytest.mark.parametrize("changes", [{"reward": None}, {"ended": True}, {"reward": -5.0}, {"quarantined": True}])
def test_neither_reward_nor_end_makes_a_unit_ripe_sooner_or_later(changes: dict[str, object]) -> None:
    book = Book(PLAN, STEP)
    book.add(msgspec.structs.replace(outcome(10_000), **changes))
    assert book.ripe(11_500) == []
    assert len(book.ripe(11_501)) == 1


def test_units_come_in_the_order_in_which_they_started_in_whichever_order_their_decisions_closed() -> None:
    rng = np.random.default_rng(0)
    rows = [outcome(10_000 + 7 * i, f"e{i // 5}") for i in range(100)]
    rows += [outcome(10_000, "first", id="a"), outcome(10_000, "second", id="b")]
    book = Book(PLAN, STEP)
    for at in rng.permutation(len(rows)):
        book.add(rows[at])
    taken = book.ripe(11_800) + book.ripe(10**6)
    assert [unit.order for unit in taken] == ["a", "b", *(f"d{10_000 + 35 * i:06}" for i in range(20))]
    assert all(unit.decisions == 5 for unit in taken[2:])


def test_a_unit_whose_first_decision_closes_last_starts_with_it() -> None:
    book = Book(PLAN, STEP)
    book.add(outcome(10_900))
    book.add(outcome(11_100))
    book.add(outcome(10_000))
    (unit,) = book.ripe(11_501)
    assert (unit.start_ms, unit.order, unit.decisions) == (10_000, "d010000", 2)  # 11_100 is beyond its time


# Value


def test_an_episode_is_worth_its_return_up_to_unit_time() -> None:
    unit = only(*(outcome(10_000 + 250 * i, reward=float(i)) for i in range(8)))
    assert (unit.value, unit.decisions, unit.ended) == (0.0 + 1.0 + 2.0 + 3.0, 4, False)
    assert only(outcome(10_000), outcome(10_400, ended=True)).ended


def test_a_key_is_worth_the_mean_of_its_first_decisions() -> None:
    plan = msgspec.structs.replace(PLAN, objective="step", unit_decisions=3)
    rows = [outcome(10_000 + i, "k", episode=f"e{i}", reward=float(i)) for i in range(6)]
    for order in (rows, rows[::-1]):
        unit = only(*order, plan=plan)
        assert (unit.value, unit.decisions) == (1.0, 3)
    assert only(outcome(10_000, "k", reward=4.0), outcome(11_000, "k", reward=9.0), plan=plan).value == 4.0


def test_of_a_keys_episodes_the_first_counts() -> None:
    rows = [outcome(10_000 + 10 * i, "k", episode="ab"[i % 2], reward=float(i)) for i in range(6)]
    assert only(*rows).value == 0.0 + 2.0 + 4.0
    single = [outcome(10_000 + i, "k", episode="", reward=2.0) for i in range(3)]
    assert (only(*single).value, only(*single).decisions) == (2.0, 1)


def test_a_missing_reward_is_the_default_and_a_quarantined_one_the_worst() -> None:
    plan = msgspec.structs.replace(PLAN, default_reward=-1.0, worst_reward=-7.0)
    rows = [outcome(10_000), outcome(10_001, reward=None), outcome(10_002, reward=99.0, quarantined=True)]
    unit = only(*rows, plan=plan)
    assert (unit.value, unit.defaulted, unit.quarantined) == (1.0 - 1.0 - 7.0, 1, 1)
    assert only(*rows).value == -math.inf


@pytest.mark.parametrize(("objective", "alone"), [("episode", 0.0), ("step", 0.25)])
def test_a_decision_that_was_not_executed_has_no_reward(objective: Literal["episode", "step"], alone: float) -> None:
    plan = msgspec.structs.replace(PLAN, objective=objective, default_reward=0.25)
    void = outcome(10_000, reward=50.0, void=True)
    unit = only(void, outcome(10_001, reward=0.5), plan=plan)
    assert (unit.value, unit.void, unit.defaulted, unit.decisions) == (0.5, 1, 0, 2)
    assert only(void, plan=plan).value == alone


def test_a_unit_counts_for_the_version_assigned_also_when_another_answered() -> None:
    rows = [
        outcome(10_000, assigned="v2", weight=0.1, overridden=True),
        outcome(10_001, assigned="v2", weight=0.1, fallback=True, slow=True),
        outcome(10_002, assigned="v2", weight=0.1, fallback=True, error=True),
    ]
    unit = only(*rows)
    assert (unit.assigned, unit.challenger, unit.value, unit.decisions) == ("v2", True, 3.0, 3)
    assert (unit.overridden, unit.fallback, unit.errors, unit.slow) == (1, 2, 1, 1)
    assert unit.weight == pytest.approx(0.1)


def test_a_unit_ends_where_it_is_assigned_anew() -> None:
    rows = [outcome(10_000), outcome(10_001, assigned="v2", weight=0.1), outcome(10_002)]
    assert (only(*rows).decisions, only(*rows).assigned) == (1, "v1")


# Once


def test_a_decision_told_twice_counts_once() -> None:
    assert only(outcome(10_000), outcome(10_000), outcome(10_000, id="d01"), outcome(10_000)).decisions == 2


def test_a_unit_counts_once_however_long_it_goes_on() -> None:
    book = Book(PLAN, STEP)
    book.add(outcome(10_000))
    assert len(book.ripe(12_000)) == 1
    book.add(outcome(12_500))
    book.add(outcome(12_400))
    assert book.ripe(10**9) == []
    assert book.known == {"e1": 12_500}


def test_what_is_known_goes_on_to_the_next_step_and_can_be_forgotten() -> None:
    book = Book(PLAN, STEP)
    book.add(outcome(10_000))
    book.ripe(12_000)
    book.add(outcome(12_500, "e2"))
    assert book.known == {"e1": 10_000, "e2": 12_500}
    following = Book(PLAN, msgspec.structs.replace(STEP, since_ms=12_000), known=book.known)
    following.add(outcome(12_600, "e2"))
    assert following.ripe(10**9) == []
    following.forget(12_600)
    following.add(outcome(20_000, "e1"))
    following.add(outcome(20_000, "e2"))
    assert len(following.ripe(10**9)) == 1


def test_single_decisions_are_not_remembered() -> None:
    book = Book(PLAN, STEP)
    for i in range(50):
        book.add(outcome(10_000 + i, f"d{10_000 + i:06}", episode=""))
    assert len(book.ripe(10**9)) == 50
    assert book.known == {}


def test_a_full_book_takes_no_new_units_and_says_so() -> None:
    book = Book(PLAN, STEP, limit=3)
    for name, at in (("a", 10_000), ("b", 10_001), ("a", 10_002), ("c", 10_003), ("a", 10_004)):
        book.add(outcome(at, name))
    assert [unit.decisions for unit in book.ripe(10**9)] == [3, 1]
    assert book.left_out == {"full": 1}
    book.add(outcome(20_000, "d"))  # two names are known, one place is left
    book.add(outcome(20_001, "e"))
    assert len(book.ripe(10**9)) == 1
    assert book.left_out == {"full": 2}


def test_what_cannot_belong_to_a_unit_takes_no_place() -> None:
    plan = msgspec.structs.replace(PLAN, objective="step", unit_decisions=2)
    book = Book(plan, STEP, limit=5)
    for i in range(40):
        book.add(outcome(10_000 + 100 * i, "a"))
    for name in ("b", "c", "d"):
        book.add(outcome(10_000, name))
    assert len(book.ripe(10**9)) == 4


# Which take part


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"at_ms": 9_998}, "before"),
        ({"generation": 4}, "before"),
        ({"generation": 9}, "after"),
        ({"weight": 0.95}, "elsewhere"),
        ({"assigned": "v2", "weight": 0.05}, "elsewhere"),
        ({"assigned": "v0"}, "elsewhere"),
    ],
)
def test_units_of_another_time_weight_or_generation_are_left_out(changes: dict[str, object], why: str) -> None:
    step = msgspec.structs.replace(STEP, generations=(5, 8))
    first = msgspec.structs.replace(outcome(10_000), **changes)
    assert left_out(first, outcome(10_500, generation=6), step=step) == {why: 1}


def test_the_first_decision_alone_says_whether_a_unit_takes_part() -> None:
    step = msgspec.structs.replace(STEP, generations=(5, 8))
    (unit,) = units_of(outcome(10_000), outcome(10_500, generation=12), step=step)
    assert unit.decisions == 2
    assert msgspec.structs.replace(STEP, generations=(5, None)).refusal(outcome(10_000, generation=99)) is None


def test_weights_that_a_float_cannot_hold_are_the_steps_all_the_same() -> None:
    step = msgspec.structs.replace(STEP, weight=0.01)
    assert step.refusal(outcome(10_000, weight=1.0 - 0.01)) is None
    assert step.chance == 0.01
    assert msgspec.structs.replace(STEP, weight=0.07).chance == 0.07  # 0.07 · 10,000 is above 700 in floats


@pytest.mark.parametrize(("floor", "weight"), [(0.1, 0.1), (0.25, 0.1), (0.0, 0.0), (0.0, 1.0)])
def test_a_step_that_assigns_nothing_anew_is_refused(floor: float, weight: float) -> None:
    step = msgspec.structs.replace(STEP, weight=weight, floor=floor)
    with pytest.raises(ValueError, match="assigns no unit anew"):
        Book(PLAN, step)


def test_of_keys_that_come_back_those_above_the_floor_are_the_challengers_by_the_chance() -> None:
    floor = 0.0
    for number, weight in enumerate((0.05, 0.25, 0.5)):
        routes = Routes(SALT, "v1", "v2", weight)
        step = msgspec.structs.replace(STEP, weight=weight, floor=floor)
        book = Book(PLAN, step)
        for i in range(4_000):
            given = assign(routes, f"key {i}")
            row = outcome(10_000 + i, f"key {i}", assigned=given.version, weight=given.weight, id=f"{number} {i}")
            book.add(row)
        taken = book.ripe(10**9)
        challengers = sum(unit.challenger for unit in taken)
        assert not Ratio(step.chance).add_many(challengers, len(taken) - challengers).mismatched(0.01)
        assert len(taken) + book.left_out["moved_before"] == 4_000
        assert len(taken) == pytest.approx(4_000 * (1.0 - floor), rel=0.02)
        assert step.chance == pytest.approx((weight - floor) / (1.0 - floor))
        assert all(unit.weight == step.chance for unit in taken)
        floor = weight


# Going on


def test_units_are_counted_as_they_begin_once_and_before_they_are_ripe() -> None:
    book = Book(PLAN, STEP)
    for at, name, assigned, weight in ((10_000, "a", "v1", 0.9), (10_050, "b", "v2", 0.1), (10_400, "c", "v1", 0.9)):
        book.add(outcome(at, name, assigned=assigned, weight=weight))
    book.add(outcome(10_060, "d", assigned="v9"))  # takes no part
    assert book.begun(10_000 + PLAN.window_ms) == (0, 0), "what began a window ago may still be told of"
    assert book.begun(10_100 + PLAN.window_ms) == (1, 1)
    assert book.begun(10_100 + PLAN.window_ms) == (0, 0)
    book.add(outcome(10_200, "a"))
    assert book.begun(10**9) == (0, 1)


def test_a_step_that_is_left_and_gone_on_with_counts_every_unit_once() -> None:
    rows = [outcome(10_000 + 100 * i, f"e{i % 7}", id=f"d{i:06}") for i in range(30)]
    rows += [outcome(10_000 + 90 * i, f"d{900 + i}", id=f"d{900 + i}", episode="") for i in range(30)]
    rows.sort(key=lambda row: row.at_ms)
    whole = Book(PLAN, STEP)
    for row in rows:
        whole.add(row)
    expected = whole.begun(10**9), [unit.order for unit in whole.ripe(10**9)]
    for cut in range(10_000, 15_000, 250):
        first = Book(PLAN, STEP)
        for row in rows:
            if row.at_ms < cut:
                first.add(row)
        begun, taken = first.begun(cut), [unit.order for unit in first.ripe(cut)]
        known = first.take_through()
        assert known == {name: seen for name, seen in first.known.items() if name not in first}
        second = Book(PLAN, STEP, known=known, begun_ms=cut, ripe_ms=cut)
        for row in rows:  # from the beginning, as from any place before the oldest that is open
            second.add(row)
        more = second.begun(10**9)
        taken += [unit.order for unit in second.ripe(10**9)]
        assert ((begun[0] + more[0], begun[1] + more[1]), sorted(taken)) == (expected[0], sorted(expected[1]))
