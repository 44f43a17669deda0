"""The error tree as RFC 9457 problem details. Pure.

`type` is a URN made of the stable code; `errors` names the field; `error` nothing else: no traces, no values.
"""

from __future__ import annotations

from policies.errors import BundleError, SafetyError, SurefootError
from service.wire import FieldError, Problem

CONTENT_TYPE = "application/problem+json"


def problem(error: SurefootError, *, instance: str | None = None, row: int | None = None) -> Problem:
    """Describe an error of the tree to a caller."""
    return Problem(
        type=f"urn:surefoot:problem:{error.code}",
        title=error.title,
        status=error.status,
        code=error.code,
        detail=error.detail,
        instance=instance,
        errors=_fields(error),
        row=row,
        check=error.check if isinstance(error, BundleError) else None,
    )


def _fields(error: SurefootError) -> list[FieldError]:
    if isinstance(error, SafetyError) and error.errors:
        return [FieldError(each.field, each.detail, each.line, each.column) for each in error.errors]
    return [FieldError(error.field, error.detail)] if error.field else []
