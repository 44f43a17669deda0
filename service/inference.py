"""A group's rows through their version's network: inline or on the device's thread, with mask and memory.

Duty: fill `group.outputs`, or `group.failure`; recurrent versions step episode by episode. It draws nothing, records
nothing, and never raises.
Strategy: predicted up to 500 µs on a CPU a call runs inline on the loop; above, or on a GPU, on the one thread of the
device; where a state's numbers may make it endless, on a thread of the policy's own, so that it holds up no other.
Anywhere the engine ends it at the limit. Rows of one episode take their steps one after the other, in waves of at most
one row per episode, each wave one call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import structlog

from policies.bundle import PolicyBundle
from policies.engine import Engine, Overdue, Reopening
from policies.network import Memory, Outputs
from policies.types import Bools
from safety.mask import request_mask
from service.clock import Clock
from service.memory import Kept, Memories
from service.plan import Group, LoadedVersion

# Above this predicted duration a call leaves the event loop: a thread hop costs 30 to 60 µs itself.
INLINE_S = 500e-6

log = structlog.get_logger(__name__)


class Inference:
    """The networks of one policy, as its pipeline asks them."""

    def __init__(self, device: Executor, clock: Clock, timeout_s: float, memories: Memories) -> None:
        self._device = device
        self._apart: Executor | None = None  # for versions that may hang
        self._clock = clock
        self._timeout_s = timeout_s
        self.memories = memories

    async def run(self, group: Group) -> None:
        """Ask the group's network about its rows."""
        bundle, started = group.version.bundle, self._clock.monotonic_s()
        try:
            if bundle.interface.recurrent:
                group.outputs = await self._steps(group)
            else:
                group.outputs, _ = await self._call(group.version.engine, group.states, _mask(group, bundle), None)
        except (TimeoutError, Overdue):
            group.failure = "inference_timeout"
            log.warning("inference_timeout", policy=bundle.policy, version=bundle.version, limit_s=self._timeout_s)
        except Reopening:
            group.failure = "session_reopening"
        except Exception as error:
            group.failure = "inference_failed"
            log.error("inference_failed", policy=bundle.policy, version=bundle.version, error=str(error))
        group.infer_s = self._clock.monotonic_s() - started
        group.version.metrics.inference.observe(group.infer_s)

    def time(self, group: Group, version: LoadedVersion, told: Callable[[bool], None]) -> None:
        """Ask another version about a group's rows on the device's thread, to see how long it takes. Nobody waits."""
        interface, engine = version.bundle.interface, version.engine

        def ask() -> float:
            memory = engine.first_memory(len(group.rows)) if interface.recurrent else None
            started = self._clock.monotonic_s()
            engine.step(group.states, _mask(group, version.bundle), memory, self._timeout_s)
            return self._clock.monotonic_s() - started

        def done(asked: asyncio.Future[float]) -> None:
            if not asked.cancelled() and asked.exception() is None:  # a faulty call is no pace
                told(asked.result() * 1000 > version.bundle.latency_budget_ms)

        asyncio.get_running_loop().run_in_executor(self._thread_for(engine), ask).add_done_callback(done)

    async def _call(
        self, engine: Engine, states: Outputs, mask: Bools | None, memory: Memory | None
    ) -> tuple[Outputs, Memory]:
        if engine.device == "cpu" and not engine.may_hang and engine.predicted_s(len(states)) <= INLINE_S:
            return engine.step(states, mask, memory, self._timeout_s)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._timeout_s):  # waiting for the thread counts
            thread = self._thread_for(engine)
            return await loop.run_in_executor(thread, engine.step, states, mask, memory, self._timeout_s)

    def _thread_for(self, engine: Engine) -> Executor:
        if engine.device != "cpu" or not engine.may_hang:
            return self._device
        if self._apart is None:
            self._apart = ThreadPoolExecutor(1, thread_name_prefix="apart")
        return self._apart

    async def _steps(self, group: Group) -> Outputs:
        mask = _mask(group, group.version.bundle)
        outputs: Outputs | None = None
        for wave in _waves([row.episode for row in group.rows]):
            before = self._recall(group, wave)
            try:
                rows, after = await self._call(
                    group.version.engine, group.states[wave], None if mask is None else mask[wave], before
                )
            except BaseException:
                self._keep(group, wave, before, None)
                raise
            self._keep(group, wave, before, after)
            if outputs is None:
                outputs = np.empty((len(group.rows), rows.shape[1]), dtype=rows.dtype)
            outputs[wave] = rows
        assert outputs is not None
        return outputs

    def _recall(self, group: Group, wave: list[int]) -> Memory:
        memory = group.version.engine.first_memory(len(wave))
        now_s, digest = self._clock.monotonic_s(), group.version.bundle.digest
        for at, i in enumerate(wave):
            row = group.rows[i]
            if row.episode is not None:
                found = self.memories.recall(row.episode, row.step, digest, now_s)
                group.state_reset[i] = found.reset
                if found.row is not None:
                    memory[at] = found.row
        return memory

    def _keep(self, group: Group, wave: list[int], before: Memory, after: Memory | None) -> None:
        now_s, bundle = self._clock.monotonic_s(), group.version.bundle
        for at, i in enumerate(wave):
            row = group.rows[i]
            if row.episode is not None:
                old, new = before[at].copy(), None if after is None else after[at].copy()  # views keep the batch alive
                kept = Kept(group.assignments[i], bundle.version, bundle.digest, row.step, group.ids[i], old, new)
                self.memories.keep(row.episode, kept, now_s)


def _mask(group: Group, bundle: PolicyBundle) -> Bools | None:
    """What the callers allow, for a network that wants to know. Rules see its answer, not its question."""
    if bundle.interface.mask is None:
        return None
    return request_mask(group.masks, bundle.action.size)


def _waves(episodes: list[str | None]) -> list[list[int]]:
    """Rows in as few waves as hold each episode once at most, in their order."""
    waves: list[list[int]] = []
    seen: dict[str, int] = {}
    for i, episode in enumerate(episodes):
        wave = 0
        if episode is not None:
            wave = seen.get(episode, 0)
            seen[episode] = wave + 1
        if wave == len(waves):
            waves.append([])
        waves[wave].append(i)
    return waves
