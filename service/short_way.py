"""EDGE: `POST /act` from bytes to bytes below ASGI, in uvicorn's own protocol: between the two lies half of its cost.

    head complete -> may it ask? -> body complete -> HotRoutes.ask -> … -> one write

Duty: questions for one action that are put plainly: `POST /act` or `/v1/act`, HTTP/1.1, no query, no `Expect`, no
`Idempotency-Key`, nothing unanswered before them on their connection. All others go through ASGI, each in its turn, and
`HotRoutes` answers both. It parses no HTTP: httptools does.
Strategy: an `Ask` stands where uvicorn has its cycle of request and response, so whatever uvicorn does with one holds
for both: who is pipelined behind it waits, a shutdown waits, and it is told when its caller has left. No task, future
or timer is made for it.
It relies on uvicorn's protocol: on what `PROTOCOL` names, on its callbacks, on `STATUS_LINE`, and on that it looks at
nothing of a cycle but `CYCLE`, outside of ASGI. tests/service/test_short_way.py holds that against the one installed.
Promise: answers are those of the long way, byte for byte. Nothing is written to a client that has left or does not
read; what was put is decided and recorded all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.body import firsts, too_large, too_slow
from service.callers import ANYONE
from service.hot import Answer, Asker, HotRoutes
from service.slow_heads import BODY, HEAD, NOTHING, Watched

PATHS: Final = {b"/act": "/act", b"/v1/act": "/v1/act"}
PROTOCOL: Final = (
    "access_log", "client", "connections", "cycle", "expect_100_continue", "flow", "headers", "limit_concurrency",
    "loop", "parser", "pipeline", "root_path", "scope", "server_state", "timeout_keep_alive", "transport", "url",
)  # fmt: skip
CYCLE: Final = ("disconnected", "keep_alive", "message_event", "response_complete")
CLOSE: Final = b"connection: close\r\n"


class Worker(Protocol):
    """What is needed of a running worker."""

    @property
    def hot(self) -> HotRoutes: ...
    @property
    def draining(self) -> bool: ...


class NoEvent:
    """Nobody waits for messages of an ask."""

    def set(self) -> None:
        pass


class Ask(Asker):
    """One question on its way: what uvicorn takes for a cycle, and whom the hot routes answer."""

    __slots__ = ("disconnected", "keep_alive", "parts", "response_complete", "size", "way", "whole")
    message_event = NoEvent()

    def __init__(self, way: ShortWay, path: str, headers: dict[bytes, bytes], keep_alive: bool) -> None:
        super().__init__(path, headers, way.client)
        self.way = way
        self.caller = ANYONE
        self.keep_alive = keep_alive
        self.body = b""
        self.parts: list[bytes] = []
        self.size = 0
        self.whole = False  # nothing of it is to come any more
        self.response_complete = False
        self.disconnected = False

    def answer(self, answer: Answer) -> None:
        self.way.write(self, answer)


class Defaults:
    """Headers that every answer of a worker has, as bytes: uvicorn makes them anew each second."""

    def __init__(self) -> None:
        self._of: list[tuple[bytes, bytes]] = []
        self._lines = b""

    def lines(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        if headers is not self._of:
            self._of, self._lines = headers, _lines(headers)
        return self._lines


class ShortWay(Watched):
    """uvicorn's protocol, with a short way for plain questions. Made by `answering`."""

    worker: ClassVar[Callable[[], Worker | None]]
    defaults: ClassVar[Defaults]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._now: Worker | None = None
        self._all_long = self.limit_concurrency is not None or self.access_log or bool(self.root_path)
        self._gathering: Ask | None = None  # whose body is coming
        self._held: tuple[Ask, Answer] | None = None  # until the client reads on

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._now = type(self).worker()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gathering = self._held = None
        ask = self.cycle
        if isinstance(ask, Ask) and not ask.response_complete:
            ask.routes.forget(ask)
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._held is not None:
            held, self._held = self._held, None
            self.write(*held)

    # -- the parser's callbacks ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._awaits(HEAD)

    def on_headers_complete(self) -> None:
        self._awaits(NOTHING)
        path = PATHS.get(self.url)
        if path is not None and self._is_plain():
            headers = firsts(self.headers)
            if b"idempotency-key" not in headers:
                self._begin(path, headers)
                return
        self._go_the_long_way()

    def on_body(self, body: bytes) -> None:
        ask = self._gathering
        if ask is not None:
            ask.parts.append(body)
            ask.size += len(body)
            if ask.size > ask.routes.max_body_bytes:
                self._refuse(ask, too_large(ask.routes.max_body_bytes))
        elif not isinstance(self.cycle, Ask):  # or what is left of one that was refused
            super().on_body(body)

    def on_message_complete(self) -> None:
        ask = self._gathering
        if ask is not None:
            self._gathering = None
            self._awaits(NOTHING)
            ask.body = ask.parts[0] if len(ask.parts) == 1 else b"".join(ask.parts)
            ask.parts.clear()
            ask.whole = True
            ask.routes.ask(ask)
        elif not isinstance(self.cycle, Ask):
            super().on_message_complete()

    # -- asks ---------------------------------------------------------------------------------------------------------

    def write(self, ask: Ask, answer: Answer) -> None:
        """Answer an ask, or hold its answer until the client reads what it was sent before."""
        transport = self.transport
        if transport.is_closing():
            ask.response_complete = True
            return
        if self.flow.write_paused:
            self._held = ask, answer
            return
        status, body, media, extra = answer
        closes = not ask.keep_alive or (self._now is not None and self._now.draining)
        transport.write(
            b"%b%bcontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b"
            % (
                STATUS_LINE[status],
                self.defaults.lines(self.server_state.default_headers),
                media,
                len(body),
                _lines(extra) if extra else b"",
                CLOSE if closes else b"",
                body,
            )
        )
        ask.response_complete = True
        if ask.whole and id(self.cycle) == id(ask):  # an idle connection holds no body
            self.cycle = None  # type: ignore[assignment]  # as in the beginning
        if closes:
            transport.close()
        self.on_response_complete()

    def _is_plain(self) -> bool:
        parser, before = self.parser, self.cycle
        return not (
            self._all_long
            or self._now is None
            or self.expect_100_continue
            or parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or parser.should_upgrade()
            or not (before is None or before.response_complete)
        )

    def _begin(self, path: str, headers: dict[bytes, bytes]) -> None:
        assert self._now is not None
        ask = Ask(self, path, headers, self.parser.should_keep_alive())
        ask.routes = self._now.hot
        self.cycle = ask  # type: ignore[assignment]  # as far as uvicorn looks
        try:
            ask.caller = ask.routes.admit(ask)
        except Exception as error:
            self.write(ask, ask.routes.refusal(ask, error))
            return
        self._gathering = ask
        self._awaited = BODY

    def _refuse(self, ask: Ask, error: Exception) -> None:
        self._gathering = None
        self._awaits(NOTHING)
        self.write(ask, ask.routes.refusal(ask, error))

    def _late_body(self) -> None:
        if self._gathering is not None:
            self._refuse(self._gathering, too_slow(self.limit_s))

    def _go_the_long_way(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        HttpToolsProtocol.on_message_begin(self)  # makes the scope, which short asks have no need of
        self.url, self.expect_100_continue = url, expects
        self.headers += headers  # the list that the scope holds
        HttpToolsProtocol.on_headers_complete(self)


def answering(worker: Callable[[], Worker | None], limit_s: float) -> type[ShortWay]:
    """Make the protocol class that uvicorn is given. limit_s: what a head may take, and then a body."""
    made = {"worker": staticmethod(worker), "defaults": Defaults(), "limit_s": limit_s}
    return type("Answering", (ShortWay,), made)


def _lines(headers: list[tuple[bytes, bytes]] | tuple[tuple[bytes, bytes], ...]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])
