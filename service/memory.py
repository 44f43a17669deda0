"""What recurrent versions remember of episodes: a bounded memory of this worker, with a time to live. Pure.

    recall -> (the network's step) -> keep -> … -> forget

Duty: the memory before a step, and whether it fits the step; what is to be known of it elsewhere, and in which bytes.
It knows nothing of networks, requests or Redis, and reads no clock: `now_s` is given.
Strategy: an entry holds the memory before and after its last step, so that asking for the same step again (a client
whose answer was lost) starts where the first did. Step, version and memory are one value, here as elsewhere. What is
dropped for want of room is forgotten elsewhere too, unless another worker has gone on with it: so all that workers keep
elsewhere is bounded by what they may keep here.
Invariant: the bytes held are at most `max_bytes`, or one episode's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from policies.route import Assignment
from policies.types import Role

Row = npt.NDArray[np.floating]  # [memory_size]
FORMAT: Final = 1
# What an entry costs besides its numbers, measured: 680 bytes of its own, 1,030 where it came from elsewhere.
OVERHEAD_BYTES = 1_050


class Recalled(NamedTuple):
    """The memory to start a step from. row: None for the memory of an episode that has not begun.

    reset: the caller is in the middle of an episode, and what it did before is not remembered here.
    """

    row: Row | None
    reset: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """What is remembered of an episode after a step."""

    assignment: Assignment  # the version that the episode began on
    version: str  # the one that decided the step: another may have stood in
    digest: str  # of what that version is
    step: int | None
    decision_id: str
    before: Row
    after: Row | None  # None: the step failed, and what comes after it is not known

    @property
    def bytes(self) -> int:
        return OVERHEAD_BYTES + self.before.nbytes + (0 if self.after is None else self.after.nbytes)

    def memory_before(self, step: int | None) -> Row | None:
        """Give the memory before a step; None where it does not follow. Without a step the episode just goes on."""
        if step is not None and step == self.step:
            return self.before
        follows = step is None or self.step is None or step == self.step + 1
        return self.after if follows else None


class _Wire(msgspec.Struct, array_like=True, frozen=True):
    """`Kept` as bytes. The decision stands in front: a script finds it there."""

    format: Literal[1]
    decision_id: str
    step: int | None
    digest: str
    version: str
    assigned: str
    role: Role
    weight: float
    dtype: Literal["<f4", "<f8"]
    before: bytes
    after: bytes
    generation: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Wire).decode


def encode(kept: Kept, after: Row) -> bytes:
    """Write what is kept, `after` being its memory after the step."""
    dtype: Literal["<f4", "<f8"] = "<f8" if after.dtype.itemsize == 8 else "<f4"
    before, now = kept.before.astype(dtype).tobytes(), after.astype(dtype).tobytes()
    began = kept.assignment
    return _encode(
        _Wire(
            FORMAT, kept.decision_id, kept.step, kept.digest, kept.version,
            began.version, began.role, began.weight, dtype, before, now,
            began.generation,
        )
    )  # fmt: skip


def decode(raw: bytes) -> Kept | None:
    """Read what `encode` wrote; None for anything else, as another release may have written it."""
    try:
        wire = _decode(raw)
        before, after = np.frombuffer(wire.before, wire.dtype), np.frombuffer(wire.after, wire.dtype)
    except (msgspec.DecodeError, ValueError):
        return None
    began = Assignment(wire.assigned, wire.role, wire.weight, wire.generation)
    return Kept(began, wire.version, wire.digest, wire.step, wire.decision_id, before, after)


class Elsewhere(Protocol):
    """Where other workers find what is kept here. Neither call waits."""

    def put_nowait(self, episode: str, kept: Kept) -> None: ...

    def forget_nowait(self, episode: str, decision_id: str) -> None:
        """Forget an episode if that decision was its last."""

    def ended_nowait(self, decision_id: str) -> None:
        """Forget the episode whose last decision this was. This worker does not know which."""


@dataclass(slots=True)
class _Entry:
    kept: Kept
    used_s: float


class Memories:
    """Memories of one policy by episode, least recently used first."""

    def __init__(self, max_bytes: int, ttl_s: float, elsewhere: Elsewhere | None = None) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._elsewhere = elsewhere
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._episode_of: dict[str, str] = {}  # last decision of an episode -> the episode
        self._bytes = 0
        self._doubted: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self._entries)

    def statistics(self) -> dict[str, int]:
        return {"episodes": len(self._entries), "bytes": self._bytes}

    def recall(self, episode: str, step: int | None, digest: str, now_s: float) -> Recalled:
        """Give the memory before `step` of an episode, as the version of that digest left it.

        Without a step (None) the episode goes on from wherever it is.
        """
        if step == 0:
            return Recalled(None, False)
        kept = self._fresh(episode, now_s)
        if kept is None:
            return Recalled(None, step is not None or episode in self._doubted)
        row = kept.memory_before(step) if kept.digest == digest else None
        return Recalled(row, row is None)

    def lacks(self, episode: str, step: int | None, now_s: float) -> bool:
        """Whether what came before a step is not remembered here, though it may be elsewhere."""
        if step == 0:
            return False
        kept = self._fresh(episode, now_s)
        return kept is None or kept.memory_before(step) is None

    def keep(self, episode: str, kept: Kept, now_s: float) -> None:
        """Remember an episode after a step. A memory that is not finite is none."""
        if kept.after is not None and not np.isfinite(kept.after).all():
            kept = replace(kept, after=None)
        self._put(episode, kept, now_s)
        # After a step that failed, who asks elsewhere finds the step before it, and may try again from there.
        if self._elsewhere is not None and kept.after is not None:
            self._elsewhere.put_nowait(episode, kept)

    def adopt(self, episode: str, kept: Kept, step: int | None, now_s: float) -> bool:
        """Take over what another worker kept, if this step follows it and nothing here does. Gives whether it was."""
        if kept.memory_before(step) is None or not self.lacks(episode, step, now_s):
            return False
        self._put(episode, kept, now_s)
        return True

    def doubt(self, episodes: Collection[str]) -> None:
        """Note of which episodes it could not be found out whether they have begun; of others it was."""
        self._doubted = frozenset(episodes)

    def ended(self, decision_id: str) -> None:
        """Forget the episode whose last decision this was: the environment has ended it."""
        episode = self._episode_of.get(decision_id)
        if episode is not None:
            self._drop(episode)
        if self._elsewhere is None:
            return
        if episode is not None:
            self._elsewhere.forget_nowait(episode, decision_id)
        else:
            self._elsewhere.ended_nowait(decision_id)

    def _fresh(self, episode: str, now_s: float) -> Kept | None:
        entry = self._entries.get(episode)
        if entry is None:
            return None
        if now_s - entry.used_s > self._ttl_s:
            self._drop(episode)
            return None
        return entry.kept

    def _put(self, episode: str, kept: Kept, now_s: float) -> None:
        self._drop(episode)
        self._entries[episode] = _Entry(kept, now_s)
        self._episode_of[kept.decision_id] = episode
        self._bytes += kept.bytes
        while len(self._entries) > 1 and (self._bytes > self._max_bytes or self._oldest_is_old(now_s)):
            oldest = next(iter(self._entries))
            last = self._drop(oldest)
            if self._elsewhere is not None and last is not None:
                self._elsewhere.forget_nowait(oldest, last.decision_id)

    def _oldest_is_old(self, now_s: float) -> bool:
        return now_s - next(iter(self._entries.values())).used_s > self._ttl_s

    def _drop(self, episode: str) -> Kept | None:
        entry = self._entries.pop(episode, None)
        if entry is None:
            return None
        self._bytes -= entry.kept.bytes
        self._episode_of.pop(entry.kept.decision_id, None)
        return entry.kept
