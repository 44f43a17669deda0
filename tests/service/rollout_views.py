"""A rollout's view as the admin API answers it, for tests of what the terminal makes of it."""

from __future__ import annotations

import copy
from typing import Any

NOW_MS = 1_763_740_120_000
SUPPORT = {
    "units": 1000, "rows": 20_000, "left_out": 3, "outside": 0, "effective_n": 412.7, "mean_weight": 1.02,
    "mean_weight_low": 0.91, "mean_weight_high": 1.13, "unsupported": 0.004, "disagreements": 2210, "matched": 118,
}  # fmt: skip


def estimate(method: str, **support: Any) -> dict[str, Any]:
    numbers = {"value": 460.2, "error": 4.0, "low": 450.0, "high": 470.0, "lower": 401.3, "upper": 498.0}
    return {"method": method, **numbers, "units": 1000, "support": SUPPORT | support}


def guard(lower: float, estimate: float, upper: float, margin: float, **more: Any) -> dict[str, Any]:
    said = {"action": "rollback", "must_prove": True, "worse": False, "proven": False, "superior": False, "lost": 0}
    return {"estimate": estimate, "lower": lower, "upper": upper, "margin": margin} | said | more


PLAN = {
    "objective": "episode", "return_range": [0.0, 500.0], "steps": [0.01, 0.05, 0.1, 0.25, 0.5], "shadow": True,
    "gate": "required", "mode": "auto", "begin": "by_hand", "hold_s": 3600.0, "min_units": 30,
    "max_duration_s": 604_800.0, "unit_time_s": 60.0, "unit_decisions": 100, "alpha": 0.01,
    "guards": {"return": {"margin": 25.0, "action": "rollback", "must_prove": True}},
}  # fmt: skip
STANDING = {
    "id": "r-1", "version": "v2", "champion": "v1", "stage": "canary", "plan": PLAN, "returns": [0.0, 500.0],
    "margin": 25.0, "step": 1, "weight": 0.05, "floor": 0.01, "place": 1, "since_ms": NOW_MS - 120_000,
    "generation": 11, "paused": "", "resumed_ms": 0, "proposal": None, "reason": "the gate before the canary passes",
}  # fmt: skip
EVIDENCE = {
    "at_ms": NOW_MS - 3_000, "through_ms": NOW_MS - 25_000,
    "units": {"challenger": 30, "champion": 1200, "open": 12, "left_out": {"before": 3}},
    "ratio": {"share": 0.051, "meant": 0.05, "challengers": 31, "champions": 1201, "mismatched": False},
    "guards": {
        "return": guard(-33.0, -0.1, 28.0, 25.0),
        "override": guard(-0.015, -0.001, 0.013, 0.02, proven=True),
        "latency": guard(-0.2, -0.09, -0.03, 0.02, action="pause", must_prove=False, worse=True),
    },
    "verdict": "pause", "warnings": ["this step expects fewer than 30 units"],
}  # fmt: skip
MARK = {"stage": "quarantined", "reason": "return: the upper bound -31 is below -25", "since_ms": NOW_MS - 10_000_000}
CANARY: dict[str, Any] = {
    "policy": "cartpole", "generation": 12, "champion": "v1", "plan": PLAN, "standing": STANDING,
    "marks": {"v3": MARK}, "next": "held for 120 of 3600 s", "evidence": EVIDENCE,
    "gate": {"outcome": "passes", "reasons": []},
    "estimates": {
        "v2": {"objective": "episode", "methods": [estimate("pdis"), estimate("recursive_dr")], "support": SUPPORT}
    },
}  # fmt: skip
NOTHING: dict[str, Any] = {
    "policy": "cartpole", "generation": 3, "champion": "v1", "plan": None, "standing": None, "marks": {}, "next": "",
    "evidence": None, "gate": None, "estimates": {},
}  # fmt: skip


def canary(**standing: Any) -> dict[str, Any]:
    """A view of a canary, its standing changed."""
    view = copy.deepcopy(CANARY)
    view["standing"] |= standing
    return view
