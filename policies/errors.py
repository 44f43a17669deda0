"""The whole error tree, with the problem `code` and HTTP status on each class.

    SurefootError
    ├── RequestError                 what the caller sent cannot be used; sending it again will not help
    │   ├── BadJson          400     the body is not JSON
    │   ├── BadMsgpack       400     the body is not msgpack
    │   ├── BadTimeout       400     a header that says how long a request may take cannot be used
    │   ├── InvalidField     422     a field has the wrong type, shape or value
    │   │   ├── UnknownField 422     a field or feature that does not exist
    │   │   ├── MissingField 422     a field or feature that must be there
    │   │   ├── NotFinite    422     NaN, Infinity, or a number that the observation's dtype cannot hold
    │   │   └── UnknownAction 422    an action outside the action space
    │   ├── UnknownPolicy    404
    │   ├── UnknownVersion   404
    │   ├── VersionExists    409     the label is taken by other content: versions never change
    │   ├── VersionLive      409     the version decides, or may: it cannot be deleted
    │   ├── VersionReadOnly  409     the version lies in the directory of the start: it cannot be deleted here
    │   ├── GenerationMoved  412     somebody else has changed the deployment meanwhile
    │   ├── GenerationMissing 428    an existing deployment is changed by If-Match only
    │   ├── UnsupportedMedia 415     the body is of a type that the route does not take
    │   ├── UnknownDecision  404     the id was never issued here: malformed, forged, or of another deployment
    │   ├── DecisionExpired  404     the id was issued, its record is gone
    │   ├── RewardConflict   409     another reward stands under the same (decision_id, reward_id)
    │   ├── NoSafeAction     409     nothing is allowed and the policy declares `fallback: none`
    │   ├── KeyReused        422     an Idempotency-Key came back with another body
    │   ├── KeyInUse         409     the first request with this Idempotency-Key is still running
    │   ├── MoveRefused      409     a rollout cannot make this move from where it stands
    │   ├── Unauthorized     401     no token, or not a valid one
    │   ├── Forbidden        403     the token's role or policies do not reach so far
    │   ├── TooMany          429     more requests, or more failed ones, than are taken (Retry-After)
    │   ├── UnknownToken     404     there is no token of this id
    │   ├── TokensMoved      409     others have changed tokens meanwhile, again and again
    │   ├── BodyTooLarge     413
    │   ├── BodyTooSlow      408
    │   └── WrongMethod      405
    ├── Unavailable          503     nothing was kept; the same request may succeed later (Retry-After)
    │   ├── Overloaded       503     there was no time for it before its deadline
    │   ├── LedgerFull       503     the bounded buffer is full
    │   ├── LedgerBroken     503     the spool cannot be written
    │   │   └── Unconfirmed  503     kept here and on its way, but Redis's replicas have not confirmed it in time
    │   ├── StoreAway        503     Redis does not answer, and the question cannot be answered without it
    │   ├── BundlesAway      503     the store of bundles does not answer
    │   ├── AuditBroken      503     the disk does not take the audit log, and nothing is changed without it
    │   └── NotReady         503     keys or policies are not loaded yet
    ├── BundleError          422     a policy bundle that is refused; `check` names the check that refused it
    ├── SafetyError          422     a `safety.yaml` that is refused; `errors` names every place with line and column
    └── ConfigError          500     a setting or a file of the deployment is wrong; the service does not start

Foreign errors are translated in the file that imports the foreign library. One handler, in `service/api.py`,
turns this tree into `application/problem+json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple


class SurefootError(Exception):
    """Root of the tree. `field` points at what is wrong, as a path: `state.cpu`, `rewards[3].reward`."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Something went wrong inside the service"
    retry_after_s: int | None = None

    def __init__(self, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field

    def within(self, prefix: str) -> SurefootError:
        """Give the same error with its field below `prefix`, for an element of a batch."""
        joint = "" if (self.field or "[").startswith("[") else "."
        return type(self)(self.detail, f"{prefix}{joint}{self.field or ''}")


class RequestError(SurefootError):
    code = "bad_request"
    status = 400
    title = "The request cannot be used"


class BadJson(RequestError):
    code = "bad_json"
    title = "The body is not valid JSON"


class BadMsgpack(RequestError):
    code = "bad_msgpack"
    title = "The body is not valid msgpack"


class BadTimeout(RequestError):
    code = "bad_timeout"
    title = "The time that the request may take cannot be used"


class InvalidField(RequestError):
    code = "invalid_field"
    status = 422
    title = "A field has the wrong type, shape or value"


class UnknownField(InvalidField):
    code = "unknown_field"
    title = "A field that does not exist"


class MissingField(InvalidField):
    code = "missing_field"
    title = "A required field is missing"


class NotFinite(InvalidField):
    code = "not_finite"
    title = "A number is not finite"


class UnknownAction(InvalidField):
    code = "unknown_action"
    title = "An action outside the action space"


class UnknownPolicy(RequestError):
    code = "unknown_policy"
    status = 404
    title = "No such policy"


class UnknownVersion(RequestError):
    code = "unknown_version"
    status = 404
    title = "No such version"


class VersionExists(RequestError):
    code = "version_exists"
    status = 409
    title = "The version's label is taken by other content"


class VersionLive(RequestError):
    code = "version_live"
    status = 409
    title = "The version is live"


class VersionReadOnly(RequestError):
    code = "version_read_only"
    status = 409
    title = "The version lies in the service's directory of policies"


class GenerationMoved(RequestError):
    code = "generation_moved"
    status = 412
    title = "The deployment has changed meanwhile"


class GenerationMissing(RequestError):
    code = "generation_missing"
    status = 428
    title = "If-Match is required"


class MoveRefused(RequestError):
    code = "move_refused"
    status = 409
    title = "The rollout cannot make this move"


class UnsupportedMedia(RequestError):
    code = "unsupported_media_type"
    status = 415
    title = "The body is of a type that is not taken here"


class UnknownDecision(RequestError):
    code = "unknown_decision"
    status = 404
    title = "No such decision"


class DecisionExpired(RequestError):
    code = "decision_expired"
    status = 404
    title = "The decision's record has expired"


class RewardConflict(RequestError):
    code = "reward_conflict"
    status = 409
    title = "Another reward stands under this id"


class NoSafeAction(RequestError):
    code = "no_safe_action"
    status = 409
    title = "No action is allowed and the policy declares no fallback"


class KeyReused(RequestError):
    code = "idempotency_key_reused"
    status = 422
    title = "The Idempotency-Key was used with another body"


class KeyInUse(RequestError):
    code = "idempotency_key_in_use"
    status = 409
    title = "The first request with this Idempotency-Key is still running"
    retry_after_s = 1


class Unauthorized(RequestError):
    code = "unauthorized"
    status = 401
    title = "A valid token is required"


class Forbidden(RequestError):
    code = "forbidden"
    status = 403
    title = "The token does not reach so far"


class TooMany(RequestError):
    code = "too_many_requests"
    status = 429
    title = "Too many requests"

    def __init__(self, detail: str, field: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(detail, field)
        self.retry_after_s = retry_after_s


class UnknownToken(RequestError):
    code = "unknown_token"
    status = 404
    title = "No such token"


class TokensMoved(RequestError):
    code = "tokens_moved"
    status = 409
    title = "Tokens have changed meanwhile"
    retry_after_s = 1


class BodyTooLarge(RequestError):
    code = "body_too_large"
    status = 413
    title = "The body is larger than the limit"


class BodyTooSlow(RequestError):
    code = "body_too_slow"
    status = 408
    title = "The body did not arrive in time"


class WrongMethod(RequestError):
    code = "method_not_allowed"
    status = 405
    title = "The method is not allowed here"


class Unavailable(SurefootError):
    code = "unavailable"
    status = 503
    title = "The service cannot do this now"
    retry_after_s = 1


class Overloaded(Unavailable):
    code = "overloaded"
    title = "There are too many requests"


class LedgerFull(Unavailable):
    code = "ledger_full"
    title = "The ledger's buffer is full"


class LedgerBroken(Unavailable):
    code = "ledger_broken"
    title = "The ledger cannot be written"
    retry_after_s = 5


class Unconfirmed(LedgerBroken):
    code = "unconfirmed"
    title = "Redis's replicas have not confirmed it in time"
    retry_after_s = 1


class StoreAway(Unavailable):
    """`reason` says in which way, in one word of a fixed set (docs/redis.md): `timeout`, `oom`, `readonly`, …"""

    code = "store_away"
    title = "Redis does not answer"

    def __init__(self, detail: str, field: str | None = None, reason: str = "away") -> None:
        super().__init__(detail, field)
        self.reason = reason


class BundlesAway(Unavailable):
    code = "bundles_away"
    title = "The store of bundles does not answer"


class AuditBroken(Unavailable):
    code = "audit_broken"
    title = "The audit log cannot be written"
    retry_after_s = 5


class NotReady(Unavailable):
    code = "not_ready"
    title = "Keys or policies are not loaded yet"


class BundleError(SurefootError):
    """A bundle that is refused. `check` names the check: `digest`, `operators`, `golden`, …"""

    code = "bundle_refused"
    status = 422
    title = "The policy bundle is refused"

    def __init__(self, detail: str, field: str | None = None, check: str = "manifest") -> None:
        super().__init__(detail, field)
        self.check = check


class SafetyFault(NamedTuple):
    """One thing that is wrong in a `safety.yaml`, and where. line, column: from 1."""

    field: str
    detail: str
    line: int
    column: int


class SafetyError(SurefootError):
    """Safety rules that are refused. `errors` holds everything that was found wrong, in the order of the file."""

    code = "invalid_safety"
    status = 422
    title = "The safety rules are refused"

    def __init__(self, detail: str, field: str | None = None, errors: Sequence[SafetyFault] = ()) -> None:
        super().__init__(detail, field)
        self.errors = tuple(errors)


class ConfigError(SurefootError):
    code = "config"
    title = "The configuration is wrong"
