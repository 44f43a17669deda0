"""What was lost, what nobody sent, what came twice: a journal held against what lies in Redis and what a trainer got.

Duty: counting and comparing. It starts, stops and waits for nothing; the world must be healed and drained before.
Strategy: acts are told apart by (episode, step), rewards by their decision. Delivered is what the raw stream holds or a
trainer got. A reward is delivered with its decision's transition, or on the streams `late`, `correction` and `orphan`.
Promise: it trusts the service in nothing: each 200 is computed again, and each delivered value compared with the one
that was answered or sent.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import redis

from tests.faults.journal import Act, Journal, Token
from tests.faults.policy import violations
from tests.faults.trainer import Delivered

Entry = Mapping[bytes, bytes]


@dataclass(frozen=True)
class Found:
    """What lies in Redis, and what the trainer has read."""

    entries: Sequence[Entry]
    aside: Sequence[Entry]  # rewards that are nobody's: late, corrections of a default, without a decision
    rows: Sequence[Delivered] = ()
    copies: int = 0

    @classmethod
    def read(cls, client: redis.Redis, policy: str, rows: Sequence[Delivered] = (), copies: int = 0) -> Found:
        def stream(name: str) -> list[Entry]:
            found: Any = client.xrange(f"sf:{{{policy}}}:{name}")
            return [fields for _, fields in found]

        return cls(stream("transitions"), [*stream("late"), *stream("correction"), *stream("orphan")], rows, copies)


@dataclass
class Tally:
    issued: int = 0
    acknowledged: int = 0
    delivered: int = 0
    lost: list[str] = field(default_factory=list)  # acknowledged and not delivered
    unexpected: list[str] = field(default_factory=list)  # delivered and never issued, or under another name


@dataclass
class Verdict:
    acts: Tally = field(default_factory=Tally)
    rewards: Tally = field(default_factory=Tally)
    duplicates_before: int = 0  # copies of an event, by (producer, epoch, seq), before anybody drops them
    duplicates_after: int = 0  # transitions that a trainer got twice all the same
    mismatches: list[str] = field(default_factory=list)  # delivered otherwise than answered or sent
    violations: list[str] = field(default_factory=list)  # answers that break a rule
    unlogged: int = 0
    explored_by_window: Counter[str] = field(default_factory=Counter)

    @property
    def lost(self) -> int:
        return len(self.acts.lost) + len(self.rewards.lost)

    @property
    def unexpected(self) -> int:
        return len(self.acts.unexpected) + len(self.rewards.unexpected)


def judge(journal: Journal, found: Found) -> Verdict:
    verdict = Verdict()
    _judge_answers(journal, verdict)
    transitions = _by_token(found)
    _judge_acts(journal, transitions, verdict)
    _judge_rewards(journal, found, verdict)
    _judge_payloads(journal, found, verdict)
    identities = Counter(_identity(entry) for entry in found.entries)
    verdict.duplicates_before = max(sum(identities.values()) - len(identities), found.copies)
    ids = Counter(row.id for row in found.rows)
    verdict.duplicates_after = sum(ids.values()) - len(ids)
    for entry in {entry[b"i"]: entry for entry in found.entries}.values():
        record = msgspec.msgpack.decode(entry[b"d"])
        if record.get("explored"):
            verdict.explored_by_window[record.get("window", "")] += 1
    return verdict


def _judge_answers(journal: Journal, verdict: Verdict) -> None:
    for token, act in journal.acts.items():
        if act.answer is not None:
            verdict.violations += [f"{token}: {wrong}" for wrong in violations(act.request, act.answer)]
            verdict.unlogged += not act.answer["logged"]


def _by_token(found: Found) -> dict[Token, set[str]]:
    """Ids of the transitions of each (episode, step)."""
    ids: dict[Token, set[str]] = {}
    for entry in found.entries:
        ids.setdefault((entry[b"ep"].decode(), int(entry[b"st"])), set()).add(entry[b"i"].decode())
    for row in found.rows:
        ids.setdefault(row.token, set()).add(row.id)
    return ids


def _judge_acts(journal: Journal, transitions: Mapping[Token, set[str]], verdict: Verdict) -> None:
    tally = verdict.acts
    tally.issued, tally.delivered = len(journal.acts), len(transitions)
    for token, act in journal.acts.items():
        if act.acked:
            tally.acknowledged += 1
            if _id(act) not in transitions.get(token, ()):
                tally.lost.append(f"{token} {_id(act)}")
    for token, ids in transitions.items():
        issued = journal.acts.get(token)
        if issued is None or len(ids) > 1 or (issued.answer is not None and ids != {_id(issued)}):
            tally.unexpected.append(f"{token} {sorted(ids)}")


def _judge_rewards(journal: Journal, found: Found, verdict: Verdict) -> None:
    tally = verdict.rewards
    joined = {(entry[b"i"].decode(), float(entry[b"r"])) for entry in found.entries if entry[b"j"] == b"joined"}
    joined |= {(row.id, row.reward) for row in found.rows if row.join == "joined"}
    delivered = joined | {(entry[b"i"].decode(), float(entry[b"r"])) for entry in found.aside}
    tally.issued = len(journal.rewards)
    tally.delivered = len({decision for decision, _ in delivered})
    for decision, reward in journal.rewards.items():
        if reward.acked:
            tally.acknowledged += 1
            if (decision, reward.value) not in delivered:
                tally.lost.append(f"{decision} {reward.value} {reward.statuses}")
            elif "joined" in reward.statuses and (decision, reward.value) not in joined:
                verdict.mismatches.append(f"the reward of {decision} was answered joined, and is not")
    effective = Counter(decision for decision, _ in joined)
    tally.unexpected += [f"{decision} has {count} rewards" for decision, count in effective.items() if count > 1]
    for decision, value in delivered:
        sent = journal.rewards.get(decision)
        if sent is None or value not in {sent.value, *sent.others}:
            tally.unexpected.append(f"{decision} {value}")


def _judge_payloads(journal: Journal, found: Found, verdict: Verdict) -> None:
    for entry in found.entries:
        act = journal.acts.get((entry[b"ep"].decode(), int(entry[b"st"])))
        if act is not None:
            verdict.mismatches += _differences(act, entry[b"i"].decode(), _seen_in(entry))
    for row in found.rows:
        act = journal.acts.get(row.token)
        if act is not None:
            propensity = None if math.isnan(row.propensity) else row.propensity
            seen = {"action": row.action, "propensity": propensity, "explored": row.explored, "version": row.version}
            verdict.mismatches += _differences(act, row.id, {"state": row.state, **seen})


def _seen_in(entry: Entry) -> dict[str, Any]:
    record = msgspec.msgpack.decode(entry[b"d"])
    told = {name: record.get(name) for name in ("propensity", "explored", "version", "action_name", "fallback")}
    return {"state": entry[b"s"], "action": int(entry[b"a"]), **told}


def _differences(act: Act, decision: str, seen: Mapping[str, Any]) -> Iterable[str]:
    if seen["state"] != struct.pack("<3f", *act.request["state"]):
        yield f"{decision}: another state than {act.request['state']}"
    if act.answer is not None and act.answer["decision_id"] == decision:
        for name in seen.keys() - {"state"}:
            if seen[name] != act.answer[name]:
                yield f"{decision}: {name} was answered {act.answer[name]!r}, delivered {seen[name]!r}"


def _identity(entry: Entry) -> tuple[bytes, bytes, bytes]:
    return entry[b"p"], entry[b"e"], entry[b"q"]


def _id(act: Act) -> str:
    assert act.answer is not None
    return str(act.answer["decision_id"])
