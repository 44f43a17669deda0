"""EDGE: numbers of metrics in memory that all workers share, so that any of them can tell those of all.

    header | values: a double for each series | kinds: a byte each | keys: 512 bytes each

Duty: one board for each worker, made by the parent: where a series' number lies, under which key, and what becomes of
it when its worker dies. It knows no names and no rule of merging (`merging.py`).
Strategy: a number is written where it lies, by an aligned store of eight bytes, so that it costs what a number costs
and no worker can die with a count of its own. The memory belongs to no file (`memfd_create`): it lasts as long as the
parent, and nothing is left behind. Pages are taken as they are used.
Promise: what was counted stays counted when the worker that counted it is killed, and is counted once; what it only
measured goes with it. A reader sees a board as it was at one moment, but for sums that grow meanwhile.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any, ClassVar, Final, NamedTuple

import structlog

# A version has some 65 series, all others together some hundred: a thousand versions. Python's own part is small.
SERIES: Final = 1 << 16
KEY_BYTES: Final = 512
HEADER_BYTES: Final = 64
_KINDS_AT: Final = HEADER_BYTES + 8 * SERIES
_KEYS_AT: Final = _KINDS_AT + SERIES
SIZE: Final = _KEYS_AT + KEY_BYTES * SERIES
_TURN, _USED, _SERVING, _CONNECTIONS = range(4)  # the header's numbers; `_TURN` is odd while the parent changes a board

FREE: Final = 0
COUNTED: Final = 1  # by the worker that runs
MEASURED: Final = 2  # by it
KEPT: Final = 3  # counted by one that is gone

log = structlog.get_logger(__name__)


class Number(NamedTuple):
    """What a board says of one series."""

    key: bytes
    value: float
    kind: int


def new_board() -> int:
    """Make an empty board. Gives its descriptor, which other processes may inherit."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("surefoot-metrics")
    else:  # not Linux: a file without a name does the same
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, SIZE)
    return descriptor


class Board:
    """A worker's numbers. One process adds and counts, all read, and the parent buries."""

    def __init__(self, descriptor: int) -> None:
        self._memory = memoryview(mmap.mmap(descriptor, SIZE))
        self._header = self._memory[:HEADER_BYTES].cast("Q")
        self.values = self._memory[HEADER_BYTES:_KINDS_AT].cast("d")
        self._kinds = self._memory[_KINDS_AT:_KEYS_AT]
        self._lock = Lock()
        self._free: deque[int] = deque()
        self._kept: dict[bytes, list[int]] = {}
        self._full = False
        self._left = False

    @property
    def serving(self) -> bool:
        """Whether its worker has started and lives."""
        return bool(self._header[_SERVING])

    def serve(self) -> None:
        """Say that what is measured here holds from now on."""
        self._header[_SERVING] = 1

    @property
    def listening(self) -> bool:
        """Whether its worker takes connections."""
        return bool(self._header[_CONNECTIONS])

    @property
    def connections(self) -> int:
        """How many it has."""
        return max(0, self._header[_CONNECTIONS] - 1)

    def listen(self, connections: int | None) -> None:
        """Say how many connections this worker has; None: it takes no more."""
        self._header[_CONNECTIONS] = 0 if connections is None else connections + 1

    def own(self) -> None:
        """Learn what an earlier owner has left. To be called once, by the process that will count here."""
        for index in range(self._header[_USED]):
            if self._kinds[index] == FREE:
                self._free.append(index)
            else:
                self._kept.setdefault(self._key(index), []).append(index)

    def add(self, key: bytes, kind: int) -> int | None:
        """Begin a series at zero. Gives where its number lies in `values`; None: there is no room for it."""
        with self._lock:
            used = self._header[_USED]
            if len(key) > KEY_BYTES - 2 or not (self._free or used < SERIES):
                self._tell_full(key)
                return None
            index = self._free.popleft() if self._free else used
            self.values[index] = 0.0
            at = _KEYS_AT + KEY_BYTES * index
            self._memory[at : at + 2 + len(key)] = len(key).to_bytes(2, "little") + key
            self._header[_TURN] += 2
            self._kinds[index] = kind  # last: who is killed before has begun nothing
            self._header[_USED] = max(used, index + 1)
            return index

    def drop(self, key: bytes, index: int) -> None:
        """End a series, and what earlier owners have counted of it. From any thread, within any other call."""
        if self._left:
            return
        for each in (index, *self._kept.pop(key, ())):
            self._kinds[each] = FREE
            self._header[_TURN] += 2
            self._free.append(each)

    def leave(self) -> None:
        """Let what stands here stand: the process ends, and its metrics with it."""
        self._left = True

    def bury(self) -> None:
        """Keep what a dead owner has counted and forget what it has measured. By the parent, before the next one."""
        self._header[_TURN] |= 1
        first: dict[bytes, int] = {}
        for index in range(self._header[_USED]):
            kept = self._kinds[index] in (COUNTED, KEPT)
            self._kinds[index] = FREE
            if kept:
                place = first.setdefault(self._key(index), index)
                if place != index:
                    self.values[place] += self.values[index]
        for index in first.values():
            self._kinds[index] = KEPT
        self._header[_SERVING] = self._header[_CONNECTIONS] = 0
        self._header[_TURN] += 1

    def read(self) -> list[Number] | None:
        """Read all numbers; None: the board was being changed, ask again."""
        turn, used = self._header[_TURN], self._header[_USED]
        values, kinds = self.values[:used].tolist(), bytes(self._kinds[:used])
        keys = bytes(self._memory[_KEYS_AT : _KEYS_AT + KEY_BYTES * used])
        if turn % 2 or self._header[_TURN] != turn:
            return None
        found = []
        for index, kind in enumerate(kinds):
            if kind != FREE:
                at = KEY_BYTES * index
                length = keys[at] | keys[at + 1] << 8
                found.append(Number(keys[at + 2 : at + 2 + length], values[index], kind))
        return found

    def _key(self, index: int) -> bytes:
        at = _KEYS_AT + KEY_BYTES * index
        length = self._memory[at] | self._memory[at + 1] << 8
        return bytes(self._memory[at + 2 : at + 2 + length])

    def _tell_full(self, key: bytes) -> None:
        if not self._full:
            self._full = True
            log.error("metrics_board_full", series=SERIES, key_bytes=len(key))


class Value:
    """A number on a board, as `prometheus_client` wants one. Without room there it is told by nobody.

    It ends when nothing can count on it any more: `remove` of the metric, and the last handle.
    """

    board: ClassVar[Board]
    key_of: ClassVar[Callable[..., bytes]]
    kind_of: ClassVar[Callable[[str, str], int]]
    _multiprocess: ClassVar[bool] = False  # the library asks
    __slots__ = ("_index", "_key", "_lock", "_now", "_values")

    def __init__(
        self, typ: str, metric: str, name: str, labels: tuple[str, ...], of: tuple[str, ...], *_: Any, **__: Any
    ) -> None:
        self._lock = Lock()
        self._now = 0.0  # what stands on the board: to read it there would cost another 0.05 µs
        self._key = type(self).key_of(metric, name, labels, of)
        self._index = self.board.add(self._key, type(self).kind_of(typ, metric))
        self._values: Any = self.board.values if self._index is not None else {None: 0.0}

    def inc(self, amount: float) -> None:
        with self._lock:
            self._now = self._values[self._index] = self._now + amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        with self._lock:
            self._now = self._values[self._index] = float(value)

    def get(self) -> float:
        return self._now

    def set_exemplar(self, exemplar: Any) -> None:
        """Nothing here has exemplars."""

    def get_exemplar(self) -> None:
        return None

    def __del__(self) -> None:
        if self._index is not None:
            self.board.drop(self._key, self._index)


def value_on(board: Board, key_of: Callable[..., bytes], kind_of: Callable[[str, str], int]) -> type[Value]:
    """Make the class that `prometheus_client` keeps a number in (`values.ValueClass`), on a board.

    key_of: metric, sample, names and values of labels -> key. kind_of: type and metric -> COUNTED or MEASURED.
    """
    said = {"board": board, "key_of": staticmethod(key_of), "kind_of": staticmethod(kind_of), "__slots__": ()}
    return type("BoardValue", (Value,), said)
