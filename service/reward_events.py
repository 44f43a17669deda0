"""A reward as it was sent, checked against its policy, as the event that is recorded. Pure.

Duty: what a reward may say of a decision or of an episode, which number is learnt from, and the digest by which it is
recognised. It knows no clock, no ledger and nothing of ids.
Promise: what is wrong is named by its field; what is right is recorded as it was sent, beside the number made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from policies.errors import InvalidField, MissingField, NotFinite
from policies.types import ActionSpec, ObservationSpec
from service.decision import EpisodeEvent, RewardEvent, RewardFlags, RewardRecord, action_text, encode_record
from service.scalar import Scalar
from service.states import StateReader
from service.wire import ABSENT, RewardRequest

OF_A_DECISION = ("final", "next_state", "executed", "executed_action")  # what cannot be said of a whole episode


@dataclass(frozen=True, slots=True)
class Rewarded:
    """What rewards of one policy are checked against."""

    policy: str
    observation: ObservationSpec
    action: ActionSpec
    states: StateReader
    window_ms: int
    ended: Callable[[str], None] = lambda decision_id: None  # told the last decision of an episode that has ended
    scalar: Scalar | None = None  # None: the reward is the number that was sent


def reward_event(request: RewardRequest, policy: Rewarded, at_ms: int, traceparent: str | None) -> RewardEvent:
    """Make the event of a decision's reward. Raises InvalidField, MissingField or NotFinite."""
    reward = _number(request, policy)
    if request.terminated and request.truncated:
        raise InvalidField("an episode ends either terminated or truncated", "truncated")
    if request.policy is not None and request.policy != policy.policy:
        raise InvalidField(f"the decision is one of {policy.policy!r}", "policy")
    executed_action = ""
    if request.executed_action is not None:
        executed_action = action_text(policy.action.parse(request.executed_action, "executed_action"))
    next_state = _next_state(request, policy)  # before the digest, which trusts it
    return RewardEvent(
        id=request.decision_id or "",
        reward_id=request.reward_id or "",
        digest=_digest(request),
        at_ms=at_ms,
        until_ms=at_ms + policy.window_ms,
        flags=_flags(request),
        executed_action=executed_action,
        next_state=next_state,
        reward=repr(reward),
        record=_record(request, reward, traceparent),
    )


def episode_event(request: RewardRequest, policy: Rewarded, at_ms: int, traceparent: str | None) -> EpisodeEvent:
    """Make the event of a whole episode's reward: it has ended, by itself where nothing else is said.

    Raises InvalidField, MissingField or NotFinite.
    """
    reward = _number(request, policy)
    for field, said in zip(OF_A_DECISION, _said_of_a_decision(request), strict=True):
        if said:
            raise InvalidField("this is said of a decision, not of an episode", field)
    if request.terminated and request.truncated:
        raise InvalidField("an episode ends either terminated or truncated", "truncated")
    return EpisodeEvent(
        episode=request.episode or "",
        reward_id=request.reward_id or "",
        digest=_digest(request),
        at_ms=at_ms,
        until_ms=at_ms + policy.window_ms,
        flags=int(RewardFlags.TRUNCATED if request.truncated else RewardFlags.TERMINATED),
        reward=repr(reward),
        record=_record(request, reward, traceparent),
    )


def _said_of_a_decision(request: RewardRequest) -> tuple[bool, ...]:
    sent = bytes(request.next_state) not in ABSENT
    return request.final, sent, not request.executed, request.executed_action is not None


def _number(request: RewardRequest, policy: Rewarded) -> float:
    """The number that is learnt from."""
    if request.reward is not None and not math.isfinite(request.reward):
        raise NotFinite("the reward is not finite", "reward")
    if policy.scalar is not None:
        return policy.scalar.value(request.reward, request.metrics)
    if request.reward is None:
        raise MissingField("a reward is needed: this policy makes none of metrics", "reward")
    return request.reward


def _record(request: RewardRequest, reward: float, traceparent: str | None) -> bytes:
    sent = request.reward if request.reward != reward else None
    return encode_record(RewardRecord(metrics=request.metrics, traceparent=traceparent, sent=sent))


def _digest(request: RewardRequest) -> str:
    """Digest of the canonical body: field order and spacing do not matter, values do."""
    fields = msgspec.structs.asdict(request)
    fields["next_state"] = msgspec.json.decode(request.next_state) if bytes(request.next_state) not in ABSENT else None
    del fields["policy"]  # said or not, it is the same
    canonical = msgspec.json.encode(fields, order="deterministic")
    return blake2b(canonical, digest_size=8).hexdigest()


def _flags(request: RewardRequest) -> int:
    flags = RewardFlags.NONE
    if request.terminated:
        flags |= RewardFlags.TERMINATED
    if request.truncated:
        flags |= RewardFlags.TRUNCATED
    if request.final:
        flags |= RewardFlags.FINAL
    if not request.executed:
        flags |= RewardFlags.NOT_EXECUTED
    return int(flags)


def _next_state(request: RewardRequest, policy: Rewarded) -> bytes:
    if bytes(request.next_state) in ABSENT:
        return b""
    state = policy.observation.array([policy.states.read(request.next_state, "next_state")])
    if policy.observation.first_not_finite(state) is not None:
        found = policy.observation.refuse_not_finite(state[0])
        raise NotFinite(found.detail, "next_" + (found.field or "state"))
    return state.astype(policy.observation.wire_dtype).tobytes()
