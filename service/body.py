"""Reading a request's head and body under limits, and answering, in plain ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from policies.errors import BodyTooLarge, BodyTooSlow

Scope = dict[str, Any]
Headers = tuple[tuple[bytes, bytes], ...]
JSON = b"application/json"


class Head:
    """What hot routes read of a request's head. headers: the first of each lower-case name; client: of the peer."""

    __slots__ = ("client", "headers", "path")

    def __init__(self, path: str, headers: Mapping[bytes, bytes], client: tuple[str, int] | None) -> None:
        self.path = path
        self.headers = headers
        self.client = client

    @classmethod
    def of(cls, scope: Scope) -> Head:
        return cls(scope["path"], firsts(scope["headers"]), scope.get("client"))


class Disconnected(Exception):
    """The caller left before the body was complete."""


def firsts(headers: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The first header of each name."""
    return dict(reversed(headers))


def expect_room(head: Head, max_bytes: int) -> None:
    """Refuse a body that is announced to be too large. Raises BodyTooLarge."""
    declared = head.headers.get(b"content-length")
    if declared and declared.isdigit() and int(declared) > max_bytes:
        raise BodyTooLarge(f"the body has {int(declared)} bytes, the limit is {max_bytes}")


def too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than the limit of {max_bytes} bytes")


def too_slow(timeout_s: float) -> BodyTooSlow:
    return BodyTooSlow(f"the body did not arrive within {timeout_s} s")


async def read_body(head: Head, receive: Any, max_bytes: int, timeout_s: float) -> bytes:
    """Read the whole body. Raises BodyTooLarge, BodyTooSlow or Disconnected."""
    expect_room(head, max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _collect(receive, max_bytes)
    except TimeoutError:
        raise too_slow(timeout_s) from None


async def _collect(receive: Any, max_bytes: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise too_large(max_bytes)
        more = message.get("more_body", False)
    return b"".join(parts)


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that lower-case name."""
    for key, value in scope["headers"]:
        if key == name:
            return value  # type: ignore[no-any-return]
    return None


async def respond(send: Any, status: int, body: bytes, content_type: bytes = JSON, extra: Headers = ()) -> None:
    """Send one complete response."""
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
