"""Replicas are asked for as long as was said, never for ever, and only counts that suffice confirm anything."""

from __future__ import annotations

import pytest
from redis.exceptions import ResponseError

from service.acks import LAST_MS, By, judge, questions, settled, unknown_command
from service.redis_connection import TIMEOUT_S
from service.shipcall import Confirm

TWO = Confirm(2, 1.0)


@pytest.mark.parametrize("by", ["waitaof", "wait"])
@pytest.mark.parametrize("wait_s", [0.0, 0.0001, 0.02, 0.3, 1.0, 60.0])
def test_slices_make_up_the_wait_and_none_is_for_ever(by: By, wait_s: float) -> None:
    waits = [question[-1] for question in questions(Confirm(2, wait_s), by)]
    assert sum(waits) == max(1, round(wait_s * 1000))
    assert 1 <= min(waits) <= max(waits) <= LAST_MS < 1000 * TIMEOUT_S
    assert waits[:-1] == sorted(waits[:-1])


@pytest.mark.parametrize(
    ("reply", "by", "enough"),
    [
        ([1, 2], "waitaof", True),
        ([1, 3], "waitaof", True),
        ([0, 2], "waitaof", False),
        ([1, 1], "waitaof", False),
        (2, "wait", True),
        (1, "wait", False),
        (ResponseError("WAITAOF cannot be used when numlocal is set but appendonly is disabled."), "waitaof", False),
    ],
)
def test_counts_decide(reply: object, by: By, enough: bool) -> None:
    acks = judge(reply, TWO, by)
    assert acks.enough is enough
    assert bool(acks.detail) is not enough


def test_a_call_that_is_applied_is_asked_about_and_a_gap_is_not() -> None:
    assert not settled([b"OK", 7, [], [0], 0], TWO, "waitaof")
    assert settled([b"GAP", 7], TWO, "waitaof")
    assert settled([1, 2], TWO, "waitaof")
    assert not settled([1, 0], TWO, "waitaof")
    assert settled(ResponseError("READONLY"), TWO, "waitaof")


def test_only_an_old_server_is_taken_for_one() -> None:
    assert unknown_command(ResponseError("unknown command 'WAITAOF', with args beginning with: '1' '2'"))
    assert not unknown_command(ResponseError("NOPERM this user has no permissions"))
    assert not unknown_command([1, 2])
