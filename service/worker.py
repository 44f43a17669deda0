"""A worker process: one event loop, one uvicorn, one runtime. Started by `supervisor.py` with an inherited socket.

Duty: serve on the socket until SIGTERM, SIGINT or the death of the parent; then drain: readiness 503 for `drain_delay`,
close the listener, give running requests `grace`, flush, ship, exit.
"""

from __future__ import annotations

if __name__ == "__main__":
    from policies import lean

    lean.begin()

import asyncio
import os
import signal
import socket
import sys
from typing import Any

import structlog
import uvicorn
from prometheus_client import disable_created_metrics
from uvicorn.config import STARTUP_FAILURE

from policies.errors import SurefootError
from service import tls
from service.app import App
from service.door import Door
from service.logs import configure_logs
from service.settings import Settings, load_settings
from service.short_way import answering
from service.team import Team

# Longer than what load balancers keep idle connections open (60 s is common), so that they close first.
KEEP_ALIVE_S = 75

log = structlog.get_logger(__name__)


class Server(uvicorn.Server):
    """uvicorn, draining before it closes."""

    def __init__(self, config: uvicorn.Config, app: App, team: Team, drain_delay_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._team = team
        self._drain_delay_s = drain_delay_s
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, but through doors."""
        if sockets is None:
            await super().startup(sockets)
            return
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        options = {"config": self.config, "server_state": self.server_state, "app_state": self.lifespan.state}
        protocol, team = self.config.http_protocol_class, self._team
        mine = team.mine if team.boards else None
        doors = [Door(each, protocol, options, self.config.ssl, mine, team.others) for each in sockets]
        for door in doors:
            door.open()
        self.servers = doors  # type: ignore[assignment]  # what it does with servers a door can
        self.started = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        """First signal: drain. Second: close at once."""
        runtime = self._app.runtime
        if runtime is None or runtime.draining:
            super().handle_exit(sig, frame)
            return
        log.info("draining", signal=signal.Signals(sig).name, delay_s=self._drain_delay_s)
        runtime.draining = True
        # A signal handler may run in the middle of anything: only what is thread-safe may be called from it.
        asyncio.get_running_loop().call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def close_later() -> None:
            await asyncio.sleep(self._drain_delay_s)
            self.should_exit = True

        self._draining = asyncio.get_running_loop().create_task(close_later())

    def parent_died(self) -> None:
        """Nobody supervises any more: take no new connection, finish, leave."""
        log.warning("parent_died")
        self.should_exit = True


def main(arguments: list[str]) -> int:
    """Run a worker. Arguments: descriptors of the listening socket and of the parent's pipe; what `Team.of` reads."""
    listener, parent = int(arguments[0]), int(arguments[1])
    team = Team.of(arguments[2:])
    settings = load_settings()
    assert settings.redis_url is not None  # the parent says where its Valkey is
    redis_url = settings.redis_url.get_secret_value()
    configure_logs(settings.log_level)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nothing here reads
    try:
        return _serve(settings, socket.socket(fileno=listener), parent, redis_url, team)
    except SurefootError as error:
        log.error("worker_failed", error=error.detail, field=error.field)
        return 1


def _serve(settings: Settings, listener: socket.socket, parent: int, redis_url: str, team: Team) -> int:
    app = App(settings, redis_url, team)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=answering(lambda: app.runtime, settings.body_timeout_s),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.grace_s)),
        backlog=2048,
        **tls.options(settings),
    )
    server = Server(config, app, team, settings.drain_delay_s)

    async def serve() -> None:
        # Nothing is ever written to the pipe: it becomes readable when the parent's end closes.
        asyncio.get_running_loop().add_reader(parent, _once(parent, server.parent_died))
        renewing = None
        if settings.tls_cert is not None:
            config.load()
            assert config.ssl is not None
            renewing = asyncio.create_task(tls.Renewal(settings, config.ssl).run())
        await server.serve([listener])
        if renewing is not None:
            renewing.cancel()

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(serve())
    return 0 if server.started else 1


def _once(descriptor: int, call: Any) -> Any:
    def react() -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        call()

    return react


if __name__ == "__main__":
    lean.end()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of ONNX Runtime and OpenTelemetry have nothing left to say
