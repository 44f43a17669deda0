"""Decision ids: sortable by time, self-describing, refused when forged."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.errors import ConfigError, UnknownDecision
from service.ids import ID_LENGTH, RANDOM_BYTES, Keyring, policy_digest

ONE, TWO = "1:" + "11" * 32, "2:" + "22" * 32
RING = Keyring.parse(ONE)
POLICY = policy_digest("cartpole")


def mint(ring: Keyring = RING, at_ms: int = 1_800_000_000_000, count: int = 1) -> list[str]:
    return ring.mint(at_ms, POLICY, os.urandom(RANDOM_BYTES * count))


@given(st.integers(0, 2**48 - 1), st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES), st.integers(0, 255))
def test_an_id_says_what_went_into_it(at_ms: int, random: bytes, partition: int) -> None:
    (text,) = RING.mint(at_ms, POLICY, random, partition)
    read = RING.verify(text)
    assert (read.text, read.at_ms, read.policy, read.partition, read.kid) == (text, at_ms, POLICY, partition, 1)
    assert len(text) == ID_LENGTH == 60


def test_ids_sort_by_time_and_differ() -> None:
    ids = [mint(at_ms=at_ms)[0] for at_ms in range(1000, 1100)]
    assert all(one < two for one, two in pairwise(ids))
    assert len(set(mint(count=100))) == 100


@given(st.integers(0, ID_LENGTH - 1), st.sampled_from("0123456789abcdef"))
def test_no_digit_of_an_id_can_be_changed(position: int, digit: str) -> None:
    text = RING.mint(1_800_000_000_000, POLICY, bytes(RANDOM_BYTES))[0]
    forged = text[:position] + digit + text[position + 1 :]
    if forged != text:
        with pytest.raises(UnknownDecision):
            RING.verify(forged)


@pytest.mark.parametrize(
    "text", ["", "x" * ID_LENGTH, "A" * ID_LENGTH, "ab", " " * ID_LENGTH, "0" * 500, "é" * ID_LENGTH]
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(UnknownDecision) as caught:
        RING.verify(text)
    assert caught.value.field == "decision_id"


def test_the_first_key_signs_and_all_verify() -> None:
    rotated = Keyring.parse(f"{TWO},{ONE}")
    assert rotated.verify(mint()[0]).kid == 1
    assert rotated.verify(mint(rotated)[0]).kid == 2
    with pytest.raises(UnknownDecision):
        RING.verify(mint(rotated)[0])
    with pytest.raises(UnknownDecision):
        RING.draw_key(2)
    assert rotated.draw_key(1) == RING.draw_key(1) != rotated.draw_key(2)


def test_tag_and_draw_keys_differ() -> None:
    assert RING.signing.tag != RING.signing.draw


@pytest.mark.parametrize("text", ["", "1", "1:zz", "1:11", "256:" + "11" * 32, "-1:" + "11" * 32, f"{ONE},{ONE}"])
def test_a_wrong_keyring_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Keyring.parse(text)
    assert caught.value.field == "SUREFOOT_KEYS"
    assert "11" * 32 not in caught.value.detail


def test_a_keyring_holds_at_least_one_key() -> None:
    with pytest.raises(ConfigError):
        Keyring([])
