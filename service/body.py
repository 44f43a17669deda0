"""Reading a request's body and headers under limits, and answering, in plain ASGI."""

from __future__ import annotations

import asyncio
from typing import Any

from policies.errors import BodyTooLarge, BodyTooSlow

Scope = dict[str, Any]
JSON = b"application/json"


class Disconnected(Exception):
    """The caller left before the body was complete."""


async def read_body(scope: Scope, receive: Any, max_bytes: int, timeout_s: float) -> bytes:
    """Read the whole body. Raises BodyTooLarge, BodyTooSlow or Disconnected."""
    declared = header(scope, b"content-length")
    if declared and declared.isdigit() and int(declared) > max_bytes:
        raise BodyTooLarge(f"the body has {int(declared)} bytes, the limit is {max_bytes}")
    try:
        async with asyncio.timeout(timeout_s):
            return await _collect(receive, max_bytes)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {timeout_s} s") from None


async def _collect(receive: Any, max_bytes: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise BodyTooLarge(f"the body is larger than the limit of {max_bytes} bytes")
        more = message.get("more_body", False)
    return b"".join(parts)


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that lower-case name."""
    for key, value in scope["headers"]:
        if key == name:
            return value  # type: ignore[no-any-return]
    return None


async def respond(
    send: Any, status: int, body: bytes, content_type: bytes = JSON, extra: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    """Send one complete response."""
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
