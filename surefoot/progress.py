"""What a trainer has trained on, as a value that is kept in its checkpoint. Pure.

Duty: the codec of that value, and the answer to one question: does the checkpoint hold this transition already?
Strategy: two sets. `seen`, the memory against copies, is bounded by a window; `held`, what was handed out and not yet
acknowledged when the value was made, is exact whatever the window, for just that may be delivered again after a crash.
Promise: a transition is called trained only if it was handed out before the value was made.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from surefoot.dedupe import Identity, Ids, Pages, Seen

_VERSION = 1


class Stream(NamedTuple):
    """What a state belongs to."""

    key: str
    group: str


class _State(msgspec.Struct, frozen=True, array_like=True):
    v: int
    key: str
    group: str
    seen: list[tuple[str, int, Pages]]
    held: list[tuple[str, int, Pages]]


_decoder = msgspec.msgpack.Decoder(_State)


class Progress:
    """Everything handed out so far, as far as it is remembered."""

    def __init__(self, of: Stream, window: int) -> None:
        self._of = of
        self.seen = Seen(window)
        self.held = Ids()  # only what a state brought along; what is handed out now is known to the reader

    @classmethod
    def read(cls, of: Stream, window: int, state: bytes | None) -> Progress:
        """Go on from a state. Raises ValueError for what is none, or belongs to another stream or group."""
        progress = cls(of, window)
        if state is not None:
            found = _read(state)
            if (found.key, found.group) != of:
                raise ValueError(f"this state belongs to group {found.group!r} of {found.key}, not to {of}")
            progress.seen.load(found.seen)
            progress.held.load(found.held)
        return progress

    def trained(self, identity: Identity) -> bool:
        return identity in self.seen or identity in self.held

    def dump(self, held: Iterable[Identity], collected: Iterable[Identity]) -> bytes:
        """Give the state: all that was seen but what is only `collected`; `held` is what may be delivered again."""
        waiting, mine = Ids(collected), Ids(held)
        mine.load(self.held.dump())
        state = _State(_VERSION, *self._of, self.seen.dump(without=waiting), mine.dump(without=waiting))
        return zlib.compress(msgspec.msgpack.encode(state), level=1)


def _read(state: bytes) -> _State:
    try:
        found = _decoder.decode(zlib.decompress(state))
    except (zlib.error, msgspec.MsgspecError, TypeError) as error:
        raise ValueError(f"this is no state of a reader: {error}") from error
    if found.v > _VERSION:
        raise ValueError(f"a state of version {found.v}: upgrade surefoot")
    return found
