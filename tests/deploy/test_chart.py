"""What the chart promises, checked on what Helm's own engine renders from several sets of values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
from prometheus_client import CollectorRegistry

from service.metrics import Metrics
from tests.deploy.chart import CHART, NAMESPACE, ROOT, VALUES_FILES, chart, container, manifests, objects, of_kind, the
from tests.deploy.chart import values_of as values_of_file

each_values_file = pytest.mark.parametrize("path", VALUES_FILES, ids=lambda path: path.stem.removesuffix("-values"))
REDIS = {"redis": {"url": "redis://redis:6379/0"}}


def pod_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    spec = the("StatefulSet", found)["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def selector_labels(service: dict[str, Any]) -> dict[str, str]:
    return dict(service["spec"]["selector"])


@each_values_file
def test_lint_finds_no_warning_and_no_error(path: Path) -> None:
    report = helm.lint(CHART, values_of_file(path), strict=True, namespace=NAMESPACE)
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@each_values_file
def test_every_values_file_renders_objects_with_unique_names(path: Path) -> None:
    found = objects(values_of_file(path))
    names = [(each["kind"], each["metadata"]["name"]) for each in found]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name) for _, name in names)
    assert {"StatefulSet", "Service", "ConfigMap", "Pod"} <= {kind for kind, _ in names}


@each_values_file
def test_every_object_has_the_common_labels(path: Path) -> None:
    expected = {
        "helm.sh/chart": "surefoot-0.1.0",
        "app.kubernetes.io/instance": "demo",
        "app.kubernetes.io/part-of": "surefoot",
        "app.kubernetes.io/managed-by": "Helm",
    }
    for each in objects(values_of_file(path)):
        assert expected.items() <= each["metadata"]["labels"].items(), each["kind"]


@each_values_file
def test_every_selector_meets_the_pods_and_nothing_but_the_pods(path: Path) -> None:
    found = objects(values_of_file(path))
    workload = the("StatefulSet", found)
    pods = workload["spec"]["template"]["metadata"]["labels"]
    selectors = [workload["spec"]["selector"]["matchLabels"]]
    selectors += [selector_labels(service) for service in of_kind("Service", found)]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind("PodDisruptionBudget", found)]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in of_kind("NetworkPolicy", found)]
    spreads = workload["spec"]["template"]["spec"]["topologySpreadConstraints"]
    selectors += [spread["labelSelector"]["matchLabels"] for spread in spreads]
    for selector in selectors:
        assert selector.items() <= pods.items()
        assert not selector.items() <= the("Pod", found)["metadata"]["labels"].items(), "the test pod is no backend"
    assert workload["spec"]["serviceName"] in [each["metadata"]["name"] for each in of_kind("Service", found)]


@each_values_file
def test_every_pod_meets_the_restricted_profile(path: Path) -> None:
    found = objects(values_of_file(path))
    for spec in (pod_of(found), the("Pod", found)["spec"]):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@each_values_file
def test_kubernetes_accepts_every_object(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    foreign = {"ServiceMonitor", "PrometheusRule"}
    for each in objects(values_of_file(path)):
        if each["kind"] not in foreign:
            validate(each, "1.34", strict=True)


def test_what_the_service_writes_is_mounted_and_the_rest_is_read_only() -> None:
    found = objects({"policies": {"volume": {"persistentVolumeClaim": {"claimName": "policies"}}}})
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container(found)["volumeMounts"]}
    assert mounts == {"/var/lib/surefoot": False, "/tmp": False, "/etc/surefoot/policies": True}
    claims = the("StatefulSet", found)["spec"]["volumeClaimTemplates"]
    volumes = pod_of(found)["volumes"] + [claim["metadata"] for claim in claims]
    assert {volume["name"] for volume in volumes} == {mount["name"] for mount in container(found)["volumeMounts"]}


def test_a_claim_outlives_its_pod_and_the_release() -> None:
    policy = the("StatefulSet", objects())["spec"]["persistentVolumeClaimRetentionPolicy"]
    assert policy == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    trial = the("StatefulSet", objects({"persistence": {"enabled": False}}))["spec"]
    assert "volumeClaimTemplates" not in trial
    assert {"name": "data", "emptyDir": {}} in trial["template"]["spec"]["volumes"]


def test_no_service_link_reaches_the_environment() -> None:
    """A Service named surefoot would set SUREFOOT_PORT to a URL, and settings that do not exist."""
    found = objects(release="surefoot")
    assert "surefoot" in [service["metadata"]["name"] for service in of_kind("Service", found)]
    assert pod_of(found)["enableServiceLinks"] is False


@pytest.mark.parametrize(("drain", "expected"), [({}, 40), ({"delaySeconds": 7.5}, 43), ({"graceSeconds": 60}, 90)])
def test_kubernetes_waits_for_drain_grace_and_shipping(drain: dict[str, float], expected: int) -> None:
    assert pod_of(objects({"drain": drain}))["terminationGracePeriodSeconds"] == expected


def test_the_default_leaves_the_service_the_time_it_takes_for_itself() -> None:
    from service.supervisor import EXIT_S

    assert chart().values["drain"]["shipSeconds"] > EXIT_S


def test_probes_ask_for_health_on_the_named_port() -> None:
    single = container(objects({"startupSeconds": 45}))
    paths = {probe: single[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    live, ready = "/health/live", "/health/ready"
    assert paths == {"startupProbe": live, "livenessProbe": live, "readinessProbe": ready}
    assert {single[probe]["httpGet"]["port"] for probe in paths} == {"http"}
    assert [port["name"] for port in single["ports"]] == ["http"]
    assert single["startupProbe"]["failureThreshold"] * single["startupProbe"]["periodSeconds"] >= 45


@pytest.mark.parametrize(
    "change",
    [
        {"auth": {"clientToken": "another"}},
        {"redis": {"url": "redis://other:6379/0"}},
        {"settings": {"SUREFOOT_LOG_LEVEL": "debug"}},
        {"drain": {"graceSeconds": 11}},
    ],
)
def test_pods_restart_when_configuration_changes_and_only_then(change: dict[str, Any]) -> None:
    def annotations(values: dict[str, Any]) -> dict[str, str]:
        return dict(the("StatefulSet", objects(values))["spec"]["template"]["metadata"]["annotations"])

    assert annotations({}) == annotations({}), "a generated token must not restart the pods"
    assert annotations(change) != annotations({})
    assert annotations({"redis": {"extraPorts": [6380]}}) == annotations({}), "the network policy's business alone"


@pytest.mark.parametrize("values", [{"replicaCount": 2}, {"autoscaling": {"enabled": True}}], ids=str)
def test_several_pods_without_a_shared_redis_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmRenderError, match="pods need a Redis that they share"):
        manifests(values)
    manifests(values | REDIS)
    manifests(values | {"redis": {"existingSecret": "shared"}})


def test_an_autoscaler_replaces_the_number_of_replicas() -> None:
    found = objects({"autoscaling": {"enabled": True}} | REDIS)
    target = the("HorizontalPodAutoscaler", found)["spec"]["scaleTargetRef"]
    workload = the("StatefulSet", found)
    assert target == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": workload["metadata"]["name"]}
    assert "replicas" not in workload["spec"]
    assert the("StatefulSet", objects())["spec"]["replicas"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"redis": {"url": "redis://a", "existingSecret": "b"}}, "not both"),
        ({"auth": {"existingSecret": "a", "adminToken": "b"}}, "auth.existingSecret"),
        ({"autoscaling": {"enabled": True, "minReplicas": 9, "maxReplicas": 2}} | REDIS, "minReplicas is above"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=message):
        manifests(values)


@pytest.mark.parametrize(
    "values",
    [
        {"replicas": 1},
        {"replicaCount": "2"},
        {"replicaCount": -1},
        {"device": "gpu"},
        {"durability": "disk"},
        {"drain": {"graceSeconds": -1}},
        {"auth": {"keys": "1:abc"}},
        {"redis": {"url": "unix:///redis.sock"}},
        {"redis": {"url": "localhost"}},
        {"image": {"digest": "sha256:1"}},
        {"service": {"port": 0}},
        {"redis": {"extraPorts": [0]}},
        {"redis": {"extraPorts": 6380}},
        {"redis": {"sentinelPort": 65536}},
        {"tls": {"existingSecret": "Not A Name"}},
        {"settings": {"SUREFOOT_TLS_CERT": "/a"}},
        {"policies": {"path": "relative"}},
        {"persistence": {"accessModes": ["ReadWriteMany"]}},
        {"settings": {"SUREFOOT_NO_SUCH": 1}},
        {"settings": {"SUREFOOT_PORT": 81}},
        {"extraEnv": [{"name": "SUREFOOT_PORT", "value": "81"}]},
        {"prometheusRule": {"fallbackRatio": 5}},
    ],
    ids=str,
)
def test_the_schema_refuses_wrong_values(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmValuesError):
        chart().validate_schema(values)
    with pytest.raises(helm.HelmValuesError):
        manifests(values)


@each_values_file
def test_the_schema_accepts_the_examples(path: Path) -> None:
    chart().validate_schema(values_of_file(path))


def test_the_schema_closes_every_object_of_the_values() -> None:
    """A misspelt value is an error, not silence; free maps hold labels, annotations and Kubernetes's own shapes."""
    schema = chart().schema
    assert schema is not None

    def compare(values: dict[str, Any], described: dict[str, Any], path: str) -> None:
        if "properties" not in described:
            return
        assert described["additionalProperties"] is False, path
        assert set(values) == set(described["properties"]) - {"global"}, path
        for name, value in values.items():
            if isinstance(value, dict):
                compare(value, described["properties"][name], f"{path}.{name}")

    compare(chart().values, schema, "")


def test_one_service_is_scraped_with_the_client_token() -> None:
    found = objects({"serviceMonitor": {"enabled": True}})
    monitor = the("ServiceMonitor", found)["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    scraped = [each for each in of_kind("Service", found) if wanted <= each["metadata"]["labels"].items()]
    assert len(scraped) == 1
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in [port["name"] for port in scraped[0]["spec"]["ports"]]
    credentials = endpoint["authorization"]["credentials"]
    assert credentials["key"] in the("Secret", found)["data"]
    assert credentials["name"] == the("Secret", found)["metadata"]["name"]


def test_alerts_use_the_metrics_that_exist_and_lead_to_a_page() -> None:
    found = objects({"prometheusRule": {"enabled": True}})
    registry = CollectorRegistry()
    Metrics(registry)
    exposed = {family.name + "_total" * (family.type == "counter") for family in registry.collect()}
    page = (ROOT / "docs" / "deploy.md").read_text()
    (group,) = the("PrometheusRule", found)["spec"]["groups"]
    assert {name for rule in group["rules"] for name in re.findall(r"surefoot_\w+", rule["expr"])} <= exposed
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        address, anchor = rule["annotations"]["runbook_url"].split("#")
        assert address.endswith("/docs/deploy.md")
        assert anchor == rule["alert"].lower()
        assert f"### {rule['alert']}\n" in page
        assert f'job="{the("StatefulSet", found)["metadata"]["name"]}"' in rule["expr"]


def test_long_release_names_still_make_valid_names() -> None:
    found = objects(release="r" * 53)
    names = [each["metadata"]["name"] for each in found]
    assert max(map(len, names)) <= 63
    assert all(len(value) <= 63 for each in found for value in each["metadata"]["labels"].values())


def test_the_notes_say_how_to_reach_it_and_what_to_beware_of() -> None:
    notes = manifests({"auth": {"allowOpen": True}, "persistence": {"enabled": False}})["NOTES.txt"]
    assert "helm -n live test demo" in notes
    assert notes.count("WARNING") == 2
    assert "WARNING" not in manifests()["NOTES.txt"]
