"""The audit log as the service uses it: who does what is written down, on disk, before it is answered.

    intent on disk -> the change -> its outcome on disk -> in the chain (waited for a moment) -> the answer

Duty: statements, their durability, and what a change tells of itself on its way (`moved`). The chain that they end up
in is `audit_chain.py`'s. It knows no HTTP.
Strategy: what changes a policy's document does so in one place (`control.py`), which asks here; who asked for it
stands in a context variable, so that nobody on the way has to pass it on. Where nobody asked, the service did it
itself: `system`. Writers that come together share one fsync.
Promise: no change without its entry, also if the process dies between both: then its outcome is `unknown`. An answer
leaves after the outcome is on disk; when that cannot be written, no change is begun, but for those that halt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import structlog
from msgspec.structs import replace

from policies.errors import AuditBroken, SurefootError
from service.audit import Statement, clipped
from service.audit_files import Line, Segment
from service.clock import Clock

# The chain usually has an entry within a few ms. An answer that waits for it can be looked up in the log at once.
CHAINED_S: Final = 0.25

log = structlog.get_logger(__name__)


class Who(NamedTuple):
    """Who does something: a token's id, its owner, the address that it came from."""

    actor: str
    owner: str = ""
    address: str = ""


SYSTEM: Final = Who("system")


@dataclass(slots=True)
class Note:
    """What a change tells of itself. outcome: where what is raised does not say it."""

    before: int | None = None
    after: int | None = None
    digest: str = ""
    subject: str = ""
    outcome: str = ""
    kept: bool = False
    complete: Callable[[], Awaitable[None]] | None = None

    async def keep(self) -> None:
        """Have the outcome written down now: the change is made, and what is left to do does not undo it.

        Raises AuditBroken when it cannot be.
        """
        if self.complete is not None and not self.kept:
            self.kept = True  # also where it fails: then the intent says all there is
            await self.complete()

    def told(self, subject: str, digest: str) -> None:
        """Remember what a change is about, where its path does not say it."""
        self.subject, self.digest = clipped(subject), digest

    def moved(self, before: int, after: int, digest: str) -> None:
        """Remember the generation that a change found and the one that it made; of several the last."""
        self.before, self.after, self.digest = before, after, digest


_noting: ContextVar[Note | None] = ContextVar("audit_note", default=None)
# What the service does where nobody asked, and what it is about.
_itself: ContextVar[tuple[str, str]] = ContextVar("audit_action", default=("change", ""))


class AuditLog:
    """The log of one worker. Use from the event loop's thread only."""

    def __init__(self, folder: Path, segment: str, clock: Clock) -> None:
        self._segment = Segment(folder, segment)
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._turn = asyncio.Lock()
        self._buffer: list[Line] = []
        self._number = 0
        self._open: set[int] = set()  # begun, and their outcome is not on disk
        self._waiters: dict[tuple[str, int], asyncio.Future[None]] = {}
        self.pending: dict[tuple[str, int], Statement] = {}  # on disk, and not in the chain
        self.wake = asyncio.Event()  # for whoever chains
        self.reachable = True  # whether the chain answered last

    @contextlib.asynccontextmanager
    async def change(
        self, who: Who, action: str, policy: str = "", subject: str = "", *, urgent: bool = False
    ) -> AsyncIterator[Note]:
        """Write down a change, done or refused. urgent: it is made although the disk takes nothing.

        Raises AuditBroken: before, when nothing was changed; after, when it was, and its outcome could not be written.
        """
        note, statement = Note(subject=clipped(subject)), self._statement(who, action, clipped(policy))
        try:
            await self._begin(replace(statement, subject=note.subject))
        except AuditBroken:
            if not urgent:
                raise
        note.complete = lambda: self._end(_completed(statement, note, note.outcome or "done"))
        before = _noting.set(note)
        outcome = "unknown"
        try:
            yield note
            outcome = note.outcome or "done"
        except SurefootError as error:
            outcome = error.code
            raise
        except Exception:
            outcome = note.outcome or "internal"
            raise
        finally:
            _noting.reset(before)
            if (
                outcome != "unknown" and not note.kept
            ):  # else this task is being cancelled, and the intent says all there is
                await self._end(_completed(statement, note, outcome))

    @contextlib.asynccontextmanager
    async def document(self, policy: str, before: int, after: int, digest: str) -> AsyncIterator[Note]:
        """Write down a change of a policy's document: with what is being written down already, or as the service's own.

        The note that is given says `outcome`; without one the change was made.
        """
        asked = _noting.get()
        if asked is not None:
            note = Note()
            yield note
            if not note.outcome:
                asked.moved(before, after, digest)
            return
        action, subject = _itself.get()
        async with self.change(SYSTEM, action, policy, subject, urgent=True) as note:
            yield note
            if not note.outcome:
                note.moved(before, after, digest)

    async def record(self, who: Who, action: str, policy: str = "", subject: str = "", outcome: str = "done") -> None:
        """Write down what has happened. Raises AuditBroken."""
        statement = replace(self._statement(who, action, clipped(policy)), subject=clipped(subject), outcome=outcome)
        await self._end(statement)

    def adopt(self, statements: Iterable[Statement]) -> None:
        """Take on what others have stated and left behind."""
        for statement in statements:
            self.pending.setdefault((statement.segment, statement.number), statement)
        self.wake.set()

    def settle(self, keys: Iterable[tuple[str, int]]) -> None:
        """Learn that statements stand in the chain, on this disk."""
        for key in keys:
            self.pending.pop(key, None)
            waiter = self._waiters.pop(key, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    async def aclose(self) -> None:
        """Close the segment; it stays on disk where something of it is not in the chain."""
        left = bool(self._open) or any(segment == self._segment.name for segment, _ in self.pending)
        async with self._turn:
            await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._segment.close(remove=not left))
        self._thread.shutdown()

    def _statement(self, who: Who, action: str, policy: str) -> Statement:
        self._number += 1
        return Statement(
            segment=self._segment.name,
            number=self._number,
            at_ms=self._clock.event_ms(),
            actor=who.actor,
            owner=who.owner,
            address=who.address,
            action=action,
            policy=policy,
        )

    async def _begin(self, statement: Statement) -> None:
        self._open.add(statement.number)
        try:
            await self._write(Line(intent=statement))
        except AuditBroken:
            self._open.discard(statement.number)
            raise

    async def _end(self, statement: Statement) -> None:
        await self._write(Line(done=statement))
        self._open.discard(statement.number)
        key = statement.segment, statement.number
        self.pending[key] = statement
        self.wake.set()
        if self.reachable:
            self._waiters[key] = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHAINED_S):
                    await self._waiters[key]
            self._waiters.pop(key, None)

    async def _write(self, line: Line) -> None:
        """Have a line on disk. Raises AuditBroken."""
        self._buffer.append(line)
        try:
            async with self._turn:
                if any(each is line for each in self._buffer):  # else who held the turn before has written it, too
                    await self._flush()
        except OSError as error:
            self._buffer = [each for each in self._buffer if each is not line]
            log.error("audit_not_written", error=str(error))
            raise AuditBroken(f"the audit log cannot be written: {error.strerror}") from None

    async def _flush(self) -> None:
        lines, self._buffer = self._buffer, []
        writing = asyncio.get_running_loop().run_in_executor(self._thread, self._segment.append, lines)
        try:
            await asyncio.shield(writing)
        except OSError:
            self._buffer = lines + self._buffer
            raise
        except asyncio.CancelledError:
            await asyncio.wait([writing])  # others wait for the same lines, and take them for written
            raise


def _completed(statement: Statement, note: Note, outcome: str) -> Statement:
    return replace(
        statement,
        before=note.before,
        after=note.after,
        digest=note.digest,
        subject=note.subject,
        outcome=outcome,
    )


def noted() -> Note:
    """Give what is being written down here; where nothing is, a note that nobody reads."""
    return _noting.get() or Note()


@contextlib.contextmanager
def by_itself(action: str, subject: str = "") -> Iterator[None]:
    """Mark what is done here as the service's own, whoever's request it is done in; name it for the log."""
    note, named = _noting.set(None), _itself.set((action, subject))
    try:
        yield
    finally:
        _noting.reset(note)
        _itself.reset(named)
