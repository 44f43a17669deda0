"""A small HTTP server that answers as the admin API's rollouts and shadows do: real sockets, one view, which moves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "an-admin-token"
TITLES = {401: "unauthorized", 404: "unknown_policy", 409: "move_refused", 412: "stale", 422: "invalid_field"}


class RolloutServer(ThreadingHTTPServer):
    """What it answers stands in `view` and `shadows`; what it was asked, in `asked`."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, view: dict[str, Any], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.view = view
        self.shadows: dict[str, Any] = {"policy": view["policy"], "shadows": [], "here": []}
        self.asked: list[tuple[str, str, str | None, Any]] = []  # method, path, If-Match, body
        self.broken: str | None = None  # a body in place of every answer
        self.broken_status = 502
        self.date = "Fri, 21 Nov 2025 15:48:40 GMT"  # the views' time, so that texts are the same each day

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def etag(self) -> str:
        return f'"{self.view["generation"]}"'

    def changed(self, parts: list[str], body: Any) -> int:
        """Change the view as a call says. Gives the status."""
        view, standing = self.view, self.view["standing"]
        if parts == []:
            if body["alpha"] > 0.5:
                return 422
            view["plan"] = body
        elif parts == ["begin"]:
            view["standing"] = {"id": "r-2", "version": body["version"], "stage": "shadow", "step": 0, "weight": 0.0,
                                "since_ms": 0, "paused": "", "proposal": None}  # fmt: skip
        elif parts[0] in ("quarantine", "release"):
            view["marks"] = {body["version"]: {"stage": parts[0], "reason": body.get("reason", ""), "since_ms": 0}}
        elif standing is None or standing["stage"] == "quarantined":
            return 409
        else:
            standing |= {
                "rollback": {"stage": "quarantined"}, "withdraw": {"stage": "registered"}, "resume": {"paused": ""},
                "promote": {"stage": "champion"}, "advance": {"step": standing["step"] + 1},
                "weight": {"weight": body.get("weight")}, "pause": {"paused": body.get("reason", "a person")},
            }[parts[0]]  # fmt: skip
        view["generation"] += 1
        return 200


class _Handler(BaseHTTPRequestHandler):
    server: RolloutServer

    def _answer(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        server.asked.append((self.command, self.path, self.headers.get("If-Match"), body))
        if server.broken is not None:
            self._send(server.broken_status, server.broken.encode(), "text/html")
            return
        status, answer = self._outcome(body)
        if status != 200:
            answer = {"status": status, "code": TITLES[status], "detail": f"so the service said of {self.path}"}
            if status == 422:
                answer["errors"] = [{"field": "alpha", "detail": "too much"}]
        self._send(status, json.dumps(answer).encode(), "application/json")

    def _outcome(self, body: Any) -> tuple[int, Any]:
        server, parts = self.server, self.path.strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, None
        if parts[:3] != ["admin", "policies", server.view["policy"]]:
            return 404, None
        if parts[3] == "shadows":
            return 200, self._shadows(parts[4:])
        match = self.headers.get("If-Match")
        if self.command != "GET" and match not in (None, server.etag):
            return 412, None
        return (200 if self.command == "GET" else server.changed(parts[4:], body)), server.view

    def _shadows(self, parts: list[str]) -> Any:
        if self.command == "PUT":
            self.server.shadows["shadows"].append(parts[0])
        if self.command == "DELETE":
            self.server.shadows["shadows"].remove(parts[0])
        return self.server.shadows | {"generation": 13}

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", len(content)), ("ETag", self.server.etag)):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        return self.server.date


@contextmanager
def answering(view: dict[str, Any], port: int = 0) -> Iterator[RolloutServer]:
    with RolloutServer(view, port) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
