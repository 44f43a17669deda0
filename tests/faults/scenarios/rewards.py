"""Row 19: rewards sent twice, contradicting each other, late, forged, for nobody, and a hundred at once."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.faults.journal import Act, Reward
from tests.faults.policy import some_request
from tests.faults.report import Report, Row, Settings
from tests.faults.world import World, world
from tests.waiting import until

VALUES = (1.0, 2.0, 3.0)
NAMES = (None, "a", "b")
UNDECIDED = ("early", "accepted")  # the decision is still on its way from another replica, or the join is slow


@dataclass(frozen=True)
class Sending:
    """One reward for a decision: through which replica, under which reward_id, which value."""

    replica: int
    name: str | None
    value: float


def post(here: World, replica: int, path: str, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    """Call a replica once, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", here.replicas[replica].port, timeout=30.0)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        found: dict[str, Any] = json.loads(response.read())
        return response.status, found
    finally:
        connection.close()


def act(here: World, chance: random.Random, replica: int = 0) -> str:
    """Take one decision, the only one of its episode."""
    request = some_request(chance)
    token = (f"lone-{len(here.journal.acts)}-{chance.randrange(1 << 30)}", 0)
    noted = here.journal.acts[token] = Act(request, time.monotonic())
    body = {"policy": here.policy, "episode": token[0], "step": 0, "include": ["distribution"], **request}
    status, noted.answer = post(here, replica, "/v1/act", body)
    assert status == 200, noted.answer
    noted.here_s = time.monotonic()
    return str(noted.answer["decision_id"])


@dataclass
class Contest:
    """Rewards for one decision, sent one after the other; the first is the one that must take effect."""

    here: World
    decision: str
    first: Sending | None = None
    bodies: dict[str | None, float] = field(default_factory=dict)  # what stands under each reward_id

    def send(self, each: Sending) -> list[str]:
        """Send one. Give what is wrong with its answer."""
        status, answer = self._post(each)
        same = self.bodies.setdefault(each.name, each.value) == each.value
        said = str(answer.get("status")) if status == 202 else str(status)
        if same:
            allowed = (
                {"joined", *UNDECIDED} if self.first is None or self.first.name == each.name else {"late", *UNDECIDED}
            )
        else:
            allowed = {"409", *UNDECIDED}
        self._note(each, said)
        return [] if said in allowed else [f"{self.decision} {each}: {status} {answer}, allowed {sorted(allowed)}"]

    def _post(self, each: Sending) -> tuple[int, dict[str, Any]]:
        body = {"decision_id": self.decision, "reward": each.value, "terminated": True}
        return post(self.here, each.replica, "/v1/reward", body | ({"reward_id": each.name} if each.name else {}))

    def _note(self, each: Sending, said: str) -> None:
        noted = self.here.journal.rewards.setdefault(self.decision, Reward(each.value))
        noted.others.add(each.value)
        if self.first is None:
            self.first = each
            noted.statuses.append(said)


def forge(here: World, decision: str, at: int, by: int) -> list[str]:
    """Post a reward for an id of which one character was changed. Give what is wrong with the answer."""
    digits = "0123456789abcdef".replace(decision[at], "")
    forged = decision[:at] + digits[by % len(digits)] + decision[at + 1 :]
    status, answer = post(here, 0, "/v1/reward", {"decision_id": forged, "reward": 9.0})
    return [] if status == 404 else [f"{forged} for {decision}: {status} {answer}"]


def contradicting(settings: Settings) -> Report:
    """Random sequences of rewards for many decisions, over two replicas, and forged ids."""
    chance = settings.chance
    with world(settings, replicas=2, verdict_wait_s="5") as here:
        wrong: list[str] = []
        for _ in range(settings.count(40, 1500)):
            contest = Contest(here, act(here, chance, chance.randrange(2)))
            for _ in range(chance.randrange(1, 6)):
                wrong += contest.send(Sending(chance.randrange(2), chance.choice(NAMES), chance.choice(VALUES)))
            wrong += forge(here, contest.decision, chance.randrange(len(contest.decision)), chance.randrange(16))
        report = Report(19, "duplicate, conflicting, forged", here.settle())
        report.expect(not wrong, f"{len(wrong)} wrong answers: {wrong[:3]}")
        report.notes.append(
            f"{sum(len(each.others) > 1 for each in here.journal.rewards.values())} decisions contested"
        )
    return report


def at_once(settings: Settings) -> Report:
    """A hundred requests at once under one idempotency key, and a hundred rewards at once for one decision."""
    with world(settings, replicas=2, verdict_wait_s="5") as here, ThreadPoolExecutor(100) as pool:
        rounds, chance, broken = settings.count(2, 30), settings.chance, list[str]()
        for number in range(rounds):
            decision = _same_key(here, pool, chance, number, broken)
            _same_reward(here, pool, decision, broken)
            _rivals(here, pool, act(here, chance), broken)
        report = Report(19, "100 at once", here.settle())
        for each in broken:
            report.expect(False, each)
        report.notes.append(f"{rounds} × 100 under one key, 100 equal rewards, 100 rivals")
    return report


def _together(
    pool: ThreadPoolExecutor, call: Callable[[int], tuple[int, dict[str, Any]]]
) -> list[tuple[int, dict[str, Any]]]:
    return list(pool.map(call, range(100)))


def _same_key(here: World, pool: ThreadPoolExecutor, chance: random.Random, number: int, broken: list[str]) -> str:
    request, token = some_request(chance), (f"keyed-{number}", 0)
    body = {"policy": here.policy, "episode": token[0], "step": 0, "include": ["distribution"], **request}
    noted = here.journal.acts[token] = Act(request, time.monotonic())
    key = {"Idempotency-Key": f"key-{number}"}
    found = _together(pool, lambda k: post(here, k % 2, "/v1/act", body, **key))
    # The other replica may be told that the key is in use by a request that is still running: 409, try again.
    answers = [answer for status, answer in found if status == 200]
    ids = {answer["decision_id"] for answer in answers}
    if len(ids) != 1 or any(status not in (200, 409) for status, _ in found):
        broken.append(f"one key got {len(ids)} decisions: {[each for each in found if each[0] != 200][:3]}")
    noted.answer, noted.here_s = answers[0], time.monotonic()
    return str(answers[0]["decision_id"])


def _same_reward(here: World, pool: ThreadPoolExecutor, decision: str, broken: list[str]) -> None:
    noted = here.journal.rewards[decision] = Reward(1.0)
    body = {"decision_id": decision, "reward": 1.0, "terminated": True}
    found = _together(pool, lambda k: post(here, k % 2, "/v1/reward", body))
    noted.statuses += [answer["status"] for status, answer in found if status == 202]
    if len(noted.statuses) != 100:
        broken.append(f"of 100 equal rewards {len(noted.statuses)} were accepted")
    if set(noted.statuses) - {"joined", "early", "accepted"}:
        broken.append(f"equal rewards were answered {set(noted.statuses)}")


def _rivals(here: World, pool: ThreadPoolExecutor, decision: str, broken: list[str]) -> None:
    """A hundred different values: one takes effect, and no other was told that it had."""

    def send(k: int) -> tuple[int, dict[str, Any]]:
        return post(here, k % 2, "/v1/reward", {"decision_id": decision, "reward": float(k), "terminated": True})

    found = _together(pool, send)
    told = [k for k, (status, answer) in enumerate(found) if status == 202 and answer["status"] == "joined"]
    until(lambda: stands(here, decision) is not None, "the transition")
    standing = stands(here, decision)
    assert standing is not None
    here.journal.rewards[decision] = Reward(standing, others={float(k) for k in range(100)})
    if standing != -1000.0 and (len(told) > 1 or (told and float(told[0]) != standing)):
        broken.append(f"{standing} stands, {told} were told that they do")
    if any(status not in (202, 409) for status, _ in found):
        broken.append(f"rivals were answered {sorted({status for status, _ in found})}")


def stands(here: World, decision: str) -> float | None:
    """The reward of a decision's transition; None: it has not left yet."""
    with here.store.client() as client:
        entries: Any = client.xrange(f"sf:{{{here.policy}}}:transitions")
    return next((float(fields[b"r"]) for _, fields in entries if fields[b"i"].decode() == decision), None)


def late(settings: Settings) -> Report:
    """Rewards after the window: the default stands, they are kept aside, once each."""
    with world(settings, window_s=1.0, verdict_wait_s="5") as here:
        chance, wrong = settings.chance, []
        decisions = [act(here, chance) for _ in range(settings.count(10, 200))]
        until(lambda: all(stands(here, each) == -1000.0 for each in decisions), "the defaults")
        for decision in decisions:
            noted = here.journal.rewards[decision] = Reward(chance.random())
            body = {"decision_id": decision, "reward": noted.value}
            for _ in range(2):
                status, answer = post(here, 0, "/v1/reward", body)
                if (status, answer.get("status")) != (202, "late"):
                    wrong.append(f"{status} {answer}")
            noted.statuses.append("late")
        report = Report(19, "late", here.settle())
        with here.store.client() as client:
            kept = int(client.xlen(f"sf:{{{here.policy}}}:late"))
        report.expect(not wrong, f"{len(wrong)} late rewards were answered otherwise: {wrong[:2]}")
        report.expect(kept == len(decisions), f"{kept} late rewards kept of {len(decisions)}, each sent twice")
    return report


ROWS = (
    Row(19, "contradicting rewards", contradicting),
    Row(19, "100 at once", at_once),
    Row(19, "late rewards", late),
)
