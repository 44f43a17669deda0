"""TLS for tests: an authority with certificates of its own, a front that ends TLS before a plain server, our service.

`cryptography` makes the certificates; the front is a thread per connection and copies bytes.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import shutil
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.conftest import Server


class Certificates:
    """An authority, a server for localhost, a client. Every file is PEM."""

    def __init__(self, folder: Path, authority: str = "authority of a test") -> None:
        self.ca, self.server, self.client = (folder / f"{name}.pem" for name in ("ca", "server", "client"))
        self.server_key, self.client_key = folder / "server.key", folder / "client.key"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, authority)])
        self.ca.write_bytes(self._certificate(self._name, self._key, authority=True))
        for file, key_file in ((self.server, self.server_key), (self.client, self.client_key)):
            key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, file.stem)])
            file.write_bytes(self._certificate(name, key, authority=False))
            key_file.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )

    def of_server(self) -> list[str]:
        """Options of a Redis or Valkey server that asks clients for a certificate."""
        files = {"--tls-cert-file": self.server, "--tls-key-file": self.server_key, "--tls-ca-cert-file": self.ca}
        return [str(each) for pair in files.items() for each in pair]

    def context(self) -> ssl.SSLContext:
        """For a server that asks clients for a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server, self.server_key)
        context.load_verify_locations(self.ca)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, authority: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM)


@dataclass
class SecureServer(Server):
    """A service that is reached by HTTPS."""

    verify: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def _read_port(self) -> bool:
        found = re.findall(r'"url": "https://[^"]*:(\d+)"', self.log)
        self.port = int(found[-1]) if found else 0
        return bool(found)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", verify=self.verify, timeout=1.0).status_code == 200
        except httpx.HTTPError:
            return False


def trusting(certificates: Certificates, *, with_own: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificates.ca)
    if with_own:
        context.load_cert_chain(certificates.client, certificates.client_key)
    return context


class TlsFront:
    """Ends TLS on a port of its own and passes on to a plain one."""

    def __init__(self, certificates: Certificates, target: int) -> None:
        self._context = certificates.context()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> TlsFront:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        with plain, suppress(OSError):
            near = self._context.wrap_socket(plain, server_side=True)
            with near, socket.create_connection(("127.0.0.1", self._target)) as far:
                # One command at a time: the client waits for the reply before it sends the next.
                while request := near.recv(1 << 20):
                    far.sendall(request)
                    near.sendall(far.recv(1 << 20))


def tls_server_binary() -> str | None:
    """A server on the PATH that knows TLS, if there is one."""
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found and b"libssl" in Path(found).read_bytes():
            return found
    return None
