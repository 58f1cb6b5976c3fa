"""What does the API tell of a request's trace? The HTTP request, and what is asked in it.

    POST /v1/chat/completions     until the last byte is sent; in its place `job` or `batch line`
      llm_request                 one prompt and its answers, until the last token
        line                      until it is its turn
        publish                   until RabbitMQ has confirmed its message, or each of them
        prefill, decode           the workers' (`pdtasks.worker.spans`)

vLLM would tell of `llm_request` by one engine's times: its name and attributes are kept here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.tracing import SpanAttributes
from vllm.v1.engine import EngineCoreRequest

from pdtasks.tracing import NO_SPAN, NO_TRACER, Span, Tracer, carried_by

#: Under this name an app's state has the tracer.
STATE: Final = "pdtasks_tracer"

_around: ContextVar[Span] = ContextVar("span", default=NO_SPAN)


def span_around() -> Span:
    """What is asked in this context is part of it."""
    return _around.get()


def tracer_of(app: FastAPI) -> Tracer:
    """The one of this process."""
    found: Tracer = getattr(app.state, STATE, NO_TRACER)
    return found


@contextmanager
def tracing(
    tracer: Tracer,
    name: str,
    begin: float,
    attributes: Mapping[str, str | int],
    parent: Mapping[str, str] | None = None,
) -> Iterator[Span]:
    """What is asked in this context is part of a span of its own, since `begin` (UNIX seconds)."""
    span = tracer.begin(name, begin, parent=parent or {}, attributes=attributes)
    token = _around.set(span)
    error = ""
    try:
        yield span
    except Exception as exc:  # (one that is cancelled is no failure)
        error = type(exc).__name__
        raise
    finally:
        _around.reset(token)
        span.end(time.time(), {}, error=error)


class Traces:
    """ASGI layer: a span for each request that asks for something."""

    def __init__(self, app: ASGIApp, *, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Others only look: dashboards and load balancers, every second.
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        span = self._tracer.begin(
            "POST",
            time.time(),
            parent=carried_by(Headers(scope=scope)).parent,
            kind="server",
            attributes={"http.request.method": "POST"},
        )
        status = 0

        def noted(message: Message) -> Any:
            nonlocal status
            status = status or message.get("status", 0)
            return send(message)

        token = _around.set(span)
        try:
            await self._app(scope, receive, noted)
        finally:
            _around.reset(token)
            # Not the path as it was sent: anybody may send any.
            route = getattr(scope.get("route"), "path", "")
            attributes: dict[str, str | int] = {"http.route": route} if route else {}
            if status:
                attributes["http.response.status_code"] = status
            failed = str(status or "aborted") if not 0 < status < 500 else ""
            span.end(time.time(), attributes, error=failed, name=f"POST {route}".strip())


class AskedSpan:
    """One prompt and its answers, from the API's taking it in to the last answer's end."""

    def __init__(self, request: EngineCoreRequest, now: float, kind: str, model: str) -> None:
        """`now`: UNIX seconds."""
        around = span_around()
        attributes = _parameters(request) if around.is_recorded else {}
        self._span = around.child(
            "llm_request", now, attributes | {"gen_ai.request.model": model, "pdtasks.kind": kind}
        )
        self._began = now
        self._prompt_tokens = len(request.prompt_token_ids or ())
        self._published_at = 0.0
        self._route = ""
        self._num_open = self._num_answers = self._output_tokens = 0
        self._first_at = float("inf")
        self._outcome = "done"
        self._error = ""

    @property
    def headers(self) -> dict[str, str]:
        """For its message."""
        return self._span.headers

    def joins(self) -> None:
        """One more answer is to come."""
        self._num_open += 1
        self._num_answers += 1

    def publishing(self, route: str) -> None:
        """It is its turn. `route`: which way it goes."""
        if self._span.is_recorded and not self._published_at:
            self._published_at, self._route = time.time(), route
            self._span.part("line", self._began, self._published_at, {})

    def published(self) -> None:
        """RabbitMQ has its message."""
        if self._span.is_recorded:
            attributes = {"messaging.system": "rabbitmq"}
            self._span.part("publish", self._published_at, time.time(), attributes)

    def answered(
        self,
        outcome: str,
        at: float,
        *,
        output_tokens: int,
        first_at: float | None,
        second_at: float | None,
    ) -> None:
        """One of its answers has ended, as `Record.end` has it. Times: UNIX seconds."""
        self._num_open -= 1
        if not self._span.is_recorded:
            return
        self._output_tokens += output_tokens
        for name, when in (("first token", first_at), ("second token", second_at)):
            if when is not None:
                self._span.note(name, when, {})
        self._first_at = min(self._first_at, first_at or self._first_at)
        if outcome != "done":
            self._outcome = outcome
        if outcome not in ("done", "stopped"):
            self._error = outcome
        if not self._num_open:
            self._end(at)

    def _end(self, at: float) -> None:
        attributes: dict[str, str | int | float] = {
            SpanAttributes.GEN_AI_REQUEST_N: self._num_answers,
            SpanAttributes.GEN_AI_USAGE_PROMPT_TOKENS: self._prompt_tokens,
            SpanAttributes.GEN_AI_USAGE_COMPLETION_TOKENS: self._output_tokens,
            SpanAttributes.GEN_AI_LATENCY_E2E: at - self._began,
            "pdtasks.outcome": self._outcome,
        }
        if self._route:
            attributes["pdtasks.route"] = self._route
        if self._output_tokens:
            first_s = self._first_at - self._began
            attributes[SpanAttributes.GEN_AI_LATENCY_TIME_TO_FIRST_TOKEN] = first_s
        self._span.end(at, attributes, error=self._error)


def _parameters(request: EngineCoreRequest) -> dict[str, str | int | float]:
    found: dict[str, str | int | float] = {
        SpanAttributes.GEN_AI_REQUEST_ID: request.external_req_id or request.request_id
    }
    if (params := request.sampling_params) is not None:
        found[SpanAttributes.GEN_AI_REQUEST_TEMPERATURE] = params.temperature
        found[SpanAttributes.GEN_AI_REQUEST_TOP_P] = params.top_p
        if params.max_tokens is not None:
            found[SpanAttributes.GEN_AI_REQUEST_MAX_TOKENS] = params.max_tokens
    return found
