"""The load test drives the real service without a failure, and fails when answers are wrong.

Locust patches sockets and ssl in its process, so it always runs in one of its own. Lies are told by a real HTTP
server that answers as the service would, but for one field.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Server

ROOT = Path(__file__).parents[2]
TRUTH: dict[str, Any] = {"decision_id": "d", "action": 1, "propensity": 0.99, "logged": True, "status": "joined"}


def run_locust(url: str, *arguments: str, decisions: int = 60) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run to the end and return the exit code, and the numbers of each route."""
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", *arguments, "--headless", "--json"]
    command += ["-H", url, "-u", "3", "-r", "100", "-t", "60s", "--decisions", str(decisions)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.lstrip().startswith("["), done.stderr
    return done.returncode, {entry["name"]: entry for entry in json.loads(done.stdout)}


@contextmanager
def answering(change: dict[str, Any], status: int | None = None) -> Iterator[str]:
    """Serve the single routes with the truth, changed."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer waits 40 ms for the acknowledgement of its headers

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps(TRUTH | change).encode()
            self.send_response(status or (202 if self.path == "/v1/reward" else 200))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the test reads Locust's numbers."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_the_service_answers_every_request_rightly(server: Server) -> None:
    code, routes = run_locust(server.url, "--policy", "cartpole", decisions=300)
    assert code == 0, routes
    assert {name: entry["num_requests"] for name, entry in routes.items()} == {"/v1/act": 300, "/v1/reward": 300}
    assert all(entry["num_failures"] == 0 for entry in routes.values())


def test_the_service_answers_batches_rightly(server: Server) -> None:
    code, routes = run_locust(server.url, "--policy", "cartpole", "--batch", "16", decisions=960)
    assert code == 0, routes
    expected = {"/v1/act/batch": 60, "/v1/reward/batch": 60}
    assert {name: entry["num_requests"] for name, entry in routes.items()} == expected


def test_a_truthful_server_passes() -> None:
    with answering({}) as url:
        code, routes = run_locust(url)
    assert code == 0
    assert {name: entry["num_requests"] for name, entry in routes.items()} == {"/v1/act": 60, "/v1/reward": 60}


@pytest.mark.parametrize(
    "lie",
    [{"propensity": 0.0}, {"propensity": None}, {"action": 2}, {"logged": False}, {"status": "conflict"}],
    ids=lambda lie: "-".join(f"{name}={value}" for name, value in lie.items()),
)
def test_a_wrong_answer_fails_the_run(lie: dict[str, Any]) -> None:
    with answering(lie) as url:
        code, _ = run_locust(url, decisions=6)
    assert code == 1


def test_errors_fail_the_run_only_beyond_the_ratio_allowed() -> None:
    with answering({}, status=503) as url:
        refused, routes = run_locust(url, decisions=6)
        allowed, _ = run_locust(url, "--max-fail-ratio", "1", decisions=6)
    assert (refused, allowed) == (1, 0)
    assert list(routes) == ["/v1/act"], "a decision that was refused is not rewarded"


def test_the_command_in_the_operators_page_runs() -> None:
    (command,) = re.findall(r"```sh\nlocust (.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    with answering({}) as url:
        code, _ = run_locust(url, *command.replace("\\\n", " ").split())
    assert code == 0
