"""The asynchronous client: `_protocol` over `httpx.AsyncClient`. It only sends and waits, as `client.py` does."""

from __future__ import annotations

import asyncio
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


class AsyncClient:
    """`Client` for asyncio: the same calls, options and errors. One per event loop; any number of tasks."""

    def __init__(self, base_url: str = DEFAULT_URL, **options: Unpack[ClientOptions]) -> None:
        self._options = Options(**options)
        self._http = httpx.AsyncClient(**self._options.for_httpx(base_url))

    async def act(self, state: Any, **options: Unpack[ActOptions]) -> Decision:
        """Ask for one action; see `Client.act`."""
        return await self._call(self._options.keyed(protocol.act(state, self._options.wire, **options)))

    async def act_batch(self, states: Any, **options: Unpack[ActBatchOptions]) -> BatchDecisions:
        """Ask for an action for each of several states; see `Client.act_batch`."""
        return await self._call(protocol.act_batch(states, self._options.wire, **options))

    async def reward(
        self, decision_id: str, reward: Number | None = None, **options: Unpack[RewardOptions]
    ) -> RewardReceipt:
        """Post the reward of a decision; see `Client.reward`."""
        return await self._call(protocol.reward(decision_id, reward, **options))

    async def reward_episode(
        self, episode: str, reward: Number | None = None, **options: Unpack[EpisodeOptions]
    ) -> RewardReceipt:
        """Post the reward of a whole episode, which has ended; it goes to its last decision.

        Options: `policy`, `reward_id`, `terminated`, `truncated`, `metrics`; see `EpisodeOptions`.
        """
        return await self._call(protocol.reward_episode(episode, reward, **options))

    async def reward_batch(self, rewards: Sequence[RewardItem]) -> list[RewardReceipt]:
        """Post several rewards; see `Client.reward_batch`."""
        return await self._call(protocol.reward_batch(rewards))

    async def decision(self, decision_id: str) -> dict[str, Any]:
        """Read the whole record of a decision; see `Client.decision`."""
        return await self._call(protocol.decision(decision_id))

    async def ready(self) -> bool:
        """Whether the service takes traffic; see `Client.ready`."""
        return protocol.is_ready(await self._attempt(protocol.ready()))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _call(self, call: Call[T]) -> T:
        attempts = Attempts(call, self._options.backoff(time.monotonic()))
        while True:
            outcome = await self._attempt(call)
            delay_s = attempts.wait_s(outcome, time.monotonic())
            if delay_s is None:
                return attempts.result(outcome)
            await asyncio.sleep(delay_s)

    async def _attempt(self, call: Call[Any]) -> Outcome:
        try:
            response = await self._http.request(call.method, call.path, content=call.body, headers=dict(call.headers))
        except httpx.RequestError as error:
            return failure(error)
        return reply(response)
