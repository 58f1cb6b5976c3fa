"""How are spans made, kept until they are sent, and sent? By OpenTelemetry's SDK, beside the work.

What ends is put into a queue that drops what is too much; one thread sends it, by OTLP.  Nobody
waits for a collector, and one that does not answer is told of once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.environment_variables import OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pdtasks.errors import ConfigurationError

logger = logging.getLogger(__name__)

#: As in `pdtasks.tracing`.
Attributes = Mapping[str, str | int | float | bool]

#: Seconds that a stopping process gives its last spans.
_CLOSE_S: Final = 2.0
#: They tell of each batch, and of each span too many.
_LOUD: Final = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")

_W3C: Final = TraceContextTextMapPropagator()


class OTLPSpan:
    """One of OpenTelemetry's spans, told in seconds."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def is_recorded(self) -> bool:
        """Is it sampled?"""
        return self._span.is_recording()

    @property
    def headers(self) -> dict[str, str]:
        """W3C's, also of what is not sampled: what follows begins no trace of its own."""
        return _headers_of(self._here)

    @property
    def _here(self) -> Context:
        return trace.set_span_in_context(self._span, Context())

    def child(self, name: str, at: float, attributes: Attributes) -> OTLPSpan:
        """Of a span that is not recorded: another such one."""
        span = self._tracer.start_span(name, self._here, attributes=attributes, start_time=_ns(at))
        return OTLPSpan(self._tracer, span)

    def part(self, name: str, begin: float, end: float, attributes: Attributes) -> None:
        """A child that is over."""
        if self.is_recorded:
            self.child(name, begin, attributes).end(max(begin, end), {})

    def note(self, name: str, at: float, attributes: Attributes) -> None:
        """An event."""
        self._span.add_event(name, attributes, _ns(at))

    def end(
        self,
        at: float,
        attributes: Attributes,
        *,
        error: str = "",
        name: str = "",
    ) -> None:
        """No error's text is told: it may quote a prompt."""
        if name:
            self._span.update_name(name)
        self._span.set_attributes(attributes)
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end(_ns(at))


class OTLPTracer:
    """Makes spans, and has them sent. A provider of its own: vLLM's and others' stay theirs."""

    def __init__(self, service: str, instance: str, processor: SpanProcessor) -> None:
        """Args:
        service: the resource's name, unless the environment has one.
        instance: which process of that name.
        processor: gets the spans; see `sending`.
        """
        self._provider = TracerProvider(
            resource=_resource(service, instance), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("pdtasks")

    def begin(
        self,
        name: str,
        at: float,
        *,
        parent: Mapping[str, str],
        kind: str = "internal",
        attributes: Attributes | None = None,
    ) -> OTLPSpan:
        """As `pdtasks.tracing.Tracer` has it."""
        context = _W3C.extract(parent, Context())
        span = self._tracer.start_span(
            name,
            context,
            kind=trace.SpanKind[kind.upper()],
            attributes=attributes,
            start_time=_ns(at),
        )
        return OTLPSpan(self._tracer, span)

    def close(self) -> None:
        """The SDK would wait 30 s for a collector that does not answer."""
        closing = threading.Thread(target=self._provider.shutdown, name="spans-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


class Told(SpanExporter):
    """Another exporter, whose failures the log has once and not for each batch."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Raises nothing: what raised has failed."""
        try:
            result = self._exporter.export(spans)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is the spans' business alone
            result, why = SpanExportResult.FAILURE, f" ({type(exc).__name__})"
        else:
            why = ""
        fails = result is not SpanExportResult.SUCCESS
        if fails and not self._fails:
            logger.warning(
                "the collector of traces takes nothing%s: spans are dropped until it does; see "
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                why,
            )
        elif self._fails and not fails:
            logger.warning("the collector of traces takes spans again")
        self._fails = fails
        return result

    def shutdown(self) -> None:
        """End the exporter, also one that waits between two tries."""
        self._exporter.shutdown()


def current_headers() -> dict[str, str]:
    """W3C's headers of the span that this context is in; empty when it is in none."""
    return _headers_of(None)


def _headers_of(context: Context | None) -> dict[str, str]:
    found: dict[str, str] = {}
    _W3C.inject(found, context)
    return found


def _resource(service: str, instance: str) -> Resource:
    attributes = {SERVICE_INSTANCE_ID: instance}
    is_named = SERVICE_NAME in os.environ.get(OTEL_RESOURCE_ATTRIBUTES, "")
    if not is_named and not os.environ.get(OTEL_SERVICE_NAME):
        attributes[SERVICE_NAME] = service
    return Resource.create(attributes)


def sending(*, is_grpc: bool) -> SpanProcessor:
    """Sends spans as OTEL_EXPORTER_OTLP_… and OTEL_BSP_… say. Raises ConfigurationError."""
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return BatchSpanProcessor(Told(_exporter(is_grpc=is_grpc)))
    except ValueError as exc:  # of a variable that should be a number, for example
        raise ConfigurationError(f"OTEL_EXPORTER_OTLP_…, OTEL_BSP_…: {exc}") from exc


def _exporter(*, is_grpc: bool) -> SpanExporter:
    # Each takes its time to import, and is alone.
    if is_grpc:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as ByGRPC

        return ByGRPC()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as ByHTTP

    return ByHTTP()


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
