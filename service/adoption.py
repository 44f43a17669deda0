"""What dead workers left behind: earlier epochs of this worker's slot, and slots that nobody runs in any more.

Duty: find such spools, give their lanes to the shipper, and let go of them when they are shipped and old; delete what
was set aside long ago. Knows nothing of Redis. Runs in the spool's reading thread; `lanes` and `spools` may be asked
from the event loop.
Strategy: another slot is held only when it lay free at two looks in a row, so that a worker that restarts gets its own.
Promise: nobody else touches a spool while it is held here; what a dead worker acknowledged is shipped by a living one.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from service.lanes import Lane
from service.leftovers import discard
from service.slots import Slot, abandoned_slots, hold_free_slot
from service.spool import Damage, Spool

DISCARD_EVERY_S = 600.0  # what is kept for days need not be looked at more often

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Adopted:
    slot: Slot
    spool: Spool
    lanes: tuple[Lane, ...]


class Adoption:
    def __init__(self, own: Slot, *, keep_bytes: int, keep_s: float, confirms: bool = False) -> None:
        self._own = own
        self._keep_bytes = keep_bytes
        self._keep_s = keep_s
        self._confirms = confirms
        self._adopted: tuple[_Adopted, ...] = ()  # replaced, never changed: two threads look at it
        self._started = False
        self._seen: set[int] = set()
        self._discard_s = float("-inf")
        self.discarded = 0  # files
        self.gone = Damage()  # of spools that have been let go
        self.lost = 0
        self.rejected = 0

    def lanes(self) -> list[Lane]:
        return [lane for adopted in self._adopted for lane in adopted.lanes]

    def spools(self) -> list[Spool]:
        return [adopted.spool for adopted in self._adopted]

    def spool_of(self, lane: Lane) -> Spool | None:
        return next((adopted.spool for adopted in self._adopted if lane in adopted.lanes), None)

    def look_around(self) -> None:
        """Adopt this slot's earlier epochs at the first call, other slots once they have lain free for two."""
        if not self._started:
            self._adopt(self._own)
            self._started = True
        data_dir = self._own.path.parent.parent
        held = {adopted.slot.number for adopted in self._adopted}
        free = abandoned_slots(data_dir) - held
        for number in sorted(free & self._seen):
            if (slot := hold_free_slot(data_dir, number)) is not None:
                try:
                    self._adopt(slot)
                except BaseException:
                    self._release_if_unused(slot)
                    raise
        self._seen = free

    def _adopt(self, slot: Slot) -> None:
        done = {adopted.spool.epoch for adopted in self._adopted if adopted.slot is slot}
        for epoch in slot.epochs():
            if epoch in done or (slot is self._own and epoch >= slot.epoch):
                continue
            spool = Spool.reopen(slot, epoch, keep_bytes=self._keep_bytes, keep_s=self._keep_s)
            lanes = tuple(
                Lane(
                    policy,
                    spool.producer,
                    epoch,
                    live=False,
                    known=False,
                    applied=span.first,
                    next_seq=span.first,
                    end=span.end,
                    assigned=span.end,
                    head_ms=span.at_ms,
                    confirms=self._confirms,
                    confirmed=span.first,
                )
                for policy, span in spool.spans().items()
            )
            log.info("spool_adopted", producer=spool.producer, epoch=epoch, files=spool.files, lanes=len(lanes))
            self._adopted += (_Adopted(slot, spool, lanes),)

    def expire(self, now_s: float) -> None:
        """Delete shipped files that are old, and let go of spools of which none are left."""
        for adopted in self._adopted:
            applied = {lane.policy: lane.releasable for lane in adopted.lanes if lane.known}
            adopted.spool.expire(applied, now_s)
            if not adopted.spool.files:
                self._let_go(adopted)

    def discard(self, now_s: float, now_ms: int) -> None:
        """Delete what was set aside and is old, in every slot that no other worker runs in; such a one does its own."""
        if now_s < self._discard_s:
            return
        self._discard_s = now_s + DISCARD_EVERY_S
        held = {self._own.number: self._own} | {adopted.slot.number: adopted.slot for adopted in self._adopted}
        for path in self._own.path.parent.glob("slot-*"):
            number = path.name.removeprefix("slot-")
            mine = held.get(int(number)) if number.isdigit() else None
            slot = mine or (hold_free_slot(self._own.path.parent.parent, int(number)) if number.isdigit() else None)
            if slot is not None:
                self.discarded += discard(slot.path, now_ms)
                if mine is None:
                    slot.release()

    def _let_go(self, adopted: _Adopted) -> None:
        self._adopted = tuple(other for other in self._adopted if other is not adopted)
        self.gone = Damage(*(a + b for a, b in zip(self.gone, adopted.spool.damage, strict=True)))
        self.lost += sum(lane.lost for lane in adopted.lanes)
        self.rejected += sum(lane.rejected for lane in adopted.lanes)
        self._release_if_unused(adopted.slot)

    def _release_if_unused(self, slot: Slot) -> None:
        if slot is not self._own and all(adopted.slot is not slot for adopted in self._adopted):
            slot.release()

    def close(self) -> None:
        for adopted in self._adopted:
            adopted.spool.close()
            if adopted.slot is not self._own:
                adopted.slot.release()
        self._adopted = ()
