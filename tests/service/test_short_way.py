"""The short way of `POST /act`: the answers of ASGI, in whatever order bytes, callers and shutdowns come."""

from __future__ import annotations

import gc
import inspect
import json
import re

import numpy as np
import pytest
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.hot import Asker, HotRoutes
from service.short_way import CYCLE, PROTOCOL, Ask
from tests.service.asking import MAX_BODY_BYTES, in_msgpack, in_raw
from tests.service.lines import BODY, front, request, run, turns, until

TOKEN = "a-token-that-clients-send"
TRACE = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
CHUNKED = b"POST /act HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
PACKED, PACKED_HEADERS = in_msgpack({"state": [0.5, -1.0, 2.0]})
RAW, RAW_HEADERS = in_raw(np.array([0.5, -1.0, 2.0]), "<f4", {"key": "k"})
BATCH = b'{"states":[[0,0,0],[1,1,1]]}'


def lines(headers: dict[str, str]) -> list[str]:
    return [f"{name}: {value}" for name, value in headers.items()]


REQUESTS = {
    "plain": request(),
    "unversioned": request("/act"),
    "asks to close": request("/act", BODY, "Connection: close"),
    "json by name": request("/act", BODY, "Content-Type: application/json; charset=utf-8"),
    "traced": request("/act", BODY, TRACE),
    "a trace that is none": request("/act", BODY, "traceparent: 00-xx"),
    "answered in msgpack": request("/act", BODY, "Accept: application/msgpack"),
    "in msgpack": request("/act", PACKED, *lines(PACKED_HEADERS)),
    "raw": request("/act", RAW, *lines(RAW_HEADERS)),
    "everything": request(
        "/act", b'{"policy":"toy","state":[1,2,3],"key":"k","episode":"e","step":3,"context":{"a":1},"explore":false,'
        b'"allowed_actions":[0,1],"previous_action":1,"include":["values","distribution"]}'
    ),
    "in chunks": CHUNKED + b"a\r\n" + BODY[:10] + b"\r\n%x\r\n" % len(BODY[10:]) + BODY[10:] + b"\r\n0\r\n\r\n",
    "no length": b"POST /act HTTP/1.1\r\nHost: here\r\n\r\n",
    "empty": request("/act", b""),
    "no json": request("/act", b"{"),
    "no json, and no time": request("/act", b"{", "X-Request-Timeout-Ms: soon"),
    "some time": request("/act", BODY, "X-Request-Timeout-Ms: 5000"),
    "no text": request("/act", b"\xff"),
    "no state": request("/act", b"{}"),
    "unknown field": request("/act", b'{"state":[0,0,0],"stat":1}'),
    "misshapen": request("/act", b'{"state":[0,0]}'),
    "infinite": request("/act", b'{"state":[0,1e39,0]}'),
    "just not infinite": request("/act", b'{"state":[0,3.4028235677973362e38,0]}'),
    "just infinite": request("/act", b'{"state":[0,-3.4028235677973366e38,0]}'),
    "unknown action": request("/act", b'{"state":[0,0,0],"allowed_actions":[7]}'),
    "nothing allowed": request("/act", b'{"state":[0,0,0],"allowed_actions":[]}'),
    "unknown policy": request("/act", b'{"policy":"other","state":[0,0,0]}'),
    "announced too large": request("/act", b"", f"Content-Length: {MAX_BODY_BYTES + 1}").replace(
        b"Content-Length: 0\r\n", b""
    ),
    "too large": CHUNKED + 5 * (b"40000\r\n" + b" " * 0x40000 + b"\r\n") + b"0\r\n\r\n",
    "wrong method": request("/act", BODY, method="PUT"),
    "with a query": request("/act?x=1"),
    "in full": request("http://here/act"),
    "encoded": request("/%61ct"),
    "expects": request("/act", BODY, "Expect: 100-continue"),
    "old": b"POST /act HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "old and kept": b"POST /act HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "wants to upgrade": request("/act", BODY, "Connection: upgrade", "Upgrade: websocket"),
    "a batch": request("/act/batch", BATCH),
    "another route": request("/elsewhere", b""),
    "no HTTP": b"HELLO\r\n\r\n",
    "two lengths": request("/act", BODY, "Content-Length: 5"),
}  # fmt: skip


# Those that uvicorn and ASGI answer, or nobody.
LONG = {
    "announced too large", "too large", "wrong method", "with a query", "in full", "encoded", "expects", "old",
    "old and kept", "wants to upgrade", "a batch", "another route", "no HTTP", "two lengths",
}  # fmt: skip


class Held:
    """Questions that were put, and wait until the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[HotRoutes, Asker]] = []
        self._ask = HotRoutes.ask
        monkeypatch.setattr(HotRoutes, "ask", lambda routes, asker: self.asked.append((routes, asker)))

    def release(self) -> None:
        for routes, asker in self.asked:
            self._ask(routes, asker)
        self.asked.clear()


async def told(short: bool, data: bytes, token: str | None = None) -> tuple[bytes, int]:
    """What is answered, with all that follows where the server closes, and how many decisions were recorded."""
    async with front(short, token=token) as here:
        client = await here.connect()
        found = await client.ask(data)
        if found.startswith(b"HTTP/1.1 100"):
            found += await client.answer()
        if b"connection: close" in found:
            found += await client.rest()
        return found, here.recorded


@pytest.mark.parametrize("data", REQUESTS.values(), ids=REQUESTS)
def test_answers_are_those_of_the_long_way_byte_for_byte(data: bytes) -> None:
    async def work() -> None:
        short = await told(True, data)
        assert short == await told(False, data)
        assert short[0].startswith(b"HTTP/1.1 ")

    run(work)


@pytest.mark.parametrize(
    ("name", "status"),
    [("plain", 200), ("just not infinite", 200), ("just infinite", 422), ("infinite", 422), ("misshapen", 422)],
)
def test_a_state_is_taken_as_far_as_its_dtype_holds_it(name: str, status: int) -> None:
    async def work() -> None:
        answer, recorded = await told(True, REQUESTS[name])
        assert (int(answer[9:12]), recorded) == (status, int(status == 200))

    run(work)


def test_plain_questions_go_the_short_way_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = HotRoutes.ask

    def note(routes: HotRoutes, asker: Asker) -> None:
        asked.append(asker.path)
        ask(routes, asker)

    monkeypatch.setattr(HotRoutes, "ask", note)

    async def work() -> None:
        for name, data in REQUESTS.items():
            asked.clear()
            await told(True, data)
            assert len(asked) == int(name not in LONG), name

    run(work)


@pytest.mark.parametrize(
    ("sent", "status"),
    [(None, b"401"), ("Bearer wrong", b"401"), (f"Bearer {TOKEN}", b"200"), ("Bearer admin", b"401")],
)
def test_tokens_are_asked_for_before_the_body(sent: str | None, status: bytes) -> None:
    async def work() -> None:
        data = request("/act", BODY, *([f"Authorization: {sent}"] if sent else []))
        short = await told(True, data, TOKEN)
        assert short == await told(False, data, TOKEN)
        assert short[0][9:12] == status
        async with front(token=TOKEN) as here:
            client = await here.connect()
            await client.send(data.removesuffix(BODY))
            if status == b"401":  # and what is left of the body is nobody's request
                assert (await client.answer())[9:12] == status
            await client.send(BODY)
            assert (await client.ask(data))[9:12] == status

    run(work)


def test_bytes_may_end_anywhere() -> None:
    data = request("/act", BODY, TRACE)

    async def work() -> None:
        async with front() as here:
            client = await here.connect()
            for cut in range(1, len(data)):
                await client.send(data[:cut])
                await turns()
                assert (await client.ask(data[cut:])).startswith(b"HTTP/1.1 200"), cut
            for byte in range(len(data)):
                await client.send(data[byte : byte + 1])
                await turns()
            assert (await client.answer()).startswith(b"HTTP/1.1 200")
            assert (here.recorded, client.got) == (len(data), b"")

    run(work)


def test_pipelined_requests_are_answered_in_their_order() -> None:
    asked = [
        request("/act", b'{"state":[0,0,0],"key":"first"}'),
        request("/elsewhere", b""),
        request("/act", b"{"),
        request("/act/batch", BATCH),
        request("/act", BODY, "Accept: application/msgpack"),
        request("/act", BODY, method="PUT"),
        request("/act"),
        request("/act", BODY, "Expect: 100-continue"),
        request("/act", BODY, "Connection: close"),
        request("/act"),  # behind the end
    ]

    async def answers(short: bool, cut: int) -> bytes:
        async with front(short) as here:
            client = await here.connect()
            data = b"".join(asked)
            await client.send(data[:cut])
            await turns()
            await client.send(data[cut:])
            return await client.rest()

    async def work() -> None:
        whole = await answers(False, 1)
        statuses = [int(part[:3]) for part in whole.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [200, 200, 400, 200, 200, 405, 200, 100, 200, 200]
        for cut in (1, 100, 250, 400, 600, len(b"".join(asked)) - 1):
            assert await answers(True, cut) == whole

    run(work)


def test_callers_who_leave_are_decided_if_they_had_asked_and_forgotten_if_not() -> None:
    data = request()

    async def work() -> None:
        async with front() as here:
            for cut in (len(data), len(data) - 1, len(data) - len(BODY), 40, 1):
                client = await here.connect()
                await client.send(data[:cut])
                client.leave()
            await until(lambda: not here.state.connections and here.recorded == 1)
            assert (await (await here.connect()).ask(data)).startswith(b"HTTP/1.1 200")
            assert here.recorded == 2

    run(work)


def test_who_leaves_between_question_and_answer_is_written_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with front() as here:
            client = await here.connect()
            held = Held(monkeypatch)
            await client.send(request())
            await until(lambda: held.asked)
            client.leave()
            await until(lambda: not here.state.connections)
            held.release()
            await until(lambda: here.recorded == 1)
            assert here.state.total_requests == 0

    run(work)


def test_a_shutdown_waits_for_answers_and_closes_what_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with front() as here:
            idle, halfway, asking = [await here.connect() for _ in range(3)]
            assert (await idle.ask(request())).startswith(b"HTTP/1.1 200")
            held = Held(monkeypatch)
            await asking.send(request())
            await halfway.send(request()[:-5])
            await until(lambda: held.asked)
            await turns()
            for each in list(here.state.connections):
                each.shutdown()
            assert await idle.rest() == b""
            await halfway.send(request()[-5:])
            await until(lambda: len(held.asked) == 2)
            held.release()
            for client in (asking, halfway):
                found = await client.rest()
                assert found.startswith(b"HTTP/1.1 200")
                assert b"\r\nconnection: close\r\n" in found
            await until(lambda: not here.state.connections)

    run(work)


def test_a_draining_worker_answers_and_closes() -> None:
    async def work() -> None:
        async with front() as here:
            client = await here.connect()
            assert b"connection: close" not in await client.ask(request())
            here.worker.draining = True
            await client.send(request())
            found = await client.rest()
            assert found.startswith(b"HTTP/1.1 200")
            assert b"\r\nconnection: close\r\n" in found

    run(work)


def test_slow_bodies_get_408_and_their_rest_is_no_request() -> None:
    async def work() -> None:
        async with front(limit_s=0.05) as here:
            client = await here.connect()
            late = await client.ask(request()[:-1])
            assert late.startswith(b"HTTP/1.1 408")
            assert b'"code":"body_too_slow"' in late
            assert (await client.ask(request()[-1:] + request())).startswith(b"HTTP/1.1 200")
            assert here.recorded == 1
            assert (await client.ask(request()[:30])).startswith(b"HTTP/1.1 408")  # a head, which ends the connection
            assert await client.rest() == b""

    run(work)


def test_bodies_that_grow_too_large_get_413_at_once_and_their_rest_is_no_request() -> None:
    async def work() -> None:
        async with front() as here:
            client = await here.connect()
            chunk = b"%x\r\n" % MAX_BODY_BYTES + b" " * MAX_BODY_BYTES + b"\r\n"
            found = await client.ask(CHUNKED + chunk + b"1\r\n \r\n")
            assert found.startswith(b"HTTP/1.1 413")
            assert (await client.ask(b"3\r\n{{{\r\n0\r\n\r\n" + request())).startswith(b"HTTP/1.1 200")

    run(work)


def test_a_client_that_does_not_read_is_not_written_to_and_misses_nothing() -> None:
    data = request("/act", b'{"state":[0,0,0],"include":["values","distribution"]}')

    async def work() -> None:
        async with front() as here:
            client = await here.connect(send_buffer=4096)
            (line,) = here.state.connections
            assert isinstance(line, HttpToolsProtocol)
            sent = 0
            while not line.flow.write_paused:
                await client.send(data)
                sent += 1
                await until(lambda: here.recorded == sent)  # noqa: B023
                await turns()
            buffered = line.transport.get_write_buffer_size()
            await client.send(data)
            await until(lambda: here.recorded == sent + 1)
            await turns()
            assert line.transport.get_write_buffer_size() == buffered
            ids = [
                json.loads((await client.answer()).partition(b"\r\n\r\n")[2])["decision_id"] for _ in range(sent + 1)
            ]
            assert ids == sorted(set(ids))

    run(work)


def test_idle_connections_are_closed_and_those_that_wait_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with front(timeout_keep_alive=0.05) as here:
            for data in (request(), request("/elsewhere", b"")):
                idle = await here.connect()
                assert (await idle.ask(data)).startswith(b"HTTP/1.1 200")
                assert await idle.rest() == b""
            held = Held(monkeypatch)
            waiting, aside = await here.connect(), await here.connect()
            await waiting.ask(request("/elsewhere", b""))
            await waiting.send(request())
            await until(lambda: held.asked)
            await aside.ask(request("/elsewhere", b""))
            assert await aside.rest() == b""  # the other has waited for longer
            held.release()
            assert (await waiting.answer()).startswith(b"HTTP/1.1 200")
            assert await waiting.rest() == b""

    run(work)


def test_an_idle_connection_holds_nothing_of_what_was_asked() -> None:
    async def work() -> None:
        async with front() as here:
            client = await here.connect()
            await client.ask(request())
            gc.collect()
            assert not [each for each in gc.get_objects() if type(each) is Ask]  # some objects warn when asked

    run(work)


def test_uvicorns_limit_of_connections_holds() -> None:
    async def work() -> None:
        async with front(limit_concurrency=1) as here:
            assert (await (await here.connect()).ask(request())).startswith(b"HTTP/1.1 503")
            assert here.recorded == 0

    run(work)


def test_what_is_taken_of_uvicorn_is_there() -> None:
    """When this fails after an upgrade, read uvicorn's protocol anew: the short way stands in the middle of it."""
    found = re.findall(r"(?:self\.cycle|existing_cycle)\.(\w+)", inspect.getsource(HttpToolsProtocol))
    assert {*found} == {*CYCLE, "body", "more_body"}, "what uvicorn looks at in a cycle"
    # The rest is looked at in two callbacks only, which are never called with an ask.
    ours = inspect.getsource(HttpToolsProtocol.on_body) + inspect.getsource(HttpToolsProtocol.on_message_complete)
    assert {"body", "more_body"} <= {*re.findall(r"self\.cycle\.(\w+)", ours)}
    assert all(hasattr(Ask, name) for name in CYCLE)
    assert {*CYCLE} <= {*RequestResponseCycle.__init__.__code__.co_names}
    assert STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"
    callbacks = ("on_message_begin", "on_url", "on_header", "on_headers_complete", "on_body", "on_message_complete")
    assert all(callable(getattr(HttpToolsProtocol, name)) for name in (*callbacks, "on_response_complete", "shutdown"))

    async def work() -> None:
        async with front(short=False) as here:
            await (await here.connect()).ask(request("/elsewhere"))
            (line,) = here.state.connections
            assert all(hasattr(line, name) for name in PROTOCOL), "what the short way looks at in the protocol"

    run(work)
