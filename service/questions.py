"""Questions for actions, from bytes to rows that are checked against the policy's spec.

    decode -> which policy? -> its state, finite -> what the caller allows -> Row

Duty: everything that a question can be refused for before it is decided. It knows no answers, and nothing of how bytes
came here. Strategy: what is small stays a list until its batch becomes one array: an array of eight numbers costs more
than looking at each of them.
Promise: a row that leaves here has the policy's shape, and every number of it is finite in the policy's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from policies.errors import InvalidField, MissingField, NotFinite
from policies.types import ActionSpec, ObservationSpec
from service.absence import Absence
from service.allowed import read_allowed
from service.body import Head
from service.callers import Caller
from service.clock import Clock
from service.coalesce import Coalescer
from service.forms import AskedBatch, form_of
from service.plan import Row
from service.states import State, StateReader, States
from service.tracing import Tracing
from service.wire import ActFields

NEEDS_EPISODE = "this policy remembers what it saw, episode by episode: name the episode, and send its step"
Said = TypeVar("Said")
Found = TypeVar("Found")
COLUMNS = ("keys", "episodes", "steps", "contexts", "allowed_actions", "previous_actions")

# From about here on numpy, which takes 2 µs for any array, is faster than 40 ns for each number.
SMALL: Final = 48
# What rounds to infinity: half a step beyond the largest number of the dtype.
BEYOND: Final = {"float32": 2.0**128 - 2.0**103, "float64": math.inf}


@dataclass(frozen=True, slots=True)
class Served:
    """A policy as the hot routes see it. beyond: no number of a short list may be so large; None: states are long."""

    name: str
    observation: ObservationSpec
    action: ActionSpec
    states: StateReader
    coalescer: Coalescer
    beyond: float | None = field(init=False)

    def __post_init__(self) -> None:
        small = len(self.observation.shape) == 1 and self.observation.size <= SMALL
        object.__setattr__(self, "beyond", BEYOND[self.observation.dtype] if small else None)

    def away(self) -> int:
        """Rows that wait for a network off the loop."""
        return self.coalescer.away


class Questions:
    """Reads questions about the policies that are served now."""

    def __init__(self, policies: Mapping[str, Served], absence: Absence, clock: Clock, max_batch: int) -> None:
        self._policies = policies  # policies come at run time, too
        self._absence = absence
        self._clock = clock
        self._max_batch = max_batch

    def one(self, head: Head, body: bytes, caller: Caller) -> tuple[Served, Row]:
        """Read a question for one action. Raises what is wrong with it, of the error tree."""
        arrived_s = self._clock.monotonic_s()
        fields, read, given = form_of(head).act(head, body)
        policy = self._find(fields.policy, caller)
        state = _finite_one(policy, read(policy.states, given))
        if fields.episode is None and policy.coalescer.decider.plan.recurrent:
            raise MissingField(NEEDS_EPISODE, "episode")
        return policy, _row(policy, fields, state, Tracing.parent(head.headers), arrived_s)

    def several(self, head: Head, body: bytes, caller: Caller) -> tuple[Served, list[Row]]:
        """Read a question for several actions. Raises as `one` does."""
        arrived_s = self._clock.monotonic_s()
        asked = form_of(head).act_batch(head, body)
        policy = self._find(asked.fields.policy, caller)
        return policy, self._rows(policy, asked, Tracing.parent(head.headers), arrived_s)

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

    def _rows(self, policy: Served, asked: AskedBatch, traceparent: str | None, arrived_s: float) -> list[Row]:
        request = asked.fields
        sent = asked.states(policy.states, self._max_batch)
        count = len(sent)
        for name in COLUMNS:
            column = getattr(request, name)
            if column is not None and len(column) != count:
                raise InvalidField(f"there are {count} states, but {len(column)} {name}", name)
        array = _finite(policy, sent, "states")
        empty = [None] * count
        episodes = request.episodes or empty
        if policy.coalescer.decider.plan.recurrent and None in episodes:
            raise MissingField(NEEDS_EPISODE, f"episodes[{episodes.index(None)}]")
        # Small lists become arrays again with their batch, whose rows may be of several requests.
        states: Iterable[State] = sent if policy.beyond is not None and isinstance(sent, list) else array
        columns = (
            request.keys or empty,
            episodes,
            request.steps or empty,
            request.contexts or empty,
            _each(request.allowed_actions, "allowed_actions", policy, read_allowed) or empty,
            _each(request.previous_actions, "previous_actions", policy, _read_action) or empty,
        )
        explore = request.explore
        return [
            Row(state, key, episode, step, context, allowed, previous, explore, (), traceparent, arrived_s)
            for state, key, episode, step, context, allowed, previous in zip(states, *columns, strict=True)
        ]


def _each(
    column: Sequence[Said] | None, name: str, policy: Served, read: Callable[[Said, ActionSpec, str], Found]
) -> list[Found] | None:
    """Read a column about actions, naming the element that cannot be."""
    if column is None:
        return None
    return [read(each, policy.action, f"{name}[{index}]") for index, each in enumerate(column)]


def _row(policy: Served, fields: ActFields, state: State, traceparent: str | None, arrived_s: float) -> Row:
    allowed, previous = fields.allowed_actions, fields.previous_action
    return Row(
        state,
        fields.key,
        fields.episode,
        fields.step,
        fields.context,
        None if allowed is None else read_allowed(allowed, policy.action, "allowed_actions"),
        None if previous is None else _read_action(previous, policy.action, "previous_action"),
        fields.explore,
        fields.include,
        traceparent,
        arrived_s,
    )


def _finite_one(policy: Served, state: State) -> State:
    """Give an observation as it came, or as an array, refusing what the spec's dtype cannot hold."""
    beyond = policy.beyond
    if beyond is not None and type(state) is list:
        for number in state:
            if not -beyond < number < beyond:  # nor NaN
                break
        else:
            return state
    found: State = _finite(policy, [state])[0]
    return found


def _finite(policy: Served, states: States, field: str | None = None) -> npt.NDArray[np.floating]:
    """Give observations as one array [B, *shape] of the spec's dtype, refusing what it cannot hold.

    JSON itself has no NaN, but 1e300 is infinite as float32. field: that lists them; None: there is one, `state`.
    """
    array = policy.observation.array(states)
    index = policy.observation.first_not_finite(array)
    if index is not None:
        found = policy.observation.refuse_not_finite(array[index])
        name = "state" if field is None else f"{field}[{index}]"
        raise NotFinite(found.detail, name + (found.field or "").removeprefix("state"))
    return array


def _read_action(action: object, space: ActionSpec, where: str) -> tuple[float, ...] | None:
    return None if action is None else space.parse(action, where)
