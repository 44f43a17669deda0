"""The policy that fault scenarios run, and what its answers must be, once more: slow, one row at a time, plain Python.

Duty: the files of a policy whose network, rules and exploration are simple enough to be computed by hand, and that
computation. It shares no code with `policies/` and `safety/`.
Strategy: states are multiples of 1/64 and weights of 1/4, so float32 and float64 give the same scores, and ties and
thresholds are exact. Rules cover: one action masked, all but the fallback masked, all masked, a rule over the request's
context, the request's own allowed actions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.policies.networks import bundle_files, linear

NAMES = ("a0", "a1", "a2", "a3")
FALLBACK = 0
EPSILON = 0.25
WEIGHTS = ((0.0, 1.0, -0.5, 2.0), (0.5, -1.0, 1.5, 0.25), (1.0, 0.25, 0.75, -0.5))
BIAS = (0.0, 0.25, 0.0, 0.25)
GOLDEN = ([0.0, 0.0, 0.0], [0.25, -0.5, 0.125], [0.5, 0.5, -0.75])
RULES: tuple[dict[str, Any], ...] = (
    {"name": "not-a3-when-hot", "when": 'state.f0 > 0.5 && action.name == "a3"'},
    {"name": "only-a0-when-full", "when": 'state.f2 > 0.75 && action.name != "a0"'},
    {"name": "low-when-calm", "when": "has(context.calm) && context.calm && action.index >= 2"},
    {"name": "nothing-when-cold", "when": "state.f1 < -0.75", "except_fallback": True},
)


def write_policy(root: Path, policy: str, *, window_s: float, limit: int, limit_window_s: float) -> None:
    """Write a directory of policies with this one: its reward window, and at most `limit` explored per window."""
    files = bundle_files(
        linear(WEIGHTS, BIAS),
        GOLDEN,
        [scores(state) for state in GOLDEN],
        policy=policy,
        exploration={"epsilon": EPSILON},
        fallback=NAMES[FALLBACK],
    )
    (root / policy / "v1").mkdir(parents=True)
    for name, content in files.items():
        (root / policy / "v1" / name).write_bytes(content)
    rules = [{"kind": "forbid", "reason": "as tested", "mode": "enforce"} | rule for rule in RULES]
    documents: dict[str, dict[str, Any]] = {
        "deployment.yaml": {
            "schema": 1, "policy": policy, "champion": "v1", "reward": {"window_s": window_s, "default": -1000.0},
        },
        "safety.yaml": {"schema": 1, "policy": policy, "on_empty": "fallback", "rules": rules},
        "exploration.yaml": {"epsilon": EPSILON, "rate": {"limit": limit, "window_s": limit_window_s}, "start": "now"},
    }  # fmt: skip
    for name, document in documents.items():
        (root / policy / name).write_text(yaml.safe_dump(document, sort_keys=False))


def some_request(chance: random.Random) -> dict[str, Any]:
    """State, and now and then context and allowed actions, of a request."""
    request: dict[str, Any] = {"state": [chance.randrange(-64, 65) / 64 for _ in range(3)]}
    if chance.random() < 0.3:
        request["context"] = {"calm": chance.random() < 0.5}
    if chance.random() < 0.2:
        request["allowed_actions"] = sorted(chance.sample(NAMES, chance.randrange(1, 4)))
    return request


def scores(state: Sequence[float]) -> list[float]:
    return [BIAS[a] + math.fsum(state[i] * WEIGHTS[i][a] for i in range(3)) for a in range(4)]


def allowed(request: dict[str, Any]) -> list[int]:
    """Actions that no rule and no caller forbids."""
    hot, cold, full = (request["state"][0] > 0.5, request["state"][1] < -0.75, request["state"][2] > 0.75)
    calm = request.get("context", {}).get("calm", False)
    left = []
    for action, name in enumerate(NAMES):
        forbidden = [hot and action == 3, full and action != 0, calm and action >= 2, cold]
        if not any(forbidden) and name in request.get("allowed_actions", NAMES):
            left.append(action)
    return left


def violations(request: dict[str, Any], answer: dict[str, Any]) -> list[str]:
    """What is wrong with an answer; nothing, as it should be."""
    left, action = allowed(request), answer["action"]
    if answer["fallback"] is not None:
        return _wrong_fallback(left, answer)
    if action not in left:
        return [f"{NAMES[action]} is forbidden, allowed are {left}"]
    found = []
    values = scores(request["state"])
    best = max(left, key=lambda each: (values[each], -each))
    epsilon = answer["exploration"]["epsilon"]
    expected = [(1 - epsilon) * (a == best) + epsilon * (a in left) / len(left) for a in range(4)]
    if not 0.0 <= epsilon <= EPSILON:
        found.append(f"epsilon is {epsilon}")
    if not math.isclose(answer["propensity"] or 0.0, expected[action], rel_tol=1e-9):
        found.append(f"propensity {answer['propensity']} of {NAMES[action]}, computed {expected[action]}")
    drawn_from = answer["distribution"]
    if abs(math.fsum(drawn_from) - 1.0) > 1e-6 or any(
        abs(p - q) > 1e-9 for p, q in zip(drawn_from, expected, strict=True)
    ):
        found.append(f"drawn from {drawn_from}, computed {expected}")
    if not answer["explored"] and action != best:
        found.append(f"{NAMES[action]} without exploring, {NAMES[best]} is best")
    if answer["action_name"] != NAMES[action]:
        found.append(f"action {action} is called {answer['action_name']}")
    return found


def _wrong_fallback(left: Sequence[int], answer: dict[str, Any]) -> list[str]:
    found = []
    if answer["action"] != FALLBACK:
        found.append(f"the fallback is {NAMES[FALLBACK]}, not {answer['action_name']}")
    if answer["propensity"] not in (1.0, None) or (answer["propensity"] is None) == (
        answer["propensity_reason"] is None
    ):
        found.append(f"the fallback's propensity is {answer['propensity']} ({answer['propensity_reason']})")
    if answer["explored"]:
        found.append("a fallback that explores")
    if not left and answer["fallback"] == "":
        found.append("a fallback without a reason")
    return found
