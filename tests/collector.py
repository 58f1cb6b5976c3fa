"""A collector of traces for tests: takes OTLP over HTTP, as any does, and keeps the spans."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class Received:
    """A span as it came."""

    trace: str
    id: str
    parent: str
    name: str
    begin: float  #: UNIX seconds
    end: float
    attributes: dict[str, Any]
    events: dict[str, float]  #: UNIX seconds by name
    is_error: bool
    service: str
    instance: str

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Collector:
    """Listens while it is a context."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Received] = []
        self._bodies: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:  # noqa: N805
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                if handler.path == "/v1/traces":
                    self._take(body)
                handler.send_response(200 if handler.path == "/v1/traces" else 404)
                handler.end_headers()
                handler.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(handler, *_: Any, **__: Any) -> None:  # noqa: N805
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def env(self) -> dict[str, str]:
        """Has other processes send their spans here, soon."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    @property
    def text(self) -> bytes:
        """All that came, as it came."""
        with self._lock:
            return b"\n".join(self._bodies)

    def spans(self, trace: str | None = None, name: str | None = None) -> list[Received]:
        """Those of one trace, or name; the earliest first."""
        with self._lock:
            found = [
                span
                for span in self._spans
                if trace in (None, span.trace) and name in (None, span.name)
            ]
        return sorted(found, key=lambda span: span.begin)

    def _take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        found = []
        for group in request.resource_spans:
            resource = _plain(group.resource.attributes)
            for scope in group.scope_spans:
                found += [
                    Received(
                        trace=span.trace_id.hex(),
                        id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        name=span.name,
                        begin=span.start_time_unix_nano / 1e9,
                        end=span.end_time_unix_nano / 1e9,
                        attributes=_plain(span.attributes),
                        events={e.name: e.time_unix_nano / 1e9 for e in span.events},
                        is_error=span.status.code == span.status.STATUS_CODE_ERROR,
                        service=resource.get("service.name", ""),
                        instance=resource.get("service.instance.id", ""),
                    )
                    for span in scope.spans
                ]
        with self._lock:
            self._bodies.append(body)
            self._spans += found


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
