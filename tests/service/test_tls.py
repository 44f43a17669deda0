"""HTTPS by real certificates: served, asked of callers, renewed while the service runs; wrong files stop the start."""

from __future__ import annotations

import re
import shutil
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from policies.errors import ConfigError
from service import tls
from service.settings import Settings, load_settings
from tests.conftest import Server
from tests.service.tls import Certificates
from tests.waiting import until

STATE = {"state": [0.0] * 4}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


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


@pytest.fixture
def secure(tmp_path: Path, certificates: Certificates) -> Iterator[SecureServer]:
    for name in ("server.pem", "server.key"):
        shutil.copy(certificates.server.parent / name, tmp_path / name)
    files = {"SUREFOOT_TLS_CERT": str(tmp_path / "server.pem"), "SUREFOOT_TLS_KEY": str(tmp_path / "server.key")}
    server = SecureServer(tmp_path / "data", files, verify=trusting(certificates))
    yield server
    if server.process is not None and server.process.poll() is None:
        assert server.stop() == 0


def test_the_service_speaks_https_and_nothing_else(secure: SecureServer, certificates: Certificates) -> None:
    secure.start()
    assert httpx.post(f"{secure.url}/v1/act", json=STATE, verify=secure.verify).status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.post(f"{secure.url}/v1/act", json=STATE)
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"http://127.0.0.1:{secure.port}/v1/act", json=STATE)
    old = trusting(certificates)
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    assert httpx.get(f"{secure.url}/health/live", verify=old).status_code == 200


def test_callers_show_a_certificate_where_they_must(secure: SecureServer, certificates: Certificates) -> None:
    secure.settings["SUREFOOT_TLS_CLIENT_CA"] = str(certificates.ca)
    secure.verify = trusting(certificates, with_own=True)
    secure.start()
    assert httpx.post(f"{secure.url}/v1/act", json=STATE, verify=secure.verify).status_code == 200
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"{secure.url}/v1/act", json=STATE, verify=trusting(certificates))


def test_a_renewed_certificate_is_taken_over_without_a_restart(secure: SecureServer, tmp_path: Path) -> None:
    secure.start()
    renewed = Certificates(new_folder(tmp_path / "renewed"))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{secure.url}/health/live", verify=trusting(renewed))
    shutil.copy(renewed.server, tmp_path / "server.pem")  # for a moment the pair does not match
    shutil.copy(renewed.server_key, tmp_path / "server.key")

    def taken_over() -> bool:
        try:
            return httpx.get(f"{secure.url}/health/live", verify=trusting(renewed)).is_success
        except httpx.ConnectError:
            return False

    until(taken_over, "the renewed certificate")


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


def settings_of(certificates: Certificates, **changes: Path | None) -> Settings:
    pair = {"tls_cert": certificates.server, "tls_key": certificates.server_key}
    return Settings(**pair | changes)  # type: ignore[arg-type]


def test_files_that_do_not_fit_are_refused_by_name(certificates: Certificates, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("nothing")
    for changes in ({"tls_cert": rubbish}, {"tls_key": tmp_path / "missing"}, {"tls_key": certificates.client_key}):
        with pytest.raises(ConfigError) as refused:
            tls.options(settings_of(certificates, **changes))
        assert refused.value.field == "SUREFOOT_TLS_CERT"
    with pytest.raises(ConfigError) as refused:
        tls.options(settings_of(certificates, tls_client_ca=rubbish))
    assert refused.value.field == "SUREFOOT_TLS_CLIENT_CA"
    assert tls.options(Settings()) == {}


def test_a_certificate_needs_its_key(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA"):
        with monkeypatch.context() as one:
            one.setenv(f"SUREFOOT_{name}", str(certificates.server))
            with pytest.raises(ConfigError, match="both"):
                load_settings()


def test_a_pair_that_does_not_match_is_not_taken_over(certificates: Certificates, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(certificates.server, cert)
    shutil.copy(certificates.server_key, key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    renewal = tls.Renewal(Settings(tls_cert=cert, tls_key=key), context)
    assert not renewal.run_once()
    shutil.copy(certificates.client, cert)
    assert not renewal.run_once()
    cert.unlink()
    assert not renewal.run_once()
    shutil.copy(certificates.client, cert)
    shutil.copy(certificates.client_key, key)
    assert renewal.run_once()
    assert not renewal.run_once()
