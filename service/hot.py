"""The hot routes, beside FastAPI's router: /act, /reward and their batches, in plain ASGI; single decisions also below.

    read -> decode -> decide | accept -> encode -> answer

Duty: what a request's outcome is answered with. What a question may be refused for stands in `questions.py`, semantics
in `act.py` and `rewards.py`.
Strategy: a dict looks up the route, msgspec decodes; nothing here is resolved, inspected or validated per request that
could be at start. A single decision has two ways in, ASGI and `short_way.py`, which share all but the transport. These
routes stand in the OpenAPI document all the same (`openapi.py`).
Promise: every error of the tree becomes problem+json here; anything else becomes a plain 500 and is logged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

import structlog

from policies.errors import Overloaded, SurefootError, WrongMethod
from service.absence import Absence
from service.body import JSON, Disconnected, Head, Headers, Scope, expect_room, read_body, respond
from service.callers import Caller, Callers
from service.clock import Clock
from service.forms import MSGPACK, wants_msgpack
from service.idempotency import Idempotency
from service.metrics import Metrics
from service.overload import Overload, Place
from service.packed import repacked
from service.plan import Outcome, Row
from service.problems import CONTENT_TYPE, problem
from service.questions import Questions, Served
from service.rewards import Rewards
from service.roles import Permission
from service.tracing import Tracing
from service.wire import ActBatchResponse, ActResponse, decode_reward, decode_reward_batch, encode

log = structlog.get_logger(__name__)
Reply = tuple[int, bytes, Headers]
Answer = tuple[int, bytes, bytes, Headers]  # status, body, its type, further headers

PROBLEM = CONTENT_TYPE.encode()


class Asker(Head, ABC):
    """One question for one action below ASGI, and whoever waits for its answer. until_s: when it comes too late."""

    __slots__ = ("body", "caller", "routes", "row", "until_s")
    kind: Final = "act"
    body: bytes
    caller: Caller
    routes: HotRoutes
    row: Row
    until_s: float

    @abstractmethod
    def answer(self, answer: Answer) -> None:
        """Take the answer. Called once, and never raises."""

    def begin(self) -> None:
        """Be parsed and decided now."""
        self.routes.begin(self)

    def refuse(self, error: SurefootError) -> None:
        """Be told that it was in vain, without having been begun."""
        self.answer(self.routes.refusal(self, error))

    def decided(self, outcomes: Sequence[Outcome] | BaseException) -> None:
        """Take what the pipeline says of the one row."""
        self.routes.tell(self, outcomes)


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
        overload: Overload,
        *,
        callers: Callers,
        max_body_bytes: int,
        body_timeout_s: float,
        max_batch: int,
    ) -> None:
        self._questions = Questions(policies, absence, clock, max_batch)
        self._rewards = rewards
        self._idempotency = idempotency
        self._metrics = metrics
        self._tracing = tracing
        self._clock = clock
        self._overload = overload
        self._callers = callers
        self.max_body_bytes = max_body_bytes
        self.body_timeout_s = body_timeout_s
        routes: dict[str, tuple[Permission, Callable[[Head, bytes, Caller], Awaitable[Reply]]]] = {
            "/act": ("act", self._act),
            "/act/batch": ("act", self._act_batch),
            "/reward": ("reward", self._reward),
            "/reward/batch": ("reward", self._reward_batch),
        }
        self.paths = {prefix + path: handle for path, handle in routes.items() for prefix in ("", "/v1")}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one request on one of `paths`."""
        head = Head.of(scope)
        try:
            permission, handle = self.paths[head.path]
            caller = self._callers.hot(head, permission)
            if scope["method"] != "POST":
                raise WrongMethod(f"{head.path} takes POST")
            body = await read_body(head, receive, self.max_body_bytes, self.body_timeout_s)
            answer = _answer(head, await handle(head, body, caller))
        except Disconnected:
            return
        except Exception as error:
            answer = self.refusal(head, error)
        await respond(send, *answer)

    # -- below ASGI ---------------------------------------------------------------------------------------------------

    def admit(self, head: Head) -> Caller:
        """Say who asks, before there is a body. Raises what `act` answers without one."""
        caller = self._callers.hot(head, "act")
        expect_room(head, self.max_body_bytes)
        return caller

    def ask(self, asker: Asker) -> None:
        """Have one question decided and answered, now or later; or refused when there is no time for it."""
        now_s = self._clock.monotonic_s()
        try:
            asker.until_s = now_s + self._overload.time_for(asker.headers)
        except SurefootError as error:
            asker.refuse(error)
            return
        self._overload.enter(asker, now_s, len(asker.body))

    def forget(self, asker: Asker) -> None:
        """Take note that an asker has left. If it still waits it is never begun."""
        self._overload.withdraw(asker)

    def begin(self, asker: Asker) -> None:
        """Parse a question, and have its row decided."""
        try:
            policy, row = self._questions.one(asker, asker.body, asker.caller)
        except Exception as error:
            try:
                asker.answer(self.refusal(asker, error))
            finally:
                self._overload.done()
            return
        asker.row = row
        policy.coalescer.put((row,), asker.decided, asker.until_s)

    def tell(self, asker: Asker, outcomes: Sequence[Outcome] | BaseException) -> None:
        """Answer an asker, whose row was decided or could not be."""
        if isinstance(outcomes, BaseException):
            if isinstance(outcomes, Overloaded):
                self._overload.count_late("act")
            answer = self.refusal(asker, outcomes)
        else:
            answer = self._answer(asker, outcomes[0])
        try:
            asker.answer(answer)
        finally:
            self._overload.done()

    def _answer(self, asker: Asker, outcome: Outcome) -> Answer:
        took_s = self._clock.monotonic_s() - asker.row.arrived_s
        try:
            answer = _answer(asker, self._decided(outcome, asker.row, took_s))
        except Exception as error:
            return self.refusal(asker, error)
        self._overload.note(took_s)
        return answer

    def refusal(self, head: Head, error: BaseException) -> Answer:
        """What an error is answered with; it is counted."""
        if not isinstance(error, SurefootError):
            log.error("request_failed", path=head.path, exc_info=error)
            error = SurefootError("an unexpected error; it has been logged")
        self._metrics.problems.labels(error.code).inc()
        extra: Headers = ()
        if error.retry_after_s is not None:
            extra = ((b"retry-after", b"%d" % error.retry_after_s),)
        if isinstance(error, WrongMethod):
            extra = ((b"allow", b"POST"),)
        return error.status, encode(problem(error, instance=head.path)), PROBLEM, extra

    # -- /act ---------------------------------------------------------------------------------------------------------

    async def _act(self, head: Head, body: bytes, caller: Caller) -> Reply:
        place = self._overload.come(head.headers, "act")
        policy, row = self._questions.one(head, body, caller)
        key = head.headers.get(b"idempotency-key")
        if key is None:
            return await self._decide_one(place, policy, row)
        return await self._idempotency.once(policy.name, key, body, lambda: self._decide_one(place, policy, row))

    async def _decide_one(self, place: Place, policy: Served, row: Row) -> Reply:
        await self._overload.wait(place, 0)
        try:
            (outcome,) = await policy.coalescer.submit((row,), place.until_s)
        except Overloaded:
            self._overload.count_late("act")
            raise
        finally:
            self._overload.done()
        return self._decided(outcome, row, self._clock.monotonic_s() - row.arrived_s)

    def _decided(self, outcome: Outcome, row: Row, took_s: float) -> Reply:
        if isinstance(outcome, SurefootError):
            raise outcome
        self._metrics.version(outcome.policy, outcome.version).duration.observe(took_s)
        return 200, encode(outcome), self._tracing.decision(outcome, row, took_s)

    # -- /act/batch ---------------------------------------------------------------------------------------------------

    async def _act_batch(self, head: Head, body: bytes, caller: Caller) -> Reply:
        place = self._overload.come(head.headers, "batch")
        await self._overload.wait(place, len(body))
        units = 1
        try:
            policy, rows = self._questions.several(head, body, caller)
            units = len(rows)
            self._overload.grow(units - 1)
            outcomes = await policy.coalescer.decide(rows, place.until_s)
        except Overloaded:
            self._overload.count_late("batch")
            raise
        finally:
            self._overload.done(units)
        took_s = self._clock.monotonic_s() - rows[0].arrived_s
        for version in {outcome.version for outcome in outcomes if isinstance(outcome, ActResponse)}:
            self._metrics.version(policy.name, version).duration.observe(took_s)
        generations = [outcome.generation for outcome in outcomes if isinstance(outcome, ActResponse)]
        # A batch cut in several may see two: the earlier is what all rows have at least.
        generation = min(generations, default=policy.coalescer.decider.plan.generation)
        return 200, encode(_columns(policy.name, generation, outcomes)), ()

    # -- /reward ------------------------------------------------------------------------------------------------------

    async def _reward(self, head: Head, body: bytes, caller: Caller) -> Reply:
        response = await self._rewards.reward(decode_reward(body), Tracing.parent(head.headers), caller.policies)
        return 202, encode(response), ()

    async def _reward_batch(self, head: Head, body: bytes, caller: Caller) -> Reply:
        parent = Tracing.parent(head.headers)
        response = await self._rewards.reward_batch(decode_reward_batch(body), parent, caller.policies)
        return 202, encode(response), ()


def _answer(head: Head, reply: Reply) -> Answer:
    status, body, extra = reply
    if wants_msgpack(head):
        return status, repacked(body), MSGPACK, extra
    return status, body, JSON, extra


_COLUMNS = {  # by where they are in an answer
    **{
        name: name
        for name in (
            "decision_id", "assigned_version", "version", "role", "action", "action_name", "propensity",
            "propensity_reason", "explored", "fallback", "logged", "propensity_kind", "log_propensity", "state_reset",
        )
    },
    "exploration.epsilon": "epsilon",
    "safety.overridden": "overridden",
}  # fmt: skip
_READ = attrgetter(*_COLUMNS)
_NOTHING = (None,) * len(_COLUMNS)


def _columns(policy: str, generation: int, outcomes: list[Outcome]) -> ActBatchResponse:
    rows = [_READ(outcome) if isinstance(outcome, ActResponse) else _NOTHING for outcome in outcomes]
    return ActBatchResponse(
        policy=policy,
        generation=generation,
        **dict(zip(_COLUMNS.values(), map(list, zip(*rows, strict=True)), strict=True)),
        errors=[problem(each, row=row) for row, each in enumerate(outcomes) if isinstance(each, SurefootError)],
    )
