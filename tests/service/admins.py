"""An operator of a running service, for tests: the admin API by httpx, and bundles to push."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import Server, new_server
from tests.policies.networks import bundle_files, linear

TOKEN = "an-admin-token"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
STATE = [1.0, 2.0]


def files_of(policy: str, version: str, prefers: int = 0, **changes: Any) -> dict[str, bytes]:
    """A bundle of two features and two actions whose network always prefers one action."""
    bias = [1.0 - prefers, float(prefers)]
    proto = linear([[0, 0], [0, 0]], bias)
    return bundle_files(proto, [STATE], [bias], policy=policy, version=version, **{"exploration": None} | changes)


def tar_of(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return raw.getvalue()


class Admin:
    """Calls on one service."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.http = httpx.Client(base_url=server.url, headers=AUTHORIZED, timeout=60.0)

    def push(self, files: Mapping[str, bytes], policy: str) -> httpx.Response:
        tar = {"Content-Type": "application/x-tar"}
        return self.http.post(f"/admin/policies/{policy}/versions", content=tar_of(files), headers=tar)

    def pushed(self, policy: str, version: str, prefers: int = 0, **changes: Any) -> dict[str, Any]:
        answer = self.push(files_of(policy, version, prefers, **changes), policy)
        assert answer.status_code == 201, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def view(self, policy: str) -> dict[str, Any]:
        answer = self.http.get(f"/admin/policies/{policy}")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def deploy(self, policy: str, match: str | None = None, /, **deployment: Any) -> httpx.Response:
        headers = {} if match is None else {"If-Match": match}
        body = {"schema": 1, "policy": policy, **deployment}
        return self.http.put(f"/admin/policies/{policy}/deployment", json=body, headers=headers)

    def promote(self, policy: str, version: str) -> None:
        tag = self.http.get(f"/admin/policies/{policy}/deployment").headers["etag"]
        answer = self.deploy(policy, tag, champion=version)
        assert answer.status_code == 200, answer.text

    def act(self, policy: str, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/act", json={"policy": policy, "state": STATE, **fields})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def delete(self, policy: str, version: str) -> httpx.Response:
        return self.http.delete(f"/admin/policies/{policy}/versions/{version}")

    def close(self) -> None:
        self.http.close()


@contextmanager
def serving(folder: Path, **settings: str) -> Iterator[Admin]:
    """A service of its own, with an admin token, stopped at the end whatever happened."""
    server = new_server(folder, admin_token=TOKEN, **settings)
    server.start()
    admin = Admin(server)
    try:
        yield admin
    finally:
        admin.close()
        if server.process is not None and server.process.poll() is None:
            server.stop()
