"""The hot routes in process, around a pipeline with a real network, and one question in every form.

Ids and the clock are the same in every run, so that answers and records of two runs can be compared byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry

from policies.bundle import read_bundle
from policies.engine import Engine
from service.absence import Absence
from service.callers import Callers
from service.clock import ManualClock
from service.coalesce import Coalescer
from service.decision import DecisionEvent
from service.hot import HotRoutes
from service.ledger import Ledger
from service.metrics import Metrics
from service.overload import Overload
from service.plan import LoadedVersion, Plan
from service.questions import Served
from service.states import StateReader
from service.tracing import Tracing
from tests.policies.networks import flattened_files
from tests.service.pipelines import decider, plan, recorded

MAX_BODY_BYTES = 1 << 20
MAX_BATCH = 64
FACTORS = {"kind": "multi_discrete", "nvec": [2, 3], "factors": [{"name": "x"}, {"name": "y"}]}
METRICS = Metrics(CollectorRegistry())

Array = npt.NDArray[Any]


def planned(shape: tuple[int, ...], dtype: str = "float32", factors: bool = False) -> Plan:
    """A plan whose one version explores, for observations of a shape and dtype."""
    changes: dict[str, Any] = {"exploration": {"epsilon": 0.3}}
    if factors:
        changes |= {"action": FACTORS, "fallback": [0, 0]}
    engine = Engine(read_bundle(flattened_files(shape, 5 if factors else 3, dtype=dtype, **changes)))
    return plan({"v1": LoadedVersion(engine.bundle, engine, METRICS.version("toy", "v1"))})


@dataclass(frozen=True)
class Answer:
    status: int
    media: str
    body: bytes

    @property
    def problem(self) -> tuple[str, list[str]]:
        """Its code, and the fields that it names."""
        found = json.loads(self.body)
        return found["code"], [each["field"] for each in found.get("errors", [])]


@dataclass(frozen=True)
class Desk:
    """The routes, and the ledger behind them."""

    routes: HotRoutes
    ledger: Ledger
    overload: Overload
    clock: ManualClock
    coalescer: Coalescer

    async def ask(self, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send one request as a server would."""
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": pairs}
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.routes(scope, receive, send)
        media = dict(sent[0]["headers"])[b"content-type"].decode()
        return Answer(sent[0]["status"], media, sent[1]["body"])

    def events(self) -> list[DecisionEvent]:
        """The decisions that the ledger holds, oldest first."""
        return recorded(self.ledger)

    def recorded(self) -> list[bytes]:
        """What the ledger holds, batch by batch."""
        return [row.blob for row in self.ledger.register("toy").window]


@contextmanager
def desk(in_force: Plan, client: str | None = None, most: int = 256) -> Iterator[Desk]:
    """Hot routes around a pipeline. Needs a running event loop.

    client: the token that callers need. most: rows that are decided at once.
    """
    with decider(in_force, METRICS) as (pipeline, ledger, clock):
        served = Served(
            "toy",
            in_force.observation,
            in_force.action,
            StateReader(in_force.observation),
            Coalescer(pipeline, MAX_BATCH, clock.monotonic_s),
        )
        never = cast(Any, None)  # rewards and idempotency are not asked for
        callers = Callers(client, "an-admin-token", clock, METRICS, rate=1.0, failures_per_minute=100.0)
        overload = Overload(clock, METRICS, served.away, deadline_s=1.0, max_deadline_s=60.0, most=most)
        routes = HotRoutes(
            {"toy": served},
            Absence({}, lambda: True),
            never,
            never,
            METRICS,
            Tracing(),
            clock,
            overload,
            callers=callers,
            max_body_bytes=MAX_BODY_BYTES,
            body_timeout_s=5.0,
            max_batch=MAX_BATCH,
        )
        yield Desk(routes, ledger, overload, clock, served.coalescer)


Request = tuple[bytes, dict[str, str]]  # body, headers


def in_json(fields: Mapping[str, Any]) -> Request:
    return json.dumps(fields).encode(), {"Content-Type": "application/json"}


def in_msgpack(fields: Mapping[str, Any]) -> Request:
    return msgspec.msgpack.encode(fields), {"Content-Type": "application/msgpack"}


def in_raw(array: Array, dtype: str, fields: Mapping[str, Any]) -> Request:
    front = json.dumps(fields).encode() if fields else b""
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(front)),
        "Surefoot-Dtype": dtype,
        "Surefoot-Shape": ",".join(map(str, array.shape)),
    }
    return front + array.astype(dtype).tobytes(), headers


def tensor(array: Array, dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "shape": array.shape, "data": array.astype(dtype).tobytes()}


def in_every_form(name: str, array: Array, own: str, fields: Mapping[str, Any]) -> dict[str, Request]:
    """One question in each form that can hold its numbers exactly. own: the observation's dtype."""
    exact = [dtype for dtype in ("<f4", "<f8", "|u1") if _holds(array, dtype)]
    forms = {"json": in_json({**fields, name: array.tolist()}), "list": in_msgpack({**fields, name: array.tolist()})}
    if own in exact:
        forms["bytes"] = in_msgpack({**fields, name: array.astype(own).tobytes()})
    if name == "states":
        forms["rows"] = in_msgpack(
            {**fields, name: [tensor(row, exact[i % len(exact)]) for i, row in enumerate(array)]}
        )
    for dtype in exact:
        forms[f"map {dtype}"] = in_msgpack({**fields, name: tensor(array, dtype)})
        forms[f"raw {dtype}"] = in_raw(array, dtype, fields)
    return forms


def _holds(array: Array, dtype: str) -> bool:
    if dtype == "|u1":
        return bool(np.all((array >= 0) & (array <= 255) & (array == np.floor(array))) and not np.signbit(array).any())
    return bool(np.all(array.astype(dtype).astype(np.float64) == array))
