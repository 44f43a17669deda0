"""A pipeline around small real networks, with a ledger in memory and a clock that a test moves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import onnx
from prometheus_client import CollectorRegistry

from policies.bundle import read_bundle
from policies.engine import Engine
from policies.route import Routes
from service.act import Decider
from service.arrivals import Arrivals
from service.breakers import Breakers
from service.clock import ManualClock
from service.decision import DecisionEvent, decode_events
from service.ids import Keyring, policy_digest
from service.inference import Inference
from service.ledger import Ledger
from service.memory import Memories
from service.metrics import Metrics
from service.plan import LoadedVersion, Plan, Row
from tests.policies.networks import bundle_files, linear

KEYS = Keyring.parse("3:" + "ab" * 32)
IDENTITY = linear([[1, 0], [0, 1]])
STATES = [[0.0, 1.0], [1.0, 0.0]]


def version(metrics: Metrics, label: str, proto: onnx.ModelProto, **changes: object) -> LoadedVersion:
    """Load a version of the policy `toy`: two features, two actions."""
    states: list[list[float]] = changes.pop("golden_states", STATES)  # type: ignore[assignment]
    outputs: list[list[float]] = changes.pop("golden_outputs", STATES)  # type: ignore[assignment]
    files = bundle_files(proto, states, outputs, version=label, **changes)
    engine = Engine(read_bundle(files))
    return LoadedVersion(engine.bundle, engine, metrics.version("toy", label))


def plan(
    versions: dict[str, LoadedVersion],
    challenger: str | None = None,
    weight: float = 0.0,
    baseline: str | None = None,
) -> Plan:
    bundle = versions["v1"].bundle
    return Plan(
        policy="toy",
        digest=policy_digest("toy"),
        generation=4,
        routes=Routes(b"salt", "v1", challenger, weight),
        versions=versions,
        window_ms=60_000,
        observation=bundle.observation,
        action=bundle.action,
        baseline=baseline,
    )


@contextmanager
def decider(
    in_force: Plan,
    metrics: Metrics | None = None,
    timeout_s: float = 5.0,
    memories: Memories | None = None,
    arrivals: Arrivals | None = None,
) -> Iterator[tuple[Decider, Ledger, ManualClock]]:
    """A pipeline whose ids are the same in every run. Needs a running event loop."""
    clock, numbers = ManualClock(), count()
    ledger = Ledger(None, clock, tier="memory")
    with ThreadPoolExecutor(1) as device:
        yield (
            Decider(
                in_force,
                ledger,
                KEYS,
                clock,
                metrics or Metrics(CollectorRegistry()),
                Inference(device, clock, timeout_s, Memories(1 << 20, 600.0) if memories is None else memories),
                Breakers(clock, lambda *_: None),
                arrivals,
                random=lambda size: b"".join(next(numbers).to_bytes(10, "big") for _ in range(size // 10)),
            ),
            ledger,
            clock,
        )


def rows(*states: list[float], **fields: object) -> list[Row]:
    return [Row(state=list(state), **fields) for state in states]  # type: ignore[arg-type]


def recorded(ledger: Ledger) -> list[DecisionEvent]:
    """The decision events that a ledger in memory holds for the policy `toy`, oldest first."""
    events = [event for row in ledger.register("toy").window for event in decode_events(row.blob)]
    return [event for event in events if isinstance(event, DecisionEvent)]
