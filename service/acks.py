"""How replicas are asked whether they have what a call wrote, and what they answer. Pure.

Duty: the words of WAITAOF and WAIT, and the comparison of counts: a reply that came as time was up looks like any
other. `redis_streams.py` sends them, on the connection that has just written.
Strategy: the wait is asked for in slices, each far shorter than the deadline of a socket, and no more once one is
confirmed. Replicas are asked once for each: one that is asked while it still syncs says that it has not, and nothing
more by itself for a second, so the first slice is short. They are sent once the call itself is answered, for the same
reason: behind it in one piece they took 300 ms where they now take 5.
"""

from __future__ import annotations

from typing import Any, Literal

from service.shipcall import Acks, Confirm

FIRST_MS, LAST_MS = 20, 250  # a server looks at deadlines ten times a second, or whenever it has something to do
By = Literal["waitaof", "wait"]


def questions(confirm: Confirm, by: By) -> list[tuple[Any, ...]]:
    """Build the commands to send behind the call, in order; the last one's reply counts."""
    left_ms, slice_ms = max(1, round(confirm.wait_s * 1000)), FIRST_MS
    asked: list[tuple[Any, ...]] = []
    while left_ms > 0:
        wait_ms = min(slice_ms, left_ms)  # never 0, which would be for ever
        whom = ("WAITAOF", 1, confirm.replicas) if by == "waitaof" else ("WAIT", confirm.replicas)
        asked.append((*whom, wait_ms))
        left_ms, slice_ms = left_ms - wait_ms, min(2 * slice_ms, LAST_MS)
    return asked


def judge(reply: Any, confirm: Confirm, by: By) -> Acks:
    """Say what a reply is worth; an error in its place confirms nothing."""
    if isinstance(reply, Exception):
        return Acks(False, 0, 0, "none", str(reply))
    if by == "waitaof":
        local, replicas = int(reply[0]), int(reply[1])
        enough = local >= 1 and replicas >= confirm.replicas
        own = "has" if local else "does not have"
        told = f"the primary {own} it on disk, {replicas} of {confirm.replicas} replicas have"
    else:
        local, replicas = 0, int(reply)
        enough = replicas >= confirm.replicas
        told = f"{replicas} of {confirm.replicas} replicas have it in memory"
    return Acks(enough, local, replicas, by, "" if enough else told)


def settled(reply: Any, confirm: Confirm, by: By) -> bool:
    """Whether nothing needs to be asked behind this reply, be it the call's own or that to a question."""
    if isinstance(reply, list) and reply[:1] in ([b"OK"], [b"GAP"]):
        return bool(reply[0] == b"GAP")
    return isinstance(reply, Exception) or judge(reply, confirm, by).enough


def unknown_command(reply: Any) -> bool:
    """Whether the server, being older than Redis 7.2, has no such command."""
    return isinstance(reply, Exception) and "unknown command" in str(reply).lower()
