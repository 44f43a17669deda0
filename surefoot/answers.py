"""What the service answers, as values. Pure.

Duty: the public result types and how their JSON is read. Fields that a newer service adds are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from surefoot.errors import ApiError, FieldProblem, Unreadable, api_error

T = TypeVar("T")
Column = list[Any]
PropensityKind = Literal["mass", "density", "mixed"]

# What an action is depends on the policy, which no type checker knows: to it both are Any, or every caller would have
# to convince it. They are checked when an answer is read.
if TYPE_CHECKING:
    Action = Any
    ActionName = Any
else:
    Action = int | list[int | float]  # an index, one for each factor, or the coordinates of a point
    ActionName = str | list[str] | None  # points have no names


class Exploration(msgspec.Struct, frozen=True):
    epsilon: float  # in force for this decision
    left: int | None = None  # explored decisions left in the budget's window; None: no budget is declared


class Safety(msgspec.Struct, frozen=True):
    overridden: bool = False  # a rule changed what the version would have done
    proposed: int | str | list[int | float | str] | None = None  # what it would have done: names where there are names
    rules: tuple[str, ...] = ()  # which rules changed it
    stand_in: str | None = None  # why another version decided in place of the assigned one


class PointDistribution(msgspec.Struct, frozen=True):
    """What a point was drawn from: (1 - ε) · T(N(mean, std²)) + ε · N(centre, sigma²), both projected onto the box.

    T is the policy's transform, and the centre is T(mean) within the box.
    """

    mean: tuple[float, ...]  # of the raw action, before transform and projection
    std: tuple[float, ...]
    low: tuple[float | None, ...]  # the box; None where it is open
    high: tuple[float | None, ...]
    epsilon: float
    sigma: tuple[float, ...] | None = None  # in units of the action; None: nothing is explored


class Decision(msgspec.Struct, frozen=True):
    """One answer to one state."""

    decision_id: str
    policy: str
    assigned_version: str  # the version that routing chose
    version: str  # the one that decided: the baseline may have stepped in
    action: Action
    action_name: ActionName
    propensity: float | None  # probability of `action`; None where it is not known or is a density
    propensity_reason: str | None  # why nothing is known
    explored: bool
    exploration: Exploration
    safety: Safety
    fallback: str | None  # the reason, where the policy's declared fallback answered
    logged: bool
    role: str = ""
    generation: int = 0
    switched: bool = False  # another version decided the episode's step before
    state_reset: bool = False  # a recurrent policy had no memory that fits the step, and started anew
    propensity_kind: PropensityKind = "mass"  # otherwise `propensity` is None, and `log_propensity` the number
    log_propensity: float | None = None  # continuous policies only
    values: tuple[float, ...] | None = None  # what the network returned, with include=["values"]
    # What was drawn from, with include=["distribution"]: a probability for each choice, or a tuple for each factor.
    distribution: tuple[float | tuple[float, ...], ...] | PointDistribution | None = None
    idempotency: str | None = None  # "local": the Idempotency-Key holds within one worker only, Redis being away


class RewardReceipt(msgspec.Struct, frozen=True):
    """A reward that is durable. `status` says what the join made of it.

    `joined`: it is the decision's reward, or a part of it. `early`: it waits for the decision's record, or for the end
    of its episode. `late`: it is kept on the late stream. `correction`: in time, but the default had left.
    `quarantined`: outside the policy's range. `accepted`: the join has not answered yet. `conflict`, in a batch only:
    another reward stands.
    """

    decision_id: str | None  # None: it is for a whole episode
    reward_id: str | None
    status: str
    duplicate: bool = False
    episode: str | None = None
    reward: float | None = None  # as it was recorded: of `metrics`, where the policy has an expression


@dataclass(frozen=True, eq=False)
class BatchDecisions:
    """Answers to B states, as columns.

    A row that could not be decided stands in `errors`; its action is -1 or, where actions are points, NaN.
    """

    policy: str
    generation: int
    decision_ids: npt.NDArray[np.object_]  # [B] of str, "" where undecided; so all strings here
    actions: npt.NDArray[Any]  # int64 [B], with factors [B, F]; points: float64 [B, D]
    action_names: npt.NDArray[np.object_]  # [B], with factors [B, F]; "" for points
    propensities: npt.NDArray[np.float64]  # [B] NaN where not known, and where it is a density
    log_propensities: npt.NDArray[np.float64]  # [B] log of the probability or density; NaN where not known
    propensity_kinds: npt.NDArray[np.object_]  # [B] mass | density | mixed, "" where undecided
    propensity_reasons: npt.NDArray[np.object_]  # [B] "" where known
    explored: npt.NDArray[np.bool_]  # [B]
    epsilons: npt.NDArray[np.float64]  # [B]
    overridden: npt.NDArray[np.bool_]  # [B]
    fallbacks: npt.NDArray[np.object_]  # [B] the reason, "" where the fallback did not answer
    assigned_versions: npt.NDArray[np.object_]  # [B]
    versions: npt.NDArray[np.object_]  # [B]
    roles: npt.NDArray[np.object_]  # [B]
    logged: npt.NDArray[np.bool_]  # [B]
    state_resets: npt.NDArray[np.bool_]  # [B] a recurrent policy had no memory that fits the step, and started anew
    errors: Mapping[int, ApiError]  # by row

    def __len__(self) -> int:
        return len(self.actions)


class _Columns(msgspec.Struct, frozen=True):
    policy: str
    decision_id: Column
    assigned_version: Column
    version: Column
    action: Column
    action_name: Column
    propensity: Column
    propensity_reason: Column
    explored: Column
    epsilon: Column
    overridden: Column
    fallback: Column
    logged: Column
    propensity_kind: Column = []
    log_propensity: Column = []
    state_reset: Column = []
    role: Column = []
    generation: int = 0
    errors: list[_Problem] = []


class _Problem(msgspec.Struct, frozen=True):
    code: str | None = None
    title: str = ""
    detail: str = ""
    status: int = 0
    errors: list[FieldProblem] = []
    row: int | None = None

    def error(self, status: int, retry_after_s: float | None = None) -> ApiError:
        return api_error(
            self.code,
            self.status or status,
            self.detail or self.title or f"status {status}",
            title=self.title,
            errors=self.errors,
            retry_after_s=retry_after_s,
        )


class _Receipts(msgspec.Struct, frozen=True):
    results: list[RewardReceipt]


_decision = msgspec.json.Decoder(Decision)
_columns = msgspec.json.Decoder(_Columns)
_receipt = msgspec.json.Decoder(RewardReceipt)
_receipts = msgspec.json.Decoder(_Receipts)
_record = msgspec.json.Decoder(dict[str, Any])
_problem = msgspec.json.Decoder(_Problem)


def _read(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unreadable(f"the service's answer cannot be read: {error}") from error


def read_decision(body: bytes) -> Decision:
    return _read(_decision, body)


def read_receipt(body: bytes) -> RewardReceipt:
    return _read(_receipt, body)


def read_receipts(body: bytes) -> list[RewardReceipt]:
    return _read(_receipts, body).results


def read_record(body: bytes) -> dict[str, Any]:
    return _read(_record, body)


def read_error(status: int, body: bytes, retry_after_s: float | None) -> ApiError:
    """Read problem details; an answer that is none (a proxy's page) becomes an ApiError with its first words."""
    try:
        return _problem.decode(body).error(status, retry_after_s)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        words = body[:200].decode(errors="replace").strip()
        return api_error(None, status, words or f"status {status}", retry_after_s=retry_after_s)


def read_batch(body: bytes) -> BatchDecisions:
    answer = _read(_columns, body)
    try:
        return _batch(answer)
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise Unreadable(f"the service's answer cannot be read: {error}") from error


def _batch(answer: _Columns) -> BatchDecisions:
    none = [None] * len(answer.action)  # instead of a column that the service does not know yet
    masses = [None if action is None else "mass" for action in answer.action]
    actions, names = _actions(answer.action, answer.action_name)
    propensities = _floats(answer.propensity)
    return BatchDecisions(
        policy=answer.policy,
        generation=answer.generation,
        decision_ids=_strings(answer.decision_id),
        actions=actions,
        action_names=names,
        propensities=propensities,
        log_propensities=_logs(propensities, _floats(answer.log_propensity or none)),
        propensity_kinds=_strings(answer.propensity_kind or masses),
        propensity_reasons=_strings(answer.propensity_reason),
        explored=np.array(answer.explored, np.bool_),
        epsilons=_floats(answer.epsilon),
        overridden=np.array(answer.overridden, np.bool_),
        fallbacks=_strings(answer.fallback),
        assigned_versions=_strings(answer.assigned_version),
        versions=_strings(answer.version),
        roles=_strings(answer.role),
        logged=np.array(answer.logged, np.bool_),
        state_resets=np.array(answer.state_reset or none, np.bool_),
        errors={problem.row: problem.error(problem.status) for problem in answer.errors if problem.row is not None},
    )


def _actions(actions: Column, names: Column) -> tuple[npt.NDArray[Any], npt.NDArray[np.object_]]:
    """Actions and their names as arrays of one shape; only points have no names."""
    decided = next((row for row, action in enumerate(actions) if action is not None), None)
    if decided is None or not isinstance(actions[decided], list):
        return np.array([-1 if action is None else action for action in actions], np.int64), _strings(names)
    size, points = len(actions[decided]), names[decided] is None
    none, dtype = (math.nan, np.float64) if points else (-1, np.int64)
    found: npt.NDArray[Any] = np.array([[none] * size if action is None else action for action in actions], dtype)
    if points:
        return found, _strings(names)
    named = [name for row in names for name in (row or [""] * size)]
    return found, _strings(named).reshape(found.shape)


def _logs(propensities: npt.NDArray[np.float64], logs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The logs that the service gave; of a mass without one, its log."""
    with np.errstate(divide="ignore"):
        return np.where(np.isnan(logs), np.log(propensities), logs)


def _strings(values: Column) -> npt.NDArray[np.object_]:
    column = np.empty(len(values), np.object_)
    column[:] = ["" if value is None else value for value in values]
    return column


def _floats(values: Column) -> npt.NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in values], np.float64)
