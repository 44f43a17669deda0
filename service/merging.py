"""How the metrics of several workers become those of one service: a rule for each, and the merge.

Duty: keys of series, the table of rules, boards to families that Prometheus is told. It knows no process.
Strategy: counters and histograms are sums, of dead workers too. What is measured has a rule below: a test holds the
table against all gauges there are. Names, texts and types are those of the worker that answers: all run one program.
Promise: whichever worker answers says the same, and no counter falls while the service runs, but when its series ends.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final, Literal

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from policies.errors import NotReady
from service.boards import COUNTED, MEASURED, Board, Number

TRIES: Final = 500
PAUSE_S: Final = 0.002

Rule = Literal["sum", "max", "min", "total"]

# total: a sum since the start, told as a gauge: what a dead worker had stays. Of what all workers read from the same
# Redis the largest is told: they read within seconds of each other, and what is too much or too old must be seen.
RULES: Final[dict[str, Rule]] = {
    "surefoot_audit_stopped": "max",
    "surefoot_audit_unchained": "sum",
    "surefoot_breaker_open": "max",
    "surefoot_calibration_alarm": "max",
    "surefoot_calibration_evidence": "max",
    "surefoot_concurrency_limit": "sum",
    "surefoot_control_age_seconds": "max",
    "surefoot_control_stale": "max",
    "surefoot_deciding_rows": "sum",
    "surefoot_estimate_effective_n": "max",
    "surefoot_estimate_lower": "max",
    "surefoot_estimate_share": "min",
    "surefoot_estimate_unsupported": "max",
    "surefoot_estimate_upper": "max",
    "surefoot_estimate_value": "max",
    "surefoot_exploration_halted": "max",
    "surefoot_exploration_lease": "min",
    "surefoot_exploration_lease_failures": "total",
    "surefoot_exploration_left": "sum",
    "surefoot_group_abandoned": "max",
    "surefoot_group_lag": "max",
    "surefoot_group_pending": "max",
    "surefoot_halts": "max",
    "surefoot_ledger_bytes": "sum",
    "surefoot_ledger_corrupt_files": "sum",  # found again by whoever adopts them
    "surefoot_ledger_corrupt_rows": "sum",
    "surefoot_ledger_discarded_files": "total",
    "surefoot_ledger_lost_events": "total",
    "surefoot_ledger_oldest_seconds": "max",
    "surefoot_ledger_recording": "min",
    "surefoot_ledger_rejected_events": "total",
    "surefoot_ledger_unconfirmed_events": "sum",
    "surefoot_ledger_unshipped_events": "sum",
    "surefoot_limit_denials": "total",
    "surefoot_live_workers": "max",
    "surefoot_loaded_versions": "min",
    "surefoot_pending_decisions": "max",
    "surefoot_policy_info": "max",
    "surefoot_redis_info": "max",
    "surefoot_redis_replicas": "min",
    "surefoot_redis_weakness": "max",
    "surefoot_reward_sum": "total",
    "surefoot_rollout_guard": "max",
    "surefoot_rollout_mismatched": "max",
    "surefoot_rollout_paused": "max",
    "surefoot_rollout_stage": "max",
    "surefoot_rollout_units": "max",
    "surefoot_rollout_weight": "max",
    "surefoot_shadow_breaker_open": "max",
    "surefoot_shadow_lag_seconds": "max",
    "surefoot_shadow_share": "min",
    "surefoot_shadow_waiting": "sum",
    "surefoot_store_memory_bytes": "max",
    "surefoot_store_memory_limit_bytes": "min",
    "surefoot_store_up": "min",
    "surefoot_stream_bytes": "max",
    "surefoot_stream_entries": "max",
    "surefoot_stream_oldest_seconds": "max",
    "surefoot_waiting_requests": "sum",
    "surefoot_worker_restarts": "sum",
    "surefoot_workers": "sum",
    "surefoot_workers_behind": "max",
}

_MERGE: Final[dict[Rule, Callable[[Iterable[float]], float]]] = {"sum": sum, "total": sum, "max": max, "min": min}
Labels = tuple[tuple[str, str], ...]


class Key(msgspec.Struct, frozen=True, array_like=True):
    """What a series is called. metric: the family; sample: as Prometheus reads it."""

    metric: str
    sample: str
    labels: Labels


_read_key = msgspec.json.Decoder(Key).decode


def key_of(metric: str, sample: str, names: Sequence[str], values: Sequence[str]) -> bytes:
    """Write a series' key."""
    return msgspec.json.encode(Key(metric, sample, tuple(zip(names, values, strict=True))))


def kind_of(typ: str, metric: str) -> int:
    """Say whether a series counts, or measures."""
    return COUNTED if typ != "gauge" or RULES.get(metric) == "total" else MEASURED


class Merged(Collector):
    """The families of all workers, for one answer."""

    def __init__(self, own: CollectorRegistry, boards: Iterable[tuple[bool, list[Number]]]) -> None:
        """own: whose names, texts and types are told. boards: for each whether its worker serves, and what it says."""
        self._own = own
        self._series: dict[str, dict[str, dict[Labels, list[float]]]] = defaultdict(lambda: defaultdict(dict))
        for serving, numbers in boards:
            for number in numbers:
                if serving or number.kind != MEASURED:
                    key = _read_key(number.key)
                    self._series[key.metric][key.sample].setdefault(key.labels, []).append(number.value)

    def collect(self) -> Iterator[Metric]:
        for family in self._own.collect():
            merged = Metric(family.name, family.documentation, family.type)
            samples = self._series.get(family.name, {})
            if family.type == "histogram":
                _add_histogram(merged, samples)
            else:
                rule = RULES.get(family.name, "sum")
                for sample, series in samples.items():
                    for labels, values in series.items():
                        merged.add_sample(sample, dict(labels), merge(rule, values))
            yield merged


async def merged_registry(own: CollectorRegistry, boards: Sequence[Board]) -> CollectorRegistry:
    """Read all boards, and give them as one registry."""
    told = [(board.serving, await read(board)) for board in boards]
    registry = CollectorRegistry()
    registry.register(Merged(own, told))
    return registry


async def read(board: Board) -> list[Number]:
    """Read a board at one moment. A worker that dies, or loads a version, changes it for about a millisecond."""
    for _ in range(TRIES):
        numbers = board.read()
        if numbers is not None:
            return numbers
        await asyncio.sleep(PAUSE_S)
    raise NotReady("the metrics of another worker do not come to rest: ask again")


def merge(rule: Rule, values: Sequence[float]) -> float:
    """Make one number of those of the workers. NaN says that one cannot tell: the others may."""
    told = [value for value in values if not math.isnan(value)]
    if not told:
        return math.nan
    return _MERGE[rule](told)


def _add_histogram(merged: Metric, samples: dict[str, dict[Labels, list[float]]]) -> None:
    """Add up what fell into each bucket; told is what lies at or below its end."""
    name = merged.name
    rows: dict[Labels, dict[float, float]] = defaultdict(dict)
    written: dict[float, str] = {}
    for labels, values in samples.get(f"{name}_bucket", {}).items():
        *of, (_, end) = labels
        rows[tuple(of)][float(end)] = sum(values)
        written[float(end)] = end
    for series, buckets in rows.items():
        ends = sorted(buckets)
        below = list(accumulate(buckets[end] for end in ends))
        for last, count in zip(ends, below, strict=True):
            merged.add_sample(f"{name}_bucket", dict(series) | {"le": written[last]}, count)
        merged.add_sample(f"{name}_count", dict(series), below[-1])
        merged.add_sample(f"{name}_sum", dict(series), sum(samples.get(f"{name}_sum", {}).get(series, [])))
