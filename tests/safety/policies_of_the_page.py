"""The policies that docs/safety-rules.md speaks of, and a rule of every kind that fits one of them."""

from __future__ import annotations

from typing import Any

from policies.types import ActionSpec, Box, Choices, Feature, ObservationSpec

SCALER = Choices((("hold", "up_1", "up_2", "down_1", "down_2"),))
CLIMATE = Choices((("off", "low", "high"), ("off", "on")), ("fan", "heater"))
ARM = Box((-1.0, -1.0), (1.0, 1.0))
LOAD = ObservationSpec(
    (4,),
    features=(
        Feature("cpu", 0.0, 1.0, {"p01": 0.1, "p99": 0.9}),
        Feature("rps", 0.0),
        Feature("p95_ms", None, None, {"p01": 10.0, "p99": 400.0}),
        Feature("replicas", 1.0, 64.0),
    ),
)
BARE = ObservationSpec((3,))
SPACES: dict[str, ActionSpec] = {"autoscaler": SCALER, "climate": CLIMATE, "arm": ARM}

FITTING: list[tuple[ActionSpec, dict[str, Any]]] = [
    (SCALER, {"kind": "forbid", "when": "state.cpu > 0.8 && action.name == 'up_1'"}),
    (CLIMATE, {"kind": "forbid", "when": "action.fan.name == 'high' && action.heater.index == 1"}),
    (CLIMATE, {"kind": "forbid", "factor": "heater", "when": "action.name == 'on' && state.cpu > 0.5"}),
    (ARM, {"kind": "forbid", "when": "state.cpu > 0.9"}),
    (ARM, {"kind": "bounds", "low": [-0.5, None], "when": "state.cpu > 0.5"}),
    (ARM, {"kind": "max_step", "limit": [0.1, 0.2], "initial": [0, 0], "except_fallback": True}),
    (SCALER, {"kind": "max_step", "limit": 1, "values": [0, 1, 2, -1, -2], "except_fallback": True}),
    (SCALER, {"kind": "rate", "actions": ["up_1", 2], "limit": 1, "window_s": 1}),
    (SCALER, {"kind": "cooldown", "actions": ["up_1"], "after": ["hold"], "seconds": 1}),
    (SCALER, {"kind": "cost", "costs": {"up_1": 0.1, "hold": 0}, "cap": 1, "window_s": 1}),
    (CLIMATE, {"kind": "rate", "factor": "heater", "actions": ["on"], "limit": 1, "window_s": 1}),
    (SCALER, {"kind": "support", "by": "range"}),
    (SCALER, {"kind": "confidence", "max_entropy": 1}),
    (SCALER, {"kind": "explore_only", "actions": ["hold"]}),
    (CLIMATE, {"kind": "never_explore", "actions": [0], "factor": "fan"}),
]


def rest(action: ActionSpec) -> tuple[float, ...]:
    return (0.0,) * (action.size if isinstance(action, Box) else len(action.nvec))
