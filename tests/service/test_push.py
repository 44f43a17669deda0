"""What `surefoot policy push` and its sisters call, against a running service."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from policies.errors import BundleError, SurefootError
from service import push as pushing
from service.push import delete, promote, push, versions
from tests.service.admins import TOKEN, Admin, files_of, serving


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    with serving(tmp_path_factory.mktemp("push")) as mine:
        yield mine


@pytest.fixture(autouse=True)
def environment(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of someone who runs the service here: its settings say where it is and who may."""
    monkeypatch.setenv("SUREFOOT_HOST", "0.0.0.0")
    monkeypatch.setenv("SUREFOOT_PORT", str(admin.server.port))
    monkeypatch.setenv("SUREFOOT_ADMIN_TOKEN", TOKEN)


def test_push_promote_and_delete_as_an_operator_does(admin: Admin, policy: str) -> None:
    first = push(files_of(policy, "v1"))
    assert (first["policy"], first["version"], first["role"], first["new"]) == (policy, "v1", "champion", True)
    assert push(files_of(policy, "v1"))["new"] is False
    push(files_of(policy, "v2", prefers=1), admin.server.url + "/", TOKEN)
    assert [(each["version"], each["role"]) for each in versions(policy)] == [("v1", "champion"), ("v2", None)]
    admin.deploy(policy, '"1"', champion="v1", challengers=[{"version": "v2", "weight": 0.5}], route_by="key")
    view = promote(policy, "v2")
    assert (view["champion"], view["challenger"], view["generation"]) == ("v2", None, 3)
    assert view["deployment"]["route_by"] == "key"  # what was not asked for stays
    assert admin.act(policy)["version"] == "v2"
    assert delete(policy, "v1")["deleted"] is True
    assert [each["version"] for each in versions(policy)] == ["v2"]


def test_a_refusal_says_check_field_and_detail(policy: str) -> None:
    files = files_of(policy, "v1")
    files["policy.yaml"] = files["policy.yaml"].replace(b"input: observation", b"input: nowhere")
    with pytest.raises(SurefootError) as caught:
        push(files)
    said = caught.value.detail.splitlines()
    assert said[0].startswith("refused (bundle_refused): the network's inputs are ['observation']")
    assert said[1:] == ["  check: interface", "  field: model.input"]
    assert caught.value.field == "model.input"
    with pytest.raises(BundleError):  # not even a manifest that says which policy it is
        push({"policy.yaml": b"{}"})


def test_every_call_says_what_is_wrong(admin: Admin, policy: str) -> None:
    push(files_of(policy, "v1"))
    with pytest.raises(SurefootError, match="version_exists"):
        push(files_of(policy, "v1", prefers=1))
    with pytest.raises(SurefootError, match="version_live"):
        delete(policy, "v1")
    with pytest.raises(SurefootError, match="no version 'v9'"):
        promote(policy, "v9")
    with pytest.raises(SurefootError, match="unknown_policy"):
        versions("nowhere")


def test_the_way_there_may_be_wrong(admin: Admin, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SurefootError, match="is not the service's: give --token"):
        versions(policy, token="wrong")
    monkeypatch.delenv("SUREFOOT_ADMIN_TOKEN")
    with pytest.raises(SurefootError, match="no token was sent: give --token"):
        versions(policy)
    with pytest.raises(SurefootError, match="is the service running"):
        versions(policy, "http://127.0.0.1:9")
    with pytest.raises(SurefootError, match="is no URL"):
        versions(policy, "nonsense://x:y")


def test_something_else_that_answers_is_named_so(policy: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        thread = Thread(target=other.serve_forever)
        thread.start()
        try:
            with pytest.raises(SurefootError, match="answered 501, and not like a Surefoot service"):
                versions(policy, f"http://127.0.0.1:{other.server_port}")
        finally:
            other.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        (None, None, "http://127.0.0.1:8080"),
        ("10.0.0.7", "9000", "http://10.0.0.7:9000"),
        ("::1", "1", "http://[::1]:1"),
        ("::", "1", "http://127.0.0.1:1"),
    ],
)
def test_the_address_follows_the_settings(
    host: str | None, port: str | None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SUREFOOT_HOST", host), ("SUREFOOT_PORT", port)):
        monkeypatch.delenv(name)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert pushing.address() == url
