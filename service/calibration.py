"""EDGE: shipped decisions to the calibration monitor of their policy, which all replicas share in Redis.

Duty: hold what was shipped until it is judged, spend a bounded share of a core on judging, change the shared state,
tell operators. What is counted, and when an alarm is raised, is `calibration_state.py`'s to say.
Strategy: once a second and for each policy: read the state, add what waits, in a thread, write it if nobody has changed
it meanwhile. The state says how far each lane has been looked at, so a lost answer, a rewind of the shipper and a
worker that adopts another's spool are one case: nothing counts twice. What the queue has no room for is left out and
counted; that depends on nothing that was drawn, so what is judged stays a fair sample.
Promise: decisions and shipping never wait for this file. Without Redis it waits too, and goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, TypeVar

import structlog

from policies.errors import StoreAway
from service.calibration_state import Absorption, Alarm, Chunk, State, decode, encode, strength, view
from service.clock import Clock
from service.decision import holds_decisions
from service.lanes import Lane
from service.metrics import Metrics
from service.redis_streams import RedisStreams, base
from service.spool_file import Row

TURN_S: Final = 1.0
# Of one core. A decision costs 7 to 12 µs, so this judges some 2,000 per second of each worker, in jobs of under 1 ms
# between which the event loop gets its turn (within a batch of 1,024: every 5 ms, Python's switch interval).
SHARE: Final = 0.02
JOB_EVENTS: Final = 64
MOST_EVENTS: Final = 8_192  # waiting, for each policy: more than an alarm takes
MOST_BYTES: Final = 16 << 20  # for all policies
READ_S: Final = 10.0  # how often a policy without traffic here is looked at
ATTEMPTS: Final = 4
CLOSE_S: Final = 2.0
KEPT_MS: Final = 90 * 86_400_000

# ARGV: the version that was read, the new one, the state, for how long to keep it in ms. Gives 1 when it was written.
WRITE: Final = b"""
local key = KEYS[1] .. ':calibration'
if (redis.call('HGET', key, 'version') or '0') ~= ARGV[1] then return 0 end
redis.call('HSET', key, 'version', ARGV[2], 'state', ARGV[3])
redis.call('PEXPIRE', key, ARGV[4])
return 1
"""

log = structlog.get_logger(__name__)
_T = TypeVar("_T")


@dataclass(slots=True)
class Watched:
    """One policy. Invariant: events and size are sums over `waiting`."""

    waiting: deque[Chunk] = field(default_factory=deque)
    events: int = 0
    size: int = 0
    state: State = field(default_factory=State)
    read_s: float = float("-inf")

    def put(self, chunk: Chunk, room: int) -> bool:
        """Take a chunk if there is room for its bytes, or nothing waits."""
        events, size = chunk.end - chunk.first_seq, len(chunk.blob)
        if self.waiting and (self.events + events > MOST_EVENTS or size > room):
            return False
        self.waiting.append(chunk)
        self.events += events
        self.size += size
        return True

    def drop(self, count: int) -> None:
        """Forget the oldest chunks."""
        for _ in range(count):
            chunk = self.waiting.popleft()
            self.events -= chunk.end - chunk.first_seq
            self.size -= len(chunk.blob)


class Calibrations:
    """The monitors of all policies of a worker. Use from the event loop's thread only."""

    def __init__(
        self,
        streams: RedisStreams,
        clock: Clock,
        metrics: Metrics,
        cpu_s: Callable[[], float] = time.thread_time,
    ) -> None:
        self._streams = streams
        self._clock = clock
        self._metrics = metrics
        self._cpu_s = cpu_s
        self._watched: dict[str, Watched] = {}
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "calibration")

    def offer(self, lane: Lane, rows: Sequence[Row]) -> None:
        """Take what has been shipped; to be called by the shipper."""
        watched, name = self._watch(lane.policy), f"{lane.producer}:{lane.epoch}"
        room = MOST_BYTES - sum(each.size for each in self._watched.values())
        for row in rows:
            if not holds_decisions(row.blob):
                continue
            if watched.put(Chunk(name, row.first_seq, row.end, row.blob), room):
                room -= len(row.blob)
            else:
                self._metrics.calibration_skipped.labels(lane.policy).inc(row.count)

    def waiting(self, policy: str) -> int:
        """How many decisions have been shipped and not judged."""
        return self._watch(policy).events

    async def run(self, policies: Collection[str]) -> None:
        """Judge for ever. policies: those served here, whoever decides: what other replicas find is told here, too."""
        while True:
            for policy in list(policies):
                self._watch(policy)
            await self.run_once()
            await asyncio.sleep(TURN_S)

    async def run_once(self, share_s: float = SHARE * TURN_S) -> None:
        """Judge what waits, for `share_s` of processor time at most. Never raises for what may pass."""
        async with self._turn:
            busy = sum(bool(watched.waiting) for watched in self._watched.values())
            try:
                for policy, watched in list(self._watched.items()):
                    if watched.waiting:
                        await self._judge(policy, watched, share_s / busy)
                    elif self._clock.monotonic_s() - watched.read_s >= READ_S:
                        await self._look(policy, watched)
            except StoreAway as error:
                log.debug("calibration_waits", reason=error.detail)

    async def view(self, policy: str) -> dict[str, Any]:
        """Say what is known of a policy: to all replicas, or to this one when Redis does not answer."""
        async with self._turn:
            watched = self._watch(policy)
            with contextlib.suppress(StoreAway):
                await self._read(policy, watched)
            return await self._in_thread(view, policy, watched.state)

    async def anew(self, policy: str) -> None:
        """Forget a policy's sums and alarms, in all replicas, and begin a new round. Raises StoreAway."""
        async with self._turn:
            watched = self._watch(policy)
            for _ in range(ATTEMPTS):
                version = await self._read(policy, watched)
                if await self._write(policy, version, state := watched.state.anew()):
                    watched.drop(len(watched.waiting))
                    await self._follow(policy, watched, state)
                    log.warning("calibration_anew", policy=policy, round=state.round)
                    return
        raise StoreAway("other replicas are changing what is known of calibration; try again")

    async def aclose(self) -> None:
        """Judge what is left, within `CLOSE_S`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self.run_once(CLOSE_S)
        self._thread.shutdown()

    def _watch(self, policy: str) -> Watched:
        watched = self._watched.get(policy)
        if watched is None:
            watched = self._watched[policy] = Watched()
            self._metrics.calibration_alarm.labels(policy).set(0)
            self._metrics.calibration_evidence.labels(policy).set(0)
        return watched

    async def _look(self, policy: str, watched: Watched) -> None:
        """Learn what others have found; tell a Redis that has lost its memory again."""
        version = await self._read(policy, watched)
        if int(version) < watched.state.version:
            await self._write(policy, version, watched.state)

    async def _judge(self, policy: str, watched: Watched, share_s: float) -> None:
        for _ in range(ATTEMPTS):
            version = await self._read(policy, watched)
            before = watched.state
            count, after = await self._absorb(before, watched.waiting, share_s)
            if await self._write(policy, version, after):
                watched.drop(count)
                self._tell(policy, before, after)
                await self._follow(policy, watched, after)
                return

    async def _absorb(self, state: State, waiting: deque[Chunk], share_s: float) -> tuple[int, State]:
        """Add chunks until the time is spent. Gives how many, and the state after them."""
        absorption, count, spent_s = Absorption(state), 0, 0.0
        while count < len(waiting) and spent_s < share_s:
            job = _job(islice(waiting, count, None))
            count += len(job)
            spent_s += await self._in_thread(self._timed, absorption, job)
        return count, await self._in_thread(absorption.state, self._clock.event_ms())

    def _timed(self, absorption: Absorption, job: Sequence[Chunk]) -> float:
        began_s = self._cpu_s()
        absorption.take(job)
        return self._cpu_s() - began_s

    async def _read(self, policy: str, watched: Watched) -> str:
        """Bring what is known here up to date. Gives the version that Redis has."""
        found = await self._streams.command("HMGET", f"{base(policy)}:calibration", "version", "state")
        version = (found[0] or b"0").decode()
        watched.read_s = self._clock.monotonic_s()
        stands = State() if found[1] is None else _decoded(policy, int(version), found[1])
        if (stands.round, stands.version) > (watched.state.round, watched.state.version):
            await self._follow(policy, watched, stands)
        return version

    async def _write(self, policy: str, version: str, state: State) -> bool:
        """Write a state if Redis still has `version`: after a restored backup, whatever is newest goes on."""
        done = await self._streams.script(WRITE, base(policy), version, state.version, encode(state), KEPT_MS)
        return bool(done)

    async def _follow(self, policy: str, watched: Watched, state: State) -> None:
        watched.state = state
        self._metrics.calibration_alarm.labels(policy).set(state.alarmed)
        self._metrics.calibration_evidence.labels(policy).set(await self._in_thread(strength, state))

    def _tell(self, policy: str, before: State, after: State) -> None:
        self._metrics.calibration_unknown.labels(policy).inc(after.unknown - before.unknown)
        broken = after.broken - before.broken
        self._metrics.calibration_broken.labels(policy).inc(broken)
        if broken:
            log.error("calibration_broken", policy=policy, decisions=broken)
        for alarm in after.alarms:
            if alarm not in before.alarms:
                _tell(policy, alarm)

    async def _in_thread(self, call: Callable[..., _T], *values: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *values)


def _job(chunks: Iterable[Chunk]) -> list[Chunk]:
    """The first chunks that have enough decisions to be worth a job."""
    job: list[Chunk] = []
    events = 0
    for chunk in chunks:
        job.append(chunk)
        events += chunk.end - chunk.first_seq
        if events >= JOB_EVENTS:
            break
    return job


def _decoded(policy: str, version: int, raw: bytes) -> State:
    try:
        return decode(raw)
    except ValueError as error:  # another release wrote it: its sums mean nothing here
        log.error("calibration_state_unreadable", policy=policy, reason=str(error))
        return State(version=version)


def _tell(policy: str, alarm: Alarm) -> None:
    log.error(
        "calibration_alarm",
        policy=policy,
        space=alarm.space,
        scope=alarm.scope,
        group=alarm.group,
        bin=alarm.bin,
        decisions=alarm.decisions,
        hits=alarm.hits,
        expected=alarm.expected,
        S=alarm.s,
        V=alarm.v,
        evidence=alarm.evidence,
        threshold=alarm.threshold,
        impossible=alarm.impossible,
    )
