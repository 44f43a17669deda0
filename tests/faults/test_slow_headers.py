"""A client that never comes to the end of its headers is cut, as one that never comes to the end of its body is."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.conftest import Server, new_server


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = new_server(tmp_path_factory.mktemp("impatient"), body_timeout_s="0.5")
    server.start()
    yield server
    server.stop()


def test_slow_headers_are_cut(impatient: Server) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=5.0) as connection:
        connection.sendall(b"POST /v1/act HTTP/1.1\r\nHo")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
        assert connection.recv(4096) == b""


def test_a_connection_that_says_nothing_is_cut(impatient: Server) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=5.0) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_what_is_answered_keeps_its_connection_and_the_next_headers_are_watched_again(impatient: Server) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=5.0) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: here\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):  # head and body may come in pieces
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHo")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
