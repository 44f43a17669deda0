"""The reward join as a table and as a slow, plain model. Pure.

Duty: say what becomes of a decision and its rewards. `service/join.lua` does it, in Redis, atomically and with indexes;
`ReferenceJoin` does the same by looking through everything each time, so that a reader can check it and a test can
compare the two, call by call. It knows nothing of Redis, keys, expiry or limits.
Strategy: a decision's life is TABLE; an unknown pair of state and move raises. How a transition ends is `ending`, a
function of a decision, its reward and its successor.
Promise: exactly one `Transition` for each decision; docs/join.md shows the table, and a test says that it does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple

from msgspec import structs

from service.decision import DecisionEvent, Event, RewardEvent, RewardFlags

# Shippers call every second: a longer silence means that Redis was away, not the producers.
BREAK_MS = 10_000
# So many rewards may wait for one decision that is not here yet.
EARLY_KEPT = 8


class State(StrEnum):
    PENDING = "pending"  # waits for its reward
    REWARDED = "rewarded"  # waits for its successor; shown as `pending`, waiting for `successor`
    JOINED = "joined"
    DEFAULTED = "defaulted"
    VOID = "void"


class Move(StrEnum):
    REWARD = "reward in time"
    LAST_WORD = "reward in time, end known"  # it tells how the step ended, or the successor is here
    NOT_EXECUTED = "not executed"
    SUCCESSOR = "successor known"
    DEADLINE = "deadline"
    OTHER_REWARD = "other or late reward"  # kept on the `late` stream, or a repetition


TABLE: dict[tuple[State, Move], State] = {
    (State.PENDING, Move.REWARD): State.REWARDED,
    (State.PENDING, Move.LAST_WORD): State.JOINED,
    (State.PENDING, Move.NOT_EXECUTED): State.VOID,
    (State.PENDING, Move.DEADLINE): State.DEFAULTED,
    (State.PENDING, Move.OTHER_REWARD): State.PENDING,
    (State.REWARDED, Move.SUCCESSOR): State.JOINED,
    (State.REWARDED, Move.DEADLINE): State.JOINED,
    (State.REWARDED, Move.OTHER_REWARD): State.REWARDED,
    (State.JOINED, Move.OTHER_REWARD): State.JOINED,
    (State.DEFAULTED, Move.OTHER_REWARD): State.DEFAULTED,
    (State.VOID, Move.OTHER_REWARD): State.VOID,
}
OPEN = frozenset({State.PENDING, State.REWARDED})


def step(state: State, move: Move) -> State:
    """Return the state after a move. Raises ValueError for a pair that cannot be."""
    try:
        return TABLE[state, move]
    except KeyError:
        raise ValueError(f"a {state.name} decision cannot meet {move.name}") from None


def diagram() -> str:
    """Draw TABLE for mermaid, moves that change nothing left out."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.PENDING.name}: decision shipped"]
    lines += [f"    {one.name} --> {two.name}: {move.value}" for (one, move), two in TABLE.items() if one is not two]
    lines += [f"    {state.name} --> [*]" for state in State if state not in OPEN]
    return "\n".join(lines)


class Verdict(StrEnum):
    """What a reward event is told."""

    JOINED = "joined"  # it is its decision's reward
    EARLY = "early"  # its decision has not been shipped; it waits
    LATE = "late"  # kept on the `late` stream, see Why
    DUPLICATE = "duplicate"  # the same reward stands already
    CONFLICT = "conflict"  # another body stands under this reward_id; nothing changes


class Why(StrEnum):
    """Why a reward is on the `late` stream."""

    LATE = "late"  # accepted after the window
    CLOSED = "closed"  # another reward_id came first
    OVERTAKEN = "overtaken"  # accepted in time, but the default had left: its producer was silent beyond max_lag


class End(Enum):
    """How a transition ends, and whether its value goes on in the next state."""

    NONE = ("none", True)
    TERMINATED = ("terminated", False)
    TRUNCATED = ("truncated", True)
    LOST = ("lost", False)  # there may have been a next state; it is not known
    SINGLE = ("single", False)  # no episode

    def __init__(self, word: str, bootstrap: bool) -> None:
        self.word = word
        self.bootstrap = bootstrap


class Next(NamedTuple):
    """What follows a decision. `order` says who says so: `step`, `time` or `reward`."""

    id: str
    state: bytes
    mask: bytes
    order: str


NOTHING = Next("", b"", b"", "")


@dataclass(frozen=True, slots=True)
class JoinConfig:
    """What the join must know of a policy; durations in milliseconds."""

    max_lag_ms: int = 300_000  # a producer silent for longer holds nothing back
    sweep_limit: int = 256  # most deadlines that one call works off
    record_ttl_ms: int = 86_400_000  # a closed decision can be read for so long
    successor_ttl_ms: int = 90_000_000  # a state waits so long for its predecessor to close
    default_reward: str = "0.0"

    def __post_init__(self) -> None:
        smallest = min(self.max_lag_ms, self.sweep_limit, self.record_ttl_ms, self.successor_ttl_ms)
        if smallest < 1:
            raise ValueError("the join's durations and limits must be at least 1")


@dataclass(frozen=True, slots=True)
class Transition:
    """One entry of the `transitions` stream; `reward` is "" when void."""

    decision: DecisionEvent
    producer: str
    epoch: int
    seq: int
    join: State
    reward: str
    end: End
    next: Next
    by: RewardEvent | None  # the reward that stands


def voids(decision: DecisionEvent, reward: RewardEvent) -> bool:
    """Whether the reward says that the decision's action was not what was done."""
    other = reward.executed_action != "" and reward.executed_action != decision.action
    return bool(reward.flags & RewardFlags.NOT_EXECUTED) or other


def ending(decision: DecisionEvent, reward: RewardEvent, following: Next | None) -> tuple[End, Next] | None:
    """Say how a rewarded decision ends, or None while that is not known."""
    sent = Next("", reward.next_state, b"", "reward") if reward.next_state else NOTHING
    if reward.flags & RewardFlags.TERMINATED:
        return End.TERMINATED, sent
    if reward.flags & RewardFlags.TRUNCATED:
        # The episode was cut here: a later step of the same name is not what this action led to.
        return (End.TRUNCATED if reward.next_state else End.LOST), sent
    if reward.next_state:
        return End.NONE, sent
    if not decision.episode:
        return End.SINGLE, NOTHING
    return (End.NONE, following) if following else None


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
    late: list[tuple[RewardEvent, Why]] = field(default_factory=list)
    orphans: list[RewardEvent] = field(default_factory=list)
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
    standing: RewardEvent | None = None

    @property
    def moment(self) -> tuple[int, bytes]:
        return self.event.at_ms, self.event.id.encode()


class ReferenceJoin:
    """The whole join, remembering everything and looking through all of it. For tests; nothing ever expires."""

    def __init__(self, config: JoinConfig) -> None:
        self._config = config
        self._decisions: dict[str, _Held] = {}
        self._early: dict[str, list[RewardEvent]] = {}
        self._late: dict[tuple[str, str], str] = {}  # (decision, reward_id) -> digest
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
        elif event.id not in self._decisions:
            placed = event.step < 0 and event.at_ms > self._horizon
            self._decisions[event.id] = _Held(event, batch.producer, batch.epoch, seq, placed)
            for reward in self._early.pop(event.id, []):
                self._judge(reward)
        self._settle()

    def _judge(self, reward: RewardEvent) -> Verdict:
        held = self._decisions.get(reward.id)
        if held is None:
            return self._wait(reward)
        standing = held.standing
        if standing is not None and standing.reward_id == reward.reward_id:
            held.state = step(held.state, Move.OTHER_REWARD)
            return Verdict.DUPLICATE if standing.digest == reward.digest else Verdict.CONFLICT
        why = self._why_late(held, reward)
        if why is not None:
            held.state = step(held.state, Move.OTHER_REWARD)
            return self._put_aside(reward, why)
        held.standing = reward
        if voids(held.event, reward):
            self._close(held, Move.NOT_EXECUTED, End.LOST if held.event.episode else End.SINGLE, NOTHING)
            return Verdict.JOINED
        known = ending(held.event, reward, self._successor(held))
        if known:
            self._close(held, Move.LAST_WORD, *known)
        else:
            held.state = step(held.state, Move.REWARD)
        return Verdict.JOINED

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
        if len(waiting) == EARLY_KEPT:
            return self._put_aside(reward, Why.CLOSED)
        waiting.append(reward)
        return Verdict.EARLY

    def _why_late(self, held: _Held, reward: RewardEvent) -> Why | None:
        if held.standing is not None:
            return Why.CLOSED
        if reward.at_ms > held.event.due_ms:
            return Why.LATE
        return None if held.state in OPEN else Why.OVERTAKEN

    def _put_aside(self, reward: RewardEvent, why: Why) -> Verdict:
        """Keep it on the `late` stream, once for each reward_id."""
        digest = self._late.setdefault((reward.id, reward.reward_id), "")
        if not digest:
            self._late[reward.id, reward.reward_id] = reward.digest
            self._out.late.append((reward, why))
        return Verdict.LATE if digest in ("", reward.digest) else Verdict.CONFLICT

    def _settle(self) -> None:
        for held in self._decisions.values():
            if held.state is State.REWARDED and held.standing:
                known = ending(held.event, held.standing, self._successor(held))
                if known:
                    self._close(held, Move.SUCCESSOR, *known)

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

    def _pass_time(self, now: int) -> None:
        """Let the low watermark act: order first, then deadlines, then rewards that never found their decision."""
        self._lanes = {lane: told for lane, told in self._lanes.items() if self._counts(lane, now)}
        low = min((through for through, _ in self._lanes.values()), default=0)
        if now < self._held_until_ms:
            low = 0  # the join has forgotten who there is
        self._horizon = max(self._horizon, low)
        self._settle()
        for held in self._decisions.values():
            if held.state in OPEN and held.event.due_ms <= low:
                self._expire(held)
        for id, waiting in list(self._early.items()):
            if max(reward.until_ms for reward in waiting) <= low:
                self._out.orphans += self._early.pop(id)

    def _expire(self, held: _Held) -> None:
        following = None if held.standing else self._successor(held)
        end = End.NONE if following else End.LOST if held.event.episode else End.SINGLE
        self._close(held, Move.DEADLINE, end, following or NOTHING)

    def _close(self, held: _Held, move: Move, end: End, following: Next) -> None:
        held.state = step(held.state, move)
        reward = held.standing.reward if held.standing and held.state is State.JOINED else ""
        if held.state is State.DEFAULTED:
            reward = self._config.default_reward
        self._out.transitions.append(
            Transition(
                held.event, held.producer, held.epoch, held.seq, held.state, reward, end, following, held.standing
            )
        )


def _first(found: Iterable[_Held], order: str) -> Next | None:
    held = next(iter(found), None)
    return Next(held.event.id, held.event.state, held.event.mask, order) if held else None
