"""Every error that this package raises, in one tree. Leaf module.

    SurefootError
    ├── ApiError                    the service refused; `code`, `status`, `title`, `detail`, `errors`, `retry_after_s`
    │   ├── InvalidField            422  a field has the wrong type, shape or value
    │   │   ├── UnknownField        422  a field or feature that does not exist
    │   │   ├── MissingField        422  a field or feature that must be there
    │   │   ├── NotFinite           422  NaN or Infinity; also raised here, before anything is sent
    │   │   └── UnknownAction       422  an action outside the action space
    │   ├── UnknownPolicy           404
    │   ├── UnknownDecision         404  the id was never issued by this service
    │   ├── DecisionExpired         404  the id was issued, its record is gone
    │   ├── RewardConflict          409  another reward stands under the same (decision_id, reward_id)
    │   ├── NoSafeAction            409  nothing is allowed and the policy declares `fallback: none`
    │   ├── KeyReused               422  an Idempotency-Key came back with another body
    │   ├── KeyInUse                409  the first request with this Idempotency-Key is still running
    │   ├── BodyTooLarge            413
    │   ├── Unauthorized            401, 403
    │   └── Unavailable             503  nothing was kept, and retrying did not help within `retry_for_s`
    ├── Unreachable                 no answer; `maybe_received` says whether the request may have been carried out
    ├── Unreadable                  an answer or an entry that this version of the package cannot read: upgrade it
    ├── Refused                     Redis does not allow a command: credentials, permissions, a foreign key in the way
    └── Gap                         transitions are gone that this consumer group has never seen

An `ApiError` whose code is not listed here is raised as `ApiError` itself: compare `code`, which is stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal


class SurefootError(Exception):
    """Root of the tree."""


@dataclass(frozen=True, slots=True)
class FieldProblem:
    """What is wrong with one field, named as a path: `state.cpu`, `rewards[3].reward`."""

    field: str
    detail: str


class ApiError(SurefootError):
    """The service refused the request."""

    codes: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        status: int = 0,
        title: str = "",
        errors: Sequence[FieldProblem] = (),
        retry_after_s: float | None = None,
    ) -> None:
        named = "; ".join(f"{problem.field}: {problem.detail}" for problem in errors if problem.detail != detail)
        where = f" [{errors[0].field}]" if errors else ""
        super().__init__(f"{detail}{where}" + (f" ({named})" if named else ""))
        self.detail = detail
        self.code = code or (self.codes[0] if self.codes else f"http_{status}")
        self.status = status
        self.title = title
        self.errors = tuple(errors)
        self.retry_after_s = retry_after_s


class InvalidField(ApiError):
    codes = ("invalid_field",)


class UnknownField(InvalidField):
    codes = ("unknown_field",)


class MissingField(InvalidField):
    codes = ("missing_field",)


class NotFinite(InvalidField):
    codes = ("not_finite",)


class UnknownAction(InvalidField):
    codes = ("unknown_action",)


class UnknownPolicy(ApiError):
    codes = ("unknown_policy",)


class UnknownDecision(ApiError):
    codes = ("unknown_decision",)


class DecisionExpired(ApiError):
    codes = ("decision_expired",)


class RewardConflict(ApiError):
    codes = ("reward_conflict",)


class NoSafeAction(ApiError):
    codes = ("no_safe_action",)


class KeyReused(ApiError):
    codes = ("idempotency_key_reused",)


class KeyInUse(ApiError):
    codes = ("idempotency_key_in_use",)


class BodyTooLarge(ApiError):
    codes = ("body_too_large",)


class Unauthorized(ApiError):
    """The token is missing or wrong (401), or does not give this right (403)."""

    codes = ("unauthorized",)


class Unavailable(ApiError):
    """The service cannot do this now; nothing was kept."""

    codes = (
        "unavailable",
        "ledger_full",
        "ledger_broken",
        "audit_broken",
        "store_away",
        "bundles_away",
        "not_ready",
        "unconfirmed",
        "overloaded",
    )


class Unreachable(SurefootError):
    """No answer came in time.

    `maybe_received`: the request left, so that the service may have carried it out all the same. False means that
    nothing has happened there, and that the same call may be made again.
    """

    def __init__(self, detail: str, *, maybe_received: bool) -> None:
        super().__init__(detail)
        self.detail = detail
        self.maybe_received = maybe_received


class Unreadable(SurefootError):
    """An answer or a stream entry that this version of the package cannot read."""


class Refused(SurefootError):
    """Redis does not allow what was asked. Trying again will not help."""


GapReason = Literal["trimmed", "deleted", "group_missing", "spool"]


class Gap(SurefootError):
    """Transitions are gone that this consumer group has never seen.

    `reason`: `trimmed`, the stream was cut past the group's position; `deleted`, single entries were removed, `ids`
    names those known; `group_missing`, group or stream vanished while it was being read; `spool`, the service itself
    lost events before they reached Redis. `lost` is the number, or None where it cannot be known. `resume` is the least
    stream id behind the loss: reading goes on there.

    Each loss is raised once. The iterator that raised it can be used on: what it yields next lies behind the gap.
    """

    def __init__(
        self, detail: str, *, reason: GapReason, lost: int | None = None, ids: Sequence[str] = (), resume: str = ""
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.reason = reason
        self.lost = lost
        self.ids = tuple(ids)
        self.resume = resume


def _leaves(kind: type[ApiError]) -> list[type[ApiError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in _leaves(child))]


_BY_CODE = {code: kind for kind in _leaves(ApiError) for code in kind.codes}
_BY_STATUS: dict[int, type[ApiError]] = {401: Unauthorized, 403: Unauthorized, 413: BodyTooLarge, 503: Unavailable}


def api_error(
    code: str | None,
    status: int,
    detail: str,
    *,
    title: str = "",
    errors: Sequence[FieldProblem] = (),
    retry_after_s: float | None = None,
) -> ApiError:
    """Make the error of the class that `code` stands for; of the class of the status where the code is unknown."""
    kind = _BY_CODE.get(code or "") or _BY_STATUS.get(status, ApiError)
    known = code or f"http_{status}"
    return kind(detail, code=known, status=status, title=title, errors=errors, retry_after_s=retry_after_s)
