"""The fault proxy: it forwards faithfully, and each of its faults is what it says."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.faults.proxy import FaultProxy, Toxics
from tests.waiting import until

MESSAGE = bytes(range(256)) * 400


class Echo:
    """Sends back what it gets. `received` is all that ever came."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.received = bytearray()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._threads):
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._answer, args=(connection,)))
                self._threads[-1].start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while piece := connection.recv(1 << 16):
                self.received += piece
                connection.sendall(piece)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy(echo.address) as found:
        yield found


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=20.0)


def receive(connection: socket.socket, size: int) -> bytes:
    """Read so many bytes, or fewer when the connection ends."""
    found = bytearray()
    while len(found) < size:
        try:
            piece = connection.recv(size - len(found))
        except ConnectionResetError:
            break
        if not piece:
            break
        found += piece
    return bytes(found)


def echoed(connection: socket.socket, message: bytes = MESSAGE) -> bytes:
    sender = threading.Thread(target=connection.sendall, args=(message,))
    sender.start()
    found = receive(connection, len(message))
    sender.join()
    return found


def silent(connection: socket.socket) -> bool:
    """Whether nothing comes within a moment."""
    connection.settimeout(0.2)
    try:
        return connection.recv(1) == b"never"
    except TimeoutError:
        return True
    finally:
        connection.settimeout(20.0)


@pytest.mark.parametrize(
    "toxics",
    [Toxics(), Toxics(slice_bytes=777), Toxics(latency_s=0.01), Toxics(bytes_per_s=1e6)],
    ids=["none", "sliced", "latency", "bandwidth"],
)
def test_all_bytes_come_through_in_order_whatever_slows_them(proxy: FaultProxy, toxics: Toxics) -> None:
    proxy.set(toxics, toxics)
    with connect(proxy) as connection:
        assert echoed(connection) == MESSAGE
    assert proxy.counters.bytes == {"up": len(MESSAGE), "down": len(MESSAGE)}
    until(lambda: proxy.counters.open == 0, "the end of the connection")


def test_latency_keeps_bytes_back_until_it_is_healed(proxy: FaultProxy) -> None:
    proxy.set(down=Toxics(latency_s=3600.0))
    with connect(proxy) as connection:
        connection.sendall(b"hello")
        assert silent(connection)
        proxy.heal()
        assert receive(connection, 5) == b"hello"


def test_a_black_hole_closes_nothing_and_loses_nothing(proxy: FaultProxy, echo: Echo) -> None:
    with connect(proxy) as before:
        assert echoed(before, b"a") == b"a"
        proxy.set(up=Toxics(hold=True))
        before.sendall(b"b")
        with connect(proxy) as after:
            after.sendall(b"c")
            assert silent(before)
            assert silent(after)
            assert bytes(echo.received) == b"a"
            proxy.heal()
            assert receive(before, 1) + receive(after, 1) == b"bc"


def test_what_was_held_arrives_although_its_sender_has_gone(proxy: FaultProxy, echo: Echo) -> None:
    proxy.set(up=Toxics(hold=True))
    with connect(proxy) as connection:
        connection.sendall(b"late")
        until(lambda: proxy.counters.connections, "the connection")
    proxy.heal()
    until(lambda: bytes(echo.received) == b"late", "what was held")


def test_down_refuses_and_resets_and_the_port_comes_back(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        assert echoed(connection, b"x") == b"x"
        proxy.down()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as connection:
        assert echoed(connection, b"y") == b"y"


def test_reset_ends_open_connections_and_takes_new_ones(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        assert echoed(connection, b"x") == b"x"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert proxy.counters.resets == 1
    with connect(proxy) as connection:
        assert echoed(connection, b"y") == b"y"


@pytest.mark.parametrize("after", [0, 1, 100, 70_000])
def test_a_cut_on_the_way_back_lets_exactly_so_many_bytes_through(proxy: FaultProxy, echo: Echo, after: int) -> None:
    proxy.cut_after("down", after, b"\xff\x00")
    with connect(proxy) as innocent, connect(proxy) as connection:
        assert echoed(innocent, b"not meant") == b"not meant"
        sender = threading.Thread(target=_send, args=(connection, MESSAGE))
        sender.start()
        assert receive(connection, len(MESSAGE)) == MESSAGE[:after]
        sender.join()
        assert echoed(innocent, b"still there") == b"still there"
    assert proxy.counters.cuts == 1


def _send(connection: socket.socket, message: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(message)


@pytest.mark.parametrize("after", [0, 1, 100])
def test_a_cut_on_the_way_up_lets_exactly_so_many_bytes_through(proxy: FaultProxy, echo: Echo, after: int) -> None:
    proxy.cut_after("up", after)
    with connect(proxy) as connection:
        _send(connection, MESSAGE)
        assert receive(connection, len(MESSAGE)) in {MESSAGE[:k] for k in range(after + 1)}
    until(lambda: proxy.counters.cuts == 1, "the cut")
    until(lambda: len(echo.received) == after, "what is before the cut")
    assert bytes(echo.received) == MESSAGE[:after]


def test_nobody_behind_it_is_counted(echo: Echo) -> None:
    echo.close()
    with FaultProxy(echo.address) as proxy:
        with connect(proxy) as connection:
            assert receive(connection, 1) == b""
        assert proxy.counters.unreachable == 1
