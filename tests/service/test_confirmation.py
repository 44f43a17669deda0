"""Who waits for replicas waits no longer than he may, and nobody waits behind one who waited in vain."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from policies.errors import Unconfirmed
from service.confirmation import TABLE, Confirmation, Move, State

Future = asyncio.Future[None]


def run(scenario: Callable[[Confirmation], Awaitable[None]], timeout_s: float = 30.0) -> None:
    async def main() -> None:
        async with asyncio.timeout(20.0):
            await scenario(Confirmation(asyncio.get_running_loop(), timeout_s))

    asyncio.run(main())


def state(confirmation: Confirmation) -> State:
    return confirmation.state


def keep(confirmation: Confirmation, *ends: int) -> list[Future]:
    futures: list[Future] = [asyncio.get_running_loop().create_future() for _ in ends]
    for end, future in zip(ends, futures, strict=True):
        confirmation.kept(end, future)
    return futures


def test_every_state_knows_every_move_and_exploring_needs_proof() -> None:
    assert TABLE.keys() == set(itertools.product(State, Move))
    into = {move for (_, move), to in TABLE.items() if to is State.CONFIRMING}
    assert into == {Move.CONFIRMED}


def test_rows_are_confirmed_up_to_an_end_and_the_others_wait() -> None:
    async def scenario(confirmation: Confirmation) -> None:
        assert state(confirmation) is State.UNKNOWN
        one, two, three = keep(confirmation, 4, 5, 9)
        confirmation.confirmed(5)
        assert (one.done(), two.done(), three.done(), confirmation.waiting) == (True, True, False, 1)
        assert state(confirmation) is State.CONFIRMING
        confirmation.doubt()
        assert state(confirmation) is State.UNKNOWN
        assert not three.done(), "one call that went wrong is not the end of waiting"
        confirmation.close()
        with pytest.raises(Unconfirmed, match="stops"):
            await three

    run(scenario)


def test_who_waited_in_vain_ends_the_waiting_of_those_behind_until_a_confirmation() -> None:
    async def scenario(confirmation: Confirmation) -> None:
        confirmation.confirmed(1)
        (first,) = keep(confirmation, 2)
        with pytest.raises(Unconfirmed, match="within"):
            await first
        assert state(confirmation) is State.FAILING
        (second,) = keep(confirmation, 3)
        assert isinstance(second.exception(), Unconfirmed)
        confirmation.doubt()
        assert state(confirmation) is State.FAILING
        confirmation.confirmed(3)
        (third,) = keep(confirmation, 4)
        assert not third.done()
        confirmation.confirmed(4)
        await third

    run(scenario, timeout_s=0.01)


def test_a_later_row_has_its_own_time() -> None:
    async def scenario(confirmation: Confirmation) -> None:
        (early,) = keep(confirmation, 2)
        await asyncio.wait([early])
        confirmation.confirmed(2)
        late, later = keep(confirmation, 3, 4)
        confirmation.confirmed(3)
        await late
        with pytest.raises(Unconfirmed):
            await later

    run(scenario, timeout_s=0.02)


def test_a_row_that_redis_refuses_and_one_that_nobody_waits_for_hurt_nobody() -> None:
    async def scenario(confirmation: Confirmation) -> None:
        refused, left, kept = keep(confirmation, 2, 3, 4)
        confirmation.refuse(2)
        assert isinstance(refused.exception(), Unconfirmed)
        left.cancel()
        confirmation.confirmed(4)
        await kept

    run(scenario)
