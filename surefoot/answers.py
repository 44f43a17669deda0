"""What the service answers, as values. Pure.

Duty: the public result types and how their JSON is read. Fields that a newer service adds are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from surefoot.errors import ApiError, FieldProblem, Unreadable, api_error

T = TypeVar("T")
Column = list[Any]


class Exploration(msgspec.Struct, frozen=True):
    epsilon: float  # in force for this decision
    left: int | None = None  # explored decisions left in the budget's window; None: no budget is declared


class Safety(msgspec.Struct, frozen=True):
    overridden: bool = False  # a rule changed what the version would have done
    proposed: int | str | None = None  # what it would have done
    rules: tuple[str, ...] = ()  # which rules changed it


class Decision(msgspec.Struct, frozen=True):
    """One answer to one state."""

    decision_id: str
    policy: str
    assigned_version: str  # the version that routing chose
    version: str  # the one that decided: the baseline may have stepped in
    action: int
    action_name: str
    propensity: float | None  # probability of `action`; None where it is not known, see `propensity_reason`
    propensity_reason: str | None
    explored: bool
    exploration: Exploration
    safety: Safety
    fallback: str | None  # the reason, where the policy's declared fallback answered
    logged: bool
    role: str = ""
    generation: int = 0
    switched: bool = False  # another version decided the episode's step before
    values: tuple[float, ...] | None = None  # what the network returned, with include=["values"]
    distribution: tuple[float, ...] | None = None  # what was drawn from, with include=["distribution"]
    idempotency: str | None = None  # "local": the Idempotency-Key holds within one worker only, Redis being away


class RewardReceipt(msgspec.Struct, frozen=True):
    """A reward that is durable. `status` says what the join made of it.

    `joined`: it is the decision's reward. `early`: it waits for the decision's record. `late`: it is kept on the late
    stream. `accepted`: the join has not answered yet. `conflict`, in a batch only: another reward stands.
    """

    decision_id: str
    reward_id: str | None
    status: str
    duplicate: bool = False


@dataclass(frozen=True, eq=False)
class BatchDecisions:
    """Answers to B states, as columns. A row that could not be decided stands in `errors`; its action is -1."""

    policy: str
    generation: int
    decision_ids: npt.NDArray[np.object_]  # [B] of str, "" where undecided; so all strings here
    actions: npt.NDArray[np.int64]  # [B]
    action_names: npt.NDArray[np.object_]  # [B]
    propensities: npt.NDArray[np.float64]  # [B] NaN where not known
    propensity_reasons: npt.NDArray[np.object_]  # [B] "" where known
    explored: npt.NDArray[np.bool_]  # [B]
    epsilons: npt.NDArray[np.float64]  # [B]
    overridden: npt.NDArray[np.bool_]  # [B]
    fallbacks: npt.NDArray[np.object_]  # [B] the reason, "" where the fallback did not answer
    assigned_versions: npt.NDArray[np.object_]  # [B]
    versions: npt.NDArray[np.object_]  # [B]
    roles: npt.NDArray[np.object_]  # [B]
    logged: npt.NDArray[np.bool_]  # [B]
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
    return BatchDecisions(
        policy=answer.policy,
        generation=answer.generation,
        decision_ids=_strings(answer.decision_id),
        actions=np.array([-1 if action is None else action for action in answer.action], np.int64),
        action_names=_strings(answer.action_name),
        propensities=_floats(answer.propensity),
        propensity_reasons=_strings(answer.propensity_reason),
        explored=np.array(answer.explored, np.bool_),
        epsilons=_floats(answer.epsilon),
        overridden=np.array(answer.overridden, np.bool_),
        fallbacks=_strings(answer.fallback),
        assigned_versions=_strings(answer.assigned_version),
        versions=_strings(answer.version),
        roles=_strings(answer.role),
        logged=np.array(answer.logged, np.bool_),
        errors={problem.row: problem.error(problem.status) for problem in answer.errors if problem.row is not None},
    )


def _strings(values: Column) -> npt.NDArray[np.object_]:
    column = np.empty(len(values), np.object_)
    column[:] = ["" if value is None else value for value in values]
    return column


def _floats(values: Column) -> npt.NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in values], np.float64)
