"""HTTPS by the chart: what is mounted, who checks which certificate, and that probes and `helm test` get through.

Probes and the test pod are carried out without a cluster: their own commands, against the real service, with
the Secrets' files in a directory of the test's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml

from tests.deploy.chart import CHART, container, environment, manifests, objects, of_kind, the, values_of
from tests.service.tls import Certificates, SecureServer, trusting

PLAIN_TLS = values_of(CHART / "ci" / "tls-values.yaml")
MUTUAL = values_of(CHART / "ci" / "mutual-tls-values.yaml")
TOKEN = "token-of-this-test"


def pod_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(the("StatefulSet", found)["spec"]["template"]["spec"])


def files_of(spec: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Say for each file that a Secret brings into the pod's container which Secret and key it is."""
    (single,) = spec["containers"]
    places = {mount["name"]: mount for mount in single.get("volumeMounts", [])}
    found: dict[str, tuple[str, str]] = {}
    for volume in spec.get("volumes", []):
        projected = [each["secret"] for each in volume.get("projected", {}).get("sources", [])]
        for source in [*projected, *([volume["secret"]] if "secret" in volume else [])]:
            name = source.get("name") or source["secretName"]
            for item in source["items"]:
                found[f"{places[volume['name']]['mountPath']}/{item['path']}"] = (name, item["key"])
    return found


def test_without_a_secret_everything_speaks_plain_http() -> None:
    found = objects({"serviceMonitor": {"enabled": True}})
    text = yaml.safe_dump_all([each for each in found if each["kind"] != "Pod"])
    assert "https" not in text.lower()
    assert not [name for name in environment(found) if "TLS" in name]
    assert files_of(pod_of(found)) == files_of(the("Pod", found)["spec"]) == {}


def test_the_settings_name_the_mounted_files() -> None:
    for values, secrets in ((PLAIN_TLS, {"surefoot-tls"}), (MUTUAL, {"surefoot-tls", "callers-authority"})):
        found = objects(values)
        named = {value for name, value in environment(found).items() if name.startswith("SUREFOOT_TLS")}
        files = files_of(pod_of(found))
        own = {path for path in files if path.startswith("/etc/surefoot/tls/")}
        assert named == own
        assert {files[path][0] for path in own} == secrets
    shared = objects({"tls": {**MUTUAL["tls"], "clientCASecret": ""}})
    assert files_of(pod_of(shared))["/etc/surefoot/tls/ca.crt"] == ("surefoot-tls", "ca.crt")


@pytest.mark.parametrize("values", [PLAIN_TLS, MUTUAL], ids=["tls", "mutual"])
def test_the_container_may_read_its_keys_and_nobody_else(values: dict[str, Any]) -> None:
    found = objects(values)
    for spec in (pod_of(found), the("Pod", found)["spec"]):
        assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]
        for volume in spec["volumes"]:
            source = volume.get("projected") or volume.get("secret")
            assert source is None or source["defaultMode"] == 0o440
        (single,) = spec["containers"]
        secret = [mount for mount in single["volumeMounts"] if mount["mountPath"].startswith("/etc/surefoot/")]
        assert secret
        assert all(mount["readOnly"] for mount in secret)
        assert not any("subPath" in mount for mount in secret), "a renewed Secret would not come through"


@pytest.mark.parametrize("values", [PLAIN_TLS, MUTUAL], ids=["tls", "mutual"])
def test_ports_are_named_after_what_they_speak(values: dict[str, Any]) -> None:
    found = objects(values)
    assert [port["name"] for port in container(found)["ports"]] == ["https"]
    for service in of_kind("Service", found):
        (port,) = service["spec"]["ports"]
        assert (port["name"], port["targetPort"], port["appProtocol"]) == ("https", "https", "https")
    (rule,) = the("NetworkPolicy", found)["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == ["https"]
    (endpoint,) = the("ServiceMonitor", found)["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["scheme"]) == ("https", "https")


def test_a_kubelet_asks_over_https() -> None:
    single = container(objects(PLAIN_TLS))
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = single[probe]["httpGet"]
        assert (asked["scheme"], asked["port"]) == ("HTTPS", "https")


def test_prometheus_checks_the_name_and_shows_a_certificate_where_it_must() -> None:
    (endpoint,) = the("ServiceMonitor", objects(PLAIN_TLS))["spec"]["endpoints"]
    authority = {"secret": {"name": "surefoot-tls", "key": "ca.crt"}}
    assert endpoint["tlsConfig"] == {"serverName": "demo-surefoot.live.svc", "ca": authority}
    (endpoint,) = the("ServiceMonitor", objects(MUTUAL))["spec"]["endpoints"]
    assert endpoint["tlsConfig"] == {
        "serverName": "policies.example",
        "ca": authority,
        "cert": {"secret": {"name": "surefoot-caller", "key": "tls.crt"}},
        "keySecret": {"name": "surefoot-caller", "key": "tls.key"},
    }
    own = {"serviceMonitor": {"enabled": True, "tlsConfig": {"serverName": "policies.example"}}}
    (endpoint,) = the("ServiceMonitor", objects(PLAIN_TLS | own))["spec"]["endpoints"]
    assert endpoint["tlsConfig"] == {"serverName": "policies.example"}


def test_the_notes_show_how_to_check_the_certificate() -> None:
    notes = manifests(PLAIN_TLS)["NOTES.txt"]
    assert "--cacert ca.crt https://demo-surefoot.live.svc:8080/health/ready" in notes
    assert "--cert" not in notes
    notes = manifests(MUTUAL)["NOTES.txt"]
    assert "--cert caller.crt" in notes
    assert "callers-authority" in notes


@pytest.mark.parametrize(
    ("tls", "message"),
    [
        ({"serverName": "a.example"}, "tls.existingSecret, which is not set"),
        ({"existingSecret": "a", "clientCertificates": True}, "needs tls.callerSecret"),
        ({"existingSecret": "a", "callerSecret": "b"}, "needs tls.callerSecret"),
        ({"existingSecret": "a", "clientCASecret": "b"}, "tls.clientCertificates only"),
    ],
)
def test_values_of_tls_that_do_not_go_together_are_refused(tls: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=message):
        manifests({"tls": tls})


# -- carried out ----------------------------------------------------------------------------------------------------


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture
def mounted(certificates: Certificates, tmp_path: Path) -> Path:
    """Lay out the Secrets as the pods find them, below a directory of the test's own."""
    sources = {
        ("surefoot-tls", "tls.crt"): certificates.server,
        ("surefoot-tls", "tls.key"): certificates.server_key,
        ("surefoot-tls", "ca.crt"): certificates.ca,
        ("callers-authority", "ca.crt"): certificates.ca,
        ("surefoot-caller", "tls.crt"): certificates.client,
        ("surefoot-caller", "tls.key"): certificates.client_key,
    }
    found = objects(MUTUAL)
    for path, source in (files_of(pod_of(found)) | files_of(the("Pod", found)["spec"])).items():
        target = tmp_path / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources[source], target)
    return tmp_path


@pytest.fixture
def secure(mounted: Path, certificates: Certificates) -> Iterator[SecureServer]:
    """Start the service with the TLS settings of the chart."""
    seen = environment(objects(MUTUAL))
    settings = {name: f"{mounted}{value}" for name, value in seen.items() if name.startswith("SUREFOOT_TLS")}
    own = {"SUREFOOT_CLIENT_TOKEN": TOKEN, "SUREFOOT_ADMIN_TOKEN": TOKEN}
    server = SecureServer(mounted / "data", settings | own)
    server.verify = trusting(certificates, with_own=True)
    server.start()
    yield server
    assert server.stop() == 0


def carried_out(command: list[str], mounted: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a container's command with the files that it names below `mounted`."""
    words = [word.replace("/etc/surefoot/", f"{mounted}/etc/surefoot/") for word in command]
    assert words[0] == "python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SUREFOOT_")}
    return subprocess.run(
        [sys.executable, *words[1:]], env=environment | variables, capture_output=True, text=True, check=False
    )


def test_probes_and_the_smoke_test_get_through_where_callers_need_a_certificate(
    secure: SecureServer, mounted: Path
) -> None:
    found = objects(MUTUAL)
    variables = secure.settings | {"SUREFOOT_HOST": "0.0.0.0", "SUREFOOT_PORT": str(secure.port)}
    commands = [
        container(found)[probe]["exec"]["command"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    ]
    for command in commands:
        done = carried_out(command, mounted, **variables)
        assert done.returncode == 0, done.stderr
    smoke = the("Pod", found)["spec"]["containers"][0]
    assert {each["name"] for each in smoke["env"]} == {"TARGET_URL", "TARGET_NAME", "TARGET_TOKEN"}
    target = {"TARGET_URL": secure.url, "TARGET_TOKEN": TOKEN}
    done = carried_out(smoke["command"], mounted, **target, TARGET_NAME="localhost")
    assert done.returncode == 0, done.stdout + done.stderr
    other = carried_out(smoke["command"], mounted, **target, TARGET_NAME="policies.example")
    assert "CERTIFICATE_VERIFY_FAILED" in other.stderr
    (mounted / "etc/surefoot/caller/tls.crt").unlink()
    assert [carried_out(command, mounted, **variables).returncode for command in commands] == [0, 0, 1]
    assert carried_out(smoke["command"], mounted, **target, TARGET_NAME="localhost").returncode != 0
