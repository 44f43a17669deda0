"""The oracle finds each kind of wrong: a journal and streams are made by hand, and one thing in them is changed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from tests.faults.journal import Act, Journal, Reward
from tests.faults.oracle import Found, Verdict, judge
from tests.faults.policy import EPSILON, NAMES, allowed, scores, some_request, violations
from tests.faults.report import Report
from tests.faults.trainer import Delivered

REQUEST = {"state": [0.25, 0.0, 0.5]}


def answer_to(request: dict[str, Any], decision: str = "d1", epsilon: float = EPSILON) -> dict[str, Any]:
    """What a sound service answers when it does not explore."""
    left = allowed(request)
    values = scores(request["state"])
    best = max(left, key=lambda each: (values[each], -each))
    drawn_from = [(1 - epsilon) * (a == best) + epsilon * (a in left) / len(left) for a in range(4)]
    return {
        "decision_id": decision, "action": best, "action_name": NAMES[best], "propensity": drawn_from[best],
        "propensity_reason": None, "distribution": drawn_from, "explored": False, "fallback": None, "logged": True,
        "version": "v1", "exploration": {"epsilon": epsilon},
    }  # fmt: skip


def entry_of(answer: dict[str, Any], request: dict[str, Any], token: tuple[str, int], seq: int) -> dict[bytes, bytes]:
    told = ("propensity", "explored", "version", "action_name", "fallback")
    return {
        b"i": answer["decision_id"].encode(), b"p": b"x.0", b"e": b"1", b"q": b"%d" % seq, b"ep": token[0].encode(),
        b"st": b"%d" % token[1], b"a": b"%d" % answer["action"], b"s": struct.pack("<3f", *request["state"]),
        b"d": msgspec.msgpack.encode({name: answer[name] for name in told}), b"r": b"0.5", b"j": b"joined",
    }  # fmt: skip


def row_of(entry: dict[bytes, bytes], answer: dict[str, Any]) -> Delivered:
    return Delivered(
        (entry[b"p"].decode(), int(entry[b"e"]), int(entry[b"q"])), entry[b"i"].decode(),
        (entry[b"ep"].decode(), int(entry[b"st"])), entry[b"s"], int(entry[b"a"]), answer["propensity"],
        float(entry[b"r"]), entry[b"j"].decode(), False, "v1",
    )  # fmt: skip


class Sound:
    """Two acts, each with its reward, delivered as they were."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.entries: list[dict[bytes, bytes]] = []
        self.rows: list[Delivered] = []
        self.aside: list[dict[bytes, bytes]] = []
        for number in (1, 2):
            token, decision = ("e", number), f"d{number}"
            answer = answer_to(REQUEST, decision)
            self.journal.acts[token] = Act(REQUEST, 0.0, answer)
            self.journal.rewards[decision] = Reward(0.5, ["joined"])
            self.entries.append(entry_of(answer, REQUEST, token, number))
            self.rows.append(row_of(self.entries[-1], answer))

    def judge(self) -> Verdict:
        return judge(self.journal, Found(self.entries, self.aside, self.rows))


def test_what_is_as_it_should_be_is_found_so() -> None:
    verdict = Sound().judge()
    assert (verdict.acts.issued, verdict.acts.acknowledged, verdict.acts.delivered) == (2, 2, 2)
    assert (verdict.rewards.issued, verdict.rewards.acknowledged, verdict.rewards.delivered) == (2, 2, 2)
    assert Report(0, "nothing", verdict).failures == []


def lose_transition(world: Sound) -> None:
    del world.entries[0], world.rows[0]


def lose_reward(world: Sound) -> None:
    world.entries[0] |= {b"r": b"-1000.0", b"j": b"defaulted"}
    world.rows[0] = replace(world.rows[0], reward=-1000.0, join="defaulted")


def invent(world: Sound) -> None:
    world.entries.append(world.entries[0] | {b"i": b"d9", b"ep": b"nobody", b"q": b"9"})


def decide_twice(world: Sound) -> None:
    world.entries.append(world.entries[0] | {b"i": b"d9", b"q": b"9"})


def change_reward(world: Sound) -> None:
    world.entries[0] |= {b"r": b"0.25"}


def change_state(world: Sound) -> None:
    world.entries[0] |= {b"s": bytes(12)}


def change_action(world: Sound) -> None:
    world.rows[0] = replace(world.rows[0], action=0)


def change_propensity(world: Sound) -> None:
    world.rows[0] = replace(world.rows[0], propensity=0.5)


def give_twice(world: Sound) -> None:
    world.rows.append(world.rows[0])


def forget_promise(world: Sound) -> None:
    world.entries[0] |= {b"j": b"void", b"r": b"0"}
    world.rows[0] = replace(world.rows[0], join="void")
    world.aside.append({b"i": b"d1", b"r": b"0.5"})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lose_transition, "lost"),
        (lose_reward, "lost"),
        (invent, "unexpected"),
        (decide_twice, "unexpected"),
        (change_reward, "unexpected"),
        (change_state, "mismatch"),
        (change_action, "mismatch"),
        (change_propensity, "mismatch"),
        (give_twice, "twice"),
        (forget_promise, "mismatch"),
    ],
)
def test_each_wrong_is_found(wrong: Callable[[Sound], None], named: str) -> None:
    world = Sound()
    wrong(world)
    assert any(named in each for each in Report(0, "planted", world.judge()).failures)


def test_what_was_not_acknowledged_may_be_missing_or_there() -> None:
    world = Sound()
    world.journal.acts["e", 1].answer = None
    world.journal.rewards["d1"].statuses.clear()
    assert Report(0, "unanswered", world.judge()).failures == []
    lose_transition(world)
    assert Report(0, "unanswered", world.judge()).failures == []


def test_a_copy_is_counted_and_is_no_fault() -> None:
    world = Sound()
    world.entries.append(world.entries[0])
    verdict = world.judge()
    assert (verdict.duplicates_before, verdict.duplicates_after) == (1, 0)
    assert Report(0, "copied", verdict).failures == []


def test_a_late_reward_is_delivered_on_its_stream() -> None:
    world = Sound()
    lose_reward(world)
    world.journal.rewards["d1"].statuses[:] = ["late"]
    world.aside.append({b"i": b"d1", b"r": b"0.5"})
    assert Report(0, "late", world.judge()).failures == []


@pytest.mark.parametrize(
    ("request_", "changes"),
    [
        ({"state": [0.75, 0.0, 0.0]}, {"action": 3, "action_name": "a3"}),
        ({"state": [0.0, 0.0, 0.875]}, {"action": 1}),
        (REQUEST | {"context": {"calm": True}}, {"action": 2}),
        (REQUEST | {"allowed_actions": ["a0", "a1"]}, {"action": 3}),
        (REQUEST, {"propensity": 0.5}),
        (REQUEST, {"propensity": None}),
        (REQUEST, {"distribution": [0.25, 0.25, 0.25, 0.25]}),
        (REQUEST, {"exploration": {"epsilon": 0.9}}),
        (REQUEST, {"action": 1, "action_name": "a1", "propensity": EPSILON / 4}),  # says that it did not explore
        (REQUEST, {"fallback": "masked", "action": 2}),
    ],
)
def test_an_answer_that_breaks_a_rule_is_found(request_: dict[str, Any], changes: dict[str, Any]) -> None:
    sound = answer_to(request_)
    assert violations(request_, sound) == []
    assert violations(request_, sound | changes)


def test_every_rule_matters_in_what_players_ask() -> None:
    chance = random.Random(1)
    left = [len(allowed(some_request(chance))) for _ in range(500)]
    assert set(left) == {0, 1, 2, 3, 4}
