"""One way to call both clients, so that each test runs on both."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Protocol

from surefoot import AsyncClient, Client


class Caller(Protocol):
    def __enter__(self) -> Any: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class Awaited:
    """An `AsyncClient` whose calls are run to their end on a loop of its own."""

    def __init__(self, base_url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(base_url, **options)

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *arguments, **options: self._runner.run(_awaited(method(*arguments, **options)))


async def _awaited(result: Any) -> Any:
    return await result


KINDS: dict[str, Any] = {"sync": Client, "async": Awaited}
