"""The examples for trainers in docs/client.md run as they stand, against a real Valkey."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch

import surefoot
from tests.surefoot.stream_entries import POINT, add, correction_fields, key, n_step_fields
from tests.surefoot.valkey import Valkey

PAGE = (Path(surefoot.__file__).parent.parent / "docs" / "client.md").read_text()
TRAINERS = PAGE[PAGE.index("## Transitions for trainers") :]
ROWS = 40


def examples() -> dict[str, str]:
    """The example under each heading that reads a stream; the first goes by the name of the chapter."""
    found: dict[str, str] = {}
    for heading, text in re.findall(r"^#+ (.+?)\n(.*?)(?=^#+ |\Z)", TRAINERS, re.MULTILINE | re.DOTALL):
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
            if "redis_url" in block:
                found[f"{heading}{number or ''}"] = block
    return found


class Calls:
    """What the reader of the page has: something to train, and places to put things."""

    def __init__(self) -> None:
        self.network = torch.nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01)
        self.trained: list[float] = []
        self.corrected: dict[str, float] = {}

    def names(self) -> dict[str, Any]:
        return {
            "transitions": surefoot.transitions,
            "Path": Path,
            "np": np,
            "network": self.network,
            "optimizer": self.optimizer,
            "torch": torch,
            "train": lambda *columns: self.trained.extend(columns[0][:, 0].tolist()),
            "best": lambda states, masks: self.network(states).masked_fill(~masks, -torch.inf).max(1).values,
            "value": lambda states: states.sum(axis=1),
            "policy": lambda states: states[:, :2],
            "replay_buffer": self,
            "log": print,
        }

    def set_reward(self, decision_id: str, reward: float) -> None:
        self.corrected[decision_id] = reward


def test_every_example_is_found() -> None:
    assert set(examples()) == {
        "Transitions for trainers", "Without blocking", "Tensors", "n steps", "Points", "Exactly once", "Exactly once1",
        "Gaps", "Corrections",
    }  # fmt: skip


@pytest.mark.parametrize("name", examples())
def test_it_runs(
    valkey: Valkey, store: redis.Redis, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    add(store, policy, range(ROWS), **(POINT if name == "Points" else {}))
    store.xadd(key(policy, "nstep"), n_step_fields(0))  # type: ignore[arg-type]
    store.xadd(key(policy, "correction"), correction_fields(3))  # type: ignore[arg-type]
    code = re.sub(r'"(autoscaler|valves)"', repr(policy), examples()[name])
    small = "" if name == "Corrections" else "batch_size=3, block_s=0.01, "
    code = code.replace('redis_url="redis://redis:6379/0"', f"redis_url={valkey.url!r}, {small}max_wait_s=0.0")
    calls = Calls()
    names = calls.names()
    exec(code, names)
    if name == "Corrections":
        assert calls.corrected == {f"{3:060x}": 3.0}
    elif name == "Exactly once":
        exec(code, names)
        kept = torch.load(tmp_path / "dqn.pt")
        assert len(kept["stream"]) > 10
        held = ROWS // 30 * 30
        assert calls.trained == [*map(float, range(ROWS)), *map(float, range(held, ROWS))]
    elif name not in ("Tensors", "n steps"):
        np.testing.assert_array_equal(calls.trained, np.arange(float(ROWS)))
