"""Is this process to tell its part of a request's trace, and to which trace does that belong?

OpenTelemetry's own variables say so, and nothing of it is imported without them: spans of a process
that is not asked for any are `NO_SPAN`.  A message carries its trace in its headers, as W3C has it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, Protocol

import msgspec

from pdtasks.errors import ConfigurationError

#: Any of these turns it on, as `OTEL_TRACES_EXPORTER=otlp` does.
ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTER: Final = "OTEL_TRACES_EXPORTER"
HTTP, GRPC = "http/protobuf", "grpc"

#: Header: when a message with a trace was sent, UNIX seconds.  RabbitMQ does not tell.
_SENT_AT: Final = "trace_sent_at"
#: W3C's bounds; what is longer belongs to no trace.
_LONGEST: Final = {"traceparent": 100, "tracestate": 512}

#: Headers of what belongs to no trace.
NO_TRACE: Final[Mapping[str, str]] = MappingProxyType({})

#: Attributes of a span.
Attributes = Mapping[str, str | int | float | bool]


class Carried(msgspec.Struct, frozen=True, kw_only=True):
    """What a message says of the trace that it is part of."""

    parent: dict[str, str] = {}  #: W3C's headers; empty: of none
    sent_at: float = 0.0  #: UNIX seconds; 0: not known


OF_NO_TRACE: Final = Carried()


class Span(Protocol):
    """A part of a trace under way."""

    @property
    def is_recorded(self) -> bool:
        """Will anybody see it? Then what is told of it may cost something."""
        ...

    @property
    def headers(self) -> dict[str, str]:
        """What makes others its children; empty when there is no trace."""
        ...

    def child(self, name: str, at: float, attributes: Attributes) -> Span:
        """A part that begins `at` (UNIX seconds)."""
        ...

    def part(self, name: str, begin: float, end: float, attributes: Attributes) -> None:
        """A part that is over. `begin`, `end`: UNIX seconds."""
        ...

    def note(self, name: str, at: float, attributes: Attributes) -> None:
        """Something that happened in it. `at`: UNIX seconds."""
        ...

    def end(self, at: float, attributes: Attributes, *, error: str = "", name: str = "") -> None:
        """It is over.

        Args:
            at: UNIX seconds.
            error: the name of what went wrong.
            name: a better one for the span.
        """
        ...


class Tracer(Protocol):
    """Makes the spans of one process. For any thread."""

    def begin(
        self,
        name: str,
        at: float,
        *,
        parent: Mapping[str, str],
        kind: str = "internal",
        attributes: Attributes | None = None,
    ) -> Span:
        """A span that begins `at` (UNIX seconds).

        Args:
            parent: `headers` of the span that it is part of; empty: a trace begins with it.
            kind: OpenTelemetry's word, in lower case.
        """
        ...

    def close(self) -> None:
        """Send what has ended. Bounded, whatever the collector does."""
        ...


class _NoSpan:
    is_recorded = False

    @property
    def headers(self) -> dict[str, str]:
        return {}

    def child(self, *_: Any, **__: Any) -> Span:
        return self

    def part(self, *_: Any, **__: Any) -> None: ...

    def note(self, *_: Any, **__: Any) -> None: ...

    def end(self, *_: Any, **__: Any) -> None: ...


class _NoTracer:
    def begin(self, *_: Any, **__: Any) -> Span:
        return NO_SPAN

    def close(self) -> None: ...


NO_SPAN: Final[Span] = _NoSpan()
NO_TRACER: Final[Tracer] = _NoTracer()


def is_configured() -> bool:
    """Has anybody asked for traces?

    Raises ConfigurationError for a way to send them that there is not.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = os.environ.get(_EXPORTER, "").strip()
    if exporter == "none" or not (exporter or any(os.environ.get(name) for name in ENDPOINTS)):
        return False
    if exporter not in ("", "otlp"):
        raise ConfigurationError(f"{_EXPORTER} is otlp or none: pdtasks sends traces by OTLP alone")
    if protocol() not in (HTTP, GRPC):
        raise ConfigurationError(f"{_PROTOCOLS[1]} is {HTTP} or {GRPC}")
    return True


def require_usable() -> None:
    """Raises ConfigurationError for a way to send traces that there is not."""
    is_configured()


def protocol() -> str:
    """How OTLP is spoken; OpenTelemetry's default is HTTP."""
    return next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), HTTP)


def make_tracer(service: str, instance: str) -> Tracer:
    """This process's tracer. Raises ConfigurationError as `is_configured` does.

    Args:
        service: what kind of process this is, unless OTEL_SERVICE_NAME says so.
        instance: which one of that kind.
    """
    if not is_configured():
        return NO_TRACER
    from pdtasks.otlp import OTLPTracer, sending

    return OTLPTracer(service, instance, sending(is_grpc=protocol() == GRPC))


@contextmanager
def not_vllms() -> Iterator[None]:
    """vLLM's processes that begin here send no spans of their own.

    They would look for the same collector, by gRPC whatever it speaks.
    """
    endpoint = os.environ.pop(ENDPOINTS[0], None)
    try:
        yield
    finally:
        if endpoint is not None:
            os.environ[ENDPOINTS[0]] = endpoint


# -- what messages carry -------------------------------------------------------------------------


def message_headers(parent: Mapping[str, str], now: float) -> dict[str, Any]:
    """Headers of a message that is part of a trace; none without one. `now`: UNIX seconds."""
    return {**parent, _SENT_AT: now} if parent else {}


def carried_by(headers: Mapping[str, Any] | None) -> Carried:
    """The trace that `headers` tell of. What cannot be is no trace: a job does not depend on it."""
    found = headers or {}
    parent = {
        name: value
        for name, longest in _LONGEST.items()
        if isinstance(value := found.get(name), str) and 0 < len(value) <= longest
    }
    sent_at = found.get(_SENT_AT)
    if "traceparent" not in parent:
        return OF_NO_TRACE
    if not isinstance(sent_at, float) or not 0 < sent_at < 2**53:
        sent_at = 0.0
    return Carried(parent=parent, sent_at=sent_at)


def callers_headers() -> dict[str, str]:
    """The trace that the program around this call is in, if it traces itself."""
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from pdtasks.otlp import current_headers

    return current_headers()
