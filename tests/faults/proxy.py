"""A TCP proxy that misbehaves on demand, between the service and Redis, or between clients and the service.

Duty: forward bytes, and damage the way they go. It knows nothing of RESP or HTTP.
Strategy: one event loop in a thread of its own; a change of the faults is in force once the call that makes it returns,
also for connections that are open. A held byte is not lost: it is forwarded late, as a network that retransmits does,
even when its sender has given up in the meantime.
Promise: without a fault set, what goes in comes out, in order; the port stays this proxy's while it is down.

    down        connections are refused, open ones are reset
    hold        nothing passes, nothing is closed (a black hole; toxiproxy calls it timeout)
    latency_s   each piece waits so long        bytes_per_s  bandwidth        slice_bytes  pieces are cut so small
    reset()     open connections get a RST      cut_after()  one connection is cut after so many bytes
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

Address = tuple[str, int] | str  # host and port, or the path of a unix socket
Way = Literal["up", "down"]  # towards the target, or back

PIECE_BYTES = 1 << 16
_RST = struct.pack("ii", 1, 0)  # SO_LINGER: closing throws away what is unsent and resets


@dataclass(frozen=True, slots=True)
class Toxics:
    """What happens to the bytes of one way."""

    hold: bool = False
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    slice_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """Reset one connection after `after` bytes of one way, counted from the piece with `seen` that it sends up."""

    way: Way
    after: int
    seen: bytes = b""


@dataclass(slots=True)
class Counters:
    connections: int = 0
    open: int = 0
    unreachable: int = 0  # the target did not take the connection
    resets: int = 0
    cuts: int = 0
    bytes: dict[Way, int] = field(default_factory=lambda: {"up": 0, "down": 0})


class _Link:
    """One connection: both its ends, and how far a cut has got on it."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near, self.far = near, far
        self.left: int | None = None  # bytes until the cut that this connection was chosen for

    def reset(self) -> None:
        for end in (self.near, self.far):
            sock = end.get_extra_info("socket")
            if sock is not None and sock.family != socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
            end.transport.abort()


class FaultProxy:
    """Listens on a free port of the loopback. A context manager; all methods are for other threads."""

    def __init__(self, target: Address | Callable[[], Address]) -> None:
        self._target = target if callable(target) else lambda: target
        self._reserved = _bound(0)  # never listens: while nothing else does, connections are refused
        self.port: int = self._reserved.getsockname()[1]
        self.counters = Counters()
        self._toxics: dict[Way, Toxics] = {"up": Toxics(), "down": Toxics()}
        self._cut: Cut | None = None
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # Faults

    def set(self, up: Toxics | None = None, down: Toxics | None = None) -> None:
        """Damage the ways like this from now on; what is left out is healed."""
        self._do(self._set(up or Toxics(), down or Toxics()))

    def heal(self) -> None:
        """Forward everything again, what was held first."""
        self._do(self._heal())

    def down(self) -> None:
        """Refuse connections and reset those that are open, until `heal`."""
        self._do(self._down())

    def reset(self) -> None:
        """Reset all open connections; new ones are taken."""
        self._do(self._reset())

    def cut_after(self, way: Way, after: int, seen: bytes = b"") -> None:
        """Reset the next connection on which `after` bytes of a way have passed since a piece with `seen` went up.

        Exactly so many are forwarded. Once; `counters.cuts` tells when it has happened.
        """
        self._do(self._arm(Cut(way, after, seen)))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30.0)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, sock=_bound(self.port), limit=PIECE_BYTES)

    async def _set(self, up: Toxics, down: Toxics) -> None:
        self._toxics = {"up": up, "down": down}
        self._announce()

    async def _heal(self) -> None:
        await self._set(Toxics(), Toxics())
        self._cut = None
        await self._listen()

    async def _down(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._reset()

    async def _reset(self) -> None:
        for link in list(self._links):
            self.counters.resets += 1
            link.reset()
        self._announce()

    async def _arm(self, cut: Cut) -> None:
        self._cut = cut
        for link in self._links:
            link.left = None

    async def _close(self) -> None:
        await self._down()
        me = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not me]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # Forwarding

    async def _serve(self, near_in: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        self.counters.connections += 1
        try:
            far_in, far = await _connect(self._target())
        except OSError:
            self.counters.unreachable += 1
            near.transport.abort()
            return
        link = _Link(near, far)
        self._links.add(link)
        self.counters.open += 1
        try:
            await asyncio.gather(self._pump(link, "up", near_in, far), self._pump(link, "down", far_in, near))
        except (OSError, asyncio.CancelledError):  # the stream protocol of Python 3.11 complains of cancelled tasks
            link.reset()
        finally:
            self._links.discard(link)
            self.counters.open -= 1
            near.transport.abort()
            far.transport.abort()

    async def _pump(self, link: _Link, way: Way, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while piece := await source.read(PIECE_BYTES):
            size = self._toxics[way].slice_bytes or len(piece)
            for start in range(0, len(piece), size):
                await self._forward(link, way, piece[start : start + size], sink)
        await self._pass(way, b"")
        if sink.can_write_eof():
            sink.write_eof()

    async def _forward(self, link: _Link, way: Way, piece: bytes, sink: asyncio.StreamWriter) -> None:
        await self._pass(way, piece)
        cut = self._cut
        if cut is not None and way == "up" and cut.seen in piece:
            link.left = cut.after
        if cut is not None and link.left is not None and cut.way == way:
            piece, whole = piece[: link.left], len(piece)
            link.left -= len(piece)
            if len(piece) < whole or cut.after == 0:
                await self._end(link, sink, piece)
        self.counters.bytes[way] += len(piece)
        sink.write(piece)
        await sink.drain()

    async def _end(self, link: _Link, sink: asyncio.StreamWriter, rest: bytes) -> None:
        """Let the last bytes before the cut through, then reset the connection."""
        self._cut = None
        self.counters.cuts += 1
        if rest:
            sink.write(rest)
            await sink.drain()
            await asyncio.sleep(0.01)  # a reset throws away what the kernel has not sent yet
        link.reset()
        raise ConnectionResetError("cut")

    async def _pass(self, way: Way, piece: bytes) -> None:
        """Wait as the faults want it, and again while they hold."""
        toxics = self._toxics[way]
        delay_s = toxics.latency_s + (len(piece) / toxics.bytes_per_s if toxics.bytes_per_s else 0.0)
        if delay_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), delay_s)  # healed: wait no longer
        while self._toxics[way].hold:
            await self._changed.wait()


async def _connect(target: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if isinstance(target, str):
        return await asyncio.open_unix_connection(target, limit=PIECE_BYTES)
    return await asyncio.open_connection(*target, limit=PIECE_BYTES)


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock
