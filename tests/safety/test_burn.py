"""The burn-rate halt: its table, its two windows, its hysteresis, and that replicas' counts add up."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safety.burn import RUNNING, TABLE, Bucket, BurnLimit, BurnState, Volume, merge, step, volume

LIMIT = BurnLimit(rate=0.2, bad_reward=-1.0, short_s=10, long_s=120, min_volume=10)
NOW = 1_000_000


def at(seconds_ago: float, outcomes: int, burnt: int) -> Bucket:
    return Bucket(int((NOW - seconds_ago * 1000) // LIMIT.width_ms), outcomes, burnt)


def after(state: BurnState, *buckets: Bucket) -> BurnState:
    return step(state, LIMIT, buckets, NOW)


def test_errors_and_rewards_below_the_mark_burn() -> None:
    assert LIMIT.burns(error=True, reward=5.0)
    assert LIMIT.burns(error=False, reward=-1.5)
    assert LIMIT.burns(error=False, reward=math.nan)
    assert not LIMIT.burns(error=False, reward=-1.0)
    assert not LIMIT.burns(error=False, reward=None)
    assert not BurnLimit(rate=0.2).burns(error=False, reward=-1e9)


def test_it_halts_when_both_windows_are_over() -> None:
    assert after(RUNNING, at(3, 10, 3)) == BurnState("halted", NOW)
    assert after(RUNNING, at(60, 100, 60), at(3, 10, 2)) == RUNNING  # over, not any more
    assert after(RUNNING, at(60, 1_000, 0), at(3, 10, 10)) == RUNNING  # a moment in a good while
    assert after(RUNNING, at(500, 1_000, 1_000), at(3, 10, 2)) == RUNNING  # long ago


def test_a_few_outcomes_say_nothing() -> None:
    assert after(RUNNING, at(60, 100, 90), at(3, 9, 9)) == RUNNING


def test_a_halt_lasts_its_time_and_until_the_short_window_is_calm() -> None:
    assert after(BurnState("halted", NOW - 9_999)).name == "halted"
    assert after(BurnState("halted", NOW - 10_000)) == BurnState("probing", NOW)
    assert after(BurnState("halted", NOW - 60_000), at(3, 10, 2)).name == "halted"  # late rewards are still bad
    assert after(BurnState("halted", NOW - 60_000), at(3, 10, 1)).name == "probing"
    slow = BurnLimit(rate=0.2, hold_s=3_600)
    assert step(BurnState("halted", NOW - 60_000), slow, [], NOW).name == "halted"


def test_a_probe_decides_after_its_volume_and_with_hysteresis() -> None:
    probing = BurnState("probing", NOW - 8_000)
    old = at(60, 100, 100)
    assert after(probing, old, at(3, 9, 9)) == probing
    assert after(probing, old, at(3, 10, 1)) == BurnState("running", NOW)
    assert after(probing, old, at(3, 10, 2)) == BurnState("halted", NOW)  # under the rate, over half of it


def test_a_slow_probe_looks_back_no_further_than_the_long_window() -> None:
    assert after(BurnState("probing", NOW - 3_600_000), at(300, 100, 100), at(3, 10, 0)).name == "running"


def test_only_a_halt_keeps_from_exploring() -> None:
    assert [BurnState(name).explores for name in ("running", "halted", "probing")] == [True, False, True]


def test_the_table_has_a_way_back_from_everywhere() -> None:
    reached = {"running"}
    for _ in TABLE:
        reached |= {after for (before, _), after in TABLE.items() if before in reached}
    assert reached == {"running", "halted", "probing"}
    assert {before for before, _ in TABLE} == reached


@given(st.lists(st.builds(Bucket, st.integers(0, 20), st.integers(0, 50), st.integers(0, 50))), st.randoms())
def test_counts_of_replicas_add_up_in_any_order_and_grouping(buckets: list[Bucket], chance: random.Random) -> None:
    shuffled = list(buckets)
    chance.shuffle(shuffled)
    cut = chance.randrange(len(shuffled) + 1)
    assert merge([*merge(shuffled[:cut]), *merge(shuffled[cut:])]) == merge(buckets)
    for state in (RUNNING, BurnState("halted", 0), BurnState("probing", 3_000)):
        assert step(state, LIMIT, merge(buckets), 20_000) == step(state, LIMIT, buckets, 20_000)


def test_a_window_counts_buckets_from_its_beginning_on() -> None:
    buckets = [Bucket(0, 1, 1), Bucket(1, 2, 0), Bucket(2, 4, 3)]
    assert volume(buckets, 1_000, 1_000) == Volume(6, 3)
    assert volume(buckets, 1_000, 1_001) == Volume(4, 3)


@pytest.mark.parametrize("document", [{"rate": 0}, {"rate": 1}, {"rate": 0.1, "short_s": 10, "long_s": 5}])
def test_a_limit_checks_itself(document: dict[str, float]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(document, BurnLimit)


def test_a_long_window_is_at_most_sixty_short_ones() -> None:
    with pytest.raises(ValueError, match="long_s"):
        BurnLimit(rate=0.1, short_s=1, long_s=61)
