"""Every route that the OpenAPI document names needs a permission, and every role gets what its permissions say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import get_args

import httpx
import pytest

from service.api import build_api
from service.roles import ACTIONS, GRANTS, OPEN, ROLES, ROUTES, Permission, Role, action_of, grants, needed
from tests.service.admins import TOKEN, Admin, serving

DOCUMENTED = sorted(
    (method.upper(), path) for path, item in build_api({}).openapi()["paths"].items() for method in item
)
LIMITED = [route for route in DOCUMENTED if route not in OPEN]
METHODS_THAT_READ = {"GET"}


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    settings = {"client_token": "a-client-token", "admin_rate": "100000", "auth_failures_per_minute": "100000"}
    with serving(tmp_path_factory.mktemp("roles"), **settings) as started:
        yield started


@pytest.fixture(scope="module")
def tokens(admin: Admin) -> dict[Role, str]:
    return {role: made(admin, role) for role in ROLES}


def made(admin: Admin, role: str, **fields: object) -> str:
    answer = admin.http.post("/admin/tokens", json={"role": role, "owner": "somebody", **fields})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["token"])


def call(admin: Admin, route: tuple[str, str], token: str | None) -> httpx.Response:
    """Call a route with a body that nothing can be done with."""
    method, path = route
    url = admin.server.url + re.sub(r"\{\w+\}", "nothing", path)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.request(method, url, headers=headers, content=None if method == "GET" else b"?", timeout=60.0)


def test_the_tables_name_the_documented_routes_and_no_other() -> None:
    assert set(DOCUMENTED) == set(ROUTES) | OPEN
    assert set(ACTIONS) <= set(ROUTES)
    changes = {route for route in ROUTES if route[0] not in METHODS_THAT_READ and route[1].startswith("/admin")}
    assert changes - set(ACTIONS) == {("POST", "/admin/policies/{policy}/safety/test")}
    assert len(set(ACTIONS.values())) == len(ACTIONS)


def test_every_permission_is_somebody_s_and_needed_somewhere() -> None:
    assert set(ROUTES.values()) == set(get_args(Permission))
    assert set(GRANTS) == set(ROLES)
    assert GRANTS["admin"] == set(get_args(Permission))
    assert GRANTS["operator"] == GRANTS["admin"] - {"tokens"}
    assert set.union(*(set(GRANTS[role]) for role in ROLES if role != "admin")) | {"tokens"} == GRANTS["admin"]


def test_a_route_of_no_table_is_the_admin_s_alone() -> None:
    assert needed("POST", "/admin/anything") is None
    assert [role for role in ROLES if grants(role, None)] == ["admin"]
    assert action_of("POST", "/admin/anything") == "POST /admin/anything"
    assert action_of("HEAD", "/admin/anything") is None


@pytest.mark.parametrize("route", LIMITED, ids=" ".join)
def test_a_route_is_closed_without_a_valid_token(admin: Admin, route: tuple[str, str]) -> None:
    for token in (None, "wrong", "sf_" + "A" * 43, TOKEN + "x", TOKEN[:-1]):
        answer = call(admin, route, token)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), token


@pytest.mark.parametrize("route", LIMITED, ids=" ".join)
def test_a_route_is_open_to_the_roles_that_have_its_permission_and_to_no_other(
    admin: Admin, tokens: dict[Role, str], route: tuple[str, str]
) -> None:
    for role in ROLES:
        answer = call(admin, route, tokens[role])
        if grants(role, ROUTES[route]):
            assert answer.status_code not in (401, 403, 500), (role, answer.text)
        else:
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), role


@pytest.mark.parametrize("path", ["/act", "/act/batch", "/reward", "/reward/batch"])
def test_the_short_names_of_hot_routes_are_as_closed_as_the_long_ones(
    admin: Admin, tokens: dict[Role, str], path: str
) -> None:
    for prefix in ("", "/v1"):
        assert call(admin, ("POST", prefix + path), None).status_code == 401
        assert call(admin, ("POST", prefix + path), tokens["viewer"]).status_code == 403
        assert call(admin, ("POST", prefix + path), tokens["client"]).status_code == 400


def test_the_settings_tokens_are_a_client_and_an_admin(admin: Admin) -> None:
    for route in LIMITED:
        assert call(admin, route, TOKEN).status_code not in (401, 403)
        assert (call(admin, route, "a-client-token").status_code == 403) is not grants("client", ROUTES[route])


@pytest.mark.parametrize("route", sorted(OPEN), ids=" ".join)
def test_probes_need_no_token(admin: Admin, route: tuple[str, str]) -> None:
    assert call(admin, route, None).status_code == 200
