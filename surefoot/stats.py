"""What a policy's transitions look like as a whole: counts, rewards, delays, propensities, episodes, streams.

Duty: the figures of `surefoot transitions stats`, in one pass over a stretch of the stream. Nothing is consumed.
Strategy: sums and sketches; episodes alone need memory each, so at most `_EPISODES` are followed at a time, and where
that was too few the report says so.
Promise: memory is bounded whatever the stream's length.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import redis

from surefoot.entries import Row
from surefoot.exchange import connect, translated
from surefoot.group import stream_key
from surefoot.rows import RangeReader, Stretch, has_reward
from surefoot.sketch import Moments, Quantiles
from surefoot.streams import ANSWER_S, DEFAULT_REDIS_URL

_EPISODES = 100_000  # about 30 MB
_NAMES = 1_000  # different values that one count tells apart
_SUMS_TO_ONE = 1e-9

_STREAMS = ("transitions", "nstep", "correction", "quarantined", "late", "orphan")
_FLAGS = ("explored", "fallback", "overridden", "switched")
_COUNTED: Mapping[str, Callable[[Row], str]] = {
    "join": lambda row: row.join,
    "end": lambda row: row.end,
    "version": lambda row: row.record.version,
    "role": lambda row: row.record.role or "unknown",
    "order": lambda row: row.order or "none",
    "propensity_kind": lambda row: row.record.propensity_kind,
}


@dataclass(slots=True)
class Check:
    """Whether a quantity has the mean that it must have, row by row, if the logged propensities are true."""

    found: Moments = field(default_factory=Moments)
    expected: Moments = field(default_factory=Moments)
    off: Moments = field(default_factory=Moments)

    def add(self, found: float, expected: float) -> None:
        self.found.add(found)
        self.expected.add(expected)
        self.off.add(found - expected)

    def plain(self) -> dict[str, Any]:
        """`z`: by how many standard errors the means differ; beyond ±4 something is wrong, or few rows weigh all."""
        if not self.off.n:
            return {"count": 0, "mean": None, "expected": None, "z": None}
        std = self.off.std
        z = self.off.mean / (std / math.sqrt(self.off.n)) if std else None
        return {"count": self.off.n, "mean": self.found.mean, "expected": self.expected.mean, "z": z}


@dataclass(slots=True)
class _Episode:
    length: int = 0
    total: float = 0.0
    ended: bool = False


@dataclass(slots=True)
class Episodes:
    """Lengths and returns of episodes that ended, from steps in any order."""

    followed: OrderedDict[str, _Episode] = field(default_factory=OrderedDict)
    lengths: Moments = field(default_factory=Moments)
    returns: Moments = field(default_factory=Moments)
    open: int = 0
    dropped: int = 0  # followed no longer, to make room: if more of it comes, it counts as another

    def add(self, row: Row) -> None:
        if not row.episode:
            return
        episode = self.followed.setdefault(row.episode, _Episode())
        self.followed.move_to_end(row.episode)
        episode.length += 1
        episode.total += row.reward if has_reward(row) else 0.0
        episode.ended |= row.end in ("terminated", "truncated")
        if len(self.followed) > _EPISODES:
            self.dropped += 1
            self._settle(self.followed.popitem(last=False)[1])

    def _settle(self, episode: _Episode) -> None:
        if not episode.ended:
            self.open += 1
            return
        self.lengths.add(episode.length)
        self.returns.add(episode.total)

    def plain(self) -> dict[str, Any]:
        """Call it once, at the end."""
        while self.followed:
            self._settle(self.followed.popitem(last=False)[1])
        whole = {"ended": self.lengths.n, "open": self.open, "length": self.lengths.plain()}
        return {**whole, "return": self.returns.plain(), "dropped": self.dropped}


@dataclass(slots=True)
class Tally:
    """Figures of the rows added so far."""

    n: int = 0
    by: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in _COUNTED})
    reward: Moments = field(default_factory=Moments)
    delay: Quantiles = field(default_factory=Quantiles)
    flags: Counter[str] = field(default_factory=Counter)
    propensity: Moments = field(default_factory=Moments)
    propensities: Quantiles = field(default_factory=Quantiles)
    unknown: int = 0  # propensities
    inverse: Check = field(default_factory=Check)
    weight: Check = field(default_factory=Check)
    differ: int = 0
    episodes: Episodes = field(default_factory=Episodes)
    first_at_ms: int | None = None
    last_at_ms: int | None = None

    def add(self, row: Row) -> None:
        record = row.record
        self.n += 1
        for name, of in _COUNTED.items():
            _count(self.by[name], of(row))
        if has_reward(row):
            self.reward.add(row.reward)
        if row.reward_at_ms is not None:
            self.delay.add(row.reward_delay_ms)
        self.flags["explored"] += record.explored
        self.flags["fallback"] += record.fallback is not None
        self.flags["overridden"] += record.overridden
        self.flags["switched"] += record.switched
        self.first_at_ms = row.at_ms if self.first_at_ms is None else min(self.first_at_ms, row.at_ms)
        self.last_at_ms = row.at_ms if self.last_at_ms is None else max(self.last_at_ms, row.at_ms)
        self.episodes.add(row)
        self._weigh(row)

    def _weigh(self, row: Row) -> None:
        """Take up the propensity, unless the decision was voided: then it is about what was not carried out."""
        mass = row.record.propensity
        if row.join == "void":
            return
        if mass is None or not mass > 0.0:
            self.unknown += row.record.propensity_kind == "mass"
            return
        self.propensity.add(mass)
        self.propensities.add(mass)
        if row.spec.space.kind == "discrete" and row.record.fallback is None:
            self._check(row, mass)

    def _check(self, row: Row, mass: float) -> None:
        """What must hold on average, whatever the policy: E[1 / b(a)] and E[π(a) / b(a)], both over the support of b.

        Where exploration reaches every allowed action, these are the number of allowed actions, and 1.
        """
        chosen = int(row.action)  # type: ignore[arg-type]
        drawn_from = np.frombuffer(row.record.behaviour, "<f8")
        self.differ += abs(float(drawn_from[chosen]) - mass) > _SUMS_TO_ONE
        support = drawn_from > 0.0
        self.inverse.add(1.0 / mass, float(support.sum()))
        target = np.frombuffer(row.record.target, "<f8") * (np.frombuffer(row.mask, "u1") != 0)
        if total := float(target.sum()):
            self.weight.add(float(target[chosen]) / total / mass, float(target[support].sum()) / total)

    def plain(self) -> dict[str, Any]:
        shares = {name: self.flags[name] / self.n if self.n else None for name in _FLAGS}
        return {
            "transitions": self.n,
            "decided_ms": {"first": self.first_at_ms, "last": self.last_at_ms},
            "by": {name: dict(counter.most_common()) for name, counter in self.by.items()},
            "reward": self.reward.plain(),
            "reward_delay_ms": self.delay.plain(0.5, 0.9, 0.99, 1.0) | {"count": self.delay.n},
            "share": shares,
            "propensity": {
                "count": self.propensity.n,
                "unknown": self.unknown,
                "min": self.propensity.plain()["min"],
                **self.propensities.plain(0.01, 0.1, 0.5, 0.9),
            },
            "checks": {
                "inverse_propensity": self.inverse.plain(),
                "importance_weight": self.weight.plain(),
                "propensity_not_of_distribution": self.differ,
            },
            "episodes": self.episodes.plain(),
        }


def transitions_stats(
    policy: str,
    *,
    redis_url: str = DEFAULT_REDIS_URL,
    from_: str | None = None,
    until: str | None = None,
) -> dict[str, Any]:
    """Describe a policy's transitions, and its streams and groups, as values that JSON can hold.

    from_, until: as `export_transitions`. Raises ExportError for a policy that has none, Unreachable, Refused and
    Unreadable as `transitions` does.
    """
    reader = RangeReader(policy, redis_url, Stretch(from_, until), 5_000, retry_for_s=0.0)
    tally = Tally()
    for chunk in reader.chunks():
        for row in chunk.rows:
            tally.add(row)
    streams = _streams(policy, redis_url)
    return {"policy": policy, **tally.plain(), "copies": reader.losses.copies, **streams, "gaps": reader.losses.gaps}


def _streams(policy: str, redis_url: str) -> dict[str, Any]:
    """Lengths of the policy's streams, who reads them, and what the service counts as lost."""
    key = stream_key(policy)
    base = key.removesuffix("transitions")
    client = connect(redis_url, ANSWER_S)
    try:
        lengths: dict[str, Any] = {name: client.xlen(base + name) for name in _STREAMS}
        groups: Any = client.xinfo_groups(key)
        lost: Any = client.hvals(base + "lost")
    except redis.RedisError as error:
        raise translated(error) from error
    finally:
        client.close()
    return {"streams": lengths, "groups": [_group(each) for each in groups], "lost": sum(map(int, lost))}


def _group(info: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": info["name"].decode(errors="replace"),
        "consumers": info["consumers"],
        "pending": info["pending"],
        "lag": info.get("lag"),  # not delivered yet; None where Redis cannot tell
        "last_delivered": info["last-delivered-id"].decode(),
    }


def _count(counter: Counter[str], value: str) -> None:
    """Count a value; beyond so many different ones, under one name."""
    counter[value if value in counter or len(counter) < _NAMES else "others"] += 1
