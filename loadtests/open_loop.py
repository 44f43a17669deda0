"""An open-loop driver: requests leave at a constant rate over kept connections, whether or not earlier ones came back.

Duty: send what `schedule.py` says, read the answers, and tell the latency of each from when it was meant to leave. It
checks statuses, not what answers say.
Strategy: one thread, one epoll, non-blocking sockets, no event loop: a request costs some 20 µs, so this side is not
what is measured. It sleeps in `select` on the epoll's own descriptor, which keeps microseconds where epoll's own
timeout keeps milliseconds, and spins for the last of them.
Promise: each request of the schedule is counted exactly once: answered, refused, failed, given up, or unanswered. What
this driver itself was late with is counted as `late`: with more than a few of those, do not believe the latencies.
"""

from __future__ import annotations

import select
import socket
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtests.latency import Latency
from loadtests.schedule import Schedule

LATE_S = 0.001
# Linux wakes a sleeper up to 50 µs late (its timer slack): the rest is spent spinning.
SPIN_S = 0.0001
LEAD_S = 0.01  # between the call and the first request
CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class Driven:
    """What came of a schedule. `latency` counts from when a request was meant to leave, `service` from when it did."""

    intended: int
    answered: int  # with a status below 400
    statuses: dict[int, int]
    failed: int  # the connection broke
    given_up: int  # no connection became free within the caller's patience
    unanswered: int
    late: int
    elapsed_s: float
    latency: Latency
    service: Latency

    @property
    def refused(self) -> int:
        return sum(number for status, number in self.statuses.items() if status >= 400)

    @property
    def per_s(self) -> float:
        """Answers below 400 a second."""
        return self.answered / self.elapsed_s


@dataclass(slots=True, eq=False)
class Connection:
    """One kept connection: idle, or with one request on the way."""

    socket: socket.socket
    idle_since_s: float
    intended_s: float = 0.0
    sent_s: float = 0.0
    busy: bool = False
    rest: memoryview = field(default_factory=lambda: memoryview(b""))
    got: bytes = b""


def complete(got: bytes) -> tuple[int, bool] | None:
    """Give an answer's status, and whether the server closes behind it; None while more is to come.

    Raises ValueError on what no HTTP/1.1 server with bodies of known length sends.
    """
    end = got.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = got[: end + 2].lower()
    at = head.find(b"\r\ncontent-length:")
    if not head.startswith(b"http/1.1 ") or at < 0:
        raise ValueError(f"cannot be read: {head[:200]!r}")
    length = int(head[at + 17 : head.index(b"\r\n", at + 2)])
    if len(got) > end + 4 + length:
        raise ValueError(f"more than was announced: {got[:200]!r}")
    return None if len(got) < end + 4 + length else (int(head[9:12]), b"\r\nconnection: close\r\n" in head)


class OpenLoop:
    """Drives one server. `requests` are whole requests as bytes, sent in turns."""

    def __init__(self, port: int, requests: Sequence[bytes], connections: int, patience_s: float = 5.0) -> None:
        self._port = port
        self._requests = requests
        self._patience_s = patience_s
        self._epoll = select.epoll()
        self._all: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self._latency, self._service = array("d"), array("d")
        self._statuses: Counter[int] = Counter()
        self._failed = self._given_up = self._late = 0
        for _ in range(connections):
            self._connect()

    def run(self, rate: float, seconds: float) -> Driven:
        """Send at this rate for so long, and wait for the answers. Closes all connections."""
        schedule = Schedule.lasting(time.perf_counter() + LEAD_S, rate, seconds)
        # Whoever waits for a connection may leave as late as that, and then waits for the answer.
        last_s = schedule.intended_s(schedule.count - 1) + 2 * self._patience_s
        sent = 0
        try:
            while (now_s := time.perf_counter()) < last_s:
                sent = self._send_due(schedule, sent, now_s)
                if sent == schedule.count and not any(each.busy for each in self._all.values()):
                    break
                self._wait(schedule, sent)
                self._receive()
        finally:
            self._close()
        answered = sum(number for status, number in self._statuses.items() if status < 400)
        gone = self._given_up + schedule.count - sent
        return Driven(
            intended=schedule.count,
            answered=answered,
            statuses=dict(self._statuses),
            failed=self._failed,
            given_up=gone,
            unanswered=schedule.count - gone - self._failed - sum(self._statuses.values()),
            late=self._late,
            # With the time until the last answer: a queue that is still to be worked off is no throughput.
            elapsed_s=max(time.perf_counter() - schedule.start_s, schedule.count / rate),
            latency=Latency.of(self._latency),
            service=Latency.of(self._service),
        )

    def _send_due(self, schedule: Schedule, sent: int, now_s: float) -> int:
        """Send what is due while connections are idle. Gives how many are sent or given up."""
        gone = schedule.given_up(now_s, self._patience_s)
        if gone > sent:
            self._given_up += gone - sent
            sent = gone
        due = schedule.due(now_s)
        while sent < due and self._idle:
            self._send(self._idle.pop(), schedule.intended_s(sent), self._requests[sent % len(self._requests)])
            sent += 1
        return sent

    def _send(self, connection: Connection, intended_s: float, request: bytes) -> None:
        now_s = time.perf_counter()
        if now_s - max(intended_s, connection.idle_since_s) > LATE_S:
            self._late += 1
        connection.intended_s, connection.sent_s, connection.busy = intended_s, now_s, True
        connection.rest = memoryview(request)
        self._push(connection)

    def _push(self, connection: Connection) -> None:
        """Hand the system as much of the request as it takes."""
        try:
            connection.rest = connection.rest[connection.socket.send(connection.rest) :]
        except BlockingIOError:
            pass
        except OSError:
            self._break(connection)
            return
        if connection.rest:
            self._epoll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)

    def _wait(self, schedule: Schedule, sent: int) -> None:
        """Sleep until an answer comes, or until shortly before the next request is due."""
        nothing_to_send = sent == schedule.count or not self._idle
        pause_s = 0.05 if nothing_to_send else schedule.intended_s(sent) - time.perf_counter() - SPIN_S
        if pause_s > 0:
            select.select([self._epoll.fileno()], [], [], min(pause_s, 0.05))

    def _receive(self) -> None:
        for descriptor, events in self._epoll.poll(0):
            connection = self._all[descriptor]
            if events & select.EPOLLOUT:
                self._epoll.modify(descriptor, select.EPOLLIN)
                self._push(connection)
            if events & ~select.EPOLLOUT and descriptor in self._all:
                self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            part = connection.socket.recv(262_144)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part:
            self._break(connection)
            return
        connection.got += part
        try:
            answer = complete(connection.got) if connection.busy else None
        except ValueError:
            self._break(connection)
            return
        if not connection.busy:
            self._break(connection)  # an answer that nobody asked for
        elif answer is not None:
            self._answered(connection, *answer)

    def _answered(self, connection: Connection, status: int, closes: bool) -> None:
        now_s = time.perf_counter()
        self._statuses[status] += 1
        if status < 400:
            self._latency.append(now_s - connection.intended_s)
            self._service.append(now_s - connection.sent_s)
        connection.got, connection.busy, connection.idle_since_s = b"", False, now_s
        if closes:
            self._break(connection)
        else:
            self._idle.append(connection)

    def _break(self, connection: Connection) -> None:
        """Count what was on the way as failed, and connect anew."""
        if connection.busy:
            self._failed += 1
        elif connection in self._idle:
            self._idle.remove(connection)
        del self._all[connection.socket.fileno()]
        connection.socket.close()
        try:
            self._connect()
        except OSError:
            if not self._all:
                raise

    def _connect(self) -> None:
        made = socket.create_connection(("127.0.0.1", self._port), CONNECT_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setblocking(False)
        connection = Connection(made, time.perf_counter())
        self._all[made.fileno()] = connection
        self._idle.append(connection)
        self._epoll.register(made, select.EPOLLIN)

    def _close(self) -> None:
        for connection in self._all.values():
            connection.socket.close()
        self._epoll.close()
