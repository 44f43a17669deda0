"""EDGE: asks the service of this machine how it is. For containers: `python -m service.health_check live`.

Duty: exit code 0 when the answer is good, 1 when it is not, with the reason. It knows the settings' variables that say
where the service listens, and nothing else of it.
Strategy: the standard library alone, since it is started every few seconds. The certificate is not checked, as a
kubelet does not: the connection does not leave the machine, and names in certificates are for callers from outside.
Promise: `live` needs no client certificate, so that one that has expired never gets a healthy process restarted.
"""

from __future__ import annotations

import argparse
import os
import socket
import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final

TIMEOUT_S: Final = 4.0
EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104  # addresses to listen on, not to call


class Unhealthy(Exception):
    """The service does not answer, or its answer is not good."""


def place() -> tuple[str, int]:
    """Give host and port of a service with this environment's settings."""
    host = os.environ.get("SUREFOOT_HOST") or "127.0.0.1"
    return "127.0.0.1" if host in EVERYWHERE else host, int(os.environ.get("SUREFOOT_PORT") or 8080)


def check(what: str, certificate: str | None = None, key: str | None = None) -> None:
    """Ask for `live` or `ready`. Raises Unhealthy with the reason."""
    secured = bool(os.environ.get("SUREFOOT_TLS_CERT"))
    shut = bool(os.environ.get("SUREFOOT_TLS_CLIENT_CA")) and certificate is None
    if shut and what != "live":
        raise Unhealthy("callers need a certificate here: give --cert and --key")
    try:
        if shut:
            _shake_hands()
        else:
            _get(f"/health/{what}", _context(certificate, key) if secured else None)
    except (OSError, HTTPException) as error:
        raise Unhealthy(f"{what}: {error or type(error).__name__}") from None


def _get(path: str, context: ssl.SSLContext | None) -> None:
    host, port = place()
    connection = (
        HTTPConnection(host, port, timeout=TIMEOUT_S)
        if context is None
        else HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    )
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        if answer.status != 200:
            raise Unhealthy(f"{path}: {answer.status} {answer.read().decode(errors='replace')}")
    finally:
        connection.close()


def _shake_hands() -> None:
    """See the worker's part of a handshake: its event loop runs. TLS 1.3 sends it before it asks for a certificate."""
    context = _context(None, None)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with socket.create_connection(place(), TIMEOUT_S) as plain, context.wrap_socket(plain):
        pass


def _context(certificate: str | None, key: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def main(arguments: list[str]) -> int:
    """Read the command line, ask, and give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.health_check", description="Ask the service how it is.")
    parser.add_argument("what", choices=("live", "ready"))
    parser.add_argument("--cert", help="certificate to show, PEM")
    parser.add_argument("--key", help="its private key, PEM")
    asked = parser.parse_args(arguments)
    try:
        check(asked.what, asked.cert, asked.key)
    except Unhealthy as unhealthy:
        print(unhealthy, file=sys.stderr)  # noqa: T201  # Kubernetes shows it with the failed probe
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
