"""Which spans does a stage tell of one request? From times that are known when it has ended.

prefill          from its message's sending to its end
  queue          until a worker took it
  load           a prefix from the store, if it was there
  compute        until the first token
  save           its blocks into ring and store, beside the others
  publish        until RabbitMQ has confirmed decode's job
decode
  queue
  load           the prompt's KV
  generate       the rest of the answer
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from vllm.tracing import SpanAttributes

from pdtasks.messages import StageReport
from pdtasks.naming import PREFILL
from pdtasks.tracing import Carried, Tracer

#: Outcomes of a run that nobody is served by.
_ERRORS: Final = ("failed", "late", "refused")


class StageSpan:
    """One run of a stage in its request's trace. Nothing is done where nobody traces."""

    def __init__(
        self,
        tracer: Tracer,
        carried: Carried,
        stage: str,
        began: float,
        attributes: Mapping[str, str | int | bool],
    ) -> None:
        """Args:
        carried: what the stage's message says.
        began: UNIX seconds when the stage was begun.
        """
        self._stage = stage
        self._began = began
        # (hosts' clocks compared)
        sent_at = min(carried.sent_at or began, began)
        self._span = tracer.begin(
            stage,
            sent_at,
            parent=carried.parent,
            kind="consumer",
            attributes={
                "messaging.system": "rabbitmq",
                "messaging.destination.name": stage,
                **attributes,
            },
        )
        if carried.sent_at:
            self._span.part("queue", sent_at, began, {})
        #: Of the span that the next stage is part of: the asker's, or this one when there is none.
        self.headers = carried.parent or self._span.headers
        self._given_at = self._made_at = began

    @property
    def is_recorded(self) -> bool:
        """Will anybody see it?"""
        return self._span.is_recorded

    def given(self) -> None:
        """The engine is told of the request now."""
        self._given_at = time.time()

    def made(self) -> None:
        """The engine has made its last token, or was left."""
        self._made_at = time.time()

    def published(self, began: float, seconds: float) -> None:
        """RabbitMQ has confirmed the next stage's job. `began`: UNIX seconds."""
        attributes = {"messaging.system": "rabbitmq"}
        self._span.part("publish", began, began + seconds, attributes)

    def moved(self, op: str, records: list[dict[str, Any]], until: float) -> None:
        """KV blocks were loaded or saved, by each rank its part, `until` (UNIX seconds)."""
        if not records:
            return
        self._span.part(
            op,
            until - max(r["seconds"] for r in records),
            until,
            {
                "pdtasks.kv.blocks": min(r["blocks"] for r in records),
                "pdtasks.kv.bytes": sum(r["bytes"] for r in records),
                "pdtasks.kv.blocks_missing": max(r["missing"] for r in records),
            },
        )
        if op == "load":
            # What the engine does with it comes after.
            self._given_at = max(self._given_at, until)

    def end(self, outcome: str, report: StageReport | None, why_recomputed: str) -> None:
        """The run has ended; `report`: if there is one."""
        name = "compute" if self._stage == PREFILL else "generate"
        if self._made_at > self._began:
            self._span.part(name, min(self._given_at, self._made_at), self._made_at, {})
        attributes: dict[str, str | int | float | bool] = {"pdtasks.outcome": outcome}
        if report is not None:
            attributes |= {
                SpanAttributes.GEN_AI_USAGE_PROMPT_TOKENS: report.prompt_tokens,
                SpanAttributes.GEN_AI_USAGE_COMPLETION_TOKENS: report.output_tokens,
                "pdtasks.cached_tokens": report.cached_tokens,
                "pdtasks.kv.blocks_written": report.kv_blocks_written,
                "pdtasks.kv.bytes_written": report.kv_bytes_written,
                "pdtasks.kv.blocks_loaded": report.kv_blocks_loaded,
                "pdtasks.kv.bytes_loaded": report.kv_bytes_loaded,
                "pdtasks.kv.blocks_recomputed": report.kv_blocks_recomputed,
            }
            if report.kv_blocks_recomputed:
                attributes["pdtasks.kv.why_recomputed"] = why_recomputed
        self._span.end(time.time(), attributes, error=outcome if outcome in _ERRORS else "")
