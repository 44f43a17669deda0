"""Each promise of the join by itself, on the real script; the model is asked the same and must agree."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from service.decision import RewardFlags, encode_events
from service.join import BREAK_MS, REWARDS_KEPT, JoinConfig
from service.join_model import Batch
from service.redis_streams import SCRIPT, script_arguments
from service.shipcall import ShipCall
from tests.service.joining import Both, Fields, ScriptJoin, Seen, beat, decision, reward

TERMINATED, TRUNCATED = int(RewardFlags.TERMINATED), int(RewardFlags.TRUNCATED)
DUE = 11_000  # of `decision` as it is by default
DAY_MS = 86_400_000


@pytest.fixture
def join(store: redis.Redis, policy: str) -> Both:
    return Both(ScriptJoin(store, policy, JoinConfig(default_reward="-0.25")))


def verdicts(seen: Seen) -> list[str]:
    return [verdict for _, verdict in seen.verdicts]


def ended(fields: Fields) -> tuple[str, str, str, str]:
    """Join state, end, bootstrap and order."""
    return fields["j"].decode(), fields["x"].decode(), fields["b"].decode(), fields["o"].decode()


# One decision, one reward


def test_a_transition_carries_everything(join: Both) -> None:
    seen = join(decision("a", "ep", 7), reward("a", value="0.1", flags=TERMINATED, reward_id="r1", sent=b"\xff\0n"))
    assert verdicts(seen) == ["joined"]
    assert seen.transitions["a"] == {
        "v": b"1", "i": b"a", "p": b"w", "e": b"1", "q": b"1", "ep": b"ep", "st": b"7", "t": b"1000", "a": b"2",
        "s": b"state of a", "m": b"\1\0\1", "d": b"record \xff of a", "r": b"0.1", "j": b"joined", "x": b"terminated",
        "b": b"0", "n": b"\xff\0n", "nm": b"", "ni": b"", "o": b"reward", "at": b"1500", "ri": b"r1",
        "rd": b"its record", "tf": b"1",
    }  # fmt: skip


def test_large_numbers_stay_exact(join: Both) -> None:
    at = 1_800_000_000_123
    first = join.born(decision("a", "ep", 4_000_000_000, at=at), reward("a", at + 1, flags=TERMINATED), through=at)
    assert (first["t"], first["st"], first["at"]) == (b"1800000000123", b"4000000000", b"1800000000124")


def test_without_an_episode_a_transition_stands_alone(join: Both) -> None:
    assert ended(join.born(decision("a"), reward("a"))) == ("joined", "single", "0", "")


@pytest.mark.parametrize(
    ("flags", "sent", "end"),
    [
        (TERMINATED, b"", ("joined", "terminated", "0", "")),
        (TERMINATED, b"n", ("joined", "terminated", "0", "reward")),
        (TRUNCATED, b"n", ("joined", "truncated", "1", "reward")),
        (TRUNCATED, b"", ("joined", "lost", "0", "")),
        (0, b"n", ("joined", "none", "1", "reward")),
    ],
)
@pytest.mark.parametrize("episode", ["", "ep"])
def test_what_the_reward_says_of_the_end_holds(
    join: Both, episode: str, flags: int, sent: bytes, end: tuple[str, ...]
) -> None:
    """Even where a next step is there."""
    join(decision("a", episode, 0), decision("b", episode, 1))
    assert ended(join.born(reward("a", flags=flags, sent=sent))) == end


@pytest.mark.parametrize("said", [{"flags": int(RewardFlags.NOT_EXECUTED)}, {"executed": "1"}], ids=["not", "other"])
@pytest.mark.parametrize(("episode", "end"), [("", "single"), ("ep", "lost")])
def test_an_action_that_was_not_executed_voids(join: Both, said: dict[str, object], episode: str, end: str) -> None:
    fields = join.born(decision("a", episode, 0), reward("a", **said))  # type: ignore[arg-type]
    assert (*ended(fields), fields["r"]) == ("void", end, "0", "", b"")
    assert not join(through=DUE).transitions, "never defaulted"


def test_naming_the_action_that_was_executed_changes_nothing(join: Both) -> None:
    assert join.born(decision("a"), reward("a", executed="2"))["j"] == b"joined"


# Verdicts


def test_the_same_reward_is_a_duplicate_and_another_body_a_conflict(join: Both) -> None:
    join(decision("a", "ep", 0), decision("b"))
    waits = join(reward("a"), reward("a"), reward("a", value="2.0"))
    assert verdicts(waits) == ["joined", "duplicate", "conflict"]
    closed = join(reward("b"), reward("b"), reward("b", value="2.0"))
    assert verdicts(closed) == ["joined", "duplicate", "conflict"]
    assert not waits.late
    assert not closed.late


def test_a_second_reward_comes_too_late_and_is_kept(join: Both) -> None:
    seen = join(decision("a"), reward("a", reward_id="1"), reward("a", value="2.0", reward_id="2"))
    assert verdicts(seen) == ["joined", "late"]
    assert list(seen.late) == [(b"a", b"2", b"2.0", b"1500", b"its record", b"closed")]


def test_late_is_what_was_accepted_after_the_window_whenever_it_arrives(join: Both) -> None:
    join(decision("a"), decision("b"))
    early_arrival = join(reward("a", at=DUE + 1))
    assert verdicts(early_arrival) == ["late"]
    assert verdicts(join(reward("b", at=DUE))) == ["joined"]
    assert join(through=DUE).transitions["a"]["j"] == b"defaulted"


def test_a_late_reward_is_kept_once(join: Both) -> None:
    join(decision("a"))
    seen = join(reward("a", at=DUE + 1), reward("a", at=DUE + 2), reward("a", at=DUE + 3, value="2.0"))
    assert verdicts(seen) == ["late", "late", "conflict"]
    assert seen.late.total() == 1


def test_a_default_that_is_overtaken_is_followed_by_a_correction(join: Both) -> None:
    join(decision("a"), through=DUE)
    sent = reward("a", reward_id="1"), reward("a", reward_id="1"), reward("a", reward_id="2")
    seen = join(*sent, lane="silent until now")
    assert verdicts(seen) == ["correction", "duplicate", "late"]
    assert seen.corrections["a"] == {
        "v": b"1", "i": b"a", "p": b"w", "e": b"1", "q": b"1", "j": b"joined", "r": b"1.0", "ri": b"1", "at": b"1500",
        "rd": b"its record", "w": b"overtaken",
    }  # fmt: skip
    assert [why for *_, why in seen.late] == [b"closed"]
    assert not seen.transitions


@pytest.mark.parametrize(
    ("said", "state"), [({"flags": int(RewardFlags.NOT_EXECUTED)}, b"void"), ({"value": "1e9"}, b"quarantined")]
)
def test_a_correction_says_what_the_transition_would_have_been(
    store: redis.Redis, policy: str, said: dict[str, Any], state: bytes
) -> None:
    join = Both(ScriptJoin(store, policy, JoinConfig(low="-1", high="1")))
    join(decision("a"), through=DUE)
    fields = join(reward("a", **said), lane="silent until now").corrections["a"]
    assert (fields["j"], fields["r"]) == (state, b"")


def test_an_early_reward_waits_for_its_decision(join: Both) -> None:
    assert verdicts(join(reward("a"), reward("a"), reward("a", value="2.0"))) == ["early", "early", "conflict"]
    assert join.born(decision("a"))["r"] == b"1.0"


def test_of_an_early_reward_sent_twice_the_copy_accepted_first_counts(join: Both) -> None:
    """Through another producer the copy may arrive first, and be late by itself."""
    assert verdicts(join(reward("a", at=DUE + 1), reward("a", at=DUE))) == ["early", "early"]
    assert join.born(decision("a"))["at"] == b"11000"


def test_of_early_rewards_the_first_accepted_in_time_is_taken(join: Both) -> None:
    join(reward("a", DUE + 1, "9.0", "1"), reward("a", value="2.0", reward_id="2"), reward("a", reward_id="3"))
    seen = join(decision("a"))
    assert seen.transitions["a"]["r"] == b"2.0"
    assert sorted((id, why) for _, id, _, _, _, why in seen.late) == [(b"1", b"late"), (b"3", b"closed")]


def test_early_rewards_of_one_decision_are_bounded(join: Both) -> None:
    seen = join(*(reward("a", reward_id=str(n)) for n in range(REWARDS_KEPT + 1)))
    assert verdicts(seen) == ["early"] * REWARDS_KEPT + ["late"]


def test_an_early_reward_without_a_decision_becomes_an_orphan(join: Both) -> None:
    join(reward("a", until=5_000), reward("a", until=6_000, reward_id="2"))
    assert not join(through=5_999).orphans
    assert join(through=6_000).orphans.total() == 2
    assert join(decision("a")).transitions == {}


def test_a_decision_that_comes_again_is_ignored(join: Both) -> None:
    join(decision("a", "ep", 0))
    assert join(decision("a", "ep", 5), reward("a", flags=TERMINATED)).transitions["a"]["st"] == b"0"
    assert not join(decision("a", "ep", 0), reward("a", reward_id="2")).transitions


# Successors


def test_each_step_leaves_as_soon_as_the_next_is_here(join: Both) -> None:
    for n in range(5):
        seen = join(decision(str(n), "ep", n))
        assert list(seen.transitions) == ([str(n - 1)] if n else [])
        for fields in seen.transitions.values():
            assert ended(fields) == ("joined", "none", "1", "step")
            assert (fields["n"], fields["nm"], fields["ni"]) == (f"state of {n}".encode(), b"\1\0\1", f"{n}".encode())
        join(reward(str(n)))


def test_a_step_waits_for_the_next_and_not_for_a_later_one(join: Both) -> None:
    join(decision("a", "ep", 1), reward("a"))
    assert not join(decision("c", "ep", 3), decision("other", "ep2", 2)).transitions
    assert join.born(decision("b", "ep", 2))["ni"] == b"b"


def test_a_hole_in_the_steps_is_lost_at_the_deadline(join: Both) -> None:
    join(decision("a", "ep", 1), reward("a"), decision("c", "ep", 3, at=2_000))
    assert not join(through=DUE - 1).transitions
    assert ended(join.born(through=DUE)) == ("joined", "lost", "0", "")


def test_a_default_has_its_successor_where_it_is_known(join: Both) -> None:
    join(decision("a", "ep", 0), decision("b", "ep", 1), decision("c"))
    born = join(through=DUE).transitions
    assert {id: (*ended(each), each["r"], each["at"]) for id, each in born.items()} == {
        "a": ("defaulted", "none", "1", "step", b"-0.25", b""),
        "b": ("defaulted", "lost", "0", "", b"-0.25", b""),
        "c": ("defaulted", "single", "0", "", b"-0.25", b""),
    }


def test_of_a_step_taken_twice_the_first_to_close_has_the_successor(join: Both) -> None:
    """A caller asked again after a lost answer; nobody knows of the decision it never saw."""
    join(decision("unseen", "ep", 0), decision("a", "ep", 0), decision("b", "ep", 1))
    assert join.born(reward("a"))["ni"] == b"b"
    assert ended(join(through=DUE).transitions["unseen"]) == ("defaulted", "lost", "0", "")


def test_where_a_successor_was_taken_twice_the_one_shipped_last_counts(join: Both) -> None:
    join(decision("a", "ep", 0), decision("b", "ep", 1), decision("c", "ep", 1))
    assert join.born(reward("a"))["ni"] == b"c"


def test_a_voided_step_is_still_what_came_next(join: Both) -> None:
    join(decision("a", "ep", 0), decision("b", "ep", 1), reward("b", executed="0"))
    assert join.born(reward("a"))["n"] == b"state of b"


def test_without_steps_the_next_by_time_counts_once_nothing_earlier_can_come(join: Both) -> None:
    join(lane="slow", through=1_100)
    join(decision("a", "ep", at=1_200), reward("a"), decision("c", "ep", at=1_400), through=3_000)
    assert not join(lane="slow", through=1_398).transitions
    assert not join(decision("b", "ep", at=1_399), lane="slow", through=1_398).transitions
    fields = join.born(lane="slow", through=1_399)
    assert (fields["ni"], fields["o"], fields["x"]) == (b"b", b"time", b"none")


def test_at_the_same_time_the_id_decides(join: Both) -> None:
    join(*(decision(id, "ep") for id in "cab"), *(reward(id) for id in "abc"))
    born = join(through=1_000).transitions
    assert {id: each["ni"] for id, each in born.items()} == {"a": b"b", "b": b"c"}


def test_what_comes_behind_the_watermark_has_no_place_in_time(join: Both) -> None:
    """Between a and c, when a has left with c: nobody's successor, and its own is not known."""
    join(decision("a", "ep", at=1_000), decision("c", "ep", at=1_400), reward("a"), through=2_000)
    join(decision("b", "ep", at=1_200), reward("b"), lane="silent until now")
    join(through=DUE + 200)
    born = join(lane="silent until now", through=DUE + 200).transitions
    assert {id: ended(fields) for id, fields in born.items()} == {"b": ("joined", "lost", "0", "")}
    assert join.script.entries()[0]["ni"] == b"c"


def test_steps_and_no_steps_in_one_episode_follow_their_own_kind(join: Both) -> None:
    join(
        decision("s0", "ep", 0, at=1_000), decision("t0", "ep", at=1_001), decision("s1", "ep", 1, at=1_002),
        decision("t1", "ep", at=1_003), reward("s0"), reward("t0"),
    )  # fmt: skip
    born = {each["i"]: (each["ni"], each["o"]) for each in join(through=2_000).transitions.values()}
    assert born == {b"t0": (b"t1", b"time")}
    assert [each["ni"] for each in join.script.entries() if each["i"] == b"s0"] == [b"s1"]


# Lanes and time


def test_what_was_applied_is_skipped_and_a_hole_is_told(join: Both) -> None:
    join(decision("a"), decision("b"))
    assert join(decision("b"), decision("c"), seq=2).last == 3
    seen = join(reward("a"), seq=9)
    assert (seen.gap, seen.last) == (True, 3)
    assert not seen.transitions


def test_a_known_hole_is_stepped_over_and_counted(join: Both) -> None:
    join(decision("a"))
    seen = join(reward("a"), seq=9, force=True)
    assert (seen.last, seen.lost, verdicts(seen)) == (9, 7, ["joined"])
    assert join.script.client.hgetall(join.script.base + ":lost") == {b"w:1": b"7"}


def test_epochs_are_lanes_of_their_own(join: Both) -> None:
    join(decision("a"))
    again = join.raw(Batch("w", 2, 1, (decision("b"),), 0, 1_000))
    assert (again.last, again.pending) == (1, 2)


def test_a_deadline_waits_for_every_producer_heard_of_lately(join: Both) -> None:
    join(lane="other", through=DUE - 1)
    join(decision("a"), through=DUE + 5)
    assert not join(through=DUE + 9).transitions
    for _ in range(JoinConfig().max_lag_ms // BREAK_MS - 1):
        join.now += BREAK_MS
        assert not join(through=join.now + DUE).transitions
    join.now += BREAK_MS
    assert join(through=join.now + DUE).transitions, "silent for max_lag"


def test_a_break_of_all_calls_is_nobodys_silence(join: Both) -> None:
    """Redis was away for longer than max_lag: the first to come back must not close what the others hold."""
    join(lane="other", through=1_000)
    join(decision("a"), through=1_000)
    join.now += 10 * JoinConfig().max_lag_ms
    assert not join(through=join.now).transitions
    assert join.born(reward("a"), lane="other", through=join.now)["j"] == b"joined"


def test_after_a_loss_of_memory_deadlines_wait_until_all_can_have_called(join: Both) -> None:
    assert join(decision("b"), seq=4, through=DUE).gap
    join(decision("a"), through=DUE)
    assert not join(through=DUE).transitions
    assert join.born(reward("a"), lane="other", through=DUE)["j"] == b"joined"
    join(decision("c"), through=DUE)
    for _ in range(JoinConfig().max_lag_ms // BREAK_MS):
        assert [each["i"] for each in join.script.entries()] == [b"a"]
        join.now += BREAK_MS
        join(lane="other", through=DUE)
    assert join.script.entries()[-1]["j"] == b"defaulted"


@pytest.mark.parametrize("steps", [0, 1], ids=["asks first", "brings events"])
def test_a_new_lane_with_a_past_is_not_alone(join: Both, steps: int) -> None:
    """Redis was emptied while nobody could call; the first to come back had not shipped anything yet."""
    join.now += 60_000
    past = [decision("a")] if steps else []
    join(*past, through=join.now - 1 if steps else 999)
    join(*[] if steps else [decision("a")], through=join.now)
    assert not join(through=join.now).transitions
    assert join.born(reward("a"), lane="other", through=join.now)["j"] == b"joined"


def test_a_new_lane_without_a_past_holds_nothing_back(join: Both) -> None:
    join.now += 60_000
    join(through=join.now - 1)
    assert join(decision("a", at=join.now - BREAK_MS), through=join.now).transitions


def test_a_lane_that_is_remembered_may_come_with_its_past(join: Both) -> None:
    """A service that was stopped over night looks through its old spool first."""
    join(decision("a"))
    join(bye=True)
    join.now += DAY_MS
    join(seq=1, through=999)
    assert join(through=join.now).transitions


def test_a_lane_that_says_bye_is_waited_for_no_more(join: Both) -> None:
    join(lane="other", through=1)
    join(decision("a"), through=DUE)
    assert join(lane="other", bye=True).transitions
    assert not join(decision("b"), bye=True).transitions, "with no lane, time stands still"


def test_a_sweep_is_bounded(store: redis.Redis, policy: str) -> None:
    script = ScriptJoin(store, policy, JoinConfig(sweep_limit=2))
    script.ship(beat("w", 1, *(decision(str(n)) for n in range(5)), *(reward(f"x{n}", until=2) for n in range(3))))
    calls = [script.ship(beat("w", 9, through=DUE)) for _ in range(3)]
    assert [len(seen.transitions) for seen in calls] == [2, 2, 1]
    assert [seen.orphans.total() for seen in calls] == [2, 1, 0]
    assert [seen.pending for seen in calls] == [3, 1, 0]


def test_the_servers_clock_is_taken_when_none_is_given(store: redis.Redis, policy: str) -> None:
    script = ScriptJoin(store, policy)
    script.ship(beat("w", 1, now=0))
    seconds: Any = store.time()
    told: Any = store.hget(script.base + ":ev", "w:1")
    assert 0 <= seconds[0] - int(told.split(b":")[1]) // 1000 <= 60


# What is refused


@pytest.mark.parametrize(
    "blob",
    [b"", b"\xc1", b"\x01", b"\x91\x01", b"\x91\x90", b"\x91\x92\xa1x\xa1D", encode_events([decision("x")])[:-4]],
    ids=["empty", "no msgpack", "number", "number in it", "no columns", "too few columns", "cut"],
)
def test_what_cannot_be_read_is_refused_before_anything_is_written(
    store: redis.Redis, policy: str, blob: bytes
) -> None:
    script = ScriptJoin(store, policy)
    whole = encode_events([decision("a"), reward("a")])
    call = ShipCall(policy, "w", 1, 1, 3, 0, 1_000, blobs=(whole, blob))
    with pytest.raises(redis.ResponseError):
        store.eval(SCRIPT, 1, script.base, *script_arguments(call, script.config, 1_000))  # type: ignore[arg-type]
    assert script.suffixes() == set()


def test_a_wrong_count_is_refused(store: redis.Redis, policy: str) -> None:
    script = ScriptJoin(store, policy)
    call = ShipCall(policy, "w", 1, 1, 2, 0, 1_000, blobs=(encode_events([decision("a")]),))
    with pytest.raises(redis.ResponseError, match="hold 1 events"):
        store.eval(SCRIPT, 1, script.base, *script_arguments(call, script.config, 1_000))  # type: ignore[arg-type]
    assert script.suffixes() == set()
