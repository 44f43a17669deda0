"""The chart and the service agree: what the chart sets are real settings, and the service starts from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.settings import PREFIX, Settings, load_settings
from tests.deploy.chart import VALUES_FILES, chart, environment, objects, the, values_of

each_values_file = pytest.mark.parametrize("path", VALUES_FILES, ids=lambda path: path.stem.removesuffix("-values"))
KNOWN = {PREFIX + name.upper() for name in Settings.model_fields}
# Held by a Secret that the chart does not make, so the test says what stands there.
OUTSIDE = {
    "SUREFOOT_CLIENT_TOKEN": "client",
    "SUREFOOT_ADMIN_TOKEN": "admin",
    "SUREFOOT_KEYS": "1:" + "0f" * 32,
    "SUREFOOT_REDIS_URL": "redis://redis:6379/0",
}


def settable() -> set[str]:
    """Return the variables that `settings` accepts."""
    schema = chart().schema
    assert schema is not None
    return set(schema["properties"]["settings"]["propertyNames"]["enum"])


def started(seen: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Load the settings as the service does when the container starts it."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in seen.items():
        monkeypatch.setenv(name, OUTSIDE[name] if value is None else value)
    return load_settings()


@each_values_file
def test_the_service_starts_from_what_the_chart_sets(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = environment(objects(values_of(path)))
    assert {name for name in seen if name.startswith(PREFIX)} <= KNOWN
    settings = started(seen, monkeypatch)
    assert settings.host == "0.0.0.0"
    assert settings.port == 8080
    assert settings.data_dir == Path("/var/lib/surefoot")


def test_every_setting_is_set_by_the_chart_or_can_be() -> None:
    everything = {
        "redis": {"url": "redis://redis:6379/0"},
        "policies": {"path": "/policies"},
        "auth": {"keys": OUTSIDE["SUREFOOT_KEYS"]},
        "tls": {"existingSecret": "server", "clientCertificates": True, "callerSecret": "caller"},
    }
    owned = {name for name in environment(objects(everything)) if name.startswith(PREFIX)}
    assert owned | settable() == KNOWN
    assert owned & settable() == set()


def test_values_reach_the_settings_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "device": "cuda",
        "durability": "memory",
        "drain": {"delaySeconds": 2.5, "graceSeconds": 4},
        "auth": {"clientToken": "c", "adminToken": "a", "keys": OUTSIDE["SUREFOOT_KEYS"]},
        "redis": {"url": "rediss://redis:6380/1"},
        "policies": {"volume": {"emptyDir": {}}},
        "settings": {"SUREFOOT_LEDGER_BUFFER_BYTES": 268435456, "SUREFOOT_TRACE_SAMPLE": 0.25},
    }
    settings = started(environment(objects(values)), monkeypatch)
    assert (settings.device, settings.durability) == ("cuda", "memory")
    assert (settings.drain_delay_s, settings.grace_s) == (2.5, 4)
    secrets = (settings.client_token, settings.admin_token, settings.keys, settings.redis_url)
    assert [secret.get_secret_value() for secret in secrets if secret] == [
        "c",
        "a",
        OUTSIDE["SUREFOOT_KEYS"],
        "rediss://redis:6380/1",
    ]
    assert settings.policies == Path("/etc/surefoot/policies")
    assert (settings.ledger_buffer_bytes, settings.trace_sample) == (268435456, 0.25)


def test_a_release_without_tokens_gets_its_own() -> None:
    first, second = (environment(objects()) for _ in range(2))
    tokens = {seen[name] for seen in (first, second) for name in ("SUREFOOT_CLIENT_TOKEN", "SUREFOOT_ADMIN_TOKEN")}
    assert len(tokens) == 4, "no token is made twice"
    assert all(token is not None and len(token) == 40 for token in tokens)


def test_no_secret_stands_outside_a_secret() -> None:
    values = {
        "auth": {"clientToken": "canary-1", "adminToken": "canary-2", "keys": OUTSIDE["SUREFOOT_KEYS"]},
        "redis": {"url": "redis://:canary-3@redis:6379/0"},
    }
    found = objects(values)
    for each in found:
        text = str(each)
        assert each["kind"] == "Secret" or not ("canary" in text or "0f0f" in text), each["kind"]
    assert the("StatefulSet", found)


def test_a_policy_volume_is_where_the_setting_points() -> None:
    found = objects({"policies": {"volume": {"emptyDir": {}}, "path": "/bundles"}})
    assert environment(found)["SUREFOOT_POLICIES"] == "/bundles"
    (mount,) = [
        each
        for each in the("StatefulSet", found)["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        if each["name"] == "policies"
    ]
    assert mount["mountPath"] == "/bundles"
    assert "SUREFOOT_POLICIES" not in environment(objects())
