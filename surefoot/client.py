"""The synchronous client: `_protocol` over `httpx.Client`. It only sends and waits; every decision is made there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

import httpx

from surefoot import _protocol as protocol
from surefoot._http import DEFAULT_URL, ClientOptions, Options, failure, reply
from surefoot._protocol import (
    ActBatchOptions,
    ActOptions,
    Attempts,
    Call,
    EpisodeOptions,
    Number,
    Outcome,
    RewardItem,
    RewardOptions,
)
from surefoot.answers import BatchDecisions, Decision, RewardReceipt

T = TypeVar("T")


class Client:
    """Asks a Surefoot service for actions and posts rewards. Thread-safe; keeps connections open.

    Options: `token`, `timeout_s`, `retry_for_s`, `idempotent`, `wire`; see `ClientOptions`.
    Every call raises an ApiError when the service refuses, Unreachable when no answer came within `retry_for_s`, and
    NotFinite or InvalidField, before anything is sent, for what JSON cannot carry.
    """

    def __init__(self, base_url: str = DEFAULT_URL, **options: Unpack[ClientOptions]) -> None:
        self._options = Options(**options)
        self._http = httpx.Client(**self._options.for_httpx(base_url))

    def act(self, state: Any, **options: Unpack[ActOptions]) -> Decision:
        """Ask for one action.

        `state`: a list or an array in the order of the policy's features, or a dict by feature name.
        Options: `policy`, `key`, `episode`, `step`, `context`, `allowed_actions`, `previous_action`,
        `explore`, `include`, `idempotency_key`; see `ActOptions`. After Unreachable with `maybe_received` a decision
        may have been recorded that nobody carries out: ask again under the next `step`, or use `idempotent=True`.
        """
        return self._call(self._options.keyed(protocol.act(state, self._options.wire, **options)))

    def act_batch(self, states: Any, **options: Unpack[ActBatchOptions]) -> BatchDecisions:
        """Ask for an action for each of several states [B, ...] of one policy. Rows that fail stand in `errors`.

        Options: `policy`, `keys`, `episodes`, `steps`, `contexts`, `allowed_actions`, `previous_actions`,
        `explore`.
        """
        return self._call(protocol.act_batch(states, self._options.wire, **options))

    def reward(self, decision_id: str, reward: Number | None = None, **options: Unpack[RewardOptions]) -> RewardReceipt:
        """Post the reward of a decision; when this returns, it is durable. `reward` may be left out where the policy
        makes it of `metrics`.

        Options: `reward_id`, `final`, `next_state`, `terminated`, `truncated`, `executed`, `executed_action`,
        `metrics`; see `RewardOptions`. Calling it again with the same arguments changes nothing; with others it raises
        RewardConflict, unless `reward_id` differs.
        """
        return self._call(protocol.reward(decision_id, reward, **options))

    def reward_episode(
        self, episode: str, reward: Number | None = None, **options: Unpack[EpisodeOptions]
    ) -> RewardReceipt:
        """Post the reward of a whole episode, which has ended; it goes to its last decision.

        Options: `policy`, `reward_id`, `terminated`, `truncated`, `metrics`; see `EpisodeOptions`.
        """
        return self._call(protocol.reward_episode(episode, reward, **options))

    def reward_batch(self, rewards: Sequence[RewardItem]) -> list[RewardReceipt]:
        """Post several rewards, each a dict with `decision_id`, `reward` and the options of `reward`.

        All are checked before any is kept. A conflict does not raise: it is the `status` of its receipt.
        """
        return self._call(protocol.reward_batch(rewards))

    def decision(self, decision_id: str) -> dict[str, Any]:
        """Read the whole record of a decision, where it stands in the join, and why it was what it was."""
        return self._call(protocol.decision(decision_id))

    def ready(self) -> bool:
        """Whether the service takes traffic. Asks once and never raises for a service that is away."""
        return protocol.is_ready(self._attempt(protocol.ready()))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self, call: Call[T]) -> T:
        attempts = Attempts(call, self._options.backoff(time.monotonic()))
        while True:
            outcome = self._attempt(call)
            delay_s = attempts.wait_s(outcome, time.monotonic())
            if delay_s is None:
                return attempts.result(outcome)
            time.sleep(delay_s)

    def _attempt(self, call: Call[Any]) -> Outcome:
        try:
            return reply(self._http.request(call.method, call.path, content=call.body, headers=dict(call.headers)))
        except httpx.RequestError as error:
            return failure(error)
