"""The `serve` parent: owns the listening socket, the embedded Valkey and the workers; serves nothing itself.

Strategy: synchronous code with one loop that wakes twice a second or at a signal. The parent binds the socket, so a
worker that dies is replaced without a refused connection. Valkey is started first and stopped last, after the workers'
final ship. What is done about workers stands in `crew.py`.
Promise: Ctrl-C and SIGTERM leave no process behind; if the parent itself is killed, the workers leave by themselves and
the next start adopts the Valkey.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import signal
import socket
import sys
import time

import structlog

from policies.errors import ConfigError
from service import tls
from service.crew import Crew
from service.settings import Settings
from service.valkey import EmbeddedValkey

log = structlog.get_logger(__name__)

TICK_S = 0.5
# How long a port may stay taken by the worker of a parent that was killed a moment ago.
BIND_WAIT_S = 10.0
# Beyond drain delay and grace: flush, ship and exit.
EXIT_S = 15.0
RESTART_PAUSE_S = 1.0
REDIS_URL = "SUREFOOT_REDIS_URL"


def serve(settings: Settings) -> int:
    """Serve until a signal says otherwise. Gives the exit code."""
    tls.options(settings)  # a wrong file is told at once
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    stop = _Stop()
    valkey = EmbeddedValkey(settings.data_dir) if settings.redis_url is None else None
    listener = _bind(settings.host, settings.port)
    try:
        redis_url = valkey.start() if valkey else _secret(settings)
        return _supervise(settings, listener, redis_url, valkey, stop)
    finally:
        listener.close()
        if valkey:
            valkey.stop()


def _secret(settings: Settings) -> str:
    assert settings.redis_url is not None
    return settings.redis_url.get_secret_value()


class _Stop:
    """Remembers that SIGTERM or SIGINT came, and wakes the loop that sleeps."""

    def __init__(self) -> None:
        self.asked = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def wait(self, seconds: float) -> None:
        """Sleep until a signal comes, at most so long."""
        if select.select([self._read], [], [], seconds)[0]:
            os.read(self._read, 512)

    def _ask(self, *_: object) -> None:
        self.asked = True


def _supervise(
    settings: Settings, listener: socket.socket, redis_url: str, valkey: EmbeddedValkey | None, stop: _Stop
) -> int:
    environment = _environment(settings) | {REDIS_URL: redis_url}
    crew = Crew(settings.workers, listener, environment, RESTART_PAUSE_S)
    crew.look_after()
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.tls_cert else "http"
    log.info("listening", url=f"{scheme}://{host}:{port}", data_dir=str(settings.data_dir), workers=settings.workers)
    while not (stop.asked or crew.hopeless):
        stop.wait(crew.due_in_s(TICK_S))
        if valkey:
            _look_after(valkey)
        if not stop.asked:
            crew.look_after()
    listener.close()
    crew.stop(settings.drain_delay_s + settings.grace_s + EXIT_S, stop.wait)
    log.info("stopped")
    return 1 if crew.hopeless else 0


def _look_after(valkey: EmbeddedValkey) -> None:
    """Restart Valkey when it has died; when that fails, try again at the next tick: decisions go on without it."""
    try:
        if valkey.ensure():
            log.error("valkey_restarted")
    except ConfigError as error:
        log.error("valkey_does_not_start", error=error.detail)


def _environment(settings: Settings) -> dict[str, str]:
    """The worker's environment: the parent's, with the admin token that was printed."""
    environment = dict(os.environ)
    if settings.admin_token is None:
        environment["SUREFOOT_ADMIN_TOKEN"] = token = secrets.token_urlsafe(24)
        print(f"admin token for this run: {token}", file=sys.stderr, flush=True)  # noqa: T201
    return environment


def _bind(host: str, port: int) -> socket.socket:
    """Bind and listen. Raises ConfigError when the address stays taken or is not ours."""
    deadline = time.monotonic() + BIND_WAIT_S
    while True:
        try:
            listener = socket.create_server((host, port), backlog=2048, family=_family(host))
        except OSError as error:
            if time.monotonic() > deadline or error.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", "SUREFOOT_PORT") from None
            time.sleep(0.1)
            continue
        listener.set_inheritable(True)
        return listener


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
