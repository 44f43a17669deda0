"""Print how much of its caps a fleet spends under steady load: `python -m tests.service.measure_budget`.

The simulation of `test_lease_worlds.py`: a manual clock, the real script in a real Valkey. The ratios stand in
docs/exploration.md.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

import redis

from safety.exploration import Cap, parse_exploration
from tests.service.banks import START_MS, Bank, Fleet, Record
from tests.surefoot.valkey import Valkey

WINDOWS = 3
CASES: list[tuple[str, Mapping[str, object], int, float]] = [
    ("rate 60 in 60 s", {"rate": {"limit": 60, "window_s": 60}}, 3, 20.0),
    ("rate 6 in 60 s", {"rate": {"limit": 6, "window_s": 60}}, 10, 3.0),
    ("share 5 % of 60 s", {"share": {"limit": 0.05, "window_s": 60}}, 3, 20.0),
    ("share 2 % of 30 s", {"share": {"limit": 0.02, "window_s": 30}}, 1, 20.0),
    ("regret 10 in 60 s", {"regret": {"limit": 10, "window_s": 60}}, 3, 20.0),
    ("regret 10 in 60 s", {"regret": {"limit": 10, "window_s": 60}}, 10, 3.0),
    ("regret 3 in 60 s", {"regret": {"limit": 3, "window_s": 60}}, 3, 1.0),
]


def spent(record: Record, cap: Cap, window: int) -> float:
    """The part of a cap that was spent in a window."""
    key = cap.kind, f"{cap.window_ms}:{START_MS // cap.window_ms + window}"
    whole = cap.limit * record.decisions[key] if cap.kind == "share" else cap.limit
    return float((record.paid if cap.kind == "regret" else record.explored)[key] / whole)


def main() -> None:
    print("| cap | replicas · decisions/s | spent of each window |\n|---|---|---|")  # noqa: T201
    with (
        tempfile.TemporaryDirectory(prefix="sf-") as folder,
        Valkey(Path(folder)) as server,
        redis.Redis.from_url(server.url, protocol=2) as store,
    ):
        for name, caps, replicas, per_s in CASES:
            parts = []
            for seed in range(3):
                bank = Bank(store, f"p-{uuid.uuid4().hex[:12]}")
                fleet = Fleet(bank, parse_exploration({**caps, "start": "now"}), seed=seed)
                for _ in range(replicas):
                    fleet.add()
                cap = fleet.exploration.caps[0]
                fleet.play(START_MS + WINDOWS * cap.window_ms - 50, 50, per_s, 0.4)
                parts += [spent(fleet.record, cap, window) for window in range(WINDOWS)]
            low, high = (f"{100 * end:.0f}" for end in (min(parts), max(parts)))
            told = low if low == high else f"{low} to {high}"
            print(f"| {name} | {replicas} · {per_s:g} | {told} % |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
