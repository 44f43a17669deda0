"""Decisions that wait for a shadow: a bounded queue that keeps a share chosen by hash where not all fit. Pure.

Duty: what is kept, what is dropped, and with which probability each kept row was. It knows no thread and no clock.
Strategy: a unit (an episode, or a decision without one) has a number h in [0, 1), the hash of its name, which has
nothing to do with routing's or with the draw's. The queue keeps rows with h < share. When rows do not fit, the share is
halved until they do; when the queue has run empty, it is doubled. So episodes are kept or dropped whole, for as long as
the share does not fall.
Promise: a row's `share` is the least share in force from its arrival until it was taken, and no kept unit would have
changed it by a smaller h; so each kept unit stands for exactly 1/share of its kind (adaptive threshold sampling, Ting,
arXiv:1708.04970).
Invariant: rows and bytes that wait are within `most_rows` and `most_bytes`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from policies.types import Floats
from shadow.shown import Rows

# A second of what one thread scores at full speed is some ten times as much: more only makes lag.
MOST_ROWS = 1_024
MOST_BYTES = 32 << 20
# Below it nothing is kept of any traffic that one service answers: the shadow is stuck.
LEAST_SHARE = 2.0**-20
_PERSON = b"surefoot-shadow"
_SCALE = 2.0**-53


@dataclass(frozen=True, slots=True)
class _Kept:
    """Rows and the share that they were kept by. heights: h of each row, once it was asked for."""

    rows: Rows
    share: float
    heights: Floats | None = None


class Waiting:
    """Rows that wait, oldest first."""

    def __init__(self, most_rows: int = MOST_ROWS, most_bytes: int = MOST_BYTES) -> None:
        self._most_rows, self._most_bytes = most_rows, most_bytes
        self._kept: deque[_Kept] = deque()
        self.share = 1.0
        self.rows = 0  # Invariant: rows and bytes are sums over _kept
        self.bytes = 0

    @property
    def oldest_s(self) -> float | None:
        """When the oldest row that waits was offered; None: none waits."""
        return float(self._kept[0].rows.offered_s[0]) if self._kept else None

    def put(self, rows: Rows) -> int:
        """Queue rows, or those of them that the share keeps. Gives how many were dropped, of these or older ones."""
        if not self._kept and self.share < 1.0:
            self.share *= 2.0
        offered = self.rows + len(rows)
        self._add(_thinned(_Kept(rows, 1.0), self.share))
        while self.rows > self._most_rows or self.bytes > self._most_bytes:
            self.share /= 2.0
            self._thin()
        return offered - self.rows

    def take(self, most: int) -> list[Rows]:
        """Take the oldest rows: whole batches, as long as they are `most` rows together, one batch at least."""
        taken: list[Rows] = []
        while self._kept and (not taken or sum(map(len, taken)) + len(self._kept[0].rows) <= most):
            kept = self._kept.popleft()
            self.rows -= len(kept.rows)
            self.bytes -= kept.rows.nbytes
            taken.append(kept.rows.at_share(kept.share))
        return taken

    def clear(self) -> int:
        """Drop everything. Gives how many rows that were."""
        dropped = self.rows
        self._kept.clear()
        self.rows = self.bytes = 0
        return dropped

    def _add(self, kept: _Kept) -> None:
        if len(kept.rows):
            self._kept.append(kept)
            self.rows += len(kept.rows)
            self.bytes += kept.rows.nbytes

    def _thin(self) -> None:
        everything = list(self._kept)
        self.clear()
        if self.share >= LEAST_SHARE:
            for kept in everything:
                self._add(_thinned(kept, self.share))


def heights(units: Sequence[str]) -> Floats:
    """h of each unit, float64 [B] in [0, 1)."""
    digests = b"".join(blake2b(unit.encode(), digest_size=8, person=_PERSON).digest() for unit in units)
    return np.asarray((np.frombuffer(digests, dtype="<u8") >> np.uint64(11)) * _SCALE, dtype=np.float64)


def _thinned(kept: _Kept, share: float) -> _Kept:
    """What a share keeps of rows, if it is smaller than the one that they were kept by."""
    if share >= kept.share:
        return kept
    each = heights(kept.rows.units) if kept.heights is None else kept.heights
    stay = np.flatnonzero(each < share)
    if len(stay) == len(each):
        return replace(kept, share=share, heights=each)
    return _Kept(kept.rows.some(stay.tolist()), share, each[stay])
