"""Too many questions at once: who waits, who is refused and with what, and that nothing of those is recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from policies.errors import ConfigError
from service.inference import Inference
from service.overload import ENVOYS, TIMEOUT
from service.plan import Group, Row
from service.settings import load_settings
from service.waiting_room import CALM, PATIENCE, YIELD
from tests.service.asking import METRICS
from tests.service.disks import Disk
from tests.service.lines import BODY, Client, Front, front, request, run, turns, until

BATCH = b'{"states":[[0,0,0],[1,1,1]]}'
DEADLINE_MS = 1000


def status(answer: bytes) -> int:
    return int(answer[9:12])


def problem(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    return json.loads(body)  # type: ignore[no-any-return]


def shed(route: str, reason: str) -> float:
    return METRICS.registry.get_sample_value("surefoot_shed_requests_total", {"route": route, "reason": reason}) or 0.0


async def asking(here: Front, *requests: bytes) -> list[Client]:
    """Put questions, each on a connection of its own, in this order."""
    clients = []
    for data in requests:
        clients.append(await here.connect())
        await clients[-1].send(data)
        await turns()
    return clients


def waiting(here: Front) -> int:
    return here.desk.overload.statistics()["waiting"]


def test_what_is_too_much_waits_unparsed_and_is_answered_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def work() -> None:
        async with front(most=2) as here:
            clients = await asking(here, *[request()] * 2, request("/act", b"{"), *[request()] * 2)
            await disk.until(1)
            assert waiting(here) == 3
            assert here.desk.overload.statistics()["bytes"] == 2 * len(BODY) + 1
            await commit_until(disk, lambda: here.recorded == 4)
            assert [status(await client.answer()) for client in clients] == [200, 200, 400, 200, 200]
            assert here.recorded == 4
            assert here.desk.overload.statistics() == {"limit": 2, "inside": 0, "waiting": 0, "bytes": 0}

    run(work)


def test_at_its_deadline_it_is_refused_and_nothing_of_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, before = Disk(monkeypatch), shed("act", "expired")

    async def work() -> None:
        async with front(most=1) as here:
            clients = await asking(here, request(), request(), request("/act?long"))
            here.desk.clock.advance(DEADLINE_MS - 1)
            here.desk.overload.look()
            assert waiting(here) == 2
            here.desk.clock.advance(1)
            here.desk.overload.look()
            for client in clients[1:]:
                refused = await client.answer()
                assert status(refused) == 503
                assert b"\r\nretry-after: 1\r\n" in refused
                assert problem(refused)["code"] == "overloaded"
            disk.commit()
            assert status(await clients[0].answer()) == 200
            assert here.recorded == 1
            assert status(await ask(clients[1], request(), disk)) == 200
            assert shed("act", "expired") == before + 2

    run(work)


async def commit_until(disk: Disk, condition: Callable[[], object]) -> None:
    """Let the disk commit whatever comes, until something holds."""

    def look() -> object:
        disk.commit()
        return condition()

    await until(look)
    disk.commit()


async def ask(client: Client, data: bytes, disk: Disk) -> bytes:
    """Ask, and let the disk commit what comes of it."""
    await client.send(data)
    await disk.until(len(disk.commits) + 1)
    disk.commit()
    return await client.answer()


@pytest.mark.parametrize(("waited_ms", "order"), [(0, [1, 2, 3]), (int(PATIENCE * DEADLINE_MS), [3, 2, 1])])
def test_the_newest_comes_first_when_not_all_can_be_served(
    monkeypatch: pytest.MonkeyPatch, waited_ms: int, order: list[int]
) -> None:
    disk = Disk(monkeypatch)

    async def work() -> None:
        async with front(most=1) as here:
            asked = [request("/act", b'{"state":[0,0,0],"key":"%d"}' % number) for number in range(4)]
            clients = await asking(here, *asked)
            here.desk.clock.advance(waited_ms)
            found: list[int] = []
            for number in [0, *order]:
                await disk.until(len(found) + 1)
                disk.commit()
                found.append(status(await clients[number].answer()))
            assert found == [200] * 4

    run(work)


@pytest.mark.parametrize("path", ["/act", "/act?long", "/act/batch"])
def test_requests_say_how_long_they_may_take(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    disk = Disk(monkeypatch)
    body = BATCH if path.endswith("batch") else BODY
    headers = {f"{TIMEOUT}: 40": 40, f"{ENVOYS}: 400": 400, f"{TIMEOUT}: 4000": 4000, f"{TIMEOUT}: 99999": 60_000}

    async def work() -> None:
        async with front(most=1) as here:
            (first, *clients) = await asking(here, request(), *[request(path, body, header) for header in headers])
            passed = 0
            for client, time_ms in zip(clients, headers.values(), strict=True):
                here.desk.clock.advance(time_ms - 1 - passed)
                here.desk.overload.look()
                await turns()
                assert waiting(here) == len(headers) - clients.index(client)
                here.desk.clock.advance(1)
                here.desk.overload.look()
                passed = time_ms
                assert status(await client.answer()) == 503
            disk.commit()
            assert status(await first.answer()) == 200

    run(work)


def test_who_has_less_time_is_refused_earlier_whoever_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def work() -> None:
        async with front(most=1) as here:
            hasty, patient = f"{TIMEOUT}: 20", f"{TIMEOUT}: 60000"
            first, last, soon = await asking(
                here, request(), *[request("/act", BODY, each) for each in (patient, hasty)]
            )
            here.desk.clock.advance(20)
            assert status(await soon.answer()) == 503, "by the timer, long before that of the other"
            await commit_until(disk, lambda: here.recorded == 2)
            assert [status(await client.answer()) for client in (first, last)] == [200, 200]

    run(work)


@pytest.mark.parametrize("path", ["/act", "/act?long", "/act/batch"])
@pytest.mark.parametrize("sent", ["", "0", "-1", "1.5", "soon", "1e3", "9" * 30])
def test_a_time_that_is_none_is_refused_by_name(path: str, sent: str) -> None:
    async def work() -> None:
        async with front() as here:
            client = await here.connect()
            for name in (TIMEOUT, ENVOYS):
                refused = await client.ask(request(path, BATCH if "batch" in path else BODY, f"{name}: {sent}"))
                found = problem(refused)
                assert (status(refused), found["code"], found["errors"][0]["field"]) == (400, "bad_timeout", name)
            assert here.recorded == 0
            assert here.desk.overload.statistics()["inside"] == 0

    run(work)


def test_what_was_begun_and_comes_too_late_is_not_decided() -> None:
    before = shed("act", "late")

    async def work() -> None:
        async with front() as here:
            begin, clock = here.desk.routes.begin, here.desk.clock

            def begin_late(asker: Any) -> None:
                begin(asker)
                clock.advance(DEADLINE_MS)

            here.desk.routes.begin = begin_late  # type: ignore[method-assign]
            client = await here.connect()
            assert problem(await client.ask(request()))["code"] == "overloaded"
            assert status(await client.ask(request("/act", BODY, f"{TIMEOUT}: 1001"))) == 200
            assert here.recorded == 1
            assert shed("act", "late") == before + 1
            assert here.desk.overload.statistics()["inside"] == 0

    run(work)


@pytest.mark.parametrize("path", ["/act", "/act?long"])
def test_what_the_network_takes_too_long_for_is_not_drawn_and_the_rest_of_its_batch_is(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    infer = Inference.run

    async def work() -> None:
        async with front() as here:

            async def slow(inference: Inference, group: Group) -> None:
                await infer(inference, group)
                here.desk.clock.advance(DEADLINE_MS)

            monkeypatch.setattr(Inference, "run", slow)
            patient = f"{TIMEOUT}: 1001"
            clients = [await here.connect() for _ in range(4)]
            bodies = [b'{"state":[0,0,%d],"episode":"%d"}' % (number, number) for number in range(4)]
            for number, client in enumerate(clients):
                await client.send(request(path, bodies[number], *([patient] if number % 2 else [])))
            answers = [await client.answer() for client in clients]
            assert [status(answer) for answer in answers] == [503, 200, 503, 200]
            ids = [json.loads(answer.partition(b"\r\n\r\n")[2])["decision_id"] for answer in answers[1::2]]
            assert [(event.id, event.episode) for event in here.desk.events()] == list(
                zip(ids, ["1", "3"], strict=True)
            )

    run(work)


def test_batches_are_refused_first_and_whole_while_questions_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, before = Disk(monkeypatch), shed("batch", "outranked")

    async def work() -> None:
        async with front(most=2) as here:
            several = request("/act/batch", BATCH)
            first, batch, single = await asking(here, several, several, request())
            assert (disk.sizes, waiting(here)) == ([2], 2), "its two rows fill the limit"
            here.desk.clock.advance(int(DEADLINE_MS * YIELD) - 1)
            here.desk.overload.look()
            assert waiting(here) == 2
            here.desk.clock.advance(1)
            here.desk.overload.look()
            assert problem(await batch.answer())["code"] == "overloaded"
            for batches, client in ((1, first), (2, single)):
                await disk.until(batches)
                disk.commit()
                assert status(await client.answer()) == 200
            assert (disk.sizes, here.recorded) == ([2, 1], 3)
            assert shed("batch", "outranked") == before + 1

    run(work)


def test_a_question_comes_before_a_batch_that_came_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def work() -> None:
        async with front(most=1) as here:
            clients = await asking(here, request(), request("/act/batch", BATCH), request())
            for batch in (1, 2, 3):
                await disk.until(batch)
                disk.commit()
            assert [status(await client.answer()) for client in clients] == [200] * 3
            assert disk.sizes == [1, 1, 2]

    run(work)


def test_a_batch_that_is_cut_in_several_is_decided_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    body = json.dumps({"states": [[0, 0, 0]] * 6}).encode()

    async def work() -> None:
        async with front() as here:
            coalescer = here.desk.coalescer
            monkeypatch.setattr(type(coalescer), "limit", 2)
            client = await here.connect()
            await client.send(request("/act/batch", body))
            for batch in (1, 2, 3):
                await disk.until(batch)
                here.desk.clock.advance(DEADLINE_MS)
                disk.commit()
            assert status(await client.answer()) == 200
            assert here.recorded == 6

    run(work)


def test_who_leaves_while_waiting_is_not_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def work() -> None:
        async with front(most=1) as here:
            first, gone, last = await asking(here, request(), request(), request())
            gone.leave()
            await until(lambda: waiting(here) == 1)
            disk.commit()
            assert status(await first.answer()) == 200
            await disk.until(2)
            disk.commit()
            assert status(await last.answer()) == 200
            assert here.recorded == 2

    run(work)


def test_other_routes_do_not_wait_and_shadows_are_given_up_first(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def work() -> None:
        async with front(most=1) as here:
            clients = await asking(here, request(), request())
            aside = await here.connect()
            assert status(await aside.ask(request("/elsewhere", b""))) == 200
            pressed: Callable[[], bool] = here.desk.overload.pressed
            here.desk.clock.advance(int(DEADLINE_MS * CALM) - 1)
            assert not pressed()
            here.desk.clock.advance(1)
            assert pressed()
            for commits in (1, 2):
                await disk.until(commits)
                disk.commit()
            assert [status(await client.answer()) for client in clients] == [200, 200]
            assert not pressed()

    run(work)


def test_a_thousand_bad_requests_that_waited_are_refused_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def work() -> None:
        async with front(most=1) as here:
            clients = [await here.connect() for _ in range(400)]
            for client in clients:
                await client.send(request("/act", b"{") if client is not clients[0] else request())
                await turns()
            assert waiting(here) == 399
            disk.commit()
            assert {status(await client.answer()) for client in clients[1:]} == {400}

    run(work)


def test_a_network_may_not_take_all_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().inference_timeout_s < load_settings().deadline_s
    monkeypatch.setenv("SUREFOOT_DEADLINE_S", "0.5")
    with pytest.raises(ConfigError, match=r"must be below SUREFOOT_DEADLINE_S, which is 0\.5"):
        load_settings()
    monkeypatch.setenv("SUREFOOT_INFERENCE_TIMEOUT_S", "0.4")
    assert load_settings().deadline_s == 0.5


def test_rows_that_are_away_keep_nobody_from_being_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)

    async def work() -> None:
        async with front(most=2) as here:
            coalescer, answer = here.desk.coalescer, asyncio.Event()
            infer = coalescer.decider.infer

            async def elsewhere(rows: Sequence[Row]) -> list[Group]:
                await answer.wait()
                return await infer(rows)

            monkeypatch.setattr(coalescer.decider, "infer", elsewhere)
            clients = await asking(here, *[request()] * 5)
            assert (coalescer.away, waiting(here)) == (5, 0)
            answer.set()
            await commit_until(disk, lambda: here.recorded == 5)
            assert [status(await client.answer()) for client in clients] == [200] * 5
            assert coalescer.away == 0
            assert here.desk.overload.statistics() == {"limit": 2, "inside": 0, "waiting": 0, "bytes": 0}

    run(work)


def test_the_limit_moves_with_what_decisions_take() -> None:
    async def work() -> None:
        async with front(most=100) as here:
            overload = here.desk.overload
            overload.grow(100)
            for took_s in (0.001, 0.001, 0.1):
                for _ in range(64):
                    overload.note(took_s)
            assert 80 < overload.statistics()["limit"] < 100
            overload.done(100)
            overload.refresh_metrics()
            assert METRICS.registry.get_sample_value("surefoot_concurrency_limit") == overload.statistics()["limit"]

    run(work)
