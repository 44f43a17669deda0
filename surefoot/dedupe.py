"""Which events have been seen already, by (producer, epoch, seq), in bounded memory. Pure.

Strategy: a producer numbers its decisions and its rewards in one sequence, and transitions are born out of order; so
what is seen is sparse, and intervals would never grow together. A bitmap over the last `window` numbers of each
(producer, epoch) holds it instead, in pages that exist only where something was seen.
Promise: an event is never called seen unless it was. Below the window nothing is known any more, and an event there
counts as new: delivering twice is allowed, dropping is not.
"""

from __future__ import annotations

from collections import OrderedDict

_PAGE_BITS = 1024

Source = tuple[str, int]  # producer, epoch


class Seen:
    """The events seen of at most `sources` producers and epochs, `window` sequence numbers of each."""

    def __init__(self, window: int, sources: int = 256) -> None:
        if window < 1 or sources < 1:
            raise ValueError("window and sources must be positive")
        self._pages_kept = -(-window // _PAGE_BITS) + 1  # Invariant: the last `window` numbers are always covered
        self._sources_kept = sources
        self._pages: OrderedDict[Source, dict[int, int]] = OrderedDict()

    def add(self, producer: str, epoch: int, seq: int) -> bool:
        """Remember an event. True if it is new, as far as is known."""
        source = (producer, epoch)
        pages = self._pages.setdefault(source, {})
        self._pages.move_to_end(source)
        if len(self._pages) > self._sources_kept:
            self._pages.popitem(last=False)
        page, bit = seq // _PAGE_BITS, 1 << seq % _PAGE_BITS
        before = pages.get(page, 0)
        if before & bit:
            return False
        pages[page] = before | bit
        if not before:
            self._forget_below(pages)
        return True

    def _forget_below(self, pages: dict[int, int]) -> None:
        floor = max(pages) - self._pages_kept + 1
        for page in [page for page in pages if page < floor]:
            del pages[page]

    def statistics(self) -> dict[str, int]:
        """How much is remembered: sources, and pages of 1,024 numbers over all of them."""
        return {"sources": len(self._pages), "pages": sum(map(len, self._pages.values()))}
