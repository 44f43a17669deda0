"""The servers that are measured, as processes: started, pinned, and stopped by pid.

Duty: from a `Spec` to a running server on a free port of loopback, ready and pinned; what its processes have used.
Strategy: our own affinity is set to the server's core while it is started, so that it and all that it starts are born
there; a store that it starts (Surefoot's embedded Valkey takes any core) is pinned afterwards. Everything it writes
goes into a folder of its own.
Promise: `stop` leaves no process behind, and ends none that was not started here.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess  # servers are programs
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests import processes
from loadtests.cases import PEERS, Spec
from loadtests.networks import NETWORKS, POLICY, contextual, limits, model, thresholds, write_policy
from loadtests.processes import Cores

READY_S = 90.0
EXIT_S = 40.0
ANSWER_S = 30.0
ADMIN_TOKEN = "of-a-server-that-is-measured"  # noqa: S105  on loopback, for as long as the server lives
LOOK_EVERY_S = 0.02
READY_AT = {"bentoml": "/readyz", "mlserver": "/v2/health/ready", "ray": "/-/healthz"}


@dataclass(slots=True)
class Running:
    """A server that answers."""

    spec: Spec
    process: subprocess.Popen[bytes]
    port: int
    ready_s: float
    log: Path
    ready_cpu_s: float = 0.0  # processor time until it was ready, of all processes that it has started

    def cpu_s(self) -> tuple[float, float]:
        """Processor time so far: of the server's processes, and of its store."""
        everything = processes.tree(self.process.pid)
        stores = {pid for pid in everything if processes.is_store(pid)}
        return processes.cpu_s(pid for pid in everything if pid not in stores), processes.cpu_s(stores)

    def peak_mb(self) -> float:
        """The most memory that the process which answers has had."""
        answering = [pid for pid in processes.tree(self.process.pid) if not processes.is_store(pid)]
        return max(map(processes.peak_mb, answering))

    def pin(self, cores: Cores) -> None:
        for pid in processes.tree(self.process.pid):
            processes.pin(pid, cores.store if processes.is_store(pid) else cores.server)

    def unshipped(self) -> int:
        """Events that Surefoot has acknowledged and not yet handed to Redis; 0 for others."""
        return int(self.gauge("surefoot_ledger_unshipped_events")) if self.spec.kind == "surefoot" else 0

    def gauge(self, name: str) -> float:
        """A metric of Surefoot's, over all its labels; 0 while there is none."""
        return total(self.metrics(), name)

    def metrics(self) -> str:
        return get(self.port, "/metrics")[1]

    def stop(self) -> None:
        """SIGTERM, and wait; what it has started and left behind is killed."""
        started = {pid: processes.born(pid) for pid in processes.tree(self.process.pid)}
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(EXIT_S)
        for pid, born in started.items():
            if born is not None and processes.born(pid) == born:  # and no other process that has the number now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(
    spec: Spec, folder: Path, cores: Cores, collector: int | None = None, peers: Path | None = None
) -> Iterator[Running]:
    """Start a server, wait until it is ready, and stop it at the end.

    collector: port that traces are sent to. peers: folder with an environment for each peer.
    """
    folder.mkdir(parents=True)
    _write_files(spec, folder)  # no part of the start, which is timed
    log = folder / "server.log"
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores.server})
    began_s = time.perf_counter()
    try:
        if spec.kind in PEERS:
            process, port = _start_peer(spec, folder, log, peers or Path())
        elif spec.kind == "surefoot":
            process, port = _start_surefoot(spec, folder, log, collector)
        else:
            process, port = _start_yardstick(spec, folder, log)
    finally:
        os.sched_setaffinity(0, before)
    server = Running(spec, process, port, 0.0, log)
    try:
        _wait_until_ready(server)
        server.ready_s = time.perf_counter() - began_s
        server.ready_cpu_s = processes.cpu_s(processes.tree(process.pid), ended=True)
        server.pin(cores)
        yield server
    finally:
        server.stop()


def _write_files(spec: Spec, folder: Path) -> None:
    network = NETWORKS[spec.network]
    if spec.kind != "surefoot":
        (folder / "model.onnx").write_bytes(model(network))
        return
    rules = thresholds(spec.rules) + contextual(spec.context_rules) + limits(spec.limits)
    for number in range(spec.policies):
        name = POLICY if number == 0 else f"{POLICY}-{number}"
        write_policy(folder / "policies", network, policy=name, rules=rules, shadow=spec.shadow)


def _start_yardstick(spec: Spec, folder: Path, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    arguments = [spec.kind, str(listener.fileno())]
    if spec.kind == "fastapi":
        arguments.append(str(folder / "model.onnx"))
    command = [sys.executable, "-m", "loadtests.yardsticks", *arguments]
    with listener, log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, pass_fds=[listener.fileno()])  # noqa: S603
        return process, listener.getsockname()[1]


def _start_surefoot(spec: Spec, folder: Path, log: Path, collector: int | None) -> tuple[subprocess.Popen[bytes], int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SUREFOOT_", "OTEL_"))}
    environment.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # a service that is installed does not compile itself at each start
    environment |= {
        "SUREFOOT_DATA_DIR": str(folder / "data"),
        "SUREFOOT_PORT": "0",
        "SUREFOOT_POLICIES": str(folder / "policies"),
        "SUREFOOT_DURABILITY": spec.durability,
        "SUREFOOT_DEVICE": spec.device,
        "SUREFOOT_LOG_LEVEL": "info",  # tells the port
        "SUREFOOT_ADMIN_TOKEN": ADMIN_TOKEN,
    }
    if spec.max_body_bytes:
        environment["SUREFOOT_MAX_BODY_BYTES"] = str(spec.max_body_bytes)
    if spec.tracing:
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{collector}"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "service.cli", "serve"]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)  # noqa: S603
    try:
        return process, _port_told(process, log)
    except BaseException:
        process.terminate()
        process.wait(EXIT_S)
        raise


def interpreter(peers: Path, kind: str) -> Path:
    """Where the Python is that a peer is installed in."""
    return peers.absolute() / kind / "bin" / "python"


def _start_peer(spec: Spec, folder: Path, log: Path, peers: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A peer opens its port itself: one that was free a moment ago."""
    shutil.copy(Path(__file__).with_name("peers.py"), folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    command = [str(interpreter(peers, spec.kind)), "peers.py", spec.kind, str(port), str(folder / "model.onnx")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603  our own command
            command, stdout=file, stderr=file, cwd=folder, env=environment, start_new_session=True
        )
    return process, port


def _port_told(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r'"url": "http://[^"]*:(\d+)"', log.read_text()):
            return int(found[1])
        time.sleep(LOOK_EVERY_S)
    raise RuntimeError(f"the server says no port:\n{log.read_text()}")


def _wait_until_ready(server: Running) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if get(server.port, READY_AT.get(server.spec.kind, "/health/ready"))[0] == 200:
                return
        except OSError:
            pass
        time.sleep(LOOK_EVERY_S)
    raise RuntimeError(f"{server.spec.name} is not ready:\n{server.log.read_text()}")


def total(metrics: str, name: str) -> float:
    """A metric over all its labels; 0 while there is none."""
    return sum(map(float, re.findall(rf"^{name}(?:\{{[^}}]*\}})? ([0-9.e+]+)", metrics, re.M)))


def get(port: int, path: str) -> tuple[int, str]:
    """Status and text of a GET. Raises OSError."""
    return _asked(port, "GET", path, None, {})


def post(port: int, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, str]:
    """Status and text of a POST. Raises OSError."""
    return _asked(port, "POST", path, body, headers)


def _asked(port: int, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()
