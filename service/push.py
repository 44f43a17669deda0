"""EDGE: the admin API as a command line calls it: versions, tokens, the audit log. By httpx.

Duty: one function for each command; the answer as a dict, or an error of the tree in the service's own words. It knows
no bundle format: files are sent as they are.
Strategy: synchronous, one connection for each call. Nothing is repeated: a push that was cut off may be sent again,
since the same content under the same label is the same version.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import httpx

from policies.errors import SurefootError
from service.health_check import place

# Trial of the bundle (up to a minute) and 256 MB over a slow line; connecting is another matter.
TIMEOUT = httpx.Timeout(300.0, connect=5.0)

PAGE = 1_000  # the most that the service gives at once


class Refusal(SurefootError):
    """What the service, or the way to it, said. `detail` is for people; the fields are the problem's."""

    code: ClassVar[str] = SurefootError.code

    def __init__(self, detail: str, problem: Mapping[str, Any] | None = None) -> None:
        self.problem = dict(problem or {})
        errors = self.problem.get("errors") or [{}]
        super().__init__(detail, errors[0].get("field"))
        self.check = self.problem.get("check")


def push(files: Mapping[str, bytes], url: str | None = None, token: str | None = None) -> dict[str, Any]:
    """Send a bundle's files, by name. Gives version, digest, warnings, and `new`: whether it was not there yet.

    Raises Refusal naming check, field and what to do.
    """
    from policies.manifest import MANIFEST, read_manifest

    manifest = read_manifest(files.get(MANIFEST, b""))
    parts = [(name, (name, content, "application/octet-stream")) for name, content in files.items()]
    response = call("POST", f"/admin/policies/{manifest.policy}/versions", url, token, files=parts)
    return {**response.json(), "new": response.status_code == 201}


def versions(policy: str, url: str | None = None, token: str | None = None) -> list[dict[str, Any]]:
    """List a policy's versions. Raises Refusal."""
    found: list[dict[str, Any]] = call("GET", f"/admin/policies/{policy}/versions", url, token).json()
    return found


def promote(policy: str, version: str, url: str | None = None, token: str | None = None) -> dict[str, Any]:
    """Make a version the champion; a challenger or a shadow that it was is none any more. Gives the policy's new view.

    Raises Refusal, also when somebody else changed the deployment meanwhile.
    """
    path = f"/admin/policies/{policy}/deployment"
    standing = call("GET", path, url, token)
    deployment = standing.json()
    deployment["champion"] = version
    deployment["challengers"] = [each for each in deployment["challengers"] if each["version"] != version]
    deployment["shadows"] = [each for each in deployment.get("shadows", ()) if each != version]
    answer = call("PUT", path, url, token, json=deployment, headers={"If-Match": standing.headers["etag"]})
    view: dict[str, Any] = answer.json()
    return view


def delete(policy: str, version: str, url: str | None = None, token: str | None = None) -> dict[str, Any]:
    """Delete a version that is not live. Raises Refusal."""
    call("DELETE", f"/admin/policies/{policy}/versions/{version}", url, token)
    return {"policy": policy, "version": version, "deleted": True}


def rehearse(policy: str, source: bytes, last: int, url: str | None = None, token: str | None = None) -> dict[str, Any]:
    """Try a safety.yaml on a policy's recent decisions. Gives what it would have changed.

    Raises Refusal, which names field, line and column of each fault.
    """
    options: dict[str, Any] = {"params": {"last": last}, "headers": {"Content-Type": "application/yaml"}}
    found: dict[str, Any] = call(
        "POST", f"/admin/policies/{policy}/safety/test", url, token, content=source, **options
    ).json()
    return found


def address() -> str:
    """Where a service with this environment's settings listens."""
    host, port = place()
    scheme = "https" if os.environ.get("SUREFOOT_TLS_CERT") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def tokens(url: str | None = None, token: str | None = None) -> list[dict[str, Any]]:
    """List the tokens that stand. Raises Refusal."""
    found: list[dict[str, Any]] = call("GET", "/admin/tokens", url, token).json()
    return found


def create_token(wanted: Mapping[str, Any], url: str | None = None, token: str | None = None) -> dict[str, Any]:
    """Make a token; its text stands in the answer under `token`, and nowhere else. Raises Refusal."""
    made: dict[str, Any] = call("POST", "/admin/tokens", url, token, json=dict(wanted)).json()
    return made


def revoke_token(token_id: str, url: str | None = None, token: str | None = None) -> dict[str, Any]:
    """End a token. Raises Refusal."""
    call("DELETE", f"/admin/tokens/{token_id}", url, token)
    return {"id": token_id, "revoked": True}


def audit(
    url: str | None = None, token: str | None = None, policy: str | None = None, source: str | None = None
) -> Iterator[dict[str, Any]]:
    """Give the entries of the audit log, oldest first, page by page. Raises Refusal."""
    after: int | None = 0
    chosen = {"policy": policy, "source": source}
    while after is not None:
        asked = {name: value for name, value in chosen.items() if value} | {"after": after, "limit": PAGE}
        page = call("GET", "/admin/audit", url, token, params=asked).json()
        yield from page["entries"]
        after = page["next"]


def call(method: str, path: str, url: str | None, token: str | None, **options: Any) -> httpx.Response:
    """Call a service as its settings here, or the options of the command, say. Raises Refusal."""
    base, token = (url or address()).rstrip("/"), token or os.environ.get("SUREFOOT_ADMIN_TOKEN")
    headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        response = httpx.request(method, base + path, headers=headers, **{"timeout": TIMEOUT} | options)
    except httpx.InvalidURL as error:
        raise Refusal(f"{base} is no URL: {error}") from None
    except httpx.HTTPError as error:
        raise Refusal(f"{base} does not answer ({error or type(error).__name__}); is the service running?") from None
    if response.is_success:
        return response
    raise _refusal(response, bool(token))


def _refusal(response: httpx.Response, with_token: bool) -> Refusal:
    try:
        problem = response.json()
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        return Refusal(f"{response.url} answered {response.status_code}, and not like a Surefoot service")
    if response.status_code == 401:
        hint = "the token is not the service's" if with_token else "no token was sent"
        return Refusal(f"{hint}: give --token or SUREFOOT_ADMIN_TOKEN", problem)
    fields = ", ".join(each["field"] for each in problem.get("errors", []) if each.get("field"))
    said = {"check": problem.get("check"), "field": fields}
    where = "".join(f"\n  {name}: {value}" for name, value in said.items() if value)
    return Refusal(f"refused ({problem['code']}): {detail}{where}", problem)
