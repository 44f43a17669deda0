"""What guards look at, read from entries of the stream as the service itself writes them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from service.decision import Record, encode_record
from service.outcomes import FAULTS, outcome
from shadow.units import Outcome

RECORD = Record(
    policy="p", assigned_version="v2", version="v2", digest="d", role="challenger", generation=7, dtype="<f4",
    shape=(2,), head="q_values", outputs_dtype="<f4", outputs=b"", target=b"", behaviour=b"", epsilon=0.0,
    explored=False, proposed=0, action_name=None, propensity=1.0, key_id=1, weight=0.1, key="k",
)  # fmt: skip


def entry(join: str = "joined", reward: str = "1.5", end: str = "none", episode: str = "e", **record: Any) -> list[Any]:
    raw = encode_record(msgspec.structs.replace(RECORD, **record))
    return [b"d1", episode.encode(), b"1000", reward.encode(), join.encode(), end.encode(), raw]


def test_a_closed_decision() -> None:
    assert outcome(entry(), None) == Outcome(
        unit="k", id="d1", at_ms=1000, assigned="v2", weight=0.1, generation=7, episode="e", reward=1.5
    )
    assert outcome(entry(end="terminated"), "episode").ended
    assert outcome(entry(end="truncated"), None).ended


@pytest.mark.parametrize(
    ("route_by", "key", "episode", "unit"),
    [
        (None, "k", "e", "k"), (None, None, "e", "e"), (None, None, "", "d1"), ("episode", "k", "e", "e"),
        ("episode", "k", "", "k"), ("decision", "k", "e", "d1"), ("key", None, "e", "e"),
    ],
)  # fmt: skip
def test_the_unit_is_what_routing_hashed(route_by: Any, key: str | None, episode: str, unit: str) -> None:
    assert outcome(entry(key=key, episode=episode), route_by).unit == unit


def test_a_unit_is_of_the_control_state_that_assigned_it() -> None:
    assert outcome(entry(pinned=3), "episode").generation == 3


def test_rewards_count_only_where_one_joined() -> None:
    assert outcome(entry("defaulted", "0.0"), None).reward is None
    found = outcome(entry("quarantined", ""), None)
    assert (found.reward, found.quarantined, found.void) == (None, True, False)
    found = outcome(entry("void", ""), None)
    assert (found.reward, found.quarantined, found.void) == (None, False, True)


@pytest.mark.parametrize("reason", sorted(FAULTS - {"check_failed"}))
def test_a_version_that_fails_is_at_fault_whoever_stood_in(reason: str) -> None:
    for found in (outcome(entry(fallback=reason), None), outcome(entry(stand_in=reason, version="v1"), None)):
        assert (found.assigned, found.error, found.fallback) == ("v2", True, True)


def test_rules_and_switches_are_no_faults() -> None:
    found = outcome(entry(fallback="nothing_allowed", overridden=True), None)
    assert (found.error, found.fallback, found.overridden) == (False, True, True)
    found = outcome(entry(stand_in="rule:support", version="v1"), None)
    assert (found.error, found.fallback) == (False, True)
    assert outcome(entry(propensity_reason="check_failed", propensity=None), None).error
    assert outcome(entry(slow=True), None).slow
