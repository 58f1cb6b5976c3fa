"""Do spans go out as they should, and harm nobody when they cannot?"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from pdtasks import otlp
from pdtasks.errors import ConfigurationError
from pdtasks.otlp import OTLPTracer, Told, current_headers
from pdtasks.tracing import make_tracer
from tests.spans import Kept, id_of, parent_of, seconds, trace_of
from tests.waiting import wait_until

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = SAMPLED[:-1] + "0"


class Collector(SpanExporter):
    """Takes spans, or not."""

    def __init__(self) -> None:
        self.answers: list[SpanExportResult | Exception] = []
        self.spans: list[ReadableSpan] = []
        self.goes_on = threading.Event()
        self.goes_on.set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.goes_on.wait(60)
        answer = self.answers.pop(0) if self.answers else SpanExportResult.SUCCESS
        if isinstance(answer, Exception):
            raise answer
        self.spans += spans
        return answer


def test_a_span_is_a_child_of_what_its_message_names() -> None:
    kept = Kept()

    span = kept.tracer.begin("prefill", 10.0, parent={"traceparent": SAMPLED}, kind="consumer")
    span.part("compute", 11.0, 11.5, {"a": 1})
    span.note("first token", 11.5, {})
    span.end(12.0, {"b": 2})

    part, whole = kept.spans
    assert (part.name, whole.name) == ("compute", "prefill")
    assert parent_of(whole) == 0xB7AD6B7169203331
    assert parent_of(part) == id_of(whole)
    assert trace_of(part) == trace_of(whole) == 0x0AF7651916CD43DD8448EB211C80319C
    assert seconds(part) == (11.0, 11.5)
    assert seconds(whole) == (10.0, 12.0)
    assert (dict(part.attributes or {}), dict(whole.attributes or {})) == ({"a": 1}, {"b": 2})
    assert [event.name for event in whole.events] == ["first token"]
    assert whole.resource.attributes["service.name"] == "pdtasks-test"
    assert whole.resource.attributes["service.instance.id"] == "i"


def test_what_its_headers_name_is_the_span_itself() -> None:
    kept = Kept()
    first = kept.tracer.begin("first", 1.0, parent={})
    kept.tracer.begin("second", 2.0, parent=first.headers).end(3.0, {})
    first.end(4.0, {})

    assert parent_of(kept.named("second")) == id_of(kept.named("first"))
    assert parent_of(kept.named("first")) is None


def test_a_trace_that_is_not_sampled_stays_so() -> None:
    kept = Kept()

    span = kept.tracer.begin("prefill", 1.0, parent={"traceparent": NOT_SAMPLED})
    span.part("compute", 1.0, 2.0, {})
    span.end(2.0, {})

    assert not span.is_recorded
    assert kept.spans == []
    # and so do those that follow
    assert span.headers["traceparent"].startswith(NOT_SAMPLED[:36])
    assert span.headers["traceparent"].endswith("-00")


def test_the_sampler_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    kept = Kept()

    kept.tracer.begin("own", 1.0, parent={}).end(2.0, {})
    kept.tracer.begin("asked for", 1.0, parent={"traceparent": SAMPLED}).end(2.0, {})

    assert [span.name for span in kept.spans] == ["asked for"]


def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,deployment.environment=test")
    kept = Kept()

    kept.tracer.begin("n", 1.0, parent={}).end(2.0, {})

    (span,) = kept.spans
    assert span.resource.attributes["service.name"] == "mine"
    assert span.resource.attributes["deployment.environment"] == "test"


def test_an_error_has_a_name_and_no_text() -> None:
    kept = Kept()

    kept.tracer.begin("n", 1.0, parent={}).end(2.0, {}, error="late")

    (span,) = kept.spans
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description is None
    assert dict(span.attributes or {}) == {"error.type": "late"}


def test_a_collector_that_takes_nothing_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "pdtasks.otlp")
    collector = Collector()
    told = Told(collector)
    failed = SpanExportResult.FAILURE
    collector.answers = [failed, OSError("canary"), failed, SpanExportResult.SUCCESS, failed]

    results = [told.export([]) for _ in range(5)]

    assert results == [failed, failed, failed, SpanExportResult.SUCCESS, failed]
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "the collector of traces takes nothing",
        "the collector of traces takes spans again",
        "the collector of traces takes nothing",
    ]
    assert "canary" not in caplog.text


def test_a_collector_that_hangs_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "_CLOSE_S", 0.1)
    collector = Collector()
    collector.goes_on.clear()
    tracer = OTLPTracer(
        "s", "i", BatchSpanProcessor(collector, max_queue_size=8, max_export_batch_size=2)
    )

    def work() -> None:
        for _ in range(100):
            tracer.begin("n", 1.0, parent={}).end(2.0, {})
        tracer.close()

    working = threading.Thread(target=work)
    working.start()
    working.join(30)
    assert not working.is_alive()

    # What did not fit was dropped, the oldest first.
    collector.goes_on.set()
    wait_until(lambda: len(collector.spans) > 2)
    assert len(collector.spans) <= 2 + 8


class GRPCCollector(TraceServiceServicer):
    """Takes spans by gRPC."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def Export(  # noqa: N802
        self, request: ExportTraceServiceRequest, context: object
    ) -> ExportTraceServiceResponse:
        groups = (scope for one in request.resource_spans for scope in one.scope_spans)
        self.names += [span.name for scope in groups for span in scope.spans]
        return ExportTraceServiceResponse()


def test_spans_go_out_by_grpc_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = GRPCCollector()
    server = grpc.server(ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    try:
        tracer = make_tracer("s", "i")
        tracer.begin("n", 1.0, parent={}).end(2.0, {})
        tracer.close()

        wait_until(lambda: collector.names == ["n"])
    finally:
        server.stop(None).wait(10)


def test_a_close_sends_what_is_there() -> None:
    collector = Collector()
    tracer = OTLPTracer("s", "i", BatchSpanProcessor(collector, schedule_delay_millis=3_600_000))
    tracer.begin("n", 1.0, parent={}).end(2.0, {})

    tracer.close()

    assert [span.name for span in collector.spans] == ["n"]


def test_a_callers_own_trace_goes_on() -> None:
    assert current_headers() == {}

    context = trace.SpanContext(1, 2, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert current_headers() == {"traceparent": f"00-{1:032x}-{2:016x}-01"}


def test_a_variable_that_cannot_be_read_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")  # less than a batch

    with pytest.raises(ConfigurationError, match="OTEL_BSP"):
        otlp.sending(is_grpc=False)
