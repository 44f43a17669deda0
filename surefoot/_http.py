"""What both clients give httpx, and what they make of its errors.

Duty: translate the client's options and httpx's exceptions; nothing is sent from here.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypedDict, TypeVar, get_args

import httpx

from surefoot._binary import Wire
from surefoot._protocol import Call, Failure, Reply
from surefoot.backoff import Backoff

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8080"

# The connection was not there, so nothing can have been received. Everything else may have been.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


class ClientOptions(TypedDict, total=False):
    """What the clients take besides the address.

    timeout_s: of each attempt, for connecting, sending and each read; a slow answer counts as none.
    retry_for_s: how long one call may go on trying, its waits included; 0 for a single attempt.
    idempotent: send an Idempotency-Key with every `act`, so that it too can be repeated when an answer was lost. It
    costs the service one round trip to Redis for each decision.
    wire: how states go: "auto", arrays of more than 256 numbers as raw numbers and all else as JSON; "json"; "binary",
    raw whatever numpy can read as numbers.
    """

    token: str | None
    timeout_s: float
    retry_for_s: float
    idempotent: bool
    wire: Wire


@dataclass(frozen=True, slots=True)
class Options:
    """`ClientOptions` with their defaults."""

    token: str | None = None
    timeout_s: float = 2.0
    retry_for_s: float = 30.0
    idempotent: bool = False
    wire: Wire = "auto"

    def __post_init__(self) -> None:
        if self.wire not in get_args(Wire):
            raise ValueError(f"wire must be one of {', '.join(get_args(Wire))}, got {self.wire!r}")
        if self.timeout_s <= 0 or self.retry_for_s < 0:
            raise ValueError("timeout_s must be positive and retry_for_s not negative")

    def for_httpx(self, base_url: str) -> dict[str, Any]:
        if httpx.URL(base_url).scheme not in ("http", "https"):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}")
        headers = {"Content-Type": "application/json", "User-Agent": f"surefoot/{version('surefoot')}"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        return {"base_url": base_url, "headers": headers, "timeout": self.timeout_s}

    def keyed(self, call: Call[T]) -> Call[T]:
        """The call as these options want it sent: with a key of its own, unless the caller gave one."""
        return call.with_key(uuid.uuid4().hex) if self.idempotent and not call.repeatable else call

    def backoff(self, now_s: float) -> Backoff:
        return Backoff(now_s + self.retry_for_s)


def reply(response: httpx.Response) -> Reply:
    return Reply(response.status_code, dict(response.headers), response.content)  # httpx gives names in lower case


def failure(error: httpx.RequestError) -> Failure:
    return Failure(error, maybe_received=not isinstance(error, _NEVER_SENT))
