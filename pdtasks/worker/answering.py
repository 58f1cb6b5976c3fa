"""How do an engine's outputs become messages on the reply streams?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackEncoder

from pdtasks.bus.reply import is_reply_stream
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.engine.generation import Generation
from pdtasks.errors import EngineFailed, PdtasksError, where
from pdtasks.messages import Ask, Failure, StageReport, StepReply

logger = logging.getLogger(__name__)

Reports = tuple[StageReport, ...]


class PutsReplies(Protocol):
    """`pdtasks.bus.reply.ReplyWriter`, as far as this module needs it."""

    def put(self, stream: str, reply: StepReply) -> None: ...


@dataclass
class _StreamStep:
    """What one engine step has for one reply stream."""

    outputs: list[EngineCoreOutput] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    reports: dict[str, Reports] = field(default_factory=dict)


class Answers:
    """A worker's end of the reply streams. For one thread, the engine's loop."""

    def __init__(self, replies: PutsReplies, *, worker: str) -> None:
        """`worker`: who says it."""
        self._replies = replies
        self._worker = worker
        self._encoder = MsgpackEncoder(size_threshold=1 << 60)
        self._reports: dict[Generation, Callable[[], Reports]] = {}

    def __len__(self) -> int:
        """Generations whose answers are under way."""
        return len(self._reports)

    def begin(self, generation: Generation, reports: Callable[[], Reports]) -> None:
        """`reports` is asked when the answer of `generation` is finished here."""
        self._reports[generation] = reports

    def end(self, generation: Generation) -> None:
        """Nothing of `generation` will come any more."""
        del self._reports[generation]

    def readers_of(self, stream: str) -> list[str]:
        """Requests under way whose answers go to `stream`."""
        return [g.request_id for g in self._reports if g.reply_to == stream]

    def publish_step(
        self, step: list[tuple[Generation, int, EngineCoreOutput]], timestamp: float
    ) -> None:
        """One message for each reply stream and stage, however many requests are in the step."""
        by_stream: dict[tuple[str, str], _StreamStep] = {}
        for generation, position, output in step:
            if generation.reply_to is None:
                continue
            reports = None
            if output.finish_reason is not None:
                try:
                    reports = self._reports[generation]()
                except Exception as exc:  # noqa: BLE001 - it ends one request, not the engine
                    logger.error("no report of %s: %s", generation.request_id, where(exc))  # noqa: TRY400
                    generation.fail(EngineFailed(f"the answer was lost: {type(exc).__name__}"))
                    continue
            part = by_stream.setdefault((generation.reply_to, generation.stage), _StreamStep())
            part.outputs.append(output)
            part.positions.append(position)
            part.attempts.append(generation.attempt)
            if reports is not None:
                part.reports[generation.request_id] = reports
        for (stream, stage), part in by_stream.items():
            outputs = EngineCoreOutputs(outputs=part.outputs, timestamp=timestamp)
            self._put(
                stream,
                stage,
                outputs=bytes(cast("bytes", self._encoder.encode(outputs)[0])),
                positions=tuple(part.positions),
                attempts=tuple(part.attempts),
                reports=part.reports,
            )

    def fail(self, stream: str | None, stage: str, request_id: str, error: PdtasksError) -> None:
        """Tell the asker that there will be no answer: `stage` has failed."""
        if is_reply_stream(stream):
            self._put(stream, stage, failures={request_id: Failure.of(error)})

    def report(self, stream: str | None, stage: str, request_id: str, reports: Reports) -> None:
        """Tell the asker what was done for a request that it ended itself."""
        self._put(stream, stage, reports={request_id: reports})

    def start(self, stream: str | None, stage: str, request_id: str) -> None:
        """Tell the asker who does the stage that begins now."""
        self._put(stream, stage, started=(request_id,))

    def ask(self, stream: str, stage: str, request_id: str, ask: Ask) -> None:
        """Ask the asker how much of the answer it has, for an attempt that begins now."""
        self._put(stream, stage, asks={request_id: ask})

    def _put(self, stream: str | None, stage: str, **content: Any) -> None:
        if stream is not None:
            reply = StepReply(worker=self._worker, stage=stage, engine=ENGINE_VERSION, **content)
            self._replies.put(stream, reply)
