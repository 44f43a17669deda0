"""The ASGI application of a worker: hot routes first, everything else to FastAPI. Lifespan builds the runtime."""

from __future__ import annotations

from typing import Any

import structlog
from prometheus_client import CollectorRegistry

from service.api import build_api
from service.body import Scope
from service.runtime import Runtime, running
from service.settings import Settings
from service.team import Team

log = structlog.get_logger(__name__)


class App:
    """Pure ASGI. `runtime` is set while the lifespan runs."""

    def __init__(self, settings: Settings, redis_url: str, team: Team) -> None:
        self._settings = settings
        self._team = team
        self._redis_url = redis_url
        self._state: dict[str, Runtime] = {}
        self._api = build_api(self._state)

    @property
    def runtime(self) -> Runtime | None:
        return self._state.get("runtime")

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        runtime = self._state["runtime"]
        if runtime.draining:
            send = _closing(send)
        if scope["path"] in runtime.hot.paths:
            await runtime.hot(scope, receive, send)
        else:
            await self._api(scope, receive, send)

    async def _lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        try:
            async with running(self._settings, self._redis_url, CollectorRegistry(), self._team) as runtime:
                self._state["runtime"] = runtime
                self._team.serve(runtime.metrics)
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except Exception as error:
            started = "runtime" in self._state
            log.error("worker_failed", error=str(error), field=getattr(error, "field", None), started=started)
            await send({"type": f"lifespan.{'shutdown' if started else 'startup'}.failed", "message": str(error)})
            raise
        finally:
            self._team.leave()
        await send({"type": "lifespan.shutdown.complete"})


def _closing(send: Any) -> Any:
    """Tell clients of a draining worker to connect elsewhere next time."""

    async def closing(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return closing
