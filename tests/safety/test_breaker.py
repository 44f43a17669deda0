"""The breaker: tables and page agree, calls are counted as the design says, and it closes only as it may."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import safety
from safety.breaker import (
    BASELINE_CALLS,
    BASELINE_FRESH_S,
    FAULTS,
    FAULTY,
    IN_A_ROW,
    INSTEAD,
    LATENCY,
    LATENCY_WINDOW,
    LONGEST_PAUSE_S,
    PAUSE_S,
    PROBE_EVERY,
    PROBES,
    SLOW,
    WINDOW,
    Action,
    Breaker,
    Counts,
    FaultEvent,
    Faults,
    Latency,
    LatencyEvent,
    Role,
    diagram,
    step,
    who,
)

PAGE = (Path(safety.__file__).parent.parent / "docs" / "breaker.md").read_text()


def calls(breaker: Breaker, count: int, *, fault: bool = False, slow: bool = False, now_s: float = 0.0) -> Action:
    """Give what the last of `count` calls asked for."""
    action = Action.NONE
    for _ in range(count):
        action = breaker.observe(now_s, fault=fault, slow=slow)
    return action


def baseline(breaker: Breaker, count: int = BASELINE_CALLS, *, slow: bool = False, now_s: float = 0.0) -> None:
    for _ in range(count):
        breaker.observe_baseline(now_s, slow=slow)


def paced(breaker: Breaker) -> Latency:
    return breaker.latency


def opened(now_s: float = 0.0) -> Breaker:
    breaker = Breaker()
    calls(breaker, SLOW, slow=True, now_s=now_s)
    baseline(breaker, now_s=now_s)
    assert paced(breaker) is Latency.OPEN
    return breaker


# -- tables and page


def test_the_page_shows_the_tables() -> None:
    drawn = re.findall(r"```mermaid\n(stateDiagram.*?)\n```", PAGE, re.DOTALL)
    assert drawn == [diagram(FAULTS, Faults.CLOSED), diagram(LATENCY, Latency.CLOSED)]


def test_the_page_shows_who_answers() -> None:
    shown = re.findall(r"^\| `(champion|challenger|baseline)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert shown == [
        (role, ", ".join(f"`{each}`" for each in (*INSTEAD[role], "fallback")))
        for role in ("champion", "challenger", "baseline")
    ]


def test_the_page_and_the_events_name_the_numbers_in_force() -> None:
    shown = dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d.]+) \|", PAGE, re.MULTILINE))
    numbers = {name: value for name, value in vars(safety.breaker).items() if name in shown}
    assert {name: float(value) for name, value in shown.items()} == numbers
    assert len(shown) == 12
    assert str(IN_A_ROW) in FaultEvent.LIMIT
    assert f"{FAULTY} of the last {WINDOW}" in FaultEvent.LIMIT
    assert f"{100 * SLOW // LATENCY_WINDOW} % of the last {LATENCY_WINDOW}" in LatencyEvent.SLOW
    assert f"{PROBES} probes" in LatencyEvent.PROBES_FAST


@pytest.mark.parametrize(("state", "event"), list(itertools.product(Faults, FaultEvent)))
def test_every_fault_event_meets_every_state(state: Faults, event: FaultEvent) -> None:
    assert step(FAULTS, state, event) == FAULTS[state, event]


@pytest.mark.parametrize(("state", "event"), list(itertools.product(Latency, LatencyEvent)))
def test_a_pair_outside_the_table_raises(state: Latency, event: LatencyEvent) -> None:
    if (state, event) in LATENCY:
        assert step(LATENCY, state, event) == LATENCY[state, event]
    else:
        with pytest.raises(ValueError, match=f"{state.value} cannot meet"):
            step(LATENCY, state, event)


# -- who answers


@pytest.mark.parametrize("assigned", list(INSTEAD))
@given(able=st.frozensets(st.sampled_from(["champion", "challenger", "baseline"])))
def test_the_first_that_is_able_answers_and_a_challenger_answers_for_nobody(
    assigned: Role, able: frozenset[Role]
) -> None:
    answer = who(assigned, able)
    assert answer == "fallback" or answer in able
    assert answer == assigned or assigned not in able
    assert answer == assigned or answer != "challenger"
    if not able:
        assert answer == "fallback"


def test_champion_open_is_the_baseline_and_baseline_open_the_fallback() -> None:
    assert who("champion", {"baseline"}) == "baseline"
    assert who("champion", {"challenger"}) == "fallback"
    assert who("challenger", {"champion", "baseline"}) == "champion"
    assert who("baseline", {"champion"}) == "fallback"


# -- faults


def test_five_faulty_calls_in_a_row_trip_at_once_and_only_an_operator_closes() -> None:
    breaker = Breaker()
    assert calls(breaker, IN_A_ROW - 1, fault=True) is Action.NONE
    assert breaker.admits(0.0)
    assert calls(breaker, 1, fault=True) is Action.PUBLISH
    assert not breaker.admits(0.0)
    assert calls(breaker, 1, fault=True) is Action.NONE, "published once"
    calls(breaker, 5_000)
    assert not breaker.admits(1e9)
    breaker.rearm()
    assert breaker.admits(1e9)
    assert breaker.counts == Counts(Faults.CLOSED, Latency.CLOSED, 0, 0)
    assert calls(breaker, IN_A_ROW - 1, fault=True) is Action.NONE, "counted anew"


def test_a_good_call_breaks_the_row() -> None:
    breaker = Breaker()
    for _ in range(2):
        calls(breaker, IN_A_ROW - 1, fault=True)
        calls(breaker, 1)
    assert breaker.faults is Faults.CLOSED


@given(st.lists(st.integers(0, 300), min_size=1, max_size=25))
def test_it_trips_with_the_first_call_that_makes_ten_faulty_of_the_last_thousand_or_five_in_a_row(
    gaps: list[int],
) -> None:
    breaker = Breaker()
    history: list[bool] = []
    for gap in gaps:
        for fault in [False] * gap + [True]:
            history.append(fault)
            calls(breaker, 1, fault=fault)
            by_definition = sum(history[-WINDOW:]) >= 10 or history[-5:] == [True] * 5
            assert breaker.counts.faulty == min(10, sum(history[-WINDOW:]))
            assert (breaker.faults is Faults.OPEN) == by_definition
            if by_definition:
                return


@pytest.mark.parametrize(("last", "state"), [(WINDOW, Faults.OPEN), (WINDOW + 1, Faults.CLOSED)])
def test_the_window_is_a_thousand_calls_and_not_one_more(last: int, state: Faults) -> None:
    breaker = Breaker()
    for number in range(1, last + 1):
        calls(breaker, 1, fault=number == last or (number % 2 == 1 and number < 2 * FAULTY - 2))
    assert breaker.faults is state


def test_a_trip_elsewhere_opens_here_and_is_kept_over_a_restart() -> None:
    breaker = Breaker()
    breaker.trip()
    breaker.trip()
    assert not breaker.admits(0.0)
    assert not Breaker(open=True).admits(0.0)


# -- latency


def test_it_opens_when_a_tenth_is_slow_and_the_baseline_keeps_its_budget() -> None:
    breaker = Breaker()
    baseline(breaker)
    calls(breaker, LATENCY_WINDOW)
    assert calls(breaker, SLOW - 1, slow=True) is Action.NONE
    assert breaker.admits(0.0)
    calls(breaker, 1, slow=True)
    assert not breaker.admits(0.0)


def test_it_does_not_open_while_the_baseline_is_slow_too() -> None:
    breaker = Breaker()
    for _ in range(5):
        calls(breaker, SLOW, slow=True)
        baseline(breaker, slow=True)
        assert paced(breaker) is Latency.CLOSED
        assert breaker.admits(0.0)
    assert breaker.counts.slow == 0, "counted anew"


def test_without_fresh_calls_of_the_baseline_it_asks_for_some() -> None:
    breaker = Breaker()
    baseline(breaker, now_s=0.0)
    now_s = BASELINE_FRESH_S + 1.0
    assert calls(breaker, SLOW, slow=True, now_s=now_s) is Action.TIME_BASELINE
    assert breaker.wants_baseline
    assert breaker.admits(now_s), "a suspect still answers"
    baseline(breaker, BASELINE_CALLS - 1, now_s=now_s)
    assert paced(breaker) is Latency.SUSPECT
    baseline(breaker, 1, now_s=now_s)
    assert paced(breaker) is Latency.OPEN


def test_a_suspect_that_is_fast_again_is_none() -> None:
    breaker = Breaker()
    calls(breaker, SLOW, slow=True)
    calls(breaker, LATENCY_WINDOW - SLOW)
    assert paced(breaker) is Latency.SUSPECT
    calls(breaker, 1)
    assert paced(breaker) is Latency.CLOSED


def test_it_closes_by_probing_one_call_in_ten() -> None:
    breaker = opened()
    assert not breaker.admits(PAUSE_S - 0.001)
    asked = [breaker.admits(PAUSE_S) for _ in range(10 * PROBE_EVERY)]
    assert sum(asked) == 10
    calls(breaker, PROBES - 1, now_s=PAUSE_S)
    assert paced(breaker) is Latency.PROBING
    calls(breaker, 1, now_s=PAUSE_S)
    assert paced(breaker) is Latency.CLOSED
    assert breaker.admits(PAUSE_S)


def test_slow_probes_open_it_again_for_twice_as_long_up_to_a_bound() -> None:
    breaker, now_s, pause_s = opened(), 0.0, PAUSE_S
    for _ in range(8):
        assert not breaker.admits(now_s + pause_s - 0.001)
        now_s += pause_s
        breaker.admits(now_s)
        assert paced(breaker) is Latency.PROBING
        calls(breaker, 2, slow=True, now_s=now_s)
        assert paced(breaker) is Latency.OPEN
        pause_s = min(2.0 * pause_s, LONGEST_PAUSE_S)
    now_s += pause_s
    breaker.admits(now_s)
    calls(breaker, PROBES, now_s=now_s)
    assert paced(breaker) is Latency.CLOSED
    calls(breaker, SLOW, slow=True, now_s=now_s)
    baseline(breaker, now_s=now_s)
    assert not breaker.admits(now_s + PAUSE_S - 0.001)
    assert not breaker.admits(now_s + PAUSE_S)  # the first of ten
    assert paced(breaker) is Latency.PROBING, "the pause starts anew"


def test_calls_under_way_when_it_opened_count_for_nothing() -> None:
    breaker = opened()
    assert calls(breaker, 50, slow=True) is Action.NONE
    assert breaker.counts.slow == 0


@pytest.mark.parametrize("state", list(Latency))
def test_an_operator_closes_it_from_every_state(state: Latency) -> None:
    breaker = Breaker()
    if state is Latency.SUSPECT:
        calls(breaker, SLOW, slow=True)
    if state in (Latency.OPEN, Latency.PROBING):
        breaker = opened()
        breaker.admits(PAUSE_S if state is Latency.PROBING else 0.0)
    assert paced(breaker) is state
    breaker.rearm()
    assert paced(breaker) is Latency.CLOSED
    assert breaker.admits(0.0)


def test_a_fault_that_trips_outranks_a_slow_call() -> None:
    breaker = Breaker()
    calls(breaker, SLOW - 1, slow=True)
    for _ in range(IN_A_ROW - 1):
        breaker.observe(0.0, fault=True, slow=False)
    assert breaker.observe(0.0, fault=True, slow=True) is Action.PUBLISH
    assert breaker.wants_baseline
