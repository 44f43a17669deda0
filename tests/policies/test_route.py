"""Routing: sticky, by weight, and raising a weight only moves units to the challenger."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.route import BUCKETS, Assignment, Routes, assign, bucket, unit_of

weights = st.floats(0, 1)


def routes(weight: float, challenger: str | None = "v2", salt: bytes = b"s") -> Routes:
    return Routes(salt, "v1", challenger, weight)


@given(st.text(max_size=20), weights, weights)
def test_raising_a_weight_only_moves_units_to_the_challenger(unit: str, one: float, other: float) -> None:
    low, high = sorted([one, other])
    if assign(routes(low), unit).role == "challenger":
        assert assign(routes(high), unit).role == "challenger"


def test_shares_follow_the_weight_and_records_carry_it() -> None:
    assigned = [assign(routes(0.25), f"unit-{i}") for i in range(20_000)]
    assert set(assigned) == {Assignment("v2", "challenger", 0.25), Assignment("v1", "champion", 0.75)}
    share = sum(a.role == "challenger" for a in assigned) / len(assigned)
    assert abs(share - 0.25) < 0.02


def test_the_next_challenger_meets_other_units() -> None:
    units = [f"unit-{i}" for i in range(2_000)]
    first = {u for u in units if bucket(b"s", "v2", u) < BUCKETS // 10}
    second = {u for u in units if bucket(b"s", "v3", u) < BUCKETS // 10}
    assert len(first & second) < len(first) / 3
    assert {u for u in units if bucket(b"t", "v2", u) < BUCKETS // 10} != first


def test_zero_and_full_weight_are_exact() -> None:
    for i in range(1_000):
        assert assign(routes(0.0), str(i)).version == "v1"
        assert assign(routes(1.0), str(i)).version == "v2"
        assert assign(routes(0.0, None), str(i)) == Assignment("v1", "champion", 1.0)


def test_the_unit_is_what_was_asked_for_or_the_first_present() -> None:
    assert unit_of(None, "k", "e", "d") == "k"
    assert unit_of(None, None, "e", "d") == "e"
    assert unit_of(None, None, None, "d") == "d"
    assert unit_of("episode", "k", "e", "d") == "e"
    assert unit_of("decision", "k", "e", "d") == "d"
    assert unit_of("key", None, "e", "d") == "e"
