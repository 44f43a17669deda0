"""A ledger whose commits wait for the test."""

from __future__ import annotations

import asyncio

import pytest

from service.ledger import Appended, Ledger


class Disk:
    """What was appended, and is committed when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commits: list[tuple[int, asyncio.Future[None]]] = []
        append = Ledger.append_nowait

        def pending(ledger: Ledger, policy: str, count: int, blob: bytes, at_ms: int) -> Appended:
            first = append(ledger, policy, count, blob, at_ms).first_seq
            committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.commits.append((count, committed))
            return Appended(first, committed)

        monkeypatch.setattr(Ledger, "append_nowait", pending)

    @property
    def sizes(self) -> list[int]:
        return [count for count, _ in self.commits]

    async def until(self, batches: int) -> None:
        async with asyncio.timeout(10.0):
            while len(self.commits) < batches:
                await asyncio.sleep(0)

    def commit(self) -> None:
        """Commit what was appended up to now."""
        for _, committed in self.commits:
            if not committed.done():
                committed.set_result(None)
