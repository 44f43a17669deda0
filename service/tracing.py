"""OpenTelemetry: the only importer of it. One span per decision, when an exporter is configured.

Duty: read `traceparent`, open and close one `decide` span around what has already happened, answer with its context.
Strategy: without OTEL_EXPORTER_OTLP_ENDPOINT nothing of the SDK is even imported, and a caller's traceparent is passed
on as it came. State values never enter a span.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

from service.plan import Row
from service.wire import ActResponse

_TRACEPARENT = re.compile(rb"^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")
Headers = tuple[tuple[bytes, bytes], ...]


class Tracing:
    """Traces decisions with the given tracer, or passes contexts through when there is none."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("surefoot") if provider else None

    @classmethod
    def from_environment(cls, sample: float) -> Tracing:
        """Export over OTLP/HTTP when OTEL_EXPORTER_OTLP_ENDPOINT (or its traces variant) is set."""
        if not any(os.environ.get(f"OTEL_EXPORTER_OTLP_{name}ENDPOINT") for name in ("", "TRACES_")):
            return cls()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        resource = Resource.create({SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", "surefoot")})
        provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(sample)))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    @staticmethod
    def parent(headers: Mapping[bytes, bytes]) -> str | None:
        """The caller's W3C traceparent, if it sent a well-formed one."""
        value = headers.get(b"traceparent")
        return None if value is None or not _TRACEPARENT.match(value) else value.decode()

    def decision(self, answer: ActResponse, row: Row, took_s: float) -> Headers:
        """Record a decision that took `took_s` and has just been made. Gives the headers to answer with."""
        if self._tracer is None:
            return ((b"traceparent", row.traceparent.encode()),) if row.traceparent else ()
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        end_ns = time.time_ns()
        context = propagator.extract({"traceparent": row.traceparent} if row.traceparent else {})
        span = self._tracer.start_span("decide", context, start_time=end_ns - int(took_s * 1e9))
        if span.is_recording():
            span.set_attributes(_attributes(answer))
            span.add_event("feature_flag.evaluation", _routing(answer), timestamp=end_ns)
        span.end(end_ns)
        trace = span.get_span_context()
        outgoing = f"00-{trace.trace_id:032x}-{trace.span_id:016x}-{int(trace.trace_flags):02x}"
        return ((b"traceparent", outgoing.encode()),)

    def close(self) -> None:
        """Export what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def _attributes(answer: ActResponse) -> dict[str, Any]:
    attributes = {
        "rl.decision.id": answer.decision_id,
        "rl.policy.name": answer.policy,
        "rl.policy.version": answer.version,
        "rl.action.name": answer.action_name,
        "rl.action.propensity": answer.propensity,
        "rl.exploration.explored": answer.explored,
        "rl.safety.overridden": answer.safety.overridden,
        "rl.fallback.reason": answer.fallback,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _routing(answer: ActResponse) -> dict[str, Any]:
    return {
        "feature_flag.key": answer.policy,
        "feature_flag.provider.name": "surefoot",
        "feature_flag.result.variant": answer.assigned_version,
        "feature_flag.result.reason": "split" if answer.role == "challenger" else "static",
        "feature_flag.version": str(answer.generation),
    }
