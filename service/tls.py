"""TLS of the listening socket: settings to uvicorn's options, and certificates that are renewed while the service runs.

Duty: refuse files that do not fit before anything listens; take a renewed certificate over without a restart. It does
not know what is served.
Strategy: new files are tried in a context of their own first, since a pair that is just being replaced may not match;
then the context in use is given them, for connections from then on. OpenSSL cannot take an authority out of a context
in use: new ones come in, and one that is no longer in the file is trusted until the next start.
Promise: files that do not load are reported and those before stay.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any, Final

import structlog

from policies.errors import ConfigError
from service.settings import Settings

POLL_S: Final = 5.0  # certificates are renewed days before they end

log = structlog.get_logger(__name__)


def options(settings: Settings) -> dict[str, Any]:
    """Give uvicorn's options for TLS; none where the service speaks plain HTTP. Raises ConfigError naming the file."""
    if settings.tls_cert is None or settings.tls_key is None:
        return {}
    _try(settings.tls_cert, settings.tls_key)
    chosen: dict[str, Any] = {"ssl_certfile": str(settings.tls_cert), "ssl_keyfile": str(settings.tls_key)}
    if settings.tls_client_ca is not None:
        _try_authorities(settings.tls_client_ca)
        chosen |= {"ssl_ca_certs": str(settings.tls_client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return chosen


class Renewal:
    """Watches the files of a context in use."""

    def __init__(self, settings: Settings, context: ssl.SSLContext) -> None:
        assert settings.tls_cert is not None
        assert settings.tls_key is not None
        self._cert, self._key = settings.tls_cert, settings.tls_key
        self._authorities = settings.tls_client_ca
        self._context = context
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._seen = self._stamp()

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(POLL_S)
            self.run_once()

    def run_once(self) -> bool:
        """Take files over that have changed. Return whether there were any."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        try:
            _try(self._cert, self._key)
            if self._authorities is not None:
                _try_authorities(self._authorities)
                self._context.load_verify_locations(self._authorities)
            self._context.load_cert_chain(self._cert, self._key)
        except (ConfigError, OSError) as error:
            log.error("certificate_not_renewed", reason=str(error))
            return False  # looked at again: the other file of the pair may be on its way
        self._seen = stamp
        log.info("certificate_renewed", file=str(self._cert))
        return True

    def _stamp(self) -> tuple[object, ...]:
        """Tell the files from what stood there before; links into a mounted secret are followed."""
        found: list[object] = []
        for path in filter(None, (self._cert, self._key, self._authorities)):
            try:
                stat = path.stat()
                found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
            except OSError:
                found.append(None)
        return tuple(found)


def _try(cert: Path, key: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{cert} and {key} are not a certificate and its key: {error}", "SUREFOOT_TLS_CERT") from None


def _try_authorities(file: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{file}: {error}", "SUREFOOT_TLS_CLIENT_CA") from None
