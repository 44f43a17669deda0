"""Prometheus metrics: every name, in one place, on a registry that is given.

Duty: names, help, labels, and handles with their labels resolved at start, so that the hot path only adds numbers.
Labels are bounded: policies and versions that are loaded, roles, rules, reasons and codes from closed lists; never ids
or states.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from policies.types import Role
from safety.types import FallbackReason
from service.estimate_metrics import EstimateMetrics
from service.rollout_metrics import RolloutMetrics
from service.shadow_metrics import ShadowMetrics
from service.wire import INTERNAL, UNRECORDED, ActResponse

# From a lone inline decision (some 200 µs) to the default deadline of a request (1 s), about 2 buckets per doubling.
SECONDS = (
    0.0001, 0.00015, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003,
    0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0,
)  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DELAY_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 3600.0, 86_400.0)


class JoinCounts(Protocol):
    """What one call of the join did (`redis_streams.Counts`)."""

    @property
    def joined(self) -> int: ...
    @property
    def defaulted(self) -> int: ...
    @property
    def void(self) -> int: ...
    @property
    def quarantined(self) -> int: ...
    @property
    def late(self) -> int: ...
    @property
    def correction(self) -> int: ...
    @property
    def orphan(self) -> int: ...
    @property
    def pending(self) -> int: ...


@dataclass(frozen=True, slots=True)
class VersionMetrics:
    """Handles of one version with labels resolved."""

    decisions: dict[str, Counter]  # by role
    fallbacks: dict[str, Counter]  # by reason
    explored: Counter
    duration: Histogram
    inference: Histogram

    def count_rare(self, answer: ActResponse) -> None:
        if answer.explored:
            self.explored.inc()
        if answer.fallback is not None:
            self.fallbacks[answer.fallback].inc()


class Metrics:
    """All metrics of a process. Construct once per registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._versions: dict[tuple[str, str], VersionMetrics] = {}
        self._decisions = self._counter("decisions", "Decisions answered.", "policy", "version", "role")
        self._fallbacks = self._counter("fallbacks", "Decisions the fallback answered.", "policy", "version", "reason")
        self._explored = self._counter("explored", "Decisions drawn by the exploring part.", "policy", "version")
        self._duration = self._histogram(
            "act_duration", "From the parsed request to its answer; a batch counts once.", "policy", "version"
        )
        self._inference = self._histogram("inference_duration", "One call of the network.", "policy", "version")
        self.batch_rows = Histogram(
            "surefoot_batch_rows", "Rows decided together.", ["policy"], buckets=ROWS, registry=registry
        )
        self.overrides = self._counter("overrides", "Decisions whose proposal a rule forbade.", "policy", "rule")
        self.monitored = self._counter(
            "monitored", "Decisions whose action a rule in monitor mode forbids.", "policy", "rule"
        )
        self.stand_ins = self._counter("stand_ins", "Decisions that another version made.", "policy", "reason")
        self.rule_failures = self._counter(
            "rule_failures", "Batches in which a rule raised, and denied.", "policy", "rule"
        )
        self.halts = self._gauge("halts", "Whether a kill switch is on (1) or not (0).", "policy", "switch")
        self.breaker_open = self._gauge(
            "breaker_open",
            "Whether a version's breaker keeps it from answering (1) or not (0).",
            "policy",
            "version",
            "breaker",
        )
        self.breaker_trips = self._counter(
            "breaker_trips", "Breakers that tripped in this worker.", "policy", "version"
        )
        self.budget_left = self._gauge("exploration_left", "What this worker's lease still holds.", "policy", "budget")
        self.lease_held = self._gauge("exploration_lease", "Whether this worker may explore (1) or not (0).", "policy")
        self.lease_failures = self._gauge("exploration_lease_failures", "Renewals of leases that Redis did not answer.")
        self.exploration_halted = self._gauge(
            "exploration_halted", "Whether bad outcomes have halted exploration (1) or not (0).", "policy"
        )
        self.explored_outcomes = self._counter(
            "explored_outcomes", "Outcomes of explored decisions that were read here.", "policy", "outcome"
        )
        self.limit_denials = self._gauge(
            "limit_denials", "Rows denied because Redis did not say what is left.", "policy"
        )
        self.memory_lookups = self._counter(
            "memory_lookups", "Episodes unknown here that were looked up in Redis.", "policy", "outcome"
        )
        self.memory_drops = self._counter(
            "memory_drops", "Steps of episodes that did not get to Redis.", "policy", "reason"
        )
        self.refusals = self._counter("no_safe_action", "Decisions refused: nothing allowed, no fallback.", "policy")
        self.unlogged = self._counter("unlogged_decisions", "Decisions answered but not recorded.", "policy")
        self.concurrency_limit = self._gauge("concurrency_limit", "Rows that may be decided at once.")
        self.deciding = self._gauge("deciding_rows", "Rows that are being decided.")
        self.waiting = self._gauge("waiting_requests", "Requests that wait for others to be decided.")
        self.shed = self._counter("shed_requests", "Requests refused for want of time.", "route", "reason")
        self.problems = self._counter("problems", "Requests answered with a problem.", "code")
        self.rewards = self._counter("rewards", "Rewards accepted, by the join's verdict.", "policy", "status")
        self.reward_sum = self._gauge("reward_sum", "Sum of accepted rewards since the start.", "policy")
        self.reward_delay = Histogram(
            "surefoot_reward_delay_seconds",
            "From a decision to its reward.",
            ["policy"],
            buckets=DELAY_SECONDS,
            registry=registry,
        )
        self.transitions = self._counter(
            "transitions",
            "What left the join: transitions by state, and rewards kept as late, correction or orphan.",
            "policy",
            "state",
        )
        self.pending = self._gauge("pending_decisions", "Decisions that wait for a reward or a successor.", "policy")
        self.calibration_alarm = self._gauge(
            "calibration_alarm", "Whether recorded probabilities were found wrong (1) or not (0).", "policy"
        )
        self.calibration_evidence = self._gauge(
            "calibration_evidence", "Largest evidence against them, as a share of what raises the alarm.", "policy"
        )
        self.calibration_unknown = self._counter(
            "calibration_unknown", "Decisions that were not judged: their propensity is null.", "policy"
        )
        self.calibration_broken = self._counter(
            "calibration_broken", "Decisions whose record contradicts itself.", "policy"
        )
        self.calibration_skipped = self._counter(
            "calibration_skipped", "Decisions that were not judged: there was no time.", "policy"
        )
        self.unshipped = self._gauge("ledger_unshipped_events", "Events recorded here and not yet in Redis.")
        self.oldest = self._gauge("ledger_oldest_seconds", "Age of the oldest event not yet in Redis.")
        self.ledger_bytes = self._gauge("ledger_bytes", "Bytes of events held in memory.")
        self.lost = self._gauge("ledger_lost_events", "Events that Redis lost and the spool no longer holds.")
        self.corrupt = self._gauge("ledger_corrupt_rows", "Spool rows that were torn or corrupt, and skipped.")
        self.corrupt_files = self._gauge("ledger_corrupt_files", "Spool files found damaged, rebuilt or set aside.")
        self.rejected = self._gauge("ledger_rejected_events", "Events that Redis refuses, set aside in rejected.db.")
        self.unconfirmed = self._gauge("ledger_unconfirmed_events", "Events that Redis's replicas have not confirmed.")
        self.discarded = self._gauge("ledger_discarded_files", "Files set aside long ago that were deleted.")
        self.recording = self._gauge(
            "ledger_recording", "Whether decisions are recorded as the tier promises (1) or not (0).", "policy"
        )
        self._ship_failures = self._counter(
            "ship_failures", "Calls of the join that Redis did not answer as asked.", "reason"
        )
        self.store_up = self._gauge("store_up", "Whether Redis answered the last call (1) or not (0).")
        self.redis_info = self._gauge(
            "redis_info",
            "What the connected Redis is.",
            *("version", "role", "appendonly", "appendfsync", "maxmemory_policy"),
        )
        self.redis_replicas = self._gauge("redis_replicas", "Replicas that are connected to it.")
        self.redis_weakness = self._gauge(
            "redis_weakness", "Whether it gives too little of something (1) or not (0).", "reason"
        )
        self.store_memory = self._gauge("store_memory_bytes", "Memory that Redis uses.")
        self.store_memory_limit = self._gauge("store_memory_limit_bytes", "Its `maxmemory`; +Inf: none is set.")
        of_stream, of_group = ("policy", "stream"), ("policy", "stream", "group")
        self.stream_entries = self._gauge("stream_entries", "Entries of a stream.", *of_stream)
        self.stream_bytes = self._gauge(
            "stream_bytes", "Memory of a stream, about; NaN: Redis does not tell.", *of_stream
        )
        self.stream_oldest = self._gauge("stream_oldest_seconds", "Age of a stream's oldest entry.", *of_stream)
        self.stream_trimmed = self._counter("stream_trimmed", "Entries trimmed by this worker.", *of_stream, "reason")
        self.group_lag = self._gauge("group_lag", "Entries not yet delivered; NaN: Redis cannot tell.", *of_group)
        self.group_pending = self._gauge("group_pending", "Entries delivered and not acknowledged.", *of_group)
        self.group_abandoned = self._gauge(
            "group_abandoned", "Whether nobody has asked for `group_ttl` (1) or somebody has (0).", *of_group
        )
        self.loaded = self._gauge("loaded_versions", "Versions that are loaded and warm.", "policy")
        self.load_failures = self._counter(
            "version_load_failures", "Loads of a version that failed in this worker.", "policy"
        )
        self.refused_callers = self._counter("refused_callers", "Callers that were not let in.", "reason")
        self.audit_entries = self._counter("audit_entries", "Entries that this worker added to the audit log.")
        self.audit_unchained = self._gauge("audit_unchained", "Entries on this disk that wait for their place.")
        self.audit_stopped = self._gauge("audit_stopped", "Whether the audit log does not take entries any more.")
        self.audit_faults = self._counter("audit_faults", "Audit logs found wrong: `file` or `fork`.", "kind")
        self.workers = self._gauge("workers", "Workers that run.")
        self.worker_restarts = self._gauge("worker_restarts", "How often those that run had to be replaced before.")
        self.control_age = self._gauge("control_age_seconds", "Since deployments were last read from Redis.")
        self.control_stale = self._gauge(
            "control_stale", "Whether the control state is too old for something: exploration, challenger.",
            "policy", "effect",
        )  # fmt: skip
        self.live_workers = self._gauge("live_workers", "Workers that were heard of lately, this one included.")
        self.workers_behind = self._gauge("workers_behind", "Live workers that serve an older generation.", "policy")
        self.changes_behind = self._counter(
            "changes_behind", "Changes that were answered before every live worker had them.", "policy"
        )
        self.shadows = ShadowMetrics(registry, SECONDS)
        self.estimates = EstimateMetrics(registry)
        self.rollouts = RolloutMetrics(registry)
        self.info = Gauge(
            "surefoot_policy_info", "Loaded versions.", ["policy", "version", "digest", "role"], registry=registry
        )

    def count_join(self, policy: str, counts: JoinCounts) -> None:
        """Add what one call of the join gave birth to."""
        for state in ("joined", "defaulted", "void", "quarantined", "late", "correction", "orphan"):
            born = getattr(counts, state)
            if born:
                self.transitions.labels(policy, state).inc(born)
        self.pending.labels(policy).set(counts.pending)

    def count_ship_failure(self, reason: str) -> None:
        """Count a call of the join that failed. reason: of a fixed set."""
        self._ship_failures.labels(reason).inc()

    def version(self, policy: str, version: str) -> VersionMetrics:
        """Give the handles of one version; their labels are resolved once."""
        known = self._versions.get((policy, version))
        if known is None:
            known = self._versions[policy, version] = self._resolve(policy, version)
        return known

    def forget(self, policy: str, version: str) -> None:
        """Drop the series of a version that is not loaded any more, so that their number stays bounded."""
        if self._versions.pop((policy, version), None) is None:
            return
        for role in get_args(Role):
            self._decisions.remove(policy, version, role)
        for reason in (*get_args(FallbackReason), INTERNAL, UNRECORDED):
            self._fallbacks.remove(policy, version, reason)
        for metric in (self._explored, self._duration, self._inference):
            metric.remove(policy, version)
        with contextlib.suppress(KeyError):  # they stand only once something was read or counted
            self.breaker_trips.remove(policy, version)
        for breaker in ("faults", "latency"):
            with contextlib.suppress(KeyError):
                self.breaker_open.remove(policy, version, breaker)

    def _resolve(self, policy: str, version: str) -> VersionMetrics:
        return VersionMetrics(
            decisions={role: self._decisions.labels(policy, version, role) for role in get_args(Role)},
            fallbacks={
                reason: self._fallbacks.labels(policy, version, reason)
                for reason in (*get_args(FallbackReason), INTERNAL, UNRECORDED)
            },
            explored=self._explored.labels(policy, version),
            duration=self._duration.labels(policy, version),
            inference=self._inference.labels(policy, version),
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"surefoot_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"surefoot_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"surefoot_{name}_seconds", text, labels, buckets=SECONDS, registry=self.registry)
