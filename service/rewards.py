"""`/reward`: from a request to a durable reward event and the join's verdict.

    read -> verify -> record -> verdict -> answer

Duty: check a reward against the decision id it names and the policy it belongs to, record it, wait a moment for the
join. It knows nothing of HTTP or Redis.
Promise: an answer other than a problem leaves after the event's commit; whatever Redis does, nothing acknowledged is
lost, and the same reward may be sent again at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from policies.errors import (
    DecisionExpired,
    Forbidden,
    InvalidField,
    MissingField,
    RewardConflict,
    SurefootError,
)
from service.absence import Absence
from service.clock import Clock
from service.decision import EpisodeEvent, Event, RewardEvent, encode_events
from service.ids import DecisionId, Keyring, policy_digest
from service.ledger import Appended, Ledger
from service.metrics import Metrics
from service.reward_events import Rewarded, episode_event, reward_event
from service.wire import RewardBatchRequest, RewardBatchResponse, RewardRequest, RewardResponse, Verdict


class Verdicts(Protocol):
    """Where the join's verdicts come from: the shipper."""

    def verdict(self, policy: str, seq: int) -> asyncio.Future[str]: ...

    def kick(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Checked:
    request: RewardRequest
    policy: Rewarded
    decision: DecisionId | None  # None: it is for a whole episode
    event: RewardEvent | EpisodeEvent


@dataclass(frozen=True, slots=True)
class _Recorded:
    policy: str
    indices: list[int]
    appended: Appended
    verdicts: list[asyncio.Future[str]]


class Rewards:
    """Accepts rewards for all policies, given by the four bytes that stand for them in decision ids."""

    def __init__(
        self,
        policies: Mapping[bytes, Rewarded],
        absence: Absence,
        ledger: Ledger,
        verdicts: Verdicts,
        keyring: Keyring,
        clock: Clock,
        metrics: Metrics,
        *,
        record_ttl_ms: int,
        verdict_wait_s: float,
    ) -> None:
        self._policies = policies
        self._absence = absence
        self._ledger = ledger
        self._verdicts = verdicts
        self._keyring = keyring
        self._clock = clock
        self._metrics = metrics
        self._record_ttl_ms = record_ttl_ms
        self._verdict_wait_s = verdict_wait_s

    def find(self, decision_id: str) -> tuple[DecisionId, Rewarded]:
        """Verify an id and find its policy. Raises UnknownDecision, NotReady or DecisionExpired."""
        decision = self._keyring.verify(decision_id)
        policy = self._policies.get(decision.policy)
        if policy is None:
            raise self._absence.of_decision(decision.policy)
        if self._clock.event_ms() > decision.at_ms + policy.window_ms + self._record_ttl_ms:
            raise DecisionExpired("this decision's record has expired", "decision_id")
        return decision, policy

    async def reward(
        self, request: RewardRequest, traceparent: str | None = None, only: Collection[str] = ()
    ) -> RewardResponse:
        """Accept one reward. only: the policies that it may be for; empty: any.

        Raises what `find` raises, InvalidField, Forbidden, RewardConflict, LedgerFull or LedgerBroken.
        """
        (response,) = await self._accept([self._check(request, traceparent, only)])
        if response.status == "conflict":
            raise RewardConflict(
                "another reward stands for this decision under the same reward_id; use a new reward_id", "reward"
            )
        return response

    async def reward_batch(
        self, request: RewardBatchRequest, traceparent: str | None = None, only: Collection[str] = ()
    ) -> RewardBatchResponse:
        """Accept rewards together. All are checked before any is kept; conflicts are reported one by one."""
        checked = []
        for index, each in enumerate(request.rewards):
            try:
                checked.append(self._check(each, traceparent, only))
            except SurefootError as error:
                raise error.within(f"rewards[{index}]") from None
        if not checked:
            raise InvalidField("there must be at least one reward", "rewards")
        return RewardBatchResponse(await self._accept(checked))

    def _check(self, request: RewardRequest, traceparent: str | None, only: Collection[str]) -> _Checked:
        checked = self._read(request, traceparent)
        if only and checked.policy.policy not in only:
            raise Forbidden(f"this token is not for the policy {checked.policy.policy!r}", "policy")
        return checked

    def _read(self, request: RewardRequest, traceparent: str | None) -> _Checked:
        if request.episode is not None:
            if request.decision_id is not None:
                raise InvalidField("a reward is for a decision or for an episode, not for both", "episode")
            policy = self._named(request.policy)
            event = episode_event(request, policy, self._clock.event_ms(), traceparent)
            return _Checked(request, policy, None, event)
        if request.decision_id is None:
            raise MissingField("a reward needs the decision_id that /act gave, or an episode", "decision_id")
        decision, policy = self.find(request.decision_id)
        return _Checked(request, policy, decision, reward_event(request, policy, self._clock.event_ms(), traceparent))

    def _named(self, policy: str | None) -> Rewarded:
        if policy is None:
            policy = self._absence.only([each.policy for each in self._policies.values()])
        if policy is None:
            raise MissingField("there are several policies: say which one the episode is of", "policy")
        found = self._policies.get(policy_digest(policy))
        if found is None:
            raise self._absence.of_policy(policy)
        return found

    async def _accept(self, checked: Sequence[_Checked]) -> list[RewardResponse]:
        by_policy: dict[str, list[int]] = {}
        for index, each in enumerate(checked):
            by_policy.setdefault(each.policy.policy, []).append(index)
        # Event times are stamped in `_check`; nothing is awaited between there and here.
        recorded = [self._append(policy, indices, checked) for policy, indices in by_policy.items()]
        responses: dict[int, RewardResponse] = {}
        try:
            for part in recorded:
                await part.appended.committed
            self._verdicts.kick()
            for each in checked:
                self._tell(each)
            waiting = [future for part in recorded for future in part.verdicts]
            await asyncio.wait(waiting, timeout=self._verdict_wait_s)
            for part in recorded:
                for index, future in zip(part.indices, part.verdicts, strict=True):
                    responses[index] = self._respond(part.policy, checked[index], future)
        finally:
            for part in recorded:
                for future in part.verdicts:
                    future.cancel()
        return [responses[index] for index in range(len(checked))]

    def _tell(self, checked: _Checked) -> None:
        if checked.request.decision_id is not None and (checked.request.terminated or checked.request.truncated):
            checked.policy.ended(checked.request.decision_id)

    def _append(self, policy: str, indices: list[int], checked: Sequence[_Checked]) -> _Recorded:
        events: list[Event] = [checked[index].event for index in indices]
        appended = self._ledger.append_nowait(
            policy, len(events), encode_events(events), checked[indices[0]].event.at_ms
        )
        seqs = range(appended.first_seq, appended.first_seq + len(events))
        return _Recorded(policy, indices, appended, [self._verdicts.verdict(policy, seq) for seq in seqs])

    def _respond(self, policy: str, checked: _Checked, future: asyncio.Future[str]) -> RewardResponse:
        verdict = future.result() if future.done() and not future.cancelled() else "accepted"
        duplicate = verdict == "duplicate"
        status = cast(Verdict, "joined" if duplicate else verdict)
        reward = float(checked.event.reward)
        self._metrics.rewards.labels(policy, "duplicate" if duplicate else status).inc()
        if status in ("joined", "early", "accepted") and not duplicate:
            self._metrics.reward_sum.labels(policy).inc(reward)
            if checked.decision is not None:
                delay_s = max(0, checked.event.at_ms - checked.decision.at_ms) / 1000
                self._metrics.reward_delay.labels(policy).observe(delay_s)
        request = checked.request
        return RewardResponse(request.decision_id, request.reward_id, status, duplicate, request.episode, reward)
