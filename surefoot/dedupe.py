"""Which events have been seen already, by (producer, epoch, seq), in bounded memory. Pure.

Strategy: a producer numbers its decisions and its rewards in one sequence, and transitions are born out of order; so
what is seen is sparse, and intervals would never grow together. Bitmaps hold it instead, in pages that exist only where
something was seen; `Seen` keeps those of the last `window` numbers of each (producer, epoch).
Promise: an event is never called seen unless it was. Below the window nothing is known any more, and an event there
counts as new: delivering twice is allowed, dropping is not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

_PAGE_BITS = 1024
_PAGE_BYTES = _PAGE_BITS // 8

Source = tuple[str, int]  # producer, epoch
Identity = tuple[str, int, int]  # producer, epoch, seq
Pages = dict[int, bytes]  # by number: 1,024 events, a bit each, little-endian


class Ids:
    """A set of events, as pages of bits."""

    def __init__(self, members: Iterable[Identity] = ()) -> None:
        self._pages: OrderedDict[Source, dict[int, int]] = OrderedDict()  # the source used last comes last
        for identity in members:
            self.add(*identity)

    def add(self, producer: str, epoch: int, seq: int) -> bool:
        """Remember an event. True if it is new."""
        source = (producer, epoch)
        pages = self._pages.setdefault(source, {})
        self._pages.move_to_end(source)
        page, bit = seq // _PAGE_BITS, 1 << seq % _PAGE_BITS
        before = pages.get(page, 0)
        pages[page] = before | bit
        return not before & bit

    def discard(self, producer: str, epoch: int, seq: int) -> None:
        """Forget an event, if it was there."""
        pages = self._pages.get((producer, epoch), {})
        page, bit = seq // _PAGE_BITS, 1 << seq % _PAGE_BITS
        left = pages.get(page, 0) & ~bit
        if left:
            pages[page] = left
        elif pages.pop(page, None) is not None and not pages:
            del self._pages[producer, epoch]

    def __contains__(self, identity: Identity) -> bool:
        producer, epoch, seq = identity
        page = self._pages.get((producer, epoch), {}).get(seq // _PAGE_BITS, 0)
        return bool(page >> seq % _PAGE_BITS & 1)

    def __len__(self) -> int:
        return sum(bits.bit_count() for pages in self._pages.values() for bits in pages.values())

    def dump(self, without: Ids | None = None) -> list[tuple[str, int, Pages]]:
        """Give all events but those `without`, as values that a codec can hold."""
        removed = {} if without is None else without._pages
        left = ((source, _dumped(pages, removed.get(source, {}))) for source, pages in self._pages.items())
        return [(*source, pages) for source, pages in left if pages]

    def load(self, dumped: Iterable[tuple[str, int, Pages]]) -> None:
        """Add what `dump` gave."""
        for producer, epoch, pages in dumped:
            if not pages:
                continue  # Invariant: a source has pages
            own = self._pages.setdefault((producer, epoch), {})
            for page, raw in pages.items():
                own[page] = own.get(page, 0) | int.from_bytes(raw, "little")

    def statistics(self) -> dict[str, int]:
        """How much is remembered: sources, and pages of 1,024 numbers over all of them."""
        return {"sources": len(self._pages), "pages": sum(map(len, self._pages.values()))}


class Seen(Ids):
    """The events seen of at most `sources` producers and epochs, `window` sequence numbers of each."""

    def __init__(self, window: int, sources: int = 256) -> None:
        if window < 1 or sources < 1:
            raise ValueError("window and sources must be positive")
        super().__init__()
        self._pages_kept = -(-window // _PAGE_BITS) + 1  # Invariant: the last `window` numbers are always covered
        self._sources_kept = sources

    def add(self, producer: str, epoch: int, seq: int) -> bool:
        """Remember an event. True if it is new, as far as is known."""
        known = len(self._pages.get((producer, epoch), ()))
        new = super().add(producer, epoch, seq)
        if len(self._pages) > self._sources_kept:
            self._pages.popitem(last=False)
        pages = self._pages[producer, epoch]
        if len(pages) > known:
            self._forget_below(pages)
        return new

    def load(self, dumped: Iterable[tuple[str, int, Pages]]) -> None:
        super().load(dumped)
        while len(self._pages) > self._sources_kept:
            self._pages.popitem(last=False)
        for pages in self._pages.values():
            self._forget_below(pages)

    def _forget_below(self, pages: dict[int, int]) -> None:
        floor = max(pages) - self._pages_kept + 1
        for page in [page for page in pages if page < floor]:
            del pages[page]


def _dumped(pages: dict[int, int], removed: dict[int, int]) -> Pages:
    left = ((page, bits & ~removed.get(page, 0)) for page, bits in pages.items())
    return {page: bits.to_bytes(_PAGE_BYTES, "little") for page, bits in left if bits}
