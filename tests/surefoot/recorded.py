"""Batches of what the service's own pipeline has decided, drawn and recorded around a small Gaussian network."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry

from service.metrics import Metrics
from surefoot import Batch
from surefoot.entries import Row
from tests.policies.networks import linear
from tests.service import pipelines
from tests.surefoot.stream_entries import fields

Floats = npt.NDArray[np.float64]


class Gauss:
    """A policy whose means are `weights` times the state, with fixed deviations; the action has two coordinates."""

    def __init__(self, weights: list[list[float]], log_std: list[float], **manifest: Any) -> None:
        self._weights, self._log_std = np.array(weights), np.array(log_std)
        width = np.concatenate([self._weights, np.zeros((2, 2))], axis=1)
        bias = [0.0, 0.0, *log_std]
        golden = (np.array(pipelines.STATES) @ width + bias).tolist()
        self._metrics = Metrics(CollectorRegistry())
        self._version = pipelines.version(
            self._metrics,
            "v1",
            linear(width.tolist(), bias),
            golden_outputs=golden,
            fallback=[0.0, 0.0],
            **manifest,
        )

    def mean(self, states: Floats) -> Floats:
        """As the network computes it, [B, 2]."""
        return (states.astype(np.float32) @ self._weights.astype(np.float32)).astype(np.float64)

    @property
    def log_std(self) -> Floats:
        return self._log_std.astype(np.float32).astype(np.float64)

    def batch(self, states: Floats, **row: Any) -> Batch:
        """Decide for these states, and read what was recorded as a trainer does."""

        async def decide() -> list[Any]:
            plan = pipelines.plan({"v1": self._version})
            with pipelines.decider(plan, self._metrics) as (decider, ledger, _):
                await decider.decide(pipelines.rows(*states.tolist(), **row))
                return pipelines.recorded(ledger)

        entries = [
            fields(n, i=event.id, a=event.action, s=event.state, m=event.mask, d=event.record, n=b"", nm=b"", q=n)
            for n, event in enumerate(asyncio.run(decide()))
        ]
        raw = [
            {name.encode(): value if isinstance(value, bytes) else str(value).encode() for name, value in entry.items()}
            for entry in entries
        ]
        rows = [Row.read(b"%d-0" % n, each) for n, each in enumerate(raw)]
        return Batch.of("toy", rows, lambda batch: None)
