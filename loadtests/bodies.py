"""What is sent: requests for one decision or for a batch of them, as bytes. Pure.

Duty: bodies and their headers. The same bytes go to every server that is compared.
Strategy: 64 different bodies in turns, so that actions, keys and rules that hold differ from request to request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtests.networks import POLICY, Network, states

JSON, RAW = "application/json", "application/octet-stream"
DIFFERENT = 64
DIFFERENT_ROWS = 4  # of large bodies: images, batches
KEYS = 1000
SPREAD = tuple(f"k{i * 17 % KEYS}" for i in range(DIFFERENT))


@dataclass(frozen=True, slots=True)
class Asking:
    """Where to post, how it is labelled, and what: `rows` decisions for each body."""

    path: str
    headers: Mapping[str, str]
    bodies: Sequence[bytes]
    rows: int = 1

    def requests(self) -> list[bytes]:
        """Whole HTTP requests."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return [
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode()
            + body
            for body in self.bodies
        ]


def acts(network: Network, *, raw: bool = False, context: bool = True, keys: Sequence[str] = SPREAD) -> Asking:
    """Single decisions, in JSON or as raw numbers (docs/binary-states.md). keys: one for each body, at least."""
    found = states(network, DIFFERENT_ROWS if network.image else DIFFERENT)
    if raw:
        fields = json.dumps({"policy": POLICY, "key": "k0"}).encode()
        return Asking("/v1/act", _raw_headers(network.shape, len(fields)), [fields + _packed(state) for state in found])
    extra = {"context": {"hour": 10}} if context else {}
    bodies = [
        json.dumps({"policy": POLICY, "state": _numbers(state), "key": keys[i], **extra}).encode()
        for i, state in enumerate(found)
    ]
    return Asking("/v1/act", {"Content-Type": JSON}, bodies)


def inferences(network: Network) -> Asking:
    """The same states in the Open Inference Protocol, for a server that speaks nothing else."""
    bodies = []
    for state in states(network, DIFFERENT):
        tensor = {"name": "observation", "shape": [1, *state.shape], "datatype": "FP32", "data": _numbers(state)}
        bodies.append(json.dumps({"inputs": [tensor]}).encode())
    return Asking("/v2/models/bench/infer", {"Content-Type": JSON}, bodies)


def batches(network: Network, rows: int) -> Asking:
    """Batches in JSON, each row with a key and a context of its own."""
    bodies = []
    for seed in range(DIFFERENT_ROWS):
        fields = {
            "policy": POLICY,
            "states": [_numbers(state) for state in states(network, rows, seed)],
            "keys": [f"k{(seed * rows + i) % KEYS}" for i in range(rows)],
            "contexts": [{"hour": 10}] * rows,
        }
        bodies.append(json.dumps(fields).encode())
    return Asking("/v1/act/batch", {"Content-Type": JSON}, bodies, rows)


def raw_batches(network: Network, rows: int) -> Asking:
    """Batches as raw numbers, the way for large ones."""
    fields = json.dumps({"policy": POLICY}).encode()
    found = states(network, rows)
    return Asking("/v1/act/batch", _raw_headers(found.shape, len(fields)), [fields + _packed(found)], rows)


def keyed(network: Network, keys: Sequence[str]) -> bytes:
    """One batch, a row for each key."""
    drawn = [_numbers(state) for state in states(network, DIFFERENT)]
    fields = {"policy": POLICY, "states": [drawn[i % DIFFERENT] for i in range(len(keys))], "keys": list(keys)}
    return json.dumps(fields).encode()


def rewards(decisions: Sequence[str], rows: int) -> Asking:
    """A reward for each decision, so many in a request."""
    bodies = [
        json.dumps({"rewards": [{"decision_id": each, "reward": 1.0} for each in decisions[at : at + rows]]}).encode()
        for at in range(0, len(decisions), rows)
    ]
    return Asking("/v1/reward/batch", {"Content-Type": JSON}, bodies, rows)


def _numbers(state: npt.NDArray[np.float32]) -> list[float]:
    """As a caller writes them: 0.1234, not the float32's seventeen digits."""
    whole = state.astype(np.float64).round(4)
    found: list[float] = (whole.astype(int) if state.ndim > 1 else whole).tolist()
    return found


def _packed(state: npt.NDArray[np.float32]) -> bytes:
    return bytes(state.astype("|u1" if state.ndim > 2 else "<f4").tobytes())


def _raw_headers(shape: tuple[int, ...], length: int) -> dict[str, str]:
    return {
        "Content-Type": RAW,
        "Surefoot-Dtype": "|u1" if len(shape) > 2 else "<f4",
        "Surefoot-Shape": ",".join(map(str, shape)),
        "Inference-Header-Content-Length": str(length),
    }
