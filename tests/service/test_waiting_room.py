"""Who is admitted, who waits, who is sent away: each exactly once, in the right order, and never too late."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.waiting_room import CALM, PATIENCE, YIELD, Reason, WaitingRoom


@dataclass(eq=False)
class Guest:
    name: int
    came_s: float = 0.0
    deadline_s: float = 1.0
    low: bool = False
    size: int = 0


def enter(room: WaitingRoom[Guest], guest: Guest) -> bool:
    return room.enter(guest, guest.came_s, guest.deadline_s, size=guest.size, low=guest.low)


def admitted(room: WaitingRoom[Guest], now_s: float) -> list[int]:
    """All that may enter now."""
    found = []
    while (guest := room.admit(now_s)) is not None:
        found.append(guest.name)
    return found


def names(sent_away: list[tuple[Guest, Reason]]) -> list[int]:
    return [guest.name for guest, _ in sent_away]


def test_below_the_limit_everybody_is_admitted_and_above_it_waits() -> None:
    room: WaitingRoom[Guest] = WaitingRoom(2)
    assert [enter(room, Guest(i)) for i in range(4)] == [True, True, False, False]
    assert room.statistics() == {"limit": 2, "inside": 2, "waiting": 2, "bytes": 0}
    assert admitted(room, 0.1) == []
    room.leave()
    assert not room.open, "who waits comes first"
    assert not enter(room, Guest(9, 0.1))
    assert admitted(room, 0.1) == [2]


def test_first_come_is_first_served_while_all_can_be_and_newest_first_when_not() -> None:
    room: WaitingRoom[Guest] = WaitingRoom(0)
    for i in range(6):
        enter(room, Guest(i, came_s=0.01 * i, deadline_s=1.0 + 0.01 * i))
    room.limit = 2
    assert admitted(room, 0.2) == [0, 1]
    room.leave(2)
    assert (room.pressed(0.02 + CALM - 0.001), room.pressed(0.02 + CALM)) == (False, True)
    assert admitted(room, 0.02 + PATIENCE) == [5, 4]
    room.leave(2)
    assert admitted(room, 1.025) == [3], "the other one's deadline is past"
    assert names(room.send_away(1.025)) == [2]
    assert len(room) == 0


def test_nobody_is_admitted_at_a_deadline_and_everybody_is_told() -> None:
    room: WaitingRoom[Guest] = WaitingRoom(1)
    assert not enter(room, Guest(0, came_s=2.0, deadline_s=2.0))
    assert room.next_deadline_s == 2.0
    assert names(room.send_away(2.0)) == [0]
    assert room.next_deadline_s is None
    assert enter(room, Guest(1, came_s=2.0, deadline_s=3.0))


def test_low_rank_comes_when_no_other_waits() -> None:
    room: WaitingRoom[Guest] = WaitingRoom(0)
    for i, low in enumerate((True, False, True, False)):
        enter(room, Guest(i, low=low))
    room.limit = 9
    assert admitted(room, 0.0) == [1, 3, 0, 2]


def test_low_rank_is_given_up_at_half_of_its_time_while_others_wait() -> None:
    room: WaitingRoom[Guest] = WaitingRoom(0)
    for i, (came_s, low) in enumerate([(0.0, True), (0.1, True), (0.1, False)]):
        enter(room, Guest(i, came_s, came_s + 1.0, low))
    assert room.send_away(YIELD - 0.01) == []
    assert [(guest.name, reason) for guest, reason in room.send_away(YIELD)] == [(0, "outranked")]
    room.limit = 1
    assert admitted(room, YIELD) == [2]
    assert room.send_away(1.0) == [], "nobody else waits"
    assert [(guest.name, reason) for guest, reason in room.send_away(1.1)] == [(1, "expired")]


def test_work_that_turns_out_larger_counts() -> None:
    room: WaitingRoom[Guest] = WaitingRoom(10)
    assert enter(room, Guest(0))
    room.grow(63)
    assert not enter(room, Guest(1))
    room.leave(64)
    assert admitted(room, 0.0) == [1]


def test_too_many_bytes_push_out_low_rank_and_then_the_oldest() -> None:
    room: WaitingRoom[Guest] = WaitingRoom(0, most_bytes=10)
    for i, low in enumerate((False, False, True, False)):
        enter(room, Guest(i, low=low, size=3))
    assert room.next_deadline_s == 0.0, "at once"
    assert names(room.send_away(0.0)) == [2]
    enter(room, Guest(4, size=9))
    assert names(room.send_away(0.0)) == [0, 1, 3]
    assert room.statistics() == {"limit": 0, "inside": 0, "waiting": 1, "bytes": 9}


def test_who_leaves_is_forgotten() -> None:
    room: WaitingRoom[Guest] = WaitingRoom(0)
    here, gone = Guest(0), Guest(1, deadline_s=0.5)
    enter(room, gone)
    enter(room, here)
    assert (room.withdraw(gone), room.withdraw(gone), room.withdraw(Guest(2))) == (True, False, False)
    assert room.next_deadline_s == 1.0, "of who stays"
    room.limit = 5
    assert admitted(room, 0.0) == [0]
    assert room.send_away(9.0) == []
    assert not room.withdraw(here)


class Visits(RuleBasedStateMachine):
    """Guests come, go and run out of time in any order: each has one fate, and the rule says whose turn it is."""

    def __init__(self) -> None:
        super().__init__()
        self.room: WaitingRoom[Guest] = WaitingRoom(1, most_bytes=8)
        self.now_s = 0.0
        self.came = 0
        self.waiting: list[Guest] = []
        self.fates: dict[int, str] = {}

    @rule(time_s=st.floats(0.0, 2.0), low=st.booleans())
    def come(self, time_s: float, low: bool) -> None:
        guest = Guest(self.came, self.now_s, self.now_s + time_s, low, size=1)
        self.came += 1
        nobody_waits = {*self.waiting} == {guest for guest, _ in self.room._away}
        if enter(self.room, guest):
            assert nobody_waits
            self.fates[guest.name] = "admitted"
        else:
            self.waiting.append(guest)

    @rule(units=st.integers(1, 3))
    def leave(self, units: int) -> None:
        self.room.leave(min(units, self.room.inside))

    @rule(limit=st.integers(0, 4))
    def limit(self, limit: int) -> None:
        self.room.limit = limit

    @rule(seconds=st.floats(0.0, 0.7))
    def later(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(at=st.integers(0, 8))
    def withdraw(self, at: int) -> None:
        for guest in self.waiting[at : at + 1]:
            if self.room.withdraw(guest):
                self.note(guest, "withdrawn")

    @rule()
    def expire(self) -> None:
        crowd = len(self.waiting)
        for guest, reason in self.room.send_away(self.now_s):
            assert reason != "expired" or guest.deadline_s <= self.now_s
            assert reason != "full" or crowd > 8
            assert reason != "outranked" or guest.low
            self.note(guest, reason)

    @rule()
    def admit(self) -> None:
        while (guest := self.room.admit(self.now_s)) is not None:
            assert guest is self.next()
            self.note(guest, "admitted")

    def next(self) -> Guest:
        """Whose turn it is: of those who still have time."""
        pushed_out = {guest for guest, _ in self.room._away}
        waiting = [each for each in self.waiting if each not in pushed_out]
        rank = [each for each in waiting if not each.low] or waiting
        in_time = [each for each in rank if each.deadline_s > self.now_s]
        oldest = rank[0]
        late = self.now_s - oldest.came_s >= PATIENCE * (oldest.deadline_s - oldest.came_s)
        return in_time[-1] if late else in_time[0]

    def note(self, guest: Guest, fate: str) -> None:
        assert guest.name not in self.fates, "twice"
        self.fates[guest.name] = fate
        self.waiting.remove(guest)

    @invariant()
    def nobody_is_lost(self) -> None:
        assert len(self.room) + len(self.room._away) == len(self.waiting)
        assert len(self.fates) + len(self.waiting) == self.came

    def teardown(self) -> None:
        for guest, reason in self.room.send_away(self.now_s + 10.0):
            self.note(guest, reason)
        assert (self.waiting, len(self.room), self.room.next_deadline_s) == ([], 0, None)


TestVisits = Visits.TestCase


def test_under_ten_times_the_load_the_newest_are_served_at_full_speed() -> None:
    """A server of 100 a second, 1,000 callers a second, who wait for a second: none of its work is in vain."""
    room: WaitingRoom[Guest] = WaitingRoom(1)
    served, refused, number = list[float](), 0, 0
    for tick in range(5_000):  # milliseconds
        now_s = tick / 1000
        if tick % 10 == 0 and room.inside:
            room.leave()
        guest = Guest(number, now_s, now_s + 1.0)
        number += 1
        if enter(room, guest):
            served.append(0.0)
        refused += len(room.send_away(now_s))
        while (turn := room.admit(now_s)) is not None:
            served.append(now_s - turn.came_s)
    assert len(served) == 500
    assert refused + len(served) + len(room) == number
    assert max(served) < 1.0
    assert sorted(served)[len(served) // 2] < PATIENCE
