"""A real HTTP server on a real socket that answers as a test says: what a healthy service never does."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType

Behaviour = Callable[[socket.socket], None]


def answer(status: int, body: str = "{}", **headers: str) -> Behaviour:
    """Answer properly; `retry_after="1"` becomes the header `retry-after: 1`."""
    lines = [f"HTTP/1.1 {status} Whatever", f"content-length: {len(body.encode())}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    raw = ("\r\n".join(lines) + "\r\n\r\n" + body).encode()
    return lambda connection: connection.sendall(raw)


def lose(connection: socket.socket) -> None:
    """The request is here, the answer never leaves: the connection ends in between."""
    connection.shutdown(socket.SHUT_RDWR)


def reset(connection: socket.socket) -> None:
    """As a process that is killed with unread data: RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def tear(connection: socket.socket) -> None:
    """Half an answer."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
    connection.shutdown(socket.SHUT_RDWR)


class OddServer:
    """Answers one request after the other with the behaviours given; a silent one once they are used up."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self._behaviours = list(behaviours)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[bytes] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> OddServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.close()
        for connection in self._open:
            connection.close()

    @property
    def bodies(self) -> list[bytes]:
        return [request.split(b"\r\n\r\n", 1)[1] for request in self.requests]

    def header(self, name: str) -> list[str | None]:
        """That header of each request."""
        found = []
        for request in self.requests:
            lines = request.split(b"\r\n\r\n", 1)[0].decode().split("\r\n")[1:]
            headers = dict(line.lower().split(": ", 1) for line in lines)
            found.append(headers.get(name))
        return found

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while request := _read_request(connection):
                self.requests.append(request)
                if self._behaviours:
                    self._behaviours.pop(0)(connection)
        except OSError:
            return


def _read_request(connection: socket.socket) -> bytes:
    raw = b""
    while b"\r\n\r\n" not in raw:
        if not (more := connection.recv(65536)):
            return b""
        raw += more
    head, _, body = raw.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body
