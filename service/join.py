"""The reward join as a table, and the rules that are functions of values. Pure.

Duty: say what becomes of a decision and its rewards. `service/join_script/` does it, in Redis, atomically and with
indexes; `join_model.py` does the same by looking through everything each time, so that a reader can check it and a
test can compare the two, call by call. It knows nothing of Redis, keys, expiry or limits.
Strategy: a decision's life is TABLE; an unknown pair of state and move raises. Which rewards count is `closing`, what
they come to is `aggregate`, how a transition ends is `ending`: functions of a decision and what was said of it, in
event time, so that the order in which things arrive does not matter.
Promise: exactly one `Transition` for each decision; docs/join.md shows the table, and a test says that it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Literal, NamedTuple, TypeVar

from service.decision import DecisionEvent, RewardEvent, RewardFlags

# Shippers call every second: a longer silence means that Redis was away, not the producers.
BREAK_MS = 10_000
# So many rewards may wait for one decision that is not here yet, or be collected for one that is.
REWARDS_KEPT = 64

Aggregation = Literal["first", "sum", "last", "max", "min", "mean"]

_Said = TypeVar("_Said", str, bytes)


class State(StrEnum):
    PENDING = "pending"  # waits for its reward
    COLLECTING = "collecting"  # has rewards, and more may count; shown as `pending`, waiting for `rewards`
    REWARDED = "rewarded"  # waits for its successor; shown as `pending`, waiting for `successor`
    JOINED = "joined"
    DEFAULTED = "defaulted"
    VOID = "void"
    QUARANTINED = "quarantined"


class Move(StrEnum):
    PART = "reward to be aggregated"
    REWARD = "reward stands"
    LAST_WORD = "reward stands, end known"  # it tells how the step ended, or the successor is here
    NOT_EXECUTED = "not executed"
    OUT_OF_RANGE = "reward out of range"
    SUCCESSOR = "successor known"
    DEADLINE = "deadline"
    OTHER_REWARD = "other or late reward"  # kept on a stream of its own, or a repetition


TABLE: dict[tuple[State, Move], State] = {
    (State.PENDING, Move.PART): State.COLLECTING,
    (State.PENDING, Move.REWARD): State.REWARDED,
    (State.PENDING, Move.LAST_WORD): State.JOINED,
    (State.PENDING, Move.NOT_EXECUTED): State.VOID,
    (State.PENDING, Move.OUT_OF_RANGE): State.QUARANTINED,
    (State.PENDING, Move.DEADLINE): State.DEFAULTED,
    (State.PENDING, Move.OTHER_REWARD): State.PENDING,
    (State.COLLECTING, Move.PART): State.COLLECTING,
    (State.COLLECTING, Move.REWARD): State.REWARDED,
    (State.COLLECTING, Move.LAST_WORD): State.JOINED,
    (State.COLLECTING, Move.NOT_EXECUTED): State.VOID,
    (State.COLLECTING, Move.OUT_OF_RANGE): State.QUARANTINED,
    (State.COLLECTING, Move.OTHER_REWARD): State.COLLECTING,
    (State.REWARDED, Move.SUCCESSOR): State.JOINED,
    (State.REWARDED, Move.DEADLINE): State.JOINED,
    (State.REWARDED, Move.OTHER_REWARD): State.REWARDED,
    (State.JOINED, Move.OTHER_REWARD): State.JOINED,
    (State.DEFAULTED, Move.OTHER_REWARD): State.DEFAULTED,
    (State.VOID, Move.OTHER_REWARD): State.VOID,
    (State.QUARANTINED, Move.OTHER_REWARD): State.QUARANTINED,
}
OPEN = frozenset({State.PENDING, State.COLLECTING, State.REWARDED})


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

    JOINED = "joined"  # it is its decision's reward, or a part of it
    EARLY = "early"  # what it is for has not been shipped, or may not all have been; it waits
    LATE = "late"  # kept on the `late` stream, see Why
    CORRECTION = "correction"  # in time, but the default had left: kept on the `correction` stream
    QUARANTINED = "quarantined"  # out of the policy's range: the decision's transition has no reward
    DUPLICATE = "duplicate"  # the same reward stands already
    CONFLICT = "conflict"  # another body stands under this reward_id; nothing changes


class Why(StrEnum):
    """Why a reward is on the `late` stream."""

    LATE = "late"  # accepted after the window
    CLOSED = "closed"  # another reward_id came first, or the last word had been said
    OVERTAKEN = "overtaken"  # accepted in time, but its producer was silent beyond max_lag, and the transition had left


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
    """What the join must know of a policy; durations in milliseconds, numbers as text so that none is rounded."""

    max_lag_ms: int = 300_000  # a producer silent for longer holds nothing back
    sweep_limit: int = 256  # most deadlines that one call works off
    record_ttl_ms: int = 3_600_000  # a closed decision can be read for so long
    successor_ttl_ms: int = 90_000_000  # a state waits so long for its predecessor to close
    episode_ttl_ms: int = 3_600_000  # what was the last decision of an episode is known for so long after it
    default_reward: str = "0.0"
    aggregation: Aggregation = "first"
    low: str = "-inf"  # a transition's reward outside [low, high] is quarantined
    high: str = "inf"
    n_step: int = 1  # above 1, records of so many steps are written to a stream of their own

    def __post_init__(self) -> None:
        lives = self.record_ttl_ms, self.successor_ttl_ms, self.episode_ttl_ms
        if min(self.max_lag_ms, self.sweep_limit, self.n_step, *lives) < 1:
            raise ValueError("the join's durations, limits and steps must be at least 1")


def voids(decision: DecisionEvent, reward: RewardEvent) -> bool:
    """Whether the reward says that the decision's action was not what was done."""
    other = reward.executed_action != "" and reward.executed_action != decision.action
    return bool(reward.flags & RewardFlags.NOT_EXECUTED) or other


def closing(decision: DecisionEvent, parts: Sequence[RewardEvent], episode_end_ms: float = math.inf) -> int:
    """Say until when rewards of a decision count, by event time; there is one part at least.

    Until its window ends, or a reward says the last word (`final`, the end of the episode, not executed); and once its
    episode has ended, no longer than until the first reward is there. More parts never make it later.
    """
    last = RewardFlags.FINAL | RewardFlags.TERMINATED | RewardFlags.TRUNCATED
    words = [part.at_ms for part in parts if part.flags & last or voids(decision, part)]
    first = min(part.at_ms for part in parts)
    return int(min(decision.due_ms, *words, max(episode_end_ms, first)))


def aggregate(parts: Sequence[RewardEvent], how: Aggregation, until_ms: int) -> RewardEvent:
    """Make one reward of those accepted by `until_ms`: what the last of them says, with all their flags.

    Numbers that are computed are written with 17 digits, those that are chosen stay as they were sent.
    """
    counted = sorted((part for part in parts if part.at_ms <= until_ms), key=lambda part: (part.at_ms, part.reward_id))
    last, flags = counted[-1], 0
    for part in counted:
        flags |= part.flags
    return RewardEvent(
        id=last.id,
        reward_id=last.reward_id,
        digest=last.digest,
        at_ms=last.at_ms,
        until_ms=last.until_ms,
        flags=flags,
        executed_action=_latest([part.executed_action for part in counted], ""),
        next_state=_latest([part.next_state for part in counted], b""),
        reward=_scalar([part.reward for part in counted], how),
        record=last.record,
    )


def _latest(said: Sequence[_Said], nothing: _Said) -> _Said:
    return next((each for each in reversed(said) if each), nothing)


def _scalar(texts: Sequence[str], how: Aggregation) -> str:
    if how in ("first", "last") or len(texts) == 1:
        return texts[0] if how == "first" else texts[-1]
    if how in ("max", "min"):
        chosen = texts[0]
        for text in texts[1:]:
            better = float(text) > float(chosen) if how == "max" else float(text) < float(chosen)
            chosen = text if better else chosen
        return chosen
    total = 0.0
    for text in texts:  # one by one, as the script adds
        total += float(text)
    return f"{total if how == 'sum' else total / len(texts):.17g}"


def in_range(reward: str, config: JoinConfig) -> bool:
    """Whether a transition may carry this reward."""
    value = float(reward)
    return math.isfinite(value) and float(config.low) <= value <= float(config.high)


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
