"""Rewards beyond one a decision: aggregated, out of range, for whole episodes; records of n steps.

On the real script; the model is asked the same and must agree at every call.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import redis

from service.decision import DecisionFlags, RewardFlags
from service.join import REWARDS_KEPT, Aggregation, JoinConfig
from tests.service.joining import Both, ScriptJoin, Seen, beat, decision, reward, whole

TERMINATED, FINAL = int(RewardFlags.TERMINATED), int(RewardFlags.FINAL)
DUE = 11_000  # of `decision` as it is by default


def joining(store: redis.Redis, policy: str, aggregation: Aggregation = "sum", **config: Any) -> Both:
    return Both(ScriptJoin(store, policy, JoinConfig(aggregation=aggregation, **config)))


@pytest.fixture
def join(store: redis.Redis, policy: str) -> Both:
    return joining(store, policy)


def verdicts(seen: Seen) -> list[str]:
    return [verdict for _, verdict in seen.verdicts]


# Aggregation


@pytest.mark.parametrize(
    ("aggregation", "value"),
    [("sum", b"1.75"), ("last", b"-0.50"), ("max", b"2.0"), ("min", b"-0.50"), ("mean", b"0.58333333333333337")],
)
def test_rewards_of_the_window_are_aggregated(
    store: redis.Redis, policy: str, aggregation: Aggregation, value: bytes
) -> None:
    join = joining(store, policy, aggregation)
    parts = [reward("a", 1_200, "2.0", "1"), reward("a", 1_400, "-0.50", "3"), reward("a", 1_300, "0.25", "2")]
    seen = join(decision("a"), *parts, through=DUE - 1)
    assert verdicts(seen) == ["joined"] * 3
    assert (seen.pending, seen.transitions) == (1, {})
    born = join.born(through=DUE)
    assert (born["r"], born["j"], born["x"], born["ri"], born["at"]) == (value, b"joined", b"single", b"3", b"1400")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("aggregation", ["sum", "last", "max", "min", "mean"])
def test_the_order_of_arrival_does_not_matter(
    store: redis.Redis, policy: str, aggregation: Aggregation, order: tuple[int, ...]
) -> None:
    join = joining(store, policy, aggregation)
    parts = [reward("a", 1_200, "0.1", "1"), reward("a", 1_300, "0.2", "2"), reward("a", 1_400, "0.3", "3")]
    join(decision("a"), *(parts[k] for k in order))
    assert join.born(through=DUE)["r"] == {
        "sum": b"0.60000000000000009", "last": b"0.3", "max": b"0.3", "min": b"0.1", "mean": b"0.20000000000000004",
    }[aggregation]  # fmt: skip


def test_all_negative_rewards_have_a_negative_maximum(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "max")
    assert (
        join.born(decision("a"), reward("a", value="-3.0"), reward("a", 1_600, "-2.0", "2"), through=DUE)["r"]
        == b"-2.0"
    )


def test_a_reward_sent_twice_is_counted_once(join: Both) -> None:
    seen = join(decision("a"), reward("a", reward_id="1"), reward("a", reward_id="1"), reward("a", 1_500, "9.0", "1"))
    assert verdicts(seen) == ["joined", "duplicate", "conflict"]
    assert join.born(through=DUE)["r"] == b"1.0"
    assert verdicts(join(reward("a", reward_id="1"), reward("a", 1_500, "9.0", "1"))) == ["duplicate", "conflict"]


def test_the_last_word_closes_once_everybody_has_shipped_through_it(join: Both) -> None:
    """What was accepted before it counts, even if it arrives after it."""
    join(lane="other", through=1_000)
    seen = join(decision("a"), reward("a", 2_000, "1.0", "1", FINAL), through=2_500)
    assert not seen.transitions
    seen = join(reward("a", 2_001, "8.0", "2"), reward("a", 1_999, "4.0", "3"), lane="other", through=1_999)
    assert verdicts(seen) == ["late", "joined"]
    assert [why for *_, why in seen.late] == [b"closed"]
    assert join.born(lane="other", through=2_000)["r"] == b"5"


def test_what_an_earlier_last_word_leaves_out_is_kept(join: Both) -> None:
    join(decision("a"), reward("a", 1_800, "8.0", "2"), reward("a", 1_500, "1.0", "1", FINAL))
    seen = join(through=1_500)
    assert seen.transitions["a"]["r"] == b"1.0"
    assert list(seen.late) == [(b"a", b"2", b"8.0", b"1800", b"its record", b"closed")]


def test_the_end_of_an_episode_closes_what_has_rewards(join: Both) -> None:
    """What has none waits for its window; its first reward closes it."""
    steps = [decision(name, "ep", number) for number, name in enumerate("abcd")]
    join(*steps, reward("a"), reward("d", 3_000, flags=TERMINATED), reward("b", 3_001, "7.0"))
    seen = join(through=3_001)
    assert {id: (each["r"], each["x"]) for id, each in seen.transitions.items()} == {
        "a": (b"1.0", b"none"), "b": (b"7.0", b"none"), "d": (b"1.0", b"terminated"),
    }  # fmt: skip
    join(reward("c", 3_500, "2.0", "1"), reward("c", 3_600, "2.0", "2"))
    assert join.born(through=3_500)["r"] == b"2.0"


def test_a_frozen_sum_waits_for_its_successor(join: Both) -> None:
    join(decision("a", "ep", 0), reward("a", flags=FINAL))
    assert not join(through=1_500).transitions
    assert verdicts(join(reward("a", 1_400, "5.0", "2"))) == ["late"], "its producer was silent until now"
    born = join.born(decision("b", "ep", 1, 1_600), through=1_600)
    assert (born["i"], born["r"], born["n"]) == (b"a", b"1.0", b"state of b")


def test_a_frozen_sum_without_a_successor_is_lost_at_its_deadline(join: Both) -> None:
    join(decision("a", "ep", 0), reward("a", flags=FINAL), through=1_500)
    born = join.born(through=DUE)
    assert (born["r"], born["x"], born["j"]) == (b"1.0", b"lost", b"joined")


def test_one_that_was_not_executed_voids_the_sum(join: Both) -> None:
    join(decision("a"), reward("a"), reward("a", 1_700, "0.0", "2", int(RewardFlags.NOT_EXECUTED)))
    born = join.born(through=1_700)
    assert (born["j"], born["r"]) == (b"void", b"")


def test_early_rewards_are_aggregated_too(join: Both) -> None:
    assert verdicts(join(reward("a"), reward("a", 1_600, "2.0", "2"))) == ["early", "early"]
    join(decision("a"))
    assert join.born(through=DUE)["r"] == b"3"


def test_what_is_collected_for_one_decision_is_bounded(join: Both) -> None:
    parts = [reward("a", 1_200 + k, "1.0", str(k)) for k in range(REWARDS_KEPT + 1)]
    seen = join(decision("a"), *parts)
    assert verdicts(seen) == ["joined"] * REWARDS_KEPT + ["late"]
    assert join.born(through=DUE)["r"] == str(REWARDS_KEPT).encode()


def test_what_overtook_a_sum_is_kept(join: Both) -> None:
    join(decision("a"), reward("a"), through=DUE)
    seen = join(reward("a", 1_600, "2.0", "2"), lane="silent until now")
    assert verdicts(seen) == ["late"]
    assert [why for *_, why in seen.late] == [b"overtaken"]


def test_the_latest_of_a_kind_is_said_of_all(join: Both) -> None:
    join(decision("a", "ep", 0), reward("a", sent=b"first"), reward("a", 1_600, "1.0", "2", sent=b"second"))
    born = join.born(through=DUE)
    assert (born["n"], born["o"], born["r"]) == (b"second", b"reward", b"2")


# Range


@pytest.mark.parametrize(("value", "verdict"), [("1.0", "joined"), ("1.0000001", "quarantined"), ("-2", "quarantined")])
def test_a_reward_out_of_range_is_quarantined(store: redis.Redis, policy: str, value: str, verdict: str) -> None:
    join = joining(store, policy, "first", low="-1.5", high="1.0")
    seen = join(decision("a", "ep", 0), reward("a", value=value, flags=TERMINATED), reward("a", value=value, flags=1))
    assert verdicts(seen) == [verdict, "duplicate"]
    if verdict == "quarantined":
        born = seen.transitions["a"]
        assert (born["j"], born["r"], born["x"], born["rd"]) == (b"quarantined", b"", b"lost", b"its record")
        assert list(seen.quarantined) == [(b"a", b"", value.encode(), b"1500", b"its record")]
    assert verdicts(join(reward("a", reward_id="2"))) == ["late"]


def test_of_a_sum_the_whole_must_be_in_range(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "sum", low="0", high="2")
    within, beyond = [reward("a", 1_200, "5.0", "1"), reward("a", 1_300, "-4.0", "2")], reward("b", value="3.0")
    assert verdicts(join(decision("a"), decision("b"), *within, beyond)) == ["joined"] * 3
    seen = join(through=DUE)
    assert (seen.transitions["a"]["r"], seen.transitions["b"]["j"]) == (b"1", b"quarantined")


def test_a_sum_that_overflows_is_quarantined(join: Both) -> None:
    join(decision("a"), reward("a", 1_200, "1.7e308", "1"), reward("a", 1_300, "1.7e308", "2"))
    assert join.born(through=DUE)["j"] == b"quarantined"


def test_what_was_not_executed_is_void_whatever_it_was_worth(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "first", high="1.0")
    assert join.born(decision("a"), reward("a", value="9.0", flags=int(RewardFlags.NOT_EXECUTED)))["j"] == b"void"


# Whole episodes


@pytest.mark.parametrize("aggregation", ["first", "sum"])
@pytest.mark.parametrize("stepped", [True, False])
def test_an_episodes_reward_goes_to_its_last_step(
    store: redis.Redis, policy: str, aggregation: Aggregation, stepped: bool
) -> None:
    """Also when the last step is shipped after it, by another producer."""
    join = joining(store, policy, aggregation)
    join(lane="other", through=1_000)
    steps = [decision(name, "ep", k if stepped else -1, 1_100 + k) for k, name in enumerate("abc")]
    seen = join(steps[0], steps[1], whole("ep", 1_500, "7.0"), through=1_600)
    assert verdicts(seen) == ["early"]
    join(steps[2], lane="other", through=1_499)
    born = join.born(lane="other", through=1_500)
    assert (born["i"], born["r"], born["x"], born["j"]) == (b"c", b"7.0", b"terminated", b"joined")
    assert join(through=DUE + 200).transitions == {}
    last = join(lane="other", through=DUE + 200).transitions
    assert {id: (each["j"], each["x"]) for id, each in last.items()} == {
        "a": (b"defaulted", b"none"), "b": (b"defaulted", b"none")
    }  # fmt: skip


def test_an_episodes_reward_is_added_to_that_of_its_last_step(join: Both) -> None:
    join(
        decision("a", "ep", 0),
        decision("b", "ep", 1),
        reward("a"),
        reward("b", value="0.5"),
        whole("ep", 2_000, "10.0", "whole"),
    )
    seen = join(through=2_000)
    assert {id: each["r"] for id, each in seen.transitions.items()} == {"a": b"1.0", "b": b"10.5"}


def test_the_same_episode_is_rewarded_once(join: Both) -> None:
    join(decision("a", "ep", 0))
    seen = join(whole("ep"), whole("ep"), whole("ep", value="2.0"), whole("ep", value="2.0", reward_id="2"))
    assert verdicts(seen) == ["early", "duplicate", "conflict", "early"]
    assert join.born(through=DUE)["r"] == b"3"
    assert verdicts(join(whole("ep"))) == ["duplicate"]


def test_an_episode_that_nobody_played_leaves_an_orphan(join: Both) -> None:
    join(whole("ep", value="2.0"))
    seen = join(through=1_500)
    assert list(seen.orphans) == [(b"", b"", b"2.0", b"1500", b"its record", b"ep")]


def test_an_episodes_reward_may_come_too_late(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "first")
    join(decision("a", "ep", 0), whole("ep", DUE + 1))
    seen = join(through=DUE + 1)
    assert [why for *_, why in seen.late] == [b"late"]
    assert seen.transitions["a"]["j"] == b"defaulted"


def test_nothing_is_left_of_an_episode_that_was_given_its_reward(join: Both) -> None:
    join(decision("a", "ep", 0), reward("a"), whole("ep", reward_id="2"))
    join(through=1_500)
    left = {key.split(":")[0] for key in join.script.suffixes()}
    assert not left & {"whole", "ends", "o", "r", "due"}


# Records of n steps


def played(join: Both, *names: str, switched: str = "") -> None:
    flags = {name: int(DecisionFlags.SWITCHED) if name in switched else 0 for name in names}
    join(*(decision(name, "ep", k, flags=flags[name]) for k, name in enumerate(names)))


def chains(seen: Seen) -> dict[str, tuple[bytes, bytes, bytes]]:
    return {id: (each["ids"], each["ni"], each["x"]) for id, each in seen.nsteps.items()}


def test_a_record_holds_n_steps(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "first", n_step=3)
    played(join, *"abcd")
    assert not join(reward("a"), reward("b", value="2.0")).nsteps
    record = join(reward("c", value="3.0")).nsteps["a"]
    assert record == {
        "v": b"1", "i": b"a", "p": b"w", "e": b"1", "q": b"1", "ep": b"ep", "st": b"0", "t": b"1000", "a": b"2",
        "s": b"state of a", "m": b"\1\0\1", "d": b"record \xff of a", "k": b"3", "ids": b"a,b,c", "rs": b"1.0,2.0,3.0",
        "lps": b"-0.1,-0.1,-0.1", "js": b"joined,joined,joined", "x": b"none", "b": b"1", "n": b"state of d",
        "nm": b"\1\0\1", "ni": b"d", "o": b"step",
    }  # fmt: skip
    assert chains(join(reward("d", flags=TERMINATED))) == {
        "b": (b"b,c,d", b"", b"terminated"), "c": (b"c,d", b"", b"terminated"), "d": (b"d", b"", b"terminated"),
    }  # fmt: skip


def test_a_record_waits_for_the_slowest_of_its_steps(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "first", n_step=3, default_reward="-1.0")
    played(join, *"abcd")
    assert not join(reward("a"), reward("c")).nsteps
    seen = join(through=DUE)
    assert seen.nsteps["a"]["rs"] == b"1.0,-1.0,1.0"
    assert seen.nsteps["a"]["js"] == b"joined,defaulted,joined"


def test_a_record_never_crosses_a_switch(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "first", n_step=3)
    played(join, *"abcd", switched="b")
    found = chains(join(*(reward(name) for name in "abc")))
    assert found == {"a": (b"a", b"b", b"none")}


def test_a_record_never_crosses_a_gap_or_a_step_without_a_reward(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "first", n_step=3)
    join(decision("a", "ep", 0), decision("b", "ep", 1), decision("d", "ep", 3))
    join(reward("a"), reward("b"), reward("d"))
    assert chains(join(through=DUE)) == {
        "a": (b"a,b", b"", b"lost"),
        "b": (b"b", b"", b"lost"),
        "d": (b"d", b"", b"lost"),
    }
    join(decision("x", "other", 0, 20_000), decision("y", "other", 1, 20_000))
    seen = join(reward("x", 21_000), reward("y", 21_000, flags=int(RewardFlags.NOT_EXECUTED)))
    assert chains(seen) == {"x": (b"x", b"y", b"none")}, "what was voided begins no record either"


def test_a_record_may_end_in_a_state_that_a_reward_brought(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "first", n_step=2)
    played(join, *"ab")
    record = join(reward("a"), reward("b", sent=b"sent")).nsteps["a"]
    assert (record["n"], record["nm"], record["o"], record["b"]) == (b"sent", b"", b"reward", b"1")


def test_a_record_whose_end_has_expired_says_so(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "first", n_step=2)
    played(join, *"abc")
    join(reward("a"))
    join.script.client.delete(join.script.base + ":d:c")
    record = join.script.ship(beat("w", join.next["w"], reward("b"))).nsteps["a"]  # the model forgets nothing
    assert (record["x"], record["b"], record["n"]) == (b"lost", b"0", b"")


def test_one_step_needs_no_records(store: redis.Redis, policy: str) -> None:
    join = joining(store, policy, "first", n_step=1)
    played(join, *"ab")
    assert not join(reward("a"), reward("b")).nsteps
    assert not any(key.startswith(("kw", "nstep")) for key in join.script.suffixes())
