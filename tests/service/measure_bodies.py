"""Print what each form of a state costs the service: `python -m tests.service.measure_bodies [json]`.

A real service with networks of 4, 128 and 28,224 (84 x 84 x 4) inputs. Bodies are built beforehand and sent one after
the other over one kept connection. Counted is the processor time of the worker, all its threads, so neither this side
nor what else the machine does. The forms take turns, round after round; a ratio is the median of those within a round.
A request is everything: reading, deciding, recording. With the argument `json` only JSON is sent, so that the file runs
in older checkouts.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from tests.conftest import Server, children, new_server
from tests.policies.networks import flattened_files

SHAPES: Mapping[str, tuple[int, ...]] = {"small": (4,), "middle": (128,), "image": (84, 84, 4)}
ROUNDS, WARM = 40, 100
REQUESTS = {"small": 60, "middle": 60, "image": 8}  # of one form at a turn
PACKED = "application/msgpack"
RAW = "application/octet-stream"


def write(folder: Path, policy: str) -> None:
    version = folder / policy / "v1"
    version.mkdir(parents=True)
    for name, raw in flattened_files(SHAPES[policy], policy=policy).items():
        (version / name).write_bytes(raw)
    (folder / policy / "deployment.yaml").write_text(f"schema: 1\npolicy: {policy}\nchampion: v1\nbaseline: v1\n")


def request(body: bytes, headers: Mapping[str, str]) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    return f"POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{''.join(lines)}\r\n".encode() + body


def requests(policy: str) -> dict[str, bytes]:
    """The same state in each form, as bytes on the wire. The pixels of an image are whole numbers below 256."""
    shape, draw = SHAPES[policy], np.random.default_rng(3)
    image = len(shape) > 1
    state = draw.integers(0, 256, shape).astype("<f4") if image else draw.normal(size=shape).astype("<f4")
    fields = {"policy": policy}
    front = json.dumps(fields).encode()
    raw = {"Content-Type": RAW, "Inference-Header-Content-Length": str(len(front))}
    raw["Surefoot-Shape"] = ",".join(map(str, shape))
    packed = msgspec.msgpack.encode({**fields, "state": state.tobytes()})
    listed = msgspec.msgpack.encode({**fields, "state": state.tolist()})
    forms = {
        "JSON": request(json.dumps({**fields, "state": state.tolist()}).encode(), {"Content-Type": "application/json"}),
        "msgpack, a list": request(listed, {"Content-Type": PACKED}),
        "msgpack, bytes": request(packed, {"Content-Type": PACKED}),
        "raw float32": request(front + state.tobytes(), {**raw, "Surefoot-Dtype": "<f4"}),
    }
    if image:
        forms["raw uint8"] = request(front + state.astype("|u1").tobytes(), {**raw, "Surefoot-Dtype": "|u1"})
    return forms


class Connection:
    """One kept connection, and the processor time of the worker behind it."""

    def __init__(self, server: Server) -> None:
        assert server.process is not None
        workers = [
            each
            for each in children(server.process.pid)
            if b"service.worker" in Path(f"/proc/{each}/cmdline").read_bytes()
        ]
        (self._worker,) = workers
        self._socket = socket.create_connection(("127.0.0.1", server.port))

    def cpu_us(self, sent: bytes, times: int) -> float:
        """Processor time for each of so many requests, in µs."""
        before = self._spent_ns()
        for _ in range(times):
            self._ask(sent)
        return (self._spent_ns() - before) / times / 1000

    def _ask(self, sent: bytes) -> None:
        self._socket.sendall(sent)
        got = b""
        while b"\r\n\r\n" not in got or got.count(b"}") < 2:
            part = self._socket.recv(65_536)
            assert part, got
            got += part
        assert got.startswith(b"HTTP/1.1 200"), got

    def _spent_ns(self) -> int:
        tasks = Path(f"/proc/{self._worker}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="sf-") as name:
        folder = Path(name)
        for policy in SHAPES:
            write(folder / "policies", policy)
        server = new_server(folder / "server", policies=str(folder / "policies"))
        server.start()
        try:
            print("| numbers | form | bytes | CPU for each request, µs | against JSON |")  # noqa: T201
            print("|---|---|---|---|---|")  # noqa: T201
            for policy in SHAPES:
                table(Connection(server), policy, only_json="json" in arguments)
        finally:
            server.stop()


def table(connection: Connection, policy: str, *, only_json: bool) -> None:
    forms = requests(policy)
    if only_json:
        forms = {"JSON": forms["JSON"]}
    found: dict[str, list[float]] = {form: [] for form in forms}
    for turn in range(ROUNDS + 1):
        for form, sent in forms.items():
            cost = connection.cpu_us(sent, REQUESTS[policy] if turn else WARM)
            if turn:
                found[form].append(cost)
    size = int(np.prod(SHAPES[policy]))
    for form, costs in found.items():
        ratios = [cost / base for cost, base in zip(costs, found["JSON"], strict=True)]
        cost, ratio = statistics.median(costs), statistics.median(ratios)
        sent = forms[form].partition(b"\r\n\r\n")[2]
        print(f"| {size:,} | {form} | {len(sent):,} | {cost:,.0f} | {ratio:.2f} |")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
