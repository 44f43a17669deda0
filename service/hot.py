"""The hot routes as plain ASGI, beside FastAPI's router: /act, /reward and their batches.

    read -> decode -> decide | accept -> encode -> answer

Duty: turn bytes into checked rows and rewards, and outcomes into bytes. Semantics live in `act.py` and `rewards.py`.
Strategy: a dict looks up the route, msgspec decodes; nothing here is resolved, inspected or validated per request that
could be at start. These routes stand in the OpenAPI document all the same (`openapi.py`).
Promise: every error of the tree becomes problem+json here; anything else becomes a plain 500 and is logged.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from policies.errors import (
    InvalidField,
    MissingField,
    NotFinite,
    SurefootError,
    WrongMethod,
)
from policies.types import ActionSpec, ObservationSpec
from service.absence import Absence
from service.allowed import read_allowed
from service.body import JSON, Disconnected, Scope, header, read_body, respond
from service.callers import Caller, Callers
from service.clock import Clock
from service.coalesce import Coalescer
from service.forms import MSGPACK, Asked, AskedBatch, form_of, wants_msgpack
from service.idempotency import Idempotency
from service.metrics import Metrics
from service.packed import repacked
from service.plan import Outcome, Row
from service.problems import CONTENT_TYPE, problem
from service.rewards import Rewards
from service.roles import Permission
from service.states import StateReader, States
from service.tracing import Tracing
from service.wire import ActBatchResponse, ActResponse, decode_reward, decode_reward_batch, encode

NEEDS_EPISODE = "this policy remembers what it saw, episode by episode: name the episode, and send its step"

log = structlog.get_logger(__name__)
Headers = tuple[tuple[bytes, bytes], ...]
Reply = tuple[int, bytes, Headers]


@dataclass(frozen=True, slots=True)
class Served:
    """A policy as the hot routes see it."""

    name: str
    observation: ObservationSpec
    action: ActionSpec
    states: StateReader
    coalescer: Coalescer


COLUMNS = ("keys", "episodes", "steps", "contexts", "allowed_actions", "previous_actions")


class HotRoutes:
    """An ASGI application for the hot routes only. `paths` says which."""

    def __init__(
        self,
        policies: Mapping[str, Served],
        absence: Absence,
        rewards: Rewards,
        idempotency: Idempotency,
        metrics: Metrics,
        tracing: Tracing,
        clock: Clock,
        *,
        callers: Callers,
        max_body_bytes: int,
        body_timeout_s: float,
        max_batch: int,
    ) -> None:
        self._policies = policies  # policies come at run time, too
        self._absence = absence
        self._rewards = rewards
        self._idempotency = idempotency
        self._metrics = metrics
        self._tracing = tracing
        self._clock = clock
        self._callers = callers
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._max_batch = max_batch
        routes: dict[str, tuple[Permission, Callable[[Scope, bytes, Caller], Awaitable[Reply]]]] = {
            "/act": ("act", self._act),
            "/act/batch": ("act", self._act_batch),
            "/reward": ("reward", self._reward),
            "/reward/batch": ("reward", self._reward_batch),
        }
        self.paths = {prefix + path: handle for path, handle in routes.items() for prefix in ("", "/v1")}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one request on one of `paths`."""
        try:
            permission, handle = self.paths[scope["path"]]
            caller = self._callers.hot(scope, permission)
            if scope["method"] != "POST":
                raise WrongMethod(f"{scope['path']} takes POST")
            body = await read_body(scope, receive, self._max_body_bytes, self._body_timeout_s)
            status, answer, headers = await handle(scope, body, caller)
            if wants_msgpack(scope):
                await respond(send, status, repacked(answer), MSGPACK, headers)
            else:
                await respond(send, status, answer, JSON, headers)
        except Disconnected:
            return
        except SurefootError as error:
            await self._refuse(scope, send, error)
        except Exception:
            log.exception("request_failed", path=scope["path"])
            await self._refuse(scope, send, SurefootError("an unexpected error; it has been logged"))

    async def _refuse(self, scope: Scope, send: Any, error: SurefootError) -> None:
        self._metrics.problems.labels(error.code).inc()
        extra: Headers = ()
        if error.retry_after_s is not None:
            extra = ((b"retry-after", b"%d" % error.retry_after_s),)
        if isinstance(error, WrongMethod):
            extra = ((b"allow", b"POST"),)
        body = encode(problem(error, instance=scope["path"]))
        await respond(send, error.status, body, CONTENT_TYPE.encode(), extra)

    # -- /act ---------------------------------------------------------------------------------------------------------

    async def _act(self, scope: Scope, body: bytes, caller: Caller) -> Reply:
        started_s = self._clock.monotonic_s()
        asked = form_of(scope).act(scope, body)
        policy = self._find(asked.fields.policy, caller)
        row = self._row(policy, asked, self._tracing.parent(scope), started_s)
        key = header(scope, b"idempotency-key")
        if key is None:
            return await self._decide_one(scope, policy, row)
        return await self._idempotency.once(policy.name, key, body, lambda: self._decide_one(scope, policy, row))

    async def _decide_one(self, scope: Scope, policy: Served, row: Row) -> Reply:
        (outcome,) = await policy.coalescer.submit((row,))
        if isinstance(outcome, SurefootError):
            raise outcome
        took_s = self._clock.monotonic_s() - row.arrived_s
        self._metrics.version(outcome.policy, outcome.version).duration.observe(took_s)
        return 200, encode(outcome), self._tracing.decision(outcome, row, took_s)

    def _find(self, name: str | None, caller: Caller) -> Served:
        if name is None and (name := self._absence.only(self._policies)) is None:
            reached = filter(caller.reaches, sorted({*self._policies, *self._absence.waiting()}))
            raise MissingField(f"name one of: {', '.join(reached)}", "policy")
        found = self._policies.get(name)
        if found is None:
            raise self._absence.of_policy(name)
        if caller.policies:
            caller.confine(name)
        return found

    def _row(self, policy: Served, asked: Asked, traceparent: str | None, arrived_s: float) -> Row:
        request = asked.fields
        states = _finite(policy, [asked.state(policy.states)], ["state"])
        if request.episode is None and policy.coalescer.decider.plan.recurrent:
            raise MissingField(NEEDS_EPISODE, "episode")
        return Row(
            state=states[0],
            key=request.key,
            episode=request.episode,
            step=request.step,
            context=request.context,
            allowed=read_allowed(request.allowed_actions, policy.action, "allowed_actions"),
            previous=_read_action(request.previous_action, policy.action, "previous_action"),
            explore=request.explore,
            include=request.include,
            traceparent=traceparent,
            arrived_s=arrived_s,
        )

    # -- /act/batch ---------------------------------------------------------------------------------------------------

    async def _act_batch(self, scope: Scope, body: bytes, caller: Caller) -> Reply:
        started_s = self._clock.monotonic_s()
        asked = form_of(scope).act_batch(scope, body)
        policy = self._find(asked.fields.policy, caller)
        rows = self._rows(policy, asked, self._tracing.parent(scope), started_s)
        outcomes = await policy.coalescer.decide(rows)
        for outcome in outcomes:
            if isinstance(outcome, ActResponse):
                took_s = self._clock.monotonic_s() - started_s
                self._metrics.version(outcome.policy, outcome.version).duration.observe(took_s)
        generations = [outcome.generation for outcome in outcomes if isinstance(outcome, ActResponse)]
        # A batch cut in several may see two: the earlier is what all rows have at least.
        generation = min(generations, default=policy.coalescer.decider.plan.generation)
        return 200, encode(_columns(policy.name, generation, outcomes)), ()

    def _rows(self, policy: Served, asked: AskedBatch, traceparent: str | None, arrived_s: float) -> list[Row]:
        request = asked.fields
        sent = asked.states(policy.states, self._max_batch)
        count = len(sent)
        columns = {name: getattr(request, name) for name in COLUMNS}
        for name, column in columns.items():
            if column is not None and len(column) != count:
                raise InvalidField(f"there are {count} states, but {len(column)} {name}", name)
        states = _finite(policy, sent, [f"states[{index}]" for index in range(count)])
        empty = [None] * count
        if policy.coalescer.decider.plan.recurrent and None in (columns["episodes"] or empty):
            raise MissingField(NEEDS_EPISODE, f"episodes[{(columns['episodes'] or empty).index(None)}]")
        return [
            Row(
                state=states[i],
                key=(columns["keys"] or empty)[i],
                episode=(columns["episodes"] or empty)[i],
                step=(columns["steps"] or empty)[i],
                context=(columns["contexts"] or empty)[i],
                allowed=read_allowed((columns["allowed_actions"] or empty)[i], policy.action, f"allowed_actions[{i}]"),
                previous=_read_action(
                    (columns["previous_actions"] or empty)[i], policy.action, f"previous_actions[{i}]"
                ),
                explore=request.explore,
                traceparent=traceparent,
                arrived_s=arrived_s,
            )
            for i in range(count)
        ]

    # -- /reward ------------------------------------------------------------------------------------------------------

    async def _reward(self, scope: Scope, body: bytes, caller: Caller) -> Reply:
        response = await self._rewards.reward(decode_reward(body), self._tracing.parent(scope), caller.policies)
        return 202, encode(response), ()

    async def _reward_batch(self, scope: Scope, body: bytes, caller: Caller) -> Reply:
        response = await self._rewards.reward_batch(
            decode_reward_batch(body), self._tracing.parent(scope), caller.policies
        )
        return 202, encode(response), ()


def _finite(policy: Served, states: States, names: Sequence[str]) -> npt.NDArray[np.floating]:
    """Give observations as one array [B, *shape] of the spec's dtype, refusing what it cannot hold.

    JSON itself has no NaN, but 1e300 is infinite as float32.
    """
    array = policy.observation.array(states)
    index = policy.observation.first_not_finite(array)
    if index is not None:
        found = policy.observation.refuse_not_finite(array[index])
        raise NotFinite(found.detail, names[index] + (found.field or "").removeprefix("state"))
    return array


_COLUMNS = (
    "decision_id", "assigned_version", "version", "role", "action", "action_name", "propensity",
    "propensity_reason", "explored", "fallback", "logged", "propensity_kind", "log_propensity", "state_reset",
)  # fmt: skip


def _columns(policy: str, generation: int, outcomes: list[Outcome]) -> ActBatchResponse:
    def column(read: Callable[[ActResponse], Any]) -> list[Any]:
        return [read(outcome) if isinstance(outcome, ActResponse) else None for outcome in outcomes]

    return ActBatchResponse(
        policy=policy,
        generation=generation,
        **{name: column(lambda answer, name=name: getattr(answer, name)) for name in _COLUMNS},  # type: ignore[misc]
        epsilon=column(lambda answer: answer.exploration.epsilon),
        overridden=column(lambda answer: answer.safety.overridden),
        errors=[problem(each, row=row) for row, each in enumerate(outcomes) if isinstance(each, SurefootError)],
    )


def _read_action(action: object, space: ActionSpec, where: str) -> tuple[float, ...] | None:
    return None if action is None else space.parse(action, where)
