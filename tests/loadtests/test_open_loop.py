"""The driver counts each request once, and leaves no waiting out. Against real sockets."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from loadtests.open_loop import OpenLoop, complete

REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
REFUSED = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
CLOSING = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nConnection: close\r\n\r\n"
Answer = Callable[[int], bytes | None]


def whole(waiting: bytes) -> int | None:
    """The length of the first request, once all of it is there."""
    head, end, rest = waiting.partition(b"\r\n\r\n")
    found = re.search(rb"Content-Length: (\d+)", head)
    return len(head) + 4 + int(found[1]) if end and found and len(rest) >= int(found[1]) else None


class Server:
    """Answers its n-th request, over all connections, with answer(n); None: it hangs up."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._lock, self._numbers = threading.Lock(), iter(range(1_000_000))
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._kept: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self.port: int = self._listener.getsockname()[1]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for connection in self._kept:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._kept.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            waiting = b""
            while part := connection.recv(65_536):
                waiting += part
                while (length := whole(waiting)) is not None:
                    waiting = waiting[length:]
                    with self._lock:
                        number = next(self._numbers)
                    said = self._answer(number)
                    if said is None:
                        return
                    connection.sendall(said)


@contextmanager
def answering(answer: Answer) -> Iterator[int]:
    with closing(Server(answer)) as server:
        yield server.port


@pytest.mark.parametrize(
    "answer",
    [
        lambda n: OK,
        lambda n: REFUSED if n % 3 == 0 else OK,
        lambda n: CLOSING if n % 5 == 0 else OK,
        lambda n: None if n % 7 == 0 else OK,
        lambda n: b"SSH-2.0-OpenSSH\r\n\r\n" if n % 7 == 0 else OK,
        lambda n: b"" if n % 50 == 0 else OK,
        lambda n: OK + OK if n % 7 == 0 else OK,
    ],
    ids=[
        "answers",
        "refuses",
        "closes behind answers",
        "hangs up",
        "says something else",
        "says nothing",
        "says it twice",
    ],
)
def test_each_request_is_counted_once(answer: Answer) -> None:
    with answering(answer) as port:
        found = OpenLoop(port, [REQUEST], connections=4, patience_s=0.2).run(rate=2000.0, seconds=0.1)
    assert found.intended == 200
    counted = found.answered + found.refused + found.failed + found.given_up + found.unanswered
    assert counted == 200, found
    assert found.latency.count == found.service.count == found.answered
    assert found.answered > 0


def test_refusals_and_broken_connections_are_told_apart() -> None:
    with answering(lambda n: (OK, REFUSED, None)[n % 3]) as port:
        found = OpenLoop(port, [REQUEST], connections=1).run(rate=300.0, seconds=0.1)
    assert (found.answered, found.refused, found.failed) == (10, 10, 10)
    assert found.statuses == {200: 10, 503: 10}


def test_waiting_for_a_connection_counts() -> None:
    """The first answer is held for 100 ms; on the one connection everybody waits for it, and the latencies say so."""
    held = threading.Event()

    def answer(number: int) -> bytes:
        if number == 0:
            held.wait(0.1)
        return OK

    with answering(answer) as port:
        found = OpenLoop(port, [REQUEST], connections=1).run(rate=1000.0, seconds=0.1)
    assert found.answered == 100
    assert found.latency.p50_us >= 50_000, "request k was meant to leave after k ms, and left after 100 ms"
    assert found.service.p50_us < found.latency.p50_us


def test_whom_nobody_serves_within_their_patience_gives_up() -> None:
    with answering(lambda n: b"") as port:
        found = OpenLoop(port, [REQUEST], connections=3, patience_s=0.1).run(rate=1000.0, seconds=0.1)
    assert (found.answered, found.unanswered, found.given_up) == (0, 3, 97)


def test_a_large_request_and_a_large_answer_arrive_whole() -> None:
    large = b"x" * 5_000_000
    request = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(large) + large
    reply = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(large) + large

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            left = 2 * len(request)
            for half in (len(request), 0):
                while left > half:
                    left -= len(connection.recv(65_536))
                connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        found = OpenLoop(listener.getsockname()[1], [request], connections=1).run(rate=100.0, seconds=0.02)
        thread.join()
    assert found.answered == 2


def test_answers_are_read_whatever_the_pieces() -> None:
    assert complete(OK) == (200, False)
    assert complete(CLOSING) == (200, True)
    assert complete(REFUSED) == (503, False)
    assert all(complete(OK[:cut]) is None for cut in range(len(OK)))
    for wrong in (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"nonsense\r\n\r\n"):
        with pytest.raises(ValueError, match="cannot be read"):
            complete(wrong)


def test_the_pages_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with answering(lambda n: OK) as port:
        exec(example.replace("8080", str(port)).replace("seconds=5.0", "seconds=0.02"), {})
    assert capsys.readouterr().out.split()[2:3] == ["0"], "nothing was refused"
