"""The whole reward join, slow and plain: remembers everything and looks through all of it. Pure; for readers and tests.

Duty: do by the rules of `join.py` what `service/join_script/` does in Redis, call by call. It knows nothing of Redis,
keys, expiry or limits: nothing here ever expires.
Strategy: after each event whatever may have become certain is tried again, over all decisions; the script has an index
for each of these questions, and the tests hold one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec import structs

from service.decision import DecisionEvent, DecisionFlags, EpisodeEvent, Event, RewardEvent, RewardFlags
from service.join import (
    BREAK_MS,
    NOTHING,
    OPEN,
    REWARDS_KEPT,
    End,
    JoinConfig,
    Move,
    Next,
    State,
    Verdict,
    Why,
    aggregate,
    closing,
    ending,
    in_range,
    step,
    voids,
)


@dataclass(frozen=True, slots=True)
class Transition:
    """One entry of the `transitions` stream; `reward` is "" when there is none that may be used."""

    decision: DecisionEvent
    producer: str
    epoch: int
    seq: int
    join: State
    reward: str
    end: End
    next: Next
    by: RewardEvent | None  # the reward that stands


@dataclass(frozen=True, slots=True)
class Correction:
    """One entry of the `correction` stream: what the decision's transition would have been, had it waited."""

    decision: DecisionEvent
    producer: str
    epoch: int
    seq: int
    join: State
    by: RewardEvent


@dataclass(frozen=True, slots=True)
class Batch:
    """One call: events of one lane from `first_seq` on, none for a heartbeat."""

    producer: str
    epoch: int
    first_seq: int
    events: tuple[Event, ...]
    through_ms: int
    now_ms: int
    force: bool = False
    bye: bool = False


@dataclass(slots=True)
class Outcome:
    """What one call did. A gap: nothing."""

    last: int
    gap: bool = False
    verdicts: list[tuple[int, Verdict]] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
    nsteps: list[list[Transition]] = field(default_factory=list)
    late: list[tuple[RewardEvent, Why]] = field(default_factory=list)
    corrections: list[Correction] = field(default_factory=list)
    quarantined: list[RewardEvent] = field(default_factory=list)
    orphans: list[RewardEvent | EpisodeEvent] = field(default_factory=list)
    lost: int = 0
    pending: int = 0


@dataclass(slots=True)
class _Held:
    """A decision that was shipped. `placed`: time may say what follows it, and what it follows."""

    event: DecisionEvent
    producer: str
    epoch: int
    seq: int
    placed: bool
    state: State = State.PENDING
    parts: list[RewardEvent] = field(default_factory=list)  # those that are collected, or that went into `standing`
    standing: RewardEvent | None = None
    until_ms: int | None = None  # what was accepted by then is what counts; None: not settled
    transition: Transition | None = None

    @property
    def moment(self) -> tuple[int, bytes]:
        return self.event.at_ms, self.event.id.encode()


class ReferenceJoin:
    """The join of one policy."""

    def __init__(self, config: JoinConfig) -> None:
        self._config = config
        self._decisions: dict[str, _Held] = {}
        self._early: dict[str, list[RewardEvent]] = {}
        self._late: dict[tuple[str, str], str] = {}  # (decision, reward_id) -> digest
        self._ends: dict[str, int] = {}  # when each episode ended
        self._of_episodes: dict[tuple[str, str], EpisodeEvent] = {}  # by episode and reward_id
        self._waiting: list[EpisodeEvent] = []  # those that are not given to a decision yet
        self._chains: list[_Held] = []  # closed, and without their record of n steps
        self._last: dict[tuple[str, int], int] = {}
        self._lanes: dict[tuple[str, int], tuple[int, int]] = {}  # event time shipped through, when heard
        self._horizon = 0  # invariant: no decision is placed at or before this time any more
        self._called_ms = self._since_ms = 0
        self._held_until_ms = 0
        self._out = Outcome(0)

    def ship(self, batch: Batch) -> Outcome:
        """Apply one call. The batch's `force` says that the hole before it is known."""
        lane, now = (batch.producer, batch.epoch), batch.now_ms
        if now - self._called_ms > BREAK_MS:
            self._since_ms = now
        self._called_ms = now
        last = self._last.get(lane, 0)
        self._out = out = Outcome(last, lost=max(0, batch.first_seq - last - 1))
        if now >= self._held_until_ms and self._strangers(batch, out.lost):
            self._held_until_ms = now + self._config.max_lag_ms
        if out.lost and not batch.force:
            out.gap, out.lost = True, 0
            return out
        for seq, event in enumerate(batch.events, batch.first_seq):
            if seq > last:
                self._apply(event, batch, seq)
        out.last = self._last[lane] = max(last, batch.first_seq + len(batch.events) - 1)
        before, _ = self._lanes.pop(lane, (0, 0))
        if not batch.bye:
            self._lanes[lane] = max(before, batch.through_ms), now
        self._pass_time(now)
        self._write_chains()
        out.pending = sum(held.state in OPEN for held in self._decisions.values())
        return out

    def _counts(self, lane: tuple[str, int], now: int) -> bool:
        """Whether deadlines wait for a lane: it was heard of within max_lag, breaks of the join left out."""
        known = self._lanes.get(lane)
        return known is not None and now - max(known[1], self._since_ms) < self._config.max_lag_ms

    def _strangers(self, batch: Batch, lost: int) -> bool:
        """Whether there may be lanes that the join does not know.

        This one has shipped what the join has forgotten, or is new and has recorded before anybody could call.
        """
        lane = batch.producer, batch.epoch
        if lost:
            return not self._counts(lane, batch.now_ms)
        oldest = min([batch.through_ms + 1, *(event.at_ms for event in batch.events[:1])])
        return lane not in self._last and oldest < self._since_ms - BREAK_MS

    def _apply(self, event: Event, batch: Batch, seq: int) -> None:
        if isinstance(event, RewardEvent):
            self._out.verdicts.append((seq, self._judge(event)))
        elif isinstance(event, EpisodeEvent):
            self._out.verdicts.append((seq, self._meet(event)))
        elif event.id not in self._decisions:
            placed = event.step < 0 and event.at_ms > self._horizon
            self._decisions[event.id] = _Held(event, batch.producer, batch.epoch, seq, placed)
            for reward in self._early.pop(event.id, []):
                self._judge(reward)
        self._settle()

    # Rewards

    def _judge(self, reward: RewardEvent) -> Verdict:
        held = self._decisions.get(reward.id)
        if held is None:
            return self._wait(reward)
        for part in held.parts:
            if part.reward_id == reward.reward_id:
                held.state = step(held.state, Move.OTHER_REWARD)
                return Verdict.DUPLICATE if part.digest == reward.digest else Verdict.CONFLICT
        why = self._why_late(held, reward)
        if why is Why.OVERTAKEN and held.state is State.DEFAULTED and not held.parts:
            return self._correct(held, reward)
        if why is not None:
            held.state = step(held.state, Move.OTHER_REWARD)
            return self._put_aside(reward, why)
        return self._take(held, reward)

    def _take(self, held: _Held, reward: RewardEvent) -> Verdict:
        held.parts.append(reward)
        if self._config.aggregation != "first":
            held.state = step(held.state, Move.PART)
            if reward.flags & (RewardFlags.TERMINATED | RewardFlags.TRUNCATED) and held.event.episode:
                self._end(held.event.episode, reward.at_ms)
            return Verdict.JOINED
        held.until_ms = held.event.due_ms
        self._stand(held, reward)
        return Verdict.QUARANTINED if held.state is State.QUARANTINED else Verdict.JOINED

    def _why_late(self, held: _Held, reward: RewardEvent) -> Why | None:
        if self._config.aggregation == "first" and held.parts:
            return Why.CLOSED
        if reward.at_ms > held.event.due_ms:
            return Why.LATE
        if held.parts and reward.at_ms > self._closing(held):
            return Why.CLOSED
        if held.state not in (State.PENDING, State.COLLECTING):
            return Why.OVERTAKEN
        return Why.CLOSED if len(held.parts) == REWARDS_KEPT else None

    def _closing(self, held: _Held) -> int:
        """Until when rewards of a decision that has some count; settled once one stands."""
        if held.until_ms is not None:
            return held.until_ms
        return closing(held.event, held.parts, self._ends.get(held.event.episode, math.inf))

    def _stand(self, held: _Held, reward: RewardEvent) -> None:
        """This is the decision's reward from now on."""
        held.standing = reward
        nowhere = End.LOST if held.event.episode else End.SINGLE
        if voids(held.event, reward):
            return self._close(held, Move.NOT_EXECUTED, nowhere, NOTHING)
        if not in_range(reward.reward, self._config):
            self._out.quarantined.append(reward)
            return self._close(held, Move.OUT_OF_RANGE, nowhere, NOTHING)
        known = ending(held.event, reward, self._successor(held))
        if known:
            return self._close(held, Move.LAST_WORD, *known)
        held.state = step(held.state, Move.REWARD)
        return None

    def _correct(self, held: _Held, reward: RewardEvent) -> Verdict:
        """The default has left, but the reward was there in time."""
        held.parts, held.standing, held.until_ms = [reward], reward, held.event.due_ms
        held.state = step(held.state, Move.OTHER_REWARD)
        join = State.JOINED if in_range(reward.reward, self._config) else State.QUARANTINED
        join = State.VOID if voids(held.event, reward) else join
        self._out.corrections.append(Correction(held.event, held.producer, held.epoch, held.seq, join, reward))
        return Verdict.CORRECTION

    def _wait(self, reward: RewardEvent) -> Verdict:
        waiting = self._early.setdefault(reward.id, [])
        for index, other in enumerate(waiting):
            if other.reward_id == reward.reward_id:
                if other.digest != reward.digest:
                    return Verdict.CONFLICT
                patience = max(other.until_ms, reward.until_ms)  # sent twice: the copy accepted first counts
                first = min(other, reward, key=lambda each: each.at_ms)
                waiting[index] = structs.replace(first, until_ms=patience)
                return Verdict.EARLY
        if len(waiting) == REWARDS_KEPT:
            return self._put_aside(reward, Why.CLOSED)
        waiting.append(reward)
        return Verdict.EARLY

    def _put_aside(self, reward: RewardEvent, why: Why) -> Verdict:
        """Keep it on the `late` stream, once for each reward_id."""
        digest = self._late.setdefault((reward.id, reward.reward_id), "")
        if not digest:
            self._late[reward.id, reward.reward_id] = reward.digest
            self._out.late.append((reward, why))
        return Verdict.LATE if digest in ("", reward.digest) else Verdict.CONFLICT

    # Episodes

    def _meet(self, event: EpisodeEvent) -> Verdict:
        """A reward for a whole episode: which decision was the last shows when everybody has shipped through it."""
        name = event.episode, event.reward_id
        standing = self._of_episodes.setdefault(name, event)
        if standing is not event:
            return Verdict.DUPLICATE if standing.digest == event.digest else Verdict.CONFLICT
        self._waiting.append(event)
        self._end(event.episode, event.at_ms)
        return Verdict.EARLY

    def _end(self, episode: str, at_ms: int) -> None:
        self._ends[episode] = min(at_ms, self._ends.get(episode, at_ms))

    def _give(self, event: EpisodeEvent) -> None:
        """Give an episode's reward to its last decision."""
        played = [held for held in self._decisions.values() if held.event.episode == event.episode]
        if not played:
            return self._out.orphans.append(event)
        last = played[0]
        for held in played[1:]:
            a, b = held.event, last.event
            if a.step > b.step or (a.step == b.step and (a.step >= 0 or held.moment > last.moment)):
                last = held
        given = event.reward_id, event.digest, event.at_ms, event.until_ms, event.flags, "", b"", event.reward
        self._judge(RewardEvent(last.event.id, *given, event.record))
        return None

    def _successor(self, held: _Held) -> Next | None:
        mine = held.event
        same = [other for other in self._decisions.values() if mine.episode and other.event.episode == mine.episode]
        if mine.step >= 0:
            if any(other.event.step == mine.step and other.state not in OPEN for other in same):
                return None  # this step was taken twice: the one that closed first has what followed
            following = [other for other in same if other.event.step == mine.step + 1]
            return _first(reversed(following), "step")
        after = [other for other in same if held.placed and other.placed and other.moment > held.moment]
        nearest = sorted(after, key=lambda other: other.moment)[:1]
        return _first((other for other in nearest if other.event.at_ms <= self._horizon), "time")

    def _settle(self) -> None:
        for held in self._decisions.values():
            if held.state is State.REWARDED and held.standing:
                known = ending(held.event, held.standing, self._successor(held))
                if known:
                    self._close(held, Move.SUCCESSOR, *known)

    # Time

    def _pass_time(self, now: int) -> None:
        """Let the low watermark act: order first, then whole episodes, then deadlines, then rewards that never found
        their decision.
        """
        self._lanes = {lane: told for lane, told in self._lanes.items() if self._counts(lane, now)}
        low = min((through for through, _ in self._lanes.values()), default=0)
        if now < self._held_until_ms:
            low = 0  # the join has forgotten who there is
        self._horizon = max(self._horizon, low)
        self._settle()
        for event in sorted(self._waiting, key=lambda each: (each.at_ms, each.reward_id, each.episode)):
            if event.at_ms <= low:
                self._waiting.remove(event)
                self._give(event)
        due = [(self._due(held), held.event.id, held) for held in self._decisions.values() if held.state in OPEN]
        for when, _, held in sorted(due, key=lambda each: each[:2]):
            if when <= low:
                self._expire(held, low)
        for id, waiting in list(self._early.items()):
            if max(reward.until_ms for reward in waiting) <= low:
                self._out.orphans += self._early.pop(id)

    def _due(self, held: _Held) -> int:
        return self._closing(held) if held.state is State.COLLECTING else held.event.due_ms

    def _expire(self, held: _Held, low: int) -> None:
        if held.state is State.COLLECTING:
            held.until_ms = until = self._closing(held)
            for part in held.parts:
                if part.at_ms > until:
                    self._put_aside(part, Why.CLOSED)
            held.parts = [part for part in held.parts if part.at_ms <= until]
            self._stand(held, aggregate(held.parts, self._config.aggregation, until))
        if held.state in OPEN and held.event.due_ms <= low:
            following = None if held.standing else self._successor(held)
            end = End.NONE if following else End.LOST if held.event.episode else End.SINGLE
            self._close(held, Move.DEADLINE, end, following or NOTHING)

    # Transitions

    def _close(self, held: _Held, move: Move, end: End, following: Next) -> None:
        held.state = step(held.state, move)
        reward = held.standing.reward if held.standing and held.state is State.JOINED else ""
        if held.state is State.DEFAULTED:
            reward = self._config.default_reward
        held.transition = Transition(
            held.event, held.producer, held.epoch, held.seq, held.state, reward, end, following, held.standing
        )
        self._out.transitions.append(held.transition)
        if self._config.n_step > 1 and reward:
            self._chains.append(held)

    def _write_chains(self) -> None:
        """Write records of n steps that are complete."""
        for held in list(self._chains):
            chain = self._chain(held)
            if chain is not None:
                self._chains.remove(held)
                self._out.nsteps.append(chain)

    def _chain(self, held: _Held) -> list[Transition] | None:
        """The transitions from this one on, up to n, an end, a switch, or one without a reward; None: not known yet."""
        chain: list[Transition] = []
        following: _Held | None = held
        while following is not None and len(chain) < self._config.n_step:
            transition = following.transition
            if transition is None:
                return None
            cut = bool(chain) and bool(following.event.flags & DecisionFlags.SWITCHED)
            if cut or not transition.reward:
                break
            chain.append(transition)
            following = self._decisions.get(transition.next.id) if transition.end is End.NONE else None
        return chain


def _first(found: Iterable[_Held], order: str) -> Next | None:
    held = next(iter(found), None)
    return Next(held.event.id, held.event.state, held.event.mask, order) if held else None
