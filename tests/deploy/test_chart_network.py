"""What the chart's network policy lets in and out, for each shape of Redis and for what else the service talks to."""

from __future__ import annotations

import re
from typing import Any

import helm_python as helm
import pytest
import yaml

from tests.deploy.chart import CHART, ROOT, objects, of_kind, the

DNS = {(53, "UDP"), (53, "TCP")}
SECRET = {"existingSecret": "shared"}


def opened(values: dict[str, Any]) -> set[tuple[int, str]]:
    """Say which ports the pods may reach; every rule names its ports, or it would open them all."""
    rules = the("NetworkPolicy", objects(values))["spec"]["egress"]
    ports = [(port["port"], port["protocol"]) for rule in rules for port in rule["ports"]]
    assert len(ports) == len(set(ports))
    return set(ports)


def test_without_anything_outside_only_names_are_resolved() -> None:
    assert opened({}) == DNS
    assert opened({"redis": {"port": 6380, "extraPorts": [6381], "sentinelPort": 26379}}) == DNS, "an embedded Valkey"


@pytest.mark.parametrize(
    ("redis", "ports"),
    [
        ({"url": "redis://redis:6379/0"}, {6379}),
        ({"url": "rediss://redis:6380/0", "port": 6380}, {6380}),
        (SECRET, {6379}),
        ({"url": "redis+sentinel://a,b,c/main"}, {6379, 26379}),
        ({"url": "rediss+sentinel://a:5000/main", "sentinelPort": 5000, "port": 6390}, {6390, 5000}),
        (SECRET | {"sentinelPort": 26379}, {6379, 26379}),
        ({"url": "redis://sentinel:6379/0"}, {6379}),
        ({"url": "redis+cluster://a:7000,b:7001", "port": 7000, "extraPorts": [7001, 7002]}, {7000, 7001, 7002}),
        (SECRET | {"extraPorts": [6379]}, {6379}),
        (SECRET | {"extraPorts": [26379], "sentinelPort": 26379}, {6379, 26379}),
    ],
    ids=str,
)
def test_each_shape_of_redis_is_reached_on_its_ports(redis: dict[str, Any], ports: set[int]) -> None:
    assert opened({"redis": redis}) == DNS | {(port, "TCP") for port in ports}


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://collector:4318", 4318),
        ("http://collector:4318/x:9", 4318),
        ("https://collector", 443),
        ("http://collector/v1", 80),
        ("http://[fd00::1]:4318", 4318),
        ("http://[fd00::1]", 80),
    ],
)
def test_traces_reach_their_endpoint(endpoint: str, port: int) -> None:
    assert opened({"otel": {"endpoint": endpoint}}) == DNS | {(port, "TCP")}


def test_the_store_is_reached_by_a_rule_of_the_user() -> None:
    (example,) = re.findall(
        r"```yaml\n(settings:\n  SUREFOOT_STORE.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL
    )
    values = yaml.safe_load(example)
    assert opened(values) == DNS | {(443, "TCP")}
    assert helm.lint(CHART, values, strict=True)["errors"] == []
    peer = {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 9000, "protocol": "TCP"}]}
    rules = the("NetworkPolicy", objects({"networkPolicy": {"extraEgress": [peer]}}))["spec"]["egress"]
    assert rules[-1] == peer


def test_everything_at_once_is_a_policy_that_kubernetes_takes() -> None:
    values = {
        "redis": {"url": "redis+sentinel://a,b/main", "extraPorts": [6380]},
        "otel": {"endpoint": "http://collector:4318"},
        "networkPolicy": {"extraEgress": [{"ports": [{"port": 443, "protocol": "TCP"}]}]},
    }
    assert opened(values) == DNS | {(port, "TCP") for port in (6379, 6380, 26379, 4318, 443)}
    validate = pytest.importorskip("kubernetes_validate").validate
    validate(the("NetworkPolicy", objects(values)), "1.34", strict=True)
    assert not of_kind("NetworkPolicy", objects({"networkPolicy": {"enabled": False}}))


def test_the_test_pod_passes_a_network_policy_that_names_the_callers() -> None:
    found = objects({"networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"team": "apps"}}}]}})
    (rule,) = the("NetworkPolicy", found)["spec"]["ingress"]
    (own,) = [peer["podSelector"]["matchLabels"] for peer in rule["from"] if "podSelector" in peer]
    assert own.items() <= the("Pod", found)["metadata"]["labels"].items()
