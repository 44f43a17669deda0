"""A trainer as a program of its own, which a test may kill at any moment: `python -m tests.surefoot.training`.

It fits a linear model by stochastic gradient descent, one step for each transition, and writes down in which order.
What it keeps is one file, put in place by an atomic rename: weights, the ids they have seen, and the reader's state. It
says each thing it has done in a line, and kills itself where `die_at` says.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from surefoot import Batch, transitions

RATE = 0.01

Floats = npt.NDArray[np.float64]


class Kept(msgspec.Struct):
    """A checkpoint."""

    ids: list[str]  # in the order of training
    weights: list[float]
    state: bytes | None = None


def load(path: Path) -> Kept:
    return msgspec.msgpack.decode(path.read_bytes(), type=Kept) if path.exists() else Kept([], [0.0] * 4)


def save(path: Path, kept: Kept) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.msgpack.encode(kept))
    temporary.replace(path)


def step(weights: Floats, state: npt.NDArray[Any], reward: float) -> Floats:
    """One step of gradient descent on the squared error; a missing reward counts 0."""
    scaled = state.astype(np.float64) / 100.0
    error = np.nan_to_num(reward) / 100.0 - weights @ scaled
    moved: Floats = weights + RATE * error * scaled
    return moved


class Trainer:
    def __init__(self, path: Path, die_at: str, keep_every: int) -> None:
        self.path, self.die_at, self.keep_every = path, die_at, keep_every
        self.kept = load(path)
        self.batches = 0

    def train(self, batch: Batch) -> None:
        weights = np.array(self.kept.weights)
        for state, reward in zip(batch.states, batch.rewards, strict=True):
            weights = step(weights, state, float(reward))
        self.kept.weights = weights.tolist()
        self.kept.ids += batch.ids.tolist()
        self.batches += 1

    def say(self, done: str) -> None:
        sys.stdout.write(f"{done}\n")
        sys.stdout.flush()
        if done == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self, options: dict[str, Any], policy: str, consumer: str) -> None:
        reader = transitions(policy, "g", consumer, state=self.kept.state, auto_ack=False, **options)
        self.say("started")
        while True:
            for batch in reader:
                self.train(batch)
                self.say("trained")
                if self.batches % self.keep_every == 0:
                    self.keep(reader)
            if self.batches:  # nothing new for a while
                self.keep(reader)
                self.batches = 0

    def keep(self, reader: Any) -> None:
        self.kept.state = reader.state()
        save(self.path, self.kept)
        self.say("kept")
        reader.ack()
        self.say("acked")


def peers(directory: Path, own: Path) -> Iterable[bytes]:
    """The states of all other consumers."""
    found = (load(path).state for path in directory.glob("*.kept") if path != own)
    return [state for state in found if state is not None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("policy")
    parser.add_argument("path", type=Path)
    parser.add_argument("--die-at", default="")
    parser.add_argument("--keep-every", type=int, default=3)
    parser.add_argument("--claim-idle-s", type=float, default=3600.0)
    parser.add_argument("--peers", action="store_true")
    given = parser.parse_args()
    options: dict[str, Any] = {
        "redis_url": given.url,
        "batch_size": 4,
        "block_s": 0.01,
        "max_wait_s": 0.05,
        "claim_idle_s": given.claim_idle_s,
    }
    if given.peers:
        options["peers"] = lambda: peers(given.path.parent, given.path)
    Trainer(given.path, given.die_at, given.keep_every).run(options, given.policy, given.path.stem)


if __name__ == "__main__":
    main()
