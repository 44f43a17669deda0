"""One span per decision reaches an OTLP collector when one is configured, and carries no state."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.conftest import new_server

STATE = [0.0123, -0.02, 0.03, 0.04]


class Collector(ThreadingHTTPServer):
    """A collector that keeps the spans it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        sent = ExportTraceServiceRequest.FromString(body)
        collector = self.server
        assert isinstance(collector, Collector)
        collector.spans += [s for each in sent.resource_spans for scope in each.scope_spans for s in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_one_span_per_decision_continues_the_callers_trace(tmp_path: Path, collector: Collector) -> None:
    service = new_server(tmp_path)
    service.settings["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{collector.server_port}"
    service.start()
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    with httpx.Client(base_url=service.url) as http:
        headers = {"traceparent": f"00-{trace}-{parent}-01"}
        first = http.post("/v1/act", json={"state": STATE}, headers=headers)
        second = http.post("/v1/act", json={"state": STATE})
        unsampled = http.post("/v1/act", json={"state": STATE}, headers={"traceparent": f"00-{trace}-{parent}-00"})
    assert service.stop() == 0  # what is left is exported on the way out
    assert [span.name for span in collector.spans] == ["decide", "decide"]
    attributes = {
        each.value.string_value: span
        for span in collector.spans
        for each in span.attributes
        if each.key == "rl.decision.id"
    }
    span = attributes[first.json()["decision_id"]]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace, parent)
    assert first.headers["traceparent"] == f"00-{trace}-{span.span_id.hex()}-01"
    assert span.end_time_unix_nano > span.start_time_unix_nano
    (routing,) = span.events
    assert routing.name == "feature_flag.evaluation"
    assert {each.key: each.value.string_value for each in routing.attributes}["feature_flag.result.variant"] == "v2"
    assert attributes[second.json()["decision_id"]].trace_id.hex() in second.headers["traceparent"]
    assert unsampled.headers["traceparent"].endswith("-00")
    assert all(str(STATE[0]) not in str(span) for span in collector.spans)
