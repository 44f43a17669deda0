"""Limits, pasts and portions, apart from Redis: what rules become, and that no window holds more than it may."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import SafetyError, UnknownAction
from policies.types import Box, Choices
from safety.limits import Entry, Limit, LimitSet, bind, whole
from safety.local import LocalLimits
from safety.past import EXACT, UNKNOWN, Charges, Past, Pasts
from safety.places import Ask, Places, Use
from safety.rules import Cooldown, Cost, Forbid, MaxStep, Rate, Rule

SPACE = Choices((("hold", "up", "down"),))
FACTORS = Choices((("n", "s"), ("hold", "up", "down")), ("way", "size"))


def one(rule: Rule, space: Choices = SPACE) -> Limit:
    (limit,) = bind([rule], space).all
    return limit


def rate(limit: int = 2, window_s: float = 1.0, actions: tuple[str, ...] = ("up",), **more: object) -> Limit:
    return one(Rate(name="r", actions=list(actions), limit=limit, window_s=window_s, **more))  # type: ignore[arg-type]


# What rules become


def test_each_rule_becomes_what_a_choice_needs_and_what_it_takes() -> None:
    limit = rate(actions=("up", "down"))
    assert (limit.need.tolist(), limit.charges, limit.cap, limit.window_ms) == ([0, 1, 1], (0, 1, 1), 2, 1_000)
    limit = one(Cost(name="c", costs={"up": 0.25, "down": 1.5}, cap=3, window_s=60))
    assert (limit.need.tolist(), limit.charges, limit.cap, limit.quantum) == ([0, 25, 150], (0, 25, 150), 300, 150)
    limit = one(Cooldown(name="c", actions=["up"], seconds=0.0001))
    assert (limit.need.tolist(), limit.charges, limit.cap, limit.window_ms) == ([0, 1, 0], (0, 1, 0), 1, 1)
    limit = one(Cooldown(name="c", actions=["up"], after=["down", 0], seconds=5))
    assert (limit.need.tolist(), limit.charges, limit.cap) == ([0, 1, 0], (1, 0, 1), 1)
    assert limit.levels == ((0, 1), (1, 0))


def test_a_rule_about_one_factor_leaves_the_others_alone() -> None:
    limit = one(Rate(name="r", actions=["up"], limit=1, window_s=1, factor="size"), FACTORS)
    assert limit.need.tolist() == [0, 0, 0, 1, 0]
    assert (limit.charge((1, 1)), limit.charge((1, 0)), limit.charge(None)) == (1, 0, 0)
    assert limit.allow([0, 1]).allowed.tolist() == [[True, True, True, False, True], [True] * 5]
    possible = np.array([[True, True, True, False, True], [True] * 5])
    assert limit.entries([None, (0, 1)], possible) == [Entry(0, ()), Entry(1, None)]
    with pytest.raises(SafetyError):
        one(Rate(name="r", actions=["up"], limit=1, window_s=1), FACTORS)
    with pytest.raises(UnknownAction):
        rate(actions=("sideways",))


def test_who_keeps_a_limit() -> None:
    def made(kind: type[Rate] | type[Cooldown], **more: object) -> Limit:
        rest = {"limit": 1, "window_s": 1.0} if kind is Rate else {"seconds": 1.0}
        return one(kind(name="r", actions=["up"], **rest, **more))  # type: ignore[arg-type]

    assert made(Rate).keeper == "redis"
    assert made(Rate, scope="local").keeper == "local"
    assert made(Rate, per="policy").keeper == "leased"
    assert made(Rate, per="policy", scope="strict").keeper == "redis"
    assert made(Cooldown, per="policy").keeper == "leased"
    # What it counts is not masked, so every replica must hear of it before it goes on.
    assert made(Cooldown, per="policy", after=["down"]).keeper == "redis"


def test_a_set_of_limits_says_who_waits_for_redis() -> None:
    rules: list[Rule] = [
        Rate(name="a", actions=["up"], limit=1, window_s=1, scope="local"),
        Rate(name="b", actions=["up"], limit=1, window_s=1, per="policy"),
        Forbid(name="f", when="true"),
    ]
    limits = bind(rules, SPACE)
    assert [each.name for each in limits.all] == ["a", "b"]
    assert ([each.name for each in limits.local], [each.name for each in limits.leased]) == (["a"], ["b"])
    assert not limits.asks_redis
    assert limits.by_key
    assert not bind(rules[1:], SPACE).by_key
    step = MaxStep(name="s", limit=1, scope="local")
    assert bind([step], Box((0.0,), (1.0,))) == LimitSet(remembers="local")
    both = bind([step, MaxStep(name="t", limit=2)], SPACE)
    assert both.remembers == "shared"
    assert both.asks_redis


def test_costs_are_counted_in_units_of_the_last_decimal_written() -> None:
    assert whole({"up": 0.1}, 1.0) == ({"up": 1}, 10, 1)  # ten times, although 0.1 + … + 0.1 is not 1 in floats
    assert whole({"up": 3.0}, 12) == ({"up": 3}, 12, 0)
    units, cap, decimals = whole({"up": 1 / 3, "down": 0.5}, math.pi)
    assert decimals == 9
    assert units == {"up": 333_333_334, "down": 500_000_000}  # up
    assert cap == 3_141_592_653  # and down
    for costs, cap_ in (({"up": 2.0**53}, 1.0), ({"up": 0.1}, 2.0**52), ({"up": 1e300}, 1e308)):
        with pytest.raises(OverflowError):
            whole(costs, cap_)


def test_the_worst_is_the_dearest_that_fits_or_that_no_mask_keeps_away() -> None:
    limit = one(Cost(name="c", costs={"up": 2, "down": 5}, cap=10, window_s=60))
    assert [limit.worst(room, Entry()) for room in (10, 4, 1, -1)] == [5, 2, 0, 0]
    assert limit.worst(10, Entry(0, (0,))) == 2
    assert limit.worst(1, Entry(5)) == 5
    assert limit.entries([(2,), None], None) == [Entry(5), Entry(0)]
    after = one(Cooldown(name="c", actions=["up"], after=["down"], seconds=5))
    assert after.worst(0, Entry()) == 1


# Pasts


def test_charges_leave_their_window_and_the_oldest_that_matter_no_more() -> None:
    charges = Charges(window_ms=1_000, cap=2)
    for at in (100, 300, 200):
        charges.add(at, 1)
    assert (charges.times, charges.total) == ([200, 300], 2)  # two fill the cap without the oldest
    charges.forget(1_200)
    assert charges.total == 2  # a time rounded down may be a millisecond late
    charges.forget(1_201)
    assert (charges.times, charges.total) == ([300], 1)
    charges.add(1_000, 7)
    assert (charges.times, charges.total) == ([1_000], 7)


def test_many_charges_share_entries_and_are_never_forgotten_early() -> None:
    charges = Charges(window_ms=10_240, cap=10**6)
    for at in range(0, 10_240):
        charges.add(at, 1)
    assert len(charges.times) <= EXACT + 1_025
    assert charges.total == 10_240
    for now in range(10_240, 20_482, 97):
        charges.forget(now)
        within = sum(at + 10_240 >= now for at in range(10_240))
        assert within <= charges.total <= within + 10


def test_what_is_held_counts_until_it_is_settled_and_longer_if_nobody_settles() -> None:
    past, limit = Past(), rate()
    assert past.room(limit, 0) == 2
    assert past.hold("a", 500, {"r": 1}, remembers=True) == 1
    assert past.hold("b", 500, {"r": 1}, remembers=True) == 2
    assert past.room(limit, 0) == 0
    assert past.previous() == UNKNOWN
    past.settle("a", 100, {}, 1, "0")
    assert past.room(limit, 100) == 1
    past.turn(500)
    assert past.room(limit, 500) == 1  # b is charged, at the latest it may have been
    assert past.previous() == UNKNOWN
    past.settle("b", 600, {}, 2, "2")  # it tells after all what it was
    assert past.previous() == "2"
    past.turn(1_501)
    assert past.room(limit, 1_501) == 2
    assert past.hold("c", 2_000, {}, remembers=False) == 0
    assert not past.holds


def test_executions_of_a_key_are_ordered_by_their_reservations() -> None:
    past = Past()
    first, second = past.hold("a", 500, {}, remembers=True), past.hold("b", 500, {}, remembers=True)
    past.settle("b", 10, {}, second, "2")
    past.settle("a", 20, {}, first, "1")
    assert past.previous() == "2"
    past.hold("c", 30, {}, remembers=True)
    past.hold("d", 900, {}, remembers=True)
    past.settle("d", 25, {}, 4, "1")
    past.turn(30)
    assert past.previous() == "1"  # nobody told what c was, but d came after it


def test_a_rule_that_is_changed_keeps_its_count() -> None:
    past = Past()
    past.settle("a", 0, {rate(window_s=10): 1}, 0, "")
    past.settle("b", 4_000, {rate(window_s=10): 1}, 0, "")
    assert past.room(rate(limit=5, window_s=10), 5_000) == 3
    assert past.room(rate(limit=5, window_s=2), 5_000) == 4


@dataclass
class Judge:
    """Everything executed under a limit, and the largest sum in any window, by brute force."""

    window_ms: int
    done: list[tuple[int, int]] = field(default_factory=list)

    def most(self) -> int:
        sums = [
            sum(amount for at, amount in self.done if start <= at < start + self.window_ms) for start, _ in self.done
        ]
        return max(sums, default=0)


deeds = st.lists(
    st.tuples(st.sampled_from(["reserve", "settle", "forget", "tick"]), st.integers(0, 2), st.integers(0, 700)),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(deeds, st.integers(1, 4))
def test_whatever_is_settled_late_or_never_no_window_passes_the_cap(
    schedule: list[tuple[str, int, int]], cap: int
) -> None:
    limit = one(Cost(name="c", costs={"up": 1, "down": 2}, cap=cap, window_s=1))
    past, judge, now, held = Past(), Judge(1_000), 0, list[tuple[str, int, bool]]()
    for number, (deed, choice, ms) in enumerate(schedule):
        past.turn(now)
        if deed == "reserve":
            room = past.room(limit, now)
            past.hold(str(number), now + 500, {"c:0": limit.worst(room, Entry())}, remembers=False)
            held.append((str(number), now + 500, room >= limit.charges[choice]))
        elif deed in ("settle", "forget") and held:
            name, until, fits = held.pop(choice % len(held))
            amount = limit.charges[choice] if fits and now < until else 0
            fits_now = amount <= past.holds[name].amounts["c:0"] if name in past.holds else False
            amount = amount if fits_now else 0
            judge.done.append((now, amount))
            if deed == "settle":
                past.settle(name, now, {limit: amount} if amount else {}, 0, "")
        else:
            now += ms
    assert judge.most() <= cap


def test_memory_for_keys_is_bounded_and_who_finds_no_room_is_not_known() -> None:
    pasts = Pasts(capacity=2, lasts_ms=1_000)
    a, b = pasts.of("a", 0), pasts.of("b", 1)
    assert a is not None
    assert b is not None
    a.settle("x", 0, {}, 0, "1")
    assert pasts.of("c", 900) is None
    assert len(pasts) == 2
    assert pasts.of("a", 900) is a
    c = pasts.of("c", 1_001)  # b has done nothing that would still matter
    assert c is not None
    assert c.previous() == ""
    d = pasts.of("d", 1_901)  # a's last action is forgotten with it
    assert d is not None
    assert d.previous() == UNKNOWN
    pasts.missed(2_000)
    assert pasts.of("e", 2_999) is None
    assert pasts.of("d", 2_999) is d
    assert pasts.of("e", 3_000) is not None


# Here alone


def local(*rules: Rule, capacity: int = 10) -> tuple[LocalLimits, LimitSet]:
    limits = bind(rules, SPACE)
    made = LocalLimits(capacity, hold_ms=500)
    made.configure(limits)
    return made, limits


def test_local_limits_count_by_key_and_by_policy() -> None:
    by_key = Rate(name="k", actions=["up"], limit=1, window_s=1, scope="local")
    by_policy = Rate(name="p", actions=["up"], limit=2, window_s=1, per="policy", scope="local")
    here, limits = local(by_key, by_policy, MaxStep(name="s", limit=1, scope="local"))
    entries = {"k": Entry(), "p": Entry()}

    def rooms(name: str, key: str | None, now: int) -> tuple[int, int, str]:
        room = here.reserve(limits, name, key, entries, now)
        here.settle(limits, name, key, room.order, (1,), "1", now)
        return room.rooms["k"], room.rooms["p"], room.previous

    assert rooms("1", "a", 0) == (1, 2, "")
    assert rooms("2", "a", 1) == (0, 1, "1")
    assert rooms("3", "b", 2) == (1, 0, "")
    assert rooms("4", None, 3) == (-1, 0, UNKNOWN)
    assert rooms("5", "a", 1_010) == (1, 2, "1")
    assert len(here) == 2


def test_local_limits_without_room_for_a_key_deny_it_and_what_follows() -> None:
    here, limits = local(Rate(name="k", actions=["up"], limit=1, window_s=1, scope="local"), capacity=1)
    entries = {"k": Entry()}
    assert here.reserve(limits, "1", "a", entries, 0).rooms == {"k": 1}
    assert here.reserve(limits, "2", "b", entries, 1).rooms == {"k": -1}
    here.settle(limits, "2", "b", 0, None, "", 1)  # nothing was executed
    assert here.reserve(limits, "3", "b", entries, 1_500).rooms == {"k": 1}
    assert here.reserve(limits, "4", "c", entries, 1_501).rooms == {"k": -1}
    here.settle(limits, "4", "c", 0, (1,), "1", 1_501)  # as a fallback would
    assert here.reserve(limits, "5", "c", entries, 3_000).rooms == {"k": -1}
    assert here.reserve(limits, "6", "c", entries, 3_001).rooms == {"k": 1}


def test_without_local_limits_nothing_is_kept() -> None:
    here, limits = local(Rate(name="p", actions=["up"], limit=1, window_s=1, per="policy", scope="local"))
    assert here.reserve(limits, "1", "a", {"p": Entry()}, 0).rooms == {"p": 1}
    assert len(here) == 0
    nothing, none = local()
    assert nothing.reserve(none, "1", "a", {}, 0).rooms == {}
    nothing.settle(none, "1", "a", 0, (1,), "1", 0)
    assert len(nothing) == 0


# Portions


def places(limit: int = 10, held: int = 3) -> Places:
    made = Places(rate(limit, per="policy"))
    _, ask = made.ask(0.0)
    made.granted(ask, held, None, 0.0, 2.0)
    return made


def test_a_portion_is_used_place_by_place_while_its_lease_lasts() -> None:
    mine = Places(rate(10, per="policy"))
    assert mine.reserve("0", Entry(), 0.0, 1.0) == 0
    assert mine.short
    mine = places()
    assert [mine.reserve(str(n), Entry(), 0.5, 1.5) for n in range(4)] == [3, 2, 1, 0]
    assert (mine.reserved, mine.short) == (3, True)
    mine.settle("0", 1)
    mine.settle("1", 0)
    mine.settle("3", 0)
    assert (mine.held, mine.reserved, mine.room(0.6)) == (2, 1, 1)
    assert mine.room(2.0) == 0  # the lease is over; what was not settled in time counts as used
    assert (mine.held, mine.reserved) == (1, 0)
    use, ask = mine.ask(2.0)
    assert use == Use(covered=2, beyond=0)
    assert ask == Ask(held=0, wanted=1 + 2 * (2 + 1))  # two used, one refused


def test_what_no_rule_masks_is_used_beyond_what_is_held() -> None:
    mine = places(held=1)
    assert mine.reserve("a", Entry(least=1), 0.0, 1.0) == 1
    assert mine.reserve("b", Entry(least=1), 0.0, 1.0) == 0
    mine.settle("a", 1)
    mine.settle("b", 1)
    assert mine.ask(0.1)[0] == Use(covered=1, beyond=1)


def test_what_is_not_wanted_or_others_wait_for_goes_back() -> None:
    mine = places(held=8)
    _, ask = mine.ask(0.5)
    assert ask == Ask(held=1, wanted=0)
    mine = places(held=8)
    for n in range(6):
        mine.reserve(str(n), Entry(), 0.1, 1.0)
        mine.settle(str(n), int(n < 3))
    _, ask = mine.ask(0.5)
    assert ask == Ask(held=5, wanted=2)
    mine.reserve("x", Entry(), 0.5, 1.0)
    mine.settle("x", 1)  # while Redis thinks
    mine.granted(ask, 6, 1, 0.5, 2.0)
    assert mine.held == 5
    assert mine.reserve("y", Entry(), 0.6, 1.0) == 5
    use, ask = mine.ask(0.7)
    assert use == Use(1, 0)
    assert ask.held == 1  # its share; what a row holds is kept in any case
    use, ask = mine.ask(0.8, closing=True)
    assert (use, ask) == (Use(0, 0), Ask(1, 0))
    mine.settle("y", 0)
    assert mine.ask(0.9, closing=True)[1] == Ask(0, 0)
