"""The holder's side of a lease: its table, its time, and what it tells; the bank's answers are written by hand here.

`tests/service/test_lease_worlds.py` plays holders against the real bank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from safety.bank import TERM_S, Granted, Progress, Reply
from safety.budget import UNLIMITED, expected_price, prices, worst_price
from safety.burn import RUNNING, Bucket, BurnLimit, BurnState
from safety.burn import TABLE as BURN
from safety.exploration import MICRO, Exploration, parse_exploration
from safety.lease import RENEW_S, RETRY_S, TABLE, Event, Holder, StateName
from safety.pace import pace

CAPS = {
    "rate": {"limit": 100, "window_s": 60},
    "share": {"limit": 0.5, "window_s": 60},
    "regret": {"limit": 50, "window_s": 60},
}


def holder(**fields: Any) -> Holder:
    return Holder("h", parse_exploration(CAPS | fields), 1)


def reply(*purses: Granted, **fields: Any) -> Reply:
    known: dict[str, Any] = {"now_ms": 1_000_000, "fleet_rate": 0.0, "progress": Progress(), "burn": RUNNING}
    return Reply(purses=list(purses), buckets=fields.pop("buckets", []), **(known | fields))


def rate(ceiling: int, window: str = "w1", ends_ms: int = 60_000, pool: int = 0, closed: bool = False) -> Granted:
    return Granted("rate", window, ceiling, ends_ms, pool, 100.0, closed, 0)


def leased(*purses: Granted, at_s: float = 0.0, **fields: Any) -> Holder:
    mine = holder(**fields)
    mine.ask(at_s)
    mine.granted(reply(*purses))
    return mine


def explore(mine: Holder, now_s: float, rows: int = 1, price: float = 1.0) -> int:
    """Every row explores that may, and draws its worst action."""
    ones = np.ones(rows)
    settled = mine.allot(now_s, ones, ones * 0, ones * price, ones * price)
    mine.spend(settled, settled.allotted.reserved, ones * price)
    return settled.allotted.count


# The table


def test_every_state_is_reached_and_every_event_means_something() -> None:
    reached = {"lapsed"}
    for _ in TABLE:
        reached |= {after for (before, _), after in TABLE.items() if before in reached}
    assert reached == set(get_args(StateName))
    assert {event for _, event in TABLE} == set(get_args(Event))
    assert all(after != "released" for (before, _), after in TABLE.items() if before in ("asking", "renewing"))


def test_what_cannot_happen_raises() -> None:
    mine = holder()
    mine.ask(0.0)
    with pytest.raises(KeyError):
        mine.ask(0.1)
    with pytest.raises(KeyError):
        mine.release(0.1)
    mine.failed(0.2)
    with pytest.raises(KeyError):
        mine.granted(reply())


# Time


def test_a_term_runs_from_before_the_request_left() -> None:
    mine = holder()
    mine.ask(10.0)
    assert mine.state == "asking"
    mine.granted(reply(rate(5)))  # whenever the answer comes
    assert explore(mine, 10.0 + TERM_S - 0.001) == 1
    assert explore(mine, 10.0 + TERM_S) == 0
    assert (mine.state, mine.lapses) == ("lapsed", 1)


def test_a_lease_is_renewed_before_its_term_and_with_its_window() -> None:
    assert leased(rate(5), at_s=10.0).due_s == pytest.approx(10.0 + RENEW_S)
    assert leased(rate(5, ends_ms=300), at_s=10.0).due_s == pytest.approx(10.3)
    assert leased(rate(5), at_s=10.0, freeze=True).due_s == pytest.approx(10.0 + RENEW_S)


def test_a_lease_that_lapses_while_it_is_renewed_is_held_again_when_the_answer_comes() -> None:
    mine = leased(rate(5))
    mine.ask(1.9)
    assert [mine.standing(s).state for s in (1.95, 2.0)] == ["renewing", "asking"]
    assert explore(mine, 2.0) == 0
    mine.granted(reply(rate(5)))
    assert explore(mine, 2.1) == 1


def test_a_failure_is_tried_again_soon_and_takes_nothing_away() -> None:
    mine = leased(rate(5))
    mine.ask(0.7)
    mine.failed(1.0)
    assert (mine.state, mine.due_s) == ("held", 1.0 + RETRY_S)
    assert explore(mine, 1.9) == 1


def test_a_portion_ends_with_its_window_though_the_lease_goes_on() -> None:
    mine = leased(rate(5, ends_ms=1_000), Granted("share", "s1", 5, 60_000, 0, 0.5, False, 0))
    assert explore(mine, 0.999) == 1
    assert explore(mine, 1.0) == 0
    assert mine.standing(1.0).windows == {"share": "s1"}
    assert mine.state == "held"


# What is used


def test_each_kind_is_charged_and_what_was_not_used_comes_back() -> None:
    mine = leased(
        rate(5),
        Granted("share", "s1", 4, 60_000, 0, 0.5, False, 0),
        Granted("regret", "g1", 3 * MICRO, 60_000, 0, 50.0, False, 0),
    )
    ones = np.ones(10)
    settled = mine.allot(0.1, ones, ones * 0, ones, ones)
    assert (settled.epsilon > 0.0).tolist() == [True] * 3 + [False] * 7  # the worst action must fit
    assert settled.windows == {"rate": "w1", "share": "s1", "regret": "g1"}
    assert mine.standing(0.1).left.regret == 0
    mine.spend(settled, np.array([True, False, True] + [False] * 7), ones * 0.25)
    left = mine.standing(0.1).left
    assert (left.rate, left.share, left.regret) == (3, 2, 3 * MICRO - 500_000)


def test_what_comes_back_after_its_window_is_gone() -> None:
    mine = leased(rate(5))
    ones = np.ones(2)
    settled = mine.allot(0.1, ones, ones * 0, ones, ones)
    mine.ask(0.7)
    mine.granted(reply(rate(9, window="w2")))
    mine.spend(settled, np.zeros(2, np.bool_), ones)
    assert mine.standing(0.8).left.rate == 9
    mine.ask(1.4)
    mine.granted(reply())
    mine.spend(settled, np.zeros(2, np.bool_), ones)
    assert mine.standing(1.5).windows == {}


def test_without_a_lease_nothing_is_charged_and_no_window_is_recorded() -> None:
    mine = holder()
    ones = np.ones(3)
    settled = mine.allot(0.0, ones, ones * 0, ones, ones)
    assert (settled.epsilon.max(), dict(settled.windows)) == (0.0, {})
    mine.spend(settled, np.zeros(3, np.bool_), ones)


def test_no_caps_are_no_limit_while_the_lease_lasts() -> None:
    mine = Holder("h", parse_exploration({}), 1)
    mine.ask(0.0)
    mine.granted(reply())
    assert mine.standing(1.0).left.rate == UNLIMITED
    assert explore(mine, 1.0, rows=50) == 50
    assert explore(mine, 2.0, rows=50) == 0


def test_a_freeze_and_a_halt_explore_nothing() -> None:
    mine = leased(rate(5))
    mine.configure(parse_exploration(CAPS | {"freeze": True}), 2)
    assert (explore(mine, 0.1), mine.due_s) == (0, float("-inf"))
    halted = holder(burn={"rate": 0.2})
    halted.ask(0.0)
    halted.granted(reply(rate(5), burn=BurnState("halted", 999_000)))
    assert explore(halted, 0.1) == 0
    assert halted.standing(0.1).burn.name == "halted"


# What is told


def test_a_request_says_everything_as_it_stands() -> None:
    mine = leased(rate(5))
    assert explore(mine, 0.1, rows=2) == 2
    request = mine.ask(0.7)
    assert (request.seq, request.generation, request.decisions, request.wanting) == (2, 1, 2, 2)
    purse = request.purses["rate"]
    assert (purse.window, purse.ceiling, purse.used, purse.decisions, purse.acked) == ("w1", 5, 2, 2, 1)
    mine.failed(0.8)
    explore(mine, 0.8)
    again = mine.ask(0.9)
    assert (again.seq, again.decisions) == (3, 3)
    assert (again.purses["rate"].used, again.purses["rate"].acked) == (3, 1)
    mine.granted(reply(rate(8)))
    assert mine.standing(1.0).left.rate == 5
    assert mine.ask(1.0).decisions == 0


def test_what_is_used_while_an_answer_is_under_way_is_not_forgotten() -> None:
    mine = leased(rate(5))
    mine.ask(0.7)
    assert explore(mine, 0.8, rows=9) == 5
    mine.granted(reply(rate(7)))
    assert mine.standing(0.9).left.rate == 2


def test_a_bank_that_takes_the_rest_away_is_obeyed_and_told_what_was_used() -> None:
    mine = leased(rate(5))
    mine.ask(0.7)
    explore(mine, 0.8, rows=2)
    mine.granted(reply(rate(0, closed=True)))
    standing = mine.standing(0.9)
    assert (standing.left.rate, standing.closed, explore(mine, 0.9)) == (0, True, 0)
    assert mine.ask(1.0).purses["rate"].ceiling == 2


def test_an_idle_holder_gives_its_portion_back() -> None:
    mine = leased(rate(5))
    explore(mine, 0.1)
    for second in range(1, 10):
        mine.allot(second, np.zeros(1), np.zeros(1), np.ones(1), np.ones(1))  # that one does not want to explore
        assert mine.ask(float(second)).purses["rate"].ceiling == 5
        mine.granted(reply(rate(5)))
    request = mine.ask(10.1)
    assert (request.purses["rate"].ceiling, request.rate) == (1, 0.0)


def test_what_was_leased_under_caps_that_change_goes_back() -> None:
    mine = leased(rate(10))
    assert explore(mine, 0.1, rows=3) == 3
    mine.configure(parse_exploration(CAPS | {"epsilon": 0.5}), 2)
    assert mine.standing(0.2).left.rate == 7  # the caps are the same
    under_way = mine.ask(0.3)
    mine.configure(parse_exploration(CAPS | {"rate": {"limit": 1, "window_s": 60}}), 3)
    assert mine.standing(0.3).left.rate == 0
    mine.granted(reply(rate(10)))  # to the request that was under way
    asked = mine.ask(0.4)
    assert (under_way.purses["rate"].ceiling, asked.purses["rate"].ceiling, asked.purses["rate"].used) == (10, 3, 3)
    assert mine.standing(0.4).left.rate == 0


def test_a_release_gives_everything_back_and_ends_it() -> None:
    mine = leased(rate(5))
    explore(mine, 0.1, rows=2)
    request = mine.release(0.2)
    assert (request.release, request.purses["rate"].ceiling) == (True, 2)
    assert explore(mine, 0.3) == 0
    assert holder().release(0.0).purses == {}


# The halt and the schedules


def test_a_halt_that_is_seen_here_holds_here_and_is_proposed() -> None:
    mine = holder(burn={"rate": 0.2, "short_s": 10, "long_s": 60, "min_volume": 10})
    mine.ask(0.0)
    bad = [Bucket(999_000 // 1_000, 10, 9)]
    mine.granted(reply(rate(5), buckets=bad))
    assert explore(mine, 0.1) == 0
    request = mine.ask(0.7)
    assert (request.was, request.will) == (RUNNING, BurnState("halted", 1_000_000))
    assert (request.burn_width_ms, request.burn_long_ms) == (1_000, 60_000)


def test_progress_is_the_banks_and_what_has_happened_since() -> None:
    mine = holder(epsilon={"kind": "constant", "value": 0.5})
    mine.ask(0.0)
    name = parse_exploration({"epsilon": {"kind": "constant", "value": 0.5}}).progress_of
    mine.granted(reply(rate(5), progress=Progress(name, 1_000, 60_000)))
    explore(mine, 0.1, rows=3)
    assert mine.standing(0.5).progress == Progress(name, 1_003, 60_500)
    request = mine.ask(1.0)
    assert (request.progress.decisions, request.decisions) == (1_000, 3)
    mine.configure(parse_exploration({}), 2)
    assert mine.standing(1.0).progress == Progress(parse_exploration({}).progress_of, 3, 0)


def test_the_pace_counts_what_a_share_earns() -> None:
    mine = leased(Granted("share", "s1", 0, 60_000, 0, 0.5, False, 0))
    assert mine.standing(0.0).pace.share == 0.0
    ones = np.ones(4)
    mine.allot(0.1, ones * [1, 0, 0, 0], ones, ones, ones)  # a quarter of the decisions want to explore
    assert mine.standing(0.1).pace.share == pytest.approx(0.5 * 4)


# The page

PAGE = (Path(__file__).parents[2] / "docs" / "exploration.md").read_text()


def test_the_page_shows_the_tables() -> None:
    drawn = re.findall(r"```mermaid\n(stateDiagram.*?)\n```", PAGE, re.DOTALL)
    assert drawn == [diagram(TABLE, "lapsed"), diagram(BURN, "running")]


def diagram(table: Mapping[tuple[Any, Any], Any], first: str) -> str:
    arrows = [f"    {before} --> {after}: {event}" for (before, event), after in table.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {first}", *arrows])


def test_the_pages_document_is_one() -> None:
    (written,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    found = parse_exploration(yaml.safe_load(written))
    assert [cap.kind for cap in found.caps] == ["rate", "share", "regret"]
    assert set(Exploration.__struct_fields__) == set(re.findall(r"^([a-z_]+):", written, re.MULTILINE)) | {
        "temperature",
        "sigma",
    }


def test_the_pages_numbers_by_hand() -> None:
    scores, mask = np.array([[0.1, 0.4, 1.0, 1.8, 2.1]]), np.array([[False, False, True, True, False]])
    found = prices(scores, mask, 2.0, greedy=True)
    shown = re.findall(r"^\| (hold|up_1) \| ([0-9.]+) \|$", PAGE, re.MULTILINE)
    assert [float(price) for _, price in shown] == pytest.approx(found[0, 2:4].tolist())
    assert expected_price(found, mask / 2) == pytest.approx(0.205)
    assert worst_price(found, mask) == pytest.approx(0.4)
    assert pace(9, 36, 4.0, 12.0, 90.0) == pytest.approx(0.058, abs=5e-4)
    limit = BurnLimit(rate=0.1)
    for number in (limit.short_s, limit.long_s, limit.min_volume, limit.resume):
        assert f"({number:g} s)" in PAGE or f"({number:g})" in PAGE
