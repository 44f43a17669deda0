"""Watches what the connected Redis is, for readiness, metrics and the log.

Duty: ask now and then, remember the answer, hold it against the durability that was asked for, and say once when that
changes. Knows nothing of Redis commands or HTTP; what is too little stands in `store_facts.py`.
Promise: what is shown is the last answer, or that there was none; a weakness is logged when it is found and when it is
gone, not at every look.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

import structlog

from policies.errors import StoreAway
from service.metrics import Metrics
from service.shipcall import Confirm
from service.store_facts import REASONS, StoreFacts, Weakness, weaknesses

AWAY = Weakness("away", "", "it does not answer; events wait in the spool")

log = structlog.get_logger(__name__)


class Probed(Protocol):
    """Redis."""

    async def probe(self) -> StoreFacts:
        """Raises StoreAway."""


class StoreWatch:
    def __init__(self, redis: Probed, metrics: Metrics, tier: str, confirm: Confirm | None = None) -> None:
        self._redis = redis
        self._metrics = metrics
        self._tier = tier
        self._confirm = confirm
        self._told: dict[str, Weakness] = {}
        self._labels: tuple[str, ...] | None = None
        self.facts: StoreFacts | None = None

    @property
    def weaknesses(self) -> list[Weakness]:
        """What this Redis gives too little of, for the tier asked for."""
        if self.facts is None:
            return [AWAY]
        confirm = self._confirm or Confirm(0, 0.0)
        return weaknesses(self.facts, self._tier, confirm.replicas, confirm.wait_s)

    async def refresh(self) -> None:
        """Ask Redis what it is."""
        try:
            self.facts = await self._redis.probe()
        except StoreAway:
            self.facts = None
        self._metrics.store_up.set(self.facts is not None)
        if self.facts is not None:
            self._show(self.facts)
        self._tell()

    def view(self) -> dict[str, Any]:
        """What readiness says."""
        found = self.weaknesses
        return {
            "durability": self._tier,
            "redis": None if self.facts is None else asdict(self.facts),
            "degraded": bool(found),
            "degraded_by": [{"reason": str(each), "detail": each.detail} for each in found],
        }

    def _show(self, facts: StoreFacts) -> None:
        appendonly = {True: "yes", False: "no", None: ""}[facts.appendonly]
        labels = facts.version, facts.role, appendonly, facts.appendfsync or "", facts.maxmemory_policy or ""
        if self._labels is not None and self._labels != labels:
            self._metrics.redis_info.remove(*self._labels)
        self._labels = labels
        self._metrics.redis_info.labels(*labels).set(1)
        self._metrics.redis_replicas.set(facts.connected_replicas or 0)

    def _tell(self) -> None:
        now = {each.reason: each for each in self.weaknesses}
        for reason in (AWAY.reason, *REASONS):
            self._metrics.redis_weakness.labels(reason).set(reason in now)
        for reason, weakness in now.items():
            if self._told.get(reason) != weakness and reason != AWAY.reason:  # the shipper says when Redis is away
                log.warning("redis_weakness", reason=str(weakness), detail=weakness.detail, durability=self._tier)
        for reason in self._told.keys() - now.keys() - {AWAY.reason}:
            log.info("redis_weakness_gone", reason=reason)
        self._told = now
