"""The HTTP contract without I/O: requests, answers, and whether a request may be sent again. Pure.

Duty: everything that `Client` and `AsyncClient` have in common, which is everything but sending and waiting.
Strategy: a `Call` is a request with its decoder; `Attempts` is told what came of each attempt and says when to make
the next.
Promise: a request that may have been carried out is sent again only if carrying it out twice is the same as once:
reading; a reward, which is counted once by (decision_id, reward_id); an act with an Idempotency-Key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt

from surefoot import _binary, answers
from surefoot._binary import Wire
from surefoot._values import allowed, allowed_by_row, number, plain
from surefoot.answers import BatchDecisions, Decision, RewardReceipt
from surefoot.backoff import Backoff
from surefoot.errors import ApiError, KeyInUse, Unavailable, Unreachable

T = TypeVar("T")

Whole = int | np.integer[Any]
Number = float | Whole | np.floating[Any]
Choice = Whole | str  # an index or a name
Action = Choice | Sequence[Choice | Number] | npt.NDArray[Any]  # one choice; one for each factor; a point
Ends = Sequence[Number | None] | npt.NDArray[Any]
# Choices; one list for each factor, None: all of it; over a box {"low": …, "high": …}, None or infinite: open.
Allowed = Sequence[Choice | Sequence[Choice] | None] | npt.NDArray[Any] | Mapping[str, Ends]
Names = Sequence[str | None] | npt.NDArray[Any]
Steps = Sequence[Whole | None] | npt.NDArray[Any]
Include = Literal["values", "distribution"]

_encoder = msgspec.json.Encoder()


class ActOptions(TypedDict, total=False):
    """What `act` takes besides the state."""

    policy: str | None  # may be left out when the service has one
    key: str | None  # whom the decision is for: routing and limits go by it
    episode: str | None  # what the transitions are linked by
    step: Whole | None  # number of the decision in its episode: the successor of t is t + 1 and nothing else
    context: Mapping[str, Any] | None  # for safety rules; recorded
    allowed_actions: Allowed | None  # None: all
    previous_action: Action | None  # the key's last executed action, for rules on steps; None: the service knows
    explore: bool  # False: take the best allowed action
    include: Sequence[Include]  # what the answer shall hold besides
    idempotency_key: str | None  # a repeat with the same key and body gets the stored answer


class ActBatchOptions(TypedDict, total=False):
    """What `act_batch` takes besides the states. Columns have one element per state, None where there is nothing."""

    policy: str | None
    keys: Names | None
    episodes: Names | None
    steps: Steps | None
    contexts: Sequence[Mapping[str, Any] | None] | None
    allowed_actions: Sequence[Allowed | None] | None
    previous_actions: Sequence[Action | None] | None
    explore: bool


class RewardOptions(TypedDict, total=False):
    """What `reward` takes besides decision and value."""

    reward_id: str | None  # names one of several rewards of a decision; repeats are counted once
    final: bool  # no more rewards will come for this decision
    next_state: Any  # what the environment showed after the action
    terminated: bool  # the environment ended the episode
    truncated: bool  # a limit cut the episode
    executed: bool  # False: the action was not carried out, which voids the decision
    executed_action: Action | None  # what was carried out; another than the decision's voids it
    metrics: Mapping[str, float] | None  # recorded with the reward


class RewardItem(RewardOptions, total=False):
    """One element of `reward_batch`; a whole episode's has `episode` in place of `decision_id`."""

    decision_id: str
    reward: Number | None
    episode: str
    policy: str | None


class EpisodeOptions(TypedDict, total=False):
    """What `reward_episode` takes besides episode and value."""

    policy: str | None  # may be left out where one is loaded
    reward_id: str | None
    terminated: bool  # it ended by itself; so it is where nothing is said
    truncated: bool  # a limit cut it
    metrics: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[bytes], T]
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True  # carried out twice it is the same as once

    def with_key(self, key: str) -> Call[T]:
        """The same call under an Idempotency-Key, which makes it repeatable."""
        return replace(self, headers={**self.headers, "Idempotency-Key": key}, repeatable=True)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it came. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after_s(self) -> float | None:
        text = self.headers.get("retry-after", "")
        if not text:
            return None
        return float(text) if text.isascii() and text.isdigit() else 1.0  # a date, as some proxies send: ask again soon

    def error(self) -> ApiError:
        return answers.read_error(self.status, self.body, self.retry_after_s)


@dataclass(frozen=True, slots=True)
class Failure:
    """No answer. `maybe_received`: the request had left, at least in part."""

    error: Exception
    maybe_received: bool


Outcome = Reply | Failure

_GATEWAY = (502, 503, 504)  # somebody between here and the service answered: it may have been carried out


class Attempts(Generic[T]):
    """One call over its attempts."""

    def __init__(self, call: Call[T], backoff: Backoff) -> None:
        self._call = call
        self._backoff = backoff
        self._maybe_received = False

    def wait_s(self, outcome: Outcome, now_s: float) -> float | None:
        """How long to wait before the next attempt, or None if this outcome stands."""
        if isinstance(outcome, Failure):
            self._maybe_received |= outcome.maybe_received
            may_repeat, at_least_s = self._call.repeatable or not outcome.maybe_received, 0.0
        else:
            may_repeat, at_least_s = self._refused_for_now(outcome), outcome.retry_after_s or 0.0
        return self._backoff.delay_s(now_s, at_least_s) if may_repeat else None

    def _refused_for_now(self, reply: Reply) -> bool:
        if reply.status < 400:
            return False
        if reply.retry_after_s is not None and isinstance(reply.error(), Unavailable | KeyInUse):
            # The service's own words: nothing was kept. A 503 of somebody in between is no such promise.
            return self._call.repeatable or reply.error().code in Unavailable.codes
        return self._call.repeatable and reply.status in _GATEWAY

    def result(self, outcome: Outcome) -> T:
        """Read the outcome that stands. Raises ApiError, Unreachable or Unreadable."""
        if isinstance(outcome, Failure):
            what = f"{self._call.method} {self._call.path}: {type(outcome.error).__name__}: {outcome.error}"
            raise Unreachable(what, maybe_received=self._maybe_received) from outcome.error
        if outcome.status >= 400:
            raise outcome.error()
        return self._call.read(outcome.body)


def act(
    state: Any,
    wire: Wire = "auto",
    *,
    policy: str | None = None,
    key: str | None = None,
    episode: str | None = None,
    step: Whole | None = None,
    context: Mapping[str, Any] | None = None,
    allowed_actions: Allowed | None = None,
    previous_action: Action | None = None,
    explore: bool = True,
    include: Sequence[Include] = (),
    idempotency_key: str | None = None,
) -> Call[Decision]:
    fields = {
        "policy": policy,
        "key": key,
        "episode": episode,
        "step": plain(step, "step"),
        "context": plain(context, "context"),
        "allowed_actions": allowed(allowed_actions, "allowed_actions"),
        "previous_action": plain(previous_action, "previous_action"),
        "explore": None if explore else False,
        "include": list(include) or None,
    }
    body, headers = _binary.request("state", state, fields, wire)
    call = Call("POST", "/v1/act", answers.read_decision, body, headers, repeatable=False)
    return call.with_key(idempotency_key) if idempotency_key is not None else call


def act_batch(
    states: Any,
    wire: Wire = "auto",
    *,
    policy: str | None = None,
    keys: Names | None = None,
    episodes: Names | None = None,
    steps: Steps | None = None,
    contexts: Sequence[Mapping[str, Any] | None] | None = None,
    allowed_actions: Sequence[Allowed | None] | None = None,
    previous_actions: Sequence[Action | None] | None = None,
    explore: bool = True,
) -> Call[BatchDecisions]:
    columns = {
        "keys": keys,
        "episodes": episodes,
        "steps": steps,
        "contexts": contexts,
        "previous_actions": previous_actions,
    }
    fields = {
        "policy": policy,
        **{name: plain(column, name) for name, column in columns.items()},
        "allowed_actions": allowed_by_row(allowed_actions, "allowed_actions"),
        "explore": None if explore else False,
    }
    body, headers = _binary.request("states", states, fields, wire)
    return Call("POST", "/v1/act/batch", answers.read_batch, body, headers, repeatable=False)


def reward(decision_id: str, value: Number | None, **options: Any) -> Call[RewardReceipt]:
    body = _reward_body("", value, decision_id=decision_id, **options)
    return Call("POST", "/v1/reward", answers.read_receipt, _encode(body))


def reward_episode(episode: str, value: Number | None, **options: Any) -> Call[RewardReceipt]:
    body = _reward_body("", value, episode=episode, **options)
    return Call("POST", "/v1/reward", answers.read_receipt, _encode(body))


def reward_batch(rewards: Sequence[Mapping[str, Any]]) -> Call[list[RewardReceipt]]:
    bodies = []
    for index, item in enumerate(rewards):
        options = dict(item)
        bodies.append(_given(_reward_body(f"rewards[{index}].", options.pop("reward", None), **options)))
    return Call("POST", "/v1/reward/batch", answers.read_receipts, _encode({"rewards": bodies}))


def _reward_body(
    path: str,
    value: Number | None,
    *,
    decision_id: str | None = None,
    episode: str | None = None,
    policy: str | None = None,
    reward_id: str | None = None,
    final: bool = False,
    next_state: Any = None,
    terminated: bool = False,
    truncated: bool = False,
    executed: bool = True,
    executed_action: Action | None = None,
    metrics: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    # bool(): environments written with numpy return numpy.bool.
    return {
        "decision_id": decision_id,
        "episode": episode,
        "policy": policy,
        "reward": None if value is None else number(value, f"{path}reward"),
        "reward_id": reward_id,
        "final": bool(final) or None,
        "next_state": plain(next_state, f"{path}next_state"),
        "terminated": bool(terminated) or None,
        "truncated": bool(truncated) or None,
        "executed": None if executed else False,
        "executed_action": plain(executed_action, f"{path}executed_action"),
        "metrics": plain(metrics, f"{path}metrics"),
    }


def decision(decision_id: str) -> Call[dict[str, Any]]:
    return Call("GET", f"/v1/decisions/{quote(decision_id, safe='')}", answers.read_record)


def ready() -> Call[bytes]:
    return Call("GET", "/health/ready", bytes)


def is_ready(outcome: Outcome) -> bool:
    return isinstance(outcome, Reply) and outcome.status == 200


def _given(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _encode(body: dict[str, Any]) -> bytes:
    return _encoder.encode(_given(body))
