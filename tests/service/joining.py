"""Drives the join script as the model is driven: the same batches in, the same outcomes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from service.decision import DecisionEvent, EpisodeEvent, Event, RewardEvent, encode_events
from service.join import JoinConfig
from service.join_model import Batch, Correction, Outcome, ReferenceJoin, Transition
from service.redis_streams import SCRIPT, base, script_arguments
from service.shipcall import ShipCall

Fields = dict[str, bytes]
STREAMS = ("transitions", "nstep", "late", "correction", "quarantined", "orphan")


@dataclass
class Seen:
    """What one call did, in words that both the script and the model can be put into."""

    last: int
    gap: bool = False
    verdicts: list[tuple[int, str]] = field(default_factory=list)
    transitions: dict[str, Fields] = field(default_factory=dict)
    nsteps: dict[str, Fields] = field(default_factory=dict)
    late: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    corrections: dict[str, Fields] = field(default_factory=dict)
    quarantined: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    orphans: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    lost: int = 0
    pending: int = 0


class ScriptJoin:
    """`service/join_script/` on a real server, for one policy."""

    def __init__(
        self, client: redis.Redis, policy: str, config: JoinConfig | None = None, source: bytes = SCRIPT
    ) -> None:
        self.client = client
        self.policy = policy
        self.config = config or JoinConfig()
        self.base = base(policy)
        self._script = client.register_script(source)
        self._lengths = dict.fromkeys(STREAMS, 0)

    def ship(self, batch: Batch, rows: int = 3) -> Seen:
        """Make the call with `rows` events in each blob."""
        parts = [batch.events[i : i + rows] for i in range(0, len(batch.events), rows)]
        call = ShipCall(
            self.policy, batch.producer, batch.epoch, batch.first_seq, len(batch.events), batch.through_ms,
            batch.now_ms, batch.force, batch.bye, tuple(encode_events(list(part)) for part in parts),
        )  # fmt: skip
        reply: Any = self._script([self.base], script_arguments(call, self.config, batch.now_ms))
        if reply[0] == b"GAP":
            return Seen(reply[1], gap=True)
        flat, counts = reply[2], reply[3]
        verdicts = [(flat[i], flat[i + 1].decode()) for i in range(0, len(flat), 2)]
        lengths = self._now()
        born, nsteps, late, corrections, quarantined, orphans = (self._news(each, lengths[each]) for each in STREAMS)
        joins = Counter(each["j"].decode() for each in born)
        assert counts == [
            *(joins[name] for name in ("joined", "defaulted", "void", "quarantined")),
            len(late),
            len(corrections),
            len(orphans),
            counts[7],
        ]
        return Seen(
            reply[1],
            False,
            verdicts,
            _by_id(born),
            _by_id(nsteps),
            Counter((*_aside(each), each["w"]) for each in late),
            _by_id(corrections),
            Counter(_aside(each) for each in quarantined),
            Counter((*_aside(each), each["ep"]) for each in orphans),
            counts[7],
            reply[4],
        )

    def entries(self, stream: str = "transitions") -> list[Fields]:
        found: Any = self.client.xrange(f"{self.base}:{stream}")
        return [_fields(entry) for _, entry in found]

    def suffixes(self) -> set[str]:
        """The suffixes of all keys there are."""
        return {key.decode().removeprefix(self.base + ":") for key in self.client.scan_iter(self.base + ":*")}

    def forget(self) -> None:
        self.client.delete(*self.client.scan_iter(self.base + ":*"))
        self._lengths = dict.fromkeys(STREAMS, 0)

    def snapshot(self) -> dict[bytes, tuple[bytes, int]]:
        client: Any = self.client
        return {key: (client.dump(key), max(client.pttl(key), 0)) for key in client.scan_iter(self.base + ":*")}

    def restore(self, snapshot: dict[bytes, tuple[bytes, int]]) -> None:
        self.forget()
        for key, (value, ttl) in snapshot.items():
            self.client.restore(key, ttl, value)
        self._lengths = self._now()

    def _now(self) -> dict[str, int]:
        """The lengths of all streams, for one round trip: worlds make tens of thousands of calls."""
        asked = self.client.pipeline(transaction=False)
        for stream in STREAMS:
            asked.xlen(f"{self.base}:{stream}")
        return dict(zip(STREAMS, asked.execute(), strict=True))

    def _news(self, stream: str, length: int) -> list[Fields]:
        news = length - self._lengths[stream]
        self._lengths[stream] = length
        if not news:
            return []
        found: Any = self.client.xrevrange(f"{self.base}:{stream}", count=news)
        return [_fields(entry) for _, entry in reversed(found)]


class Both:
    """Script and model, called alike. `next` counts a lane's events, so that tests need not."""

    def __init__(self, script: ScriptJoin) -> None:
        self.script, self.model = script, ReferenceJoin(script.config)
        self.next: dict[str, int] = {}
        self.now = 1_000

    def __call__(self, *events: Any, lane: str = "w", through: int = 0, seq: int | None = None, **options: Any) -> Seen:
        first = self.next.get(lane, 1) if seq is None else seq
        seen = self.raw(beat(lane, first, *events, through=through, now=self.now, **options))
        if not seen.gap:
            self.next[lane] = seen.last + 1
        return seen

    def raw(self, batch: Batch) -> Seen:
        seen = self.script.ship(batch)
        assert seen == modelled(self.model.ship(batch))
        return seen

    def born(self, *events: Any, **options: Any) -> Fields:
        """Make a call that gives birth to one transition."""
        (fields,) = self(*events, **options).transitions.values()
        return fields


def modelled(outcome: Outcome) -> Seen:
    """Put what the model did into the script's words."""
    return Seen(
        outcome.last,
        outcome.gap,
        [(seq, str(verdict)) for seq, verdict in outcome.verdicts],
        {each.decision.id: _entry(each) for each in outcome.transitions},
        {each[0].decision.id: _steps(each) for each in outcome.nsteps},
        Counter((*_reward(reward), why.encode()) for reward, why in outcome.late),
        {each.decision.id: _correction(each) for each in outcome.corrections},
        Counter(_reward(reward) for reward in outcome.quarantined),
        Counter(_orphan(reward) for reward in outcome.orphans),
        outcome.lost,
        outcome.pending,
    )


def _by_id(entries: list[Fields]) -> dict[str, Fields]:
    found = {each["i"].decode(): each for each in entries}
    assert len(found) == len(entries), "a decision gave two of these at once"
    return found


def _steps(chain: list[Transition]) -> Fields:
    """A record of n steps: the head of the first, the end of the last, and what each brought."""
    head, last = _entry(chain[0]), _entry(chain[-1])
    lists = {
        "k": str(len(chain)),
        "ids": ",".join(each.decision.id for each in chain),
        "rs": ",".join(each.reward for each in chain),
        "lps": ",".join(each.decision.log_propensity for each in chain),
        "js": ",".join(each.join for each in chain),
    }
    return (
        {name: head[name] for name in ("v", "i", "p", "e", "q", "ep", "st", "t", "a", "s", "m", "d")}
        | {name: last[name] for name in ("x", "b", "n", "nm", "ni", "o")}
        | {name: text.encode() for name, text in lists.items()}
    )


def _correction(correction: Correction) -> Fields:
    d, by = correction.decision, correction.by
    texts = {
        "v": 1, "i": d.id, "p": correction.producer, "e": correction.epoch, "q": correction.seq, "j": correction.join,
        "r": by.reward if correction.join == "joined" else "", "ri": by.reward_id, "at": by.at_ms, "w": "overtaken",
    }  # fmt: skip
    return {name: str(value).encode() for name, value in texts.items()} | {"rd": by.record}


def _orphan(reward: RewardEvent | EpisodeEvent) -> tuple[bytes, ...]:
    if isinstance(reward, RewardEvent):
        return (*_reward(reward), b"")
    texts = "", reward.reward_id, reward.reward, str(reward.at_ms)
    return (*(text.encode() for text in texts), reward.record, reward.episode.encode())


def _entry(transition: Transition) -> Fields:
    d, by = transition.decision, transition.by
    texts = {
        "v": 1, "i": d.id, "p": transition.producer, "e": transition.epoch, "q": transition.seq, "ep": d.episode,
        "st": d.step, "t": d.at_ms, "a": d.action, "r": transition.reward, "j": transition.join,
        "x": transition.end.word, "b": int(transition.end.bootstrap), "ni": transition.next.id,
        "o": transition.next.order, "at": by.at_ms if by else "", "ri": by.reward_id if by else "",
        "tf": by.flags % 4 if by else 0,
    }  # fmt: skip
    raw = {
        "s": d.state, "m": d.mask, "d": d.record, "n": transition.next.state, "nm": transition.next.mask,
        "rd": by.record if by else b"",
    }  # fmt: skip
    return {name: str(value).encode() for name, value in texts.items()} | raw


def _fields(entry: dict[bytes, bytes]) -> Fields:
    return {name.decode(): value for name, value in entry.items()}


def _aside(fields: Fields) -> tuple[bytes, ...]:
    return tuple(fields[name] for name in ("i", "ri", "r", "at", "rd"))


def _reward(reward: RewardEvent) -> tuple[bytes, ...]:
    texts = reward.id, reward.reward_id, reward.reward, str(reward.at_ms)
    return (*(text.encode() for text in texts), reward.record)


def decision(
    id: str, episode: str = "", step: int = -1, at: int = 1_000, window: int = 10_000, flags: int = 0
) -> DecisionEvent:
    state, mask, record = f"state of {id}".encode(), b"\1\0\1", b"record \xff of " + id.encode()
    return DecisionEvent(id, episode, step, at + window, at, "2", state, mask, record, f"-0.{len(id)}", flags)


def whole(
    episode: str, at: int = 1_500, value: str = "1.0", reward_id: str = "", flags: int = 1, until: int = 20_000
) -> EpisodeEvent:
    return EpisodeEvent(episode, reward_id, f"{value}{flags}", at, until, flags, value, b"its record")


def reward(
    id: str,
    at: int = 1_500,
    value: str = "1.0",
    reward_id: str = "",
    flags: int = 0,
    executed: str = "",
    sent: bytes = b"",
    until: int = 20_000,
) -> RewardEvent:
    digest = f"{value}{flags}{executed}{sent!r}"
    return RewardEvent(id, reward_id, digest, at, until, flags, executed, sent, value, b"its record")


def beat(producer: str, seq: int, *events: Event, through: int = 0, now: int = 1_000, **options: Any) -> Batch:
    return Batch(producer, 1, seq, events, through, now, **options)


def only(found: Sequence[Fields]) -> Fields:
    (one,) = found
    return one
