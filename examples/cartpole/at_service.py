"""A running service, as an operator has it: start one, push versions, deploy, begin a rollout, look at it.

Duty: the admin API's calls that `rollout.py` makes, by httpx, and a service of one's own in a folder. It knows nothing
of what is rolled out.
Promise: a call that is refused ends the program with the service's own words; a service that was started is stopped.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

READY_S = 60.0


class Operator:
    """The admin API of one policy."""

    def __init__(self, http: httpx.AsyncClient, policy: str) -> None:
        self._http, self._path = http, f"/admin/policies/{policy}"

    async def push(self, bundle: bytes) -> None:
        """Send a version, as `packed` gives it."""
        await self._call("POST", "/versions", content=bundle, headers={"Content-Type": "application/x-tar"})

    async def deploy(self, **deployment: Any) -> None:
        await self._call("PUT", "/deployment", json=deployment, headers=await self._match())

    async def plan(self, plan: dict[str, Any]) -> None:
        """Set the plan that the next rollout goes by."""
        await self._call("PUT", "/rollout", json=plan, headers=await self._match())

    async def begin(self, version: str) -> dict[str, Any]:
        """Begin a rollout. Gives its view."""
        return dict((await self._call("POST", "/rollout/begin", json={"version": version})).json())

    async def view(self) -> dict[str, Any]:
        return dict((await self._call("GET", "/rollout")).json())

    async def behind_s(self) -> float:
        """How old the oldest event is that has not been joined yet."""
        told = (await self._http.get("/metrics")).text
        found = re.search(r"^surefoot_ledger_oldest_seconds(?:\{.*\})? (\S+)$", told, re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def _match(self) -> dict[str, str]:
        return {"If-Match": (await self._call("GET", "/rollout")).headers["etag"]}

    async def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = await self._http.request(method, self._path + path, **options)
        if answer.is_error:
            raise SystemExit(f"{method} {self._path}{path}: {answer.status_code} {answer.text}")
        return answer


def packed(folder: Path) -> bytes:
    """A bundle's folder as a tar."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    return raw.getvalue()


@contextlib.contextmanager
def service(folder: Path) -> Iterator[tuple[str, str]]:
    """A service of our own, with everything it keeps in `folder`. Gives its address and its admin token."""
    token, log = secrets.token_urlsafe(), folder / "service.log"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SUREFOOT_")}
    settings = {"DATA_DIR": str(folder / "data"), "PORT": "0", "ADMIN_TOKEN": token, "SPOOL_MIN_FREE_BYTES": "0"}
    environment = kept | {f"SUREFOOT_{name}": value for name, value in settings.items()}
    program = [str(Path(sys.executable).parent / "surefoot"), "serve"]
    with log.open("w") as out:
        process = subprocess.Popen(program, env=environment, stdout=out, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            yield _address(log, process), token
        finally:
            process.terminate()
            process.wait(60)


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r'"url": "(http://[^"]*:\d+)"', log.read_text(encoding="utf-8"))
        if found:
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"the service did not start:\n{log.read_text(encoding='utf-8')}")
