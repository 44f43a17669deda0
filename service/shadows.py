"""The shadows of a worker: which there are, what they are shown, what they say.

Duty: have a runner for each shadow that is deployed and loaded, show it what was decided once the answers have left,
and make its figures readable. How it scores stands in `shadow/`, how scores get to Redis in `shadow_stream.py`.
Strategy: a runner belongs to a version's content; it stays while the version watches. Each change of the policy's
control document lets a shadow that has tripped try again. On a GPU a version that watches is opened anew on the CPU: a
device has one thread, and that one answers.
Promise: whatever a shadow does, the pipeline neither waits for it nor hears of it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from policies.deployment import Deployment
from policies.draw import uniforms
from policies.engine import Engine
from service.clock import Clock
from service.ids import Keyring
from service.plan import LoadedVersion, Plan, Settled
from service.shadow_metrics import ShadowMetrics
from service.shadow_rows import shown
from service.shadow_stream import ShadowStream
from shadow.runner import CPU_SHARE, Runner

CLOSE_S = 1.0
log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Watching:
    """A runner and the content that it scores."""

    digest: str
    runner: Runner


class Shadows:
    """The shadows of all policies. Use from the event loop's thread only."""

    def __init__(
        self,
        keyring: Keyring,
        clock: Clock,
        metrics: ShadowMetrics,
        stream: ShadowStream,
        limit_s: float,
        cpu_share: float = CPU_SHARE,
    ) -> None:
        """limit_s: of a call. cpu_share: of a core, for each shadow."""
        self._keyring = keyring
        self._clock = clock
        self._metrics = metrics
        self.stream = stream
        self._limit_s = limit_s
        self._cpu_share = cpu_share
        self._watching: dict[str, dict[str, _Watching]] = {}
        self._generations: dict[str, int] = {}
        self.pressed: Callable[[], bool] = lambda: False  # callers wait, and shadows are given up first

    def follow(self, plan: Plan, deployment: Deployment) -> bool:
        """Have the shadows that a deployment names, as far as they are loaded. Gives whether there are any."""
        wanted = {label: plan.versions[label] for label in deployment.shadows if label in plan.versions}
        now = self._watching.setdefault(plan.policy, {})
        for label, each in list(now.items()):
            if label not in wanted or wanted[label].bundle.digest != each.digest:
                self._end(plan.policy, label)
        if self._generations.get(plan.policy) != plan.generation:
            for each in now.values():
                each.runner.rearm()
        self._generations[plan.policy] = plan.generation
        for label, version in wanted.items():
            if label not in now:
                now[label] = self._begin(plan.policy, label, version)
        return bool(now)

    def show(self, policy: str, settled: Sequence[Settled]) -> None:
        """Show what was decided and recorded to the policy's shadows. Never raises."""
        watching = self._watching.get(policy)
        if not watching:
            return
        if self.pressed():
            for label in watching:
                self._metrics.unshown(policy, label, sum(len(each.group.rows) for each in settled))
            return
        try:
            now_s = self._clock.monotonic_s()
            for each in settled:
                rows = shown(each, now_s)
                if len(rows):
                    for shadow in watching.values():
                        shadow.runner.offer_nowait(rows)
        except Exception:
            log.exception("shadows_not_shown", policy=policy)

    def view(self, policy: str) -> list[dict[str, Any]]:
        """What this worker's shadows of a policy have come to."""
        watching = self._watching.get(policy, {})
        return [
            {"version": label, "digest": each.digest} | each.runner.view() for label, each in sorted(watching.items())
        ]

    def fault_of(self, policy: str, label: str) -> str | None:
        """Why a shadow is not asked any more here; None: it watches, or is none."""
        each = self._watching.get(policy, {}).get(label)
        now = None if each is None else each.runner.statistics()
        if now is None or now.status not in ("tripped", "failed"):
            return None
        return f"its shadow {now.status}" + (f": {now.why}" if now.why else "")

    def refresh_metrics(self) -> None:
        for policy, watching in self._watching.items():
            for label, each in watching.items():
                self._metrics.tell(policy, label, each.runner.statistics())

    async def aclose(self) -> None:
        """End all shadows, and write what they have scored. One that is stuck is left behind."""
        runners = [each.runner for watching in self._watching.values() for each in watching.values()]
        for runner in runners:
            runner.close()
        ended = await asyncio.gather(*(asyncio.to_thread(runner.join, CLOSE_S) for runner in runners))
        if not all(ended):
            log.warning("shadows_left_behind", count=ended.count(False))
        await self.stream.aclose()

    def _begin(self, policy: str, label: str, version: LoadedVersion) -> _Watching:
        log.info("shadow_watches", policy=policy, version=label)
        runner = Runner(
            partial(_engine, version),
            partial(uniforms, self._keyring.signing.draw),
            partial(self.stream.put, policy, label),
            self._metrics.called(policy, label),
            limit_s=self._limit_s,
            cpu_share=self._cpu_share,
            monotonic_s=self._clock.monotonic_s,
        )
        runner.start(label)
        return _Watching(version.bundle.digest, runner)

    def _end(self, policy: str, label: str) -> None:
        self._watching[policy].pop(label).runner.close()
        self._metrics.forget(policy, label)
        log.info("shadow_gone", policy=policy, version=label)


def _engine(version: LoadedVersion) -> Engine:
    """The engine that scores. Called on the shadow's thread."""
    if version.engine.device == "cpu":
        return version.engine
    return Engine(replace(version.bundle, latency_budget_ms=math.inf), "cpu")
