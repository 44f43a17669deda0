"""HTTPS by real certificates: served, asked of callers, renewed while the service runs; wrong files stop the start."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from policies.errors import ConfigError
from service import health_check, tls
from service.settings import Settings, load_settings
from tests.conftest import children
from tests.service.tls import Certificates, SecureServer, trusting
from tests.waiting import until

STATE = {"state": [0.0] * 4}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


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


def test_an_authority_that_comes_into_the_file_is_trusted_without_a_restart(
    secure: SecureServer, certificates: Certificates, tmp_path: Path
) -> None:
    authorities = tmp_path / "authorities.pem"
    shutil.copy(certificates.ca, authorities)
    secure.settings["SUREFOOT_TLS_CLIENT_CA"] = str(authorities)
    secure.verify = trusting(certificates, with_own=True)
    secure.start()
    others = Certificates(new_folder(tmp_path / "others"), authority="another authority")
    caller = ssl.create_default_context(cafile=certificates.ca)
    caller.load_cert_chain(others.client, others.client_key)

    def let_in(context: ssl.SSLContext) -> bool:
        try:
            return httpx.get(f"{secure.url}/health/live", verify=context).is_success
        except httpx.HTTPError:
            return False

    assert not let_in(caller)
    authorities.write_bytes(certificates.ca.read_bytes() + others.ca.read_bytes())
    until(lambda: let_in(caller), "trust in the new authority")
    assert let_in(secure.verify), "and the one before still counts"


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


def test_authorities_that_do_not_load_leave_the_pair_and_those_before(
    certificates: Certificates, tmp_path: Path
) -> None:
    cert, key, ca = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    for file, source in ((cert, certificates.server), (key, certificates.server_key), (ca, certificates.ca)):
        shutil.copy(source, file)
    context = certificates.context()
    renewal = tls.Renewal(Settings(tls_cert=cert, tls_key=key, tls_client_ca=ca), context)
    before = context.get_ca_certs(binary_form=True)
    ca.write_text("nothing")
    assert not renewal.run_once()
    assert context.get_ca_certs(binary_form=True) == before
    ca.write_bytes(Certificates(new_folder(tmp_path / "others")).ca.read_bytes())
    assert renewal.run_once()
    assert len(context.get_ca_certs()) == len(before) + 1


def asks(server: SecureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the environment in which a container's health check would run."""
    for name, value in (server.settings | {"SUREFOOT_HOST": "0.0.0.0", "SUREFOOT_PORT": str(server.port)}).items():
        monkeypatch.setenv(name, value)


def test_the_health_check_of_a_container_asks_over_https(
    secure: SecureServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secure.start()
    asks(secure, monkeypatch)
    assert [health_check.main([what]) for what in ("live", "ready")] == [0, 0]
    assert secure.stop() == 0
    assert [health_check.main([what]) for what in ("live", "ready")] == [1, 1]
    assert "live: " in capsys.readouterr().err


def test_where_callers_need_a_certificate_ready_needs_one_and_live_does_not(
    secure: SecureServer,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secure.settings["SUREFOOT_TLS_CLIENT_CA"] = str(certificates.ca)
    secure.verify = trusting(certificates, with_own=True)
    secure.start()
    asks(secure, monkeypatch)
    own = ["--cert", str(certificates.client), "--key", str(certificates.client_key)]
    assert health_check.main(["live"]) == 0
    assert health_check.main(["ready", *own]) == 0
    assert health_check.main(["ready"]) == 1
    assert "--cert" in capsys.readouterr().err
    assert secure.process is not None
    (worker,) = [pid for pid in children(secure.process.pid) if is_worker(pid)]
    os.kill(worker, signal.SIGSTOP)
    try:
        monkeypatch.setattr(health_check, "TIMEOUT_S", 0.2)
        assert health_check.main(["live"]) == 1, "an open port alone is no sign of life"
    finally:
        os.kill(worker, signal.SIGCONT)


def is_worker(pid: int) -> bool:
    return b"service.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
