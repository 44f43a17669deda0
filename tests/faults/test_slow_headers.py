"""A client that never comes to the end of its headers is cut, as one that never comes to the end of its body is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Server, new_server


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Server]:
    server = new_server(tmp_path, body_timeout_s="0.2")
    server.start()
    yield server
    server.stop()


@pytest.mark.xfail(reason="nothing watches the time that headers take", strict=True, raises=TimeoutError)
def test_slow_headers_are_cut(impatient: Server) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=5.0) as connection:
        connection.sendall(b"POST /v1/act HTTP/1.1\r\nHo")
        assert connection.recv(4096)[:12] in (b"", b"HTTP/1.1 408")
