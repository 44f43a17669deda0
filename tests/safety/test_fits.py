"""Rules fit their policy or are refused at their field; none may forbid the declared fallback unless it says so."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from policies.errors import SafetyError, SafetyFault
from policies.types import ActionSpec, Choices, Feature, ObservationSpec
from safety.document import KINDS, RuleSet, bind, read_rules
from tests.safety.policies_of_the_page import ARM, BARE, CLIMATE, FITTING, LOAD, SCALER, SPACES, rest


def ruleset(*rules: dict[str, Any], policy: str = "autoscaler") -> RuleSet:
    named = [{"name": f"r{index}", **rule} for index, rule in enumerate(rules)]
    return read_rules(json.dumps({"schema": 1, "policy": policy, "rules": named}, indent=1).encode())


def misfits(
    action: ActionSpec,
    *rules: dict[str, Any],
    fallback: tuple[float, ...] | None = None,
    observation: ObservationSpec = LOAD,
    **others: Any,
) -> list[SafetyFault]:
    """What is wrong with rules for a policy."""
    try:
        bind(ruleset(*rules), action, observation, fallback, **others)
    except SafetyError as error:
        return list(error.errors)
    return []


@pytest.mark.parametrize(("action", "rule"), FITTING)
def test_a_rule_that_fits_is_bound(action: ActionSpec, rule: dict[str, Any]) -> None:
    assert misfits(action, rule, fallback=rest(action)) == []
    assert misfits(action, rule, fallback=None) == []


def test_every_kind_is_bound_somewhere() -> None:
    assert {rule["kind"] for _, rule in FITTING} == set(KINDS)


@pytest.mark.parametrize(
    ("action", "rule", "field", "words"),
    [
        (SCALER, {"kind": "forbid", "when": "state.cpuu > 0.8"}, "when", "known: cpu, rps"),
        (SCALER, {"kind": "forbid", "when": "action.name == 'up'"}, "when", "known: hold, up_1"),
        (SCALER, {"kind": "forbid", "when": "true", "factor": "fan"}, "factor", "'fan'"),
        (CLIMATE, {"kind": "forbid", "when": "true", "factor": "van"}, "factor", "known: fan, heater"),
        (ARM, {"kind": "forbid", "when": "true", "factor": "fan"}, "factor", "no factors"),
        (ARM, {"kind": "forbid", "when": "action.x > 0.5"}, "when", "continuous"),
        (SCALER, {"kind": "forbid", "when": "sizes(state) > 1"}, "when", "no function 'sizes'"),
        (SCALER, {"kind": "bounds", "low": [0]}, "kind", "continuous"),
        (ARM, {"kind": "bounds"}, "low", "low, high"),
        (ARM, {"kind": "bounds", "low": [0]}, "low", "2 coordinates"),
        (ARM, {"kind": "bounds", "low": [0.5, 0], "high": [0.4, 0]}, "low", "nothing would be left"),
        (ARM, {"kind": "bounds", "low": [0, 1.5]}, "low[1]", "ends at 1: this leaves nothing"),
        (ARM, {"kind": "bounds", "high": [-2, 0]}, "high[0]", "ends at -1: this leaves nothing"),
        (ARM, {"kind": "bounds", "low": [0, 0], "when": "action.x > 1"}, "when", "action"),
        (ARM, {"kind": "max_step", "limit": [1]}, "limit", "2 coordinates"),
        (ARM, {"kind": "max_step", "limit": 1, "values": [1]}, "values", "choices"),
        (SCALER, {"kind": "max_step", "limit": 1}, "values", "what each choice is worth"),
        (SCALER, {"kind": "max_step", "limit": 1, "values": {"up_1": 1}}, "values", "value"),
        (SCALER, {"kind": "max_step", "limit": 1, "values": [0] * 5, "initial": "up"}, "initial", "known: hold"),
        (CLIMATE, {"kind": "max_step", "limit": 1, "values": [0, 1, 2]}, "factor", "fan, heater"),
        (SCALER, {"kind": "rate", "actions": ["hold", "up"], "limit": 1, "window_s": 1}, "actions[1]", "known: hold"),
        (SCALER, {"kind": "rate", "actions": [5], "limit": 1, "window_s": 1}, "actions[0]", "0..4"),
        (ARM, {"kind": "rate", "actions": [5], "limit": 1, "window_s": 1}, "kind", "continuous"),
        (CLIMATE, {"kind": "rate", "actions": ["on"], "limit": 1, "window_s": 1}, "factor", "fan, heater"),
        (SCALER, {"kind": "cooldown", "actions": ["up_1"], "after": ["u"], "seconds": 1}, "after[0]", "known: hold"),
        (CLIMATE, {"kind": "cooldown", "actions": ["on"], "seconds": 1}, "factor", "fan, heater"),
        (SCALER, {"kind": "cost", "costs": {"up_1": 1, "u": 1}, "cap": 1, "window_s": 1}, "costs.u", "known: hold"),
        (SCALER, {"kind": "cost", "costs": {"up_1": 1e300}, "cap": 1, "window_s": 1}, "costs", "too large"),
        (CLIMATE, {"kind": "cost", "costs": {"on": 1}, "cap": 1, "window_s": 1}, "factor", "fan, heater"),
        (SCALER, {"kind": "confidence"}, "min_gap", "max_entropy"),
        (ARM, {"kind": "confidence", "min_gap": 1}, "kind", "continuous"),
        (ARM, {"kind": "explore_only", "actions": [1]}, "kind", "continuous"),
        (CLIMATE, {"kind": "explore_only", "actions": ["on"]}, "factor", "fan, heater"),
        (CLIMATE, {"kind": "never_explore", "actions": ["on"], "factor": "fan"}, "actions[0]", "known: off, low"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused_at_its_field(
    action: ActionSpec, rule: dict[str, Any], field: str, words: str
) -> None:
    (found,) = misfits(action, rule)
    assert found.field == f"rules[0].{field}"
    assert words in found.detail
    assert found.line > 1


def test_support_needs_what_the_manifest_says_of_features() -> None:
    for by in ("range", "quantiles"):
        (found,) = misfits(SCALER, {"kind": "support", "by": by}, observation=BARE)
        assert found.field == "rules[0].by"
    half = ObservationSpec((1,), features=(Feature("x", 0.0),))
    assert misfits(SCALER, {"kind": "support"}, observation=half) == []
    (found,) = misfits(SCALER, {"kind": "support", "max_distance": 1}, observation=half)
    assert found.field == "rules[0].max_distance"


def test_a_joint_rule_is_refused_over_too_many_combinations() -> None:
    wide = Choices((tuple(map(str, range(64))), tuple(map(str, range(65)))), ("a", "b"))
    rule = {"kind": "forbid", "when": "action.a.index == 1 && action.b.index == 2"}
    (found,) = misfits(wide, rule)
    assert "4096" in found.detail.replace(",", "")
    assert misfits(wide, {"kind": "forbid", "factor": "a", "when": "action.index == 1"}) == []


def test_faults_of_all_rules_are_told_with_their_places() -> None:
    raw = b"schema: 1\npolicy: other\nrules:\n"
    raw += b"- kind: cost\n  name: a\n  costs: {up_1: 1, u: 2}\n  cap: 1\n  window_s: 1\n"
    raw += b"- {kind: rate, name: b, actions: [up_9], limit: 1, window_s: 1}\n"
    with pytest.raises(SafetyError) as caught:
        bind(read_rules(raw), SCALER, LOAD, None, policy="autoscaler", where="x.yaml")
    assert [(each.field, each.line, each.column) for each in caught.value.errors] == [
        ("policy", 2, 9),
        ("rules[0].costs.u", 6, 20),
        ("rules[1].actions[0]", 9, 35),
    ]
    assert caught.value.detail.startswith("x.yaml:2:9: policy: these rules are for 'other', the policy is 'autoscaler'")
    bind(ruleset(policy="other"), SCALER, LOAD, None)
    bind(ruleset(), SCALER, LOAD, None, policy="autoscaler")


# Promise 1: a rule that may forbid the declared fallback is refused unless it says so.


@pytest.mark.parametrize(
    ("action", "rule", "fallback", "field"),
    [
        (SCALER, {"kind": "rate", "actions": ["up_1", "hold"], "limit": 1, "window_s": 1}, (0,), "actions"),
        (SCALER, {"kind": "cooldown", "actions": ["hold"], "seconds": 1}, (0,), "actions"),
        (SCALER, {"kind": "cost", "costs": {"up_1": 1}, "cap": 1, "window_s": 1}, (1,), "costs"),
        (
            CLIMATE,
            {"kind": "rate", "factor": "heater", "actions": ["on"], "limit": 1, "window_s": 1},
            (0, 1),
            "actions",
        ),
        (SCALER, {"kind": "max_step", "limit": 1, "values": [0] * 5}, (0,), "limit"),
        (ARM, {"kind": "max_step", "limit": 1}, (0.0, 0.0), "limit"),
        (ARM, {"kind": "bounds", "low": [None, 0.5]}, (0.0, 0.0), "low[1]"),
        (ARM, {"kind": "bounds", "high": [-0.5, None]}, (0.0, 0.0), "high[0]"),
        (ARM, {"kind": "bounds", "high": [-0.5, None], "when": "state.cpu > 2.0"}, (0.0, 0.0), "high[0]"),
        (SCALER, {"kind": "forbid", "when": "action.name == 'hold'"}, (0,), "when"),
        (SCALER, {"kind": "forbid", "when": "state.cpu < 0.5"}, (0,), "when"),
        (SCALER, {"kind": "forbid", "when": "context.hour > 6"}, (0,), "when"),
        (CLIMATE, {"kind": "forbid", "factor": "heater", "when": "action.name == 'off'"}, (1, 0), "when"),
        (CLIMATE, {"kind": "forbid", "when": "action.fan.name == 'low' && action.heater.index == 1"}, (1, 1), "when"),
        (ARM, {"kind": "forbid", "when": "state.cpu < 0.5"}, (0.0, 0.0), "when"),
    ],
)
def test_a_rule_that_may_forbid_the_fallback_says_so_or_is_refused(
    action: ActionSpec, rule: dict[str, Any], fallback: tuple[float, ...], field: str
) -> None:
    (found,) = misfits(action, rule, fallback=fallback)
    assert found.field == f"rules[0].{field}"
    assert "the declared fallback" in found.detail
    assert "except_fallback: true" in found.detail
    assert misfits(action, {**rule, "except_fallback": True}, fallback=fallback) == []
    assert misfits(action, {**rule, "mode": "monitor"}, fallback=fallback) == []
    assert misfits(action, rule, fallback=None) == []


@pytest.mark.parametrize(
    ("action", "rule", "fallback"),
    [
        (SCALER, {"kind": "forbid", "when": "action.name == 'hold'"}, (1,)),
        (SCALER, {"kind": "forbid", "when": "has(context.hour) && context.hour > 6"}, (0,)),
        (SCALER, {"kind": "cooldown", "actions": ["up_1"], "after": ["hold"], "seconds": 1}, (0,)),
        (SCALER, {"kind": "cost", "costs": {"hold": 0, "up_1": 1}, "cap": 1, "window_s": 1}, (0,)),
        (CLIMATE, {"kind": "rate", "factor": "heater", "actions": ["on"], "limit": 1, "window_s": 1}, (1, 0)),
        (CLIMATE, {"kind": "forbid", "when": "action.fan.name == 'low' && action.heater.index == 1"}, (1, 0)),
        (CLIMATE, {"kind": "forbid", "when": "action.fan.name == 'low' && action.heater.index == 1"}, (2, 1)),
        (CLIMATE, {"kind": "forbid", "factor": "heater", "when": "action.name == 'on'"}, (1, 0)),
        (ARM, {"kind": "bounds", "low": [-0.5, 0.0], "high": [0.0, 0.5]}, (0.0, 0.0)),
        (SCALER, {"kind": "support"}, (0,)),
        (SCALER, {"kind": "explore_only", "actions": ["up_1"]}, (0,)),
    ],
)
def test_a_rule_that_leaves_the_fallback_alone_is_taken(
    action: ActionSpec, rule: dict[str, Any], fallback: tuple[float, ...]
) -> None:
    assert misfits(action, rule, fallback=fallback) == []


def test_a_forbid_is_tried_on_the_fallback_in_every_sample_state() -> None:
    rule = {"kind": "forbid", "when": "state.cpu > 0.8 && action.name == 'hold'"}
    calm, hot = [0.1, 10.0, 20.0, 3.0], [0.9, 10.0, 20.0, 3.0]
    assert misfits(SCALER, rule, fallback=(0,)) == []  # the state nearest to zero is calm
    assert misfits(SCALER, rule, fallback=(0,), sample_states=np.array([calm, calm], dtype=np.float32)) == []
    (found,) = misfits(SCALER, rule, fallback=(0,), sample_states=np.array([calm, hot], dtype=np.float32))
    assert "in sample state 1" in found.detail


def test_the_state_nearest_to_zero_lies_in_the_range_of_the_features() -> None:
    rule = {"kind": "forbid", "when": "state.replicas < 1.0"}
    assert misfits(SCALER, rule, fallback=(0,)) == []
    (found,) = misfits(SCALER, {"kind": "forbid", "when": "state[2] == 0.0"}, fallback=(0,), observation=BARE)
    assert found.field == "rules[0].when"


@pytest.mark.parametrize("observation", [LOAD, BARE, ObservationSpec((2, 2))])
@pytest.mark.parametrize("action", SPACES.values())
def test_rules_of_other_policies_are_refused_or_taken_but_break_nothing(
    action: ActionSpec, observation: ObservationSpec
) -> None:
    rules = [rule for _, rule in FITTING]
    found = misfits(action, *rules, fallback=rest(action), observation=observation)
    assert all(fault.field.startswith("rules[") and fault.line > 1 for fault in found)
    assert len({fault.field.partition("]")[0] for fault in found}) == len(found) < len(rules)


def test_names_that_no_path_can_hold_are_shown_at_their_map() -> None:
    costs = {"50% [3] of.all": 1}
    (found,) = misfits(SCALER, {"kind": "cost", "costs": costs, "cap": 1, "window_s": 1})
    assert found.field.startswith("rules[0].costs.50")
    assert "'50% [3] of.all'" in found.detail
