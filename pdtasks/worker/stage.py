"""What do both stages of a request have in common, apart from being tasks (`worker.task`)?"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from pdtasks.engine.generation import Generation, Verdict
from pdtasks.engine.wire import decode_request, require_runnable
from pdtasks.errors import InvalidRequest, PdtasksError, RequestAborted, where
from pdtasks.messages import Answer, Ask, DecodeJob, PrefillJob, StageReport
from pdtasks.tracing import OF_NO_TRACE, Carried
from pdtasks.worker import counting, service
from pdtasks.worker.spans import StageSpan

logger = logging.getLogger(__name__)

J = TypeVar("J", PrefillJob, DecodeJob)


class GoesOnElsewhere(RequestAborted):
    """Another attempt answers this request: what belongs to it stays."""


class Stage(ABC, Generic[J]):
    """One request's way through a stage. For the engine's loop, and for one run."""

    name: str  #: of the stage, as in `naming`
    generation: Generation  #: from `new_generation` on
    span: StageSpan  #: from `run` on
    why_recomputed = ""  #: KV that was there before, if it was computed again

    def __init__(
        self,
        here: service.Worker,
        job: J,
        reply_to: str | None,
        *,
        is_again: bool = False,
        carried: Carried = OF_NO_TRACE,
    ) -> None:
        """Args:
        reply_to: the asker's reply stream, None when nobody reads along.
        is_again: the job was delivered before, perhaps to a worker that was lost.
        carried: the trace that its message is part of.
        """
        self.here = here
        self.attempt = here.new_attempt()
        self._is_again = is_again
        self.job: J = job
        self.reply_to = reply_to
        self.detokeniser: IncrementalDetokenizer | None = None  # for who wants text in the result
        self._carried = carried
        self._is_held = False  # it takes of this worker's credit
        self._started = time.monotonic()
        self._started_at = time.time()

    async def run(self) -> Any:
        """`work`, counted and traced."""
        self.span = StageSpan(
            self.here.tracer,
            self._carried,
            self.name,
            self._started_at,
            {
                "pdtasks.request_id": self.job.request_id,
                "pdtasks.worker": self.here.name,
                "pdtasks.again": self._is_again,
            },
        )
        if self._is_again:
            counting.redelivered(self.name)
        outcome, report = "failed", None
        try:
            result = await self.work()
            outcome = self.outcome(result)
            if outcome == "done":
                report = self.reports()[-1]
        except GoesOnElsewhere:
            outcome = "elsewhere"
            raise
        except RequestAborted:
            outcome = "aborted"
            raise
        except InvalidRequest:
            outcome = "refused"
            raise
        except asyncio.CancelledError:
            outcome = "late"  # its deadline has passed
            raise
        finally:
            if self._is_held:
                self.here.credit.ends(self.engine_id)
            counting.ended(self.name, outcome, report, self.why_recomputed)
            if self.span.is_recorded:
                self._end_span(outcome, report)
        return result

    def _end_span(self, outcome: str, report: StageReport | None) -> None:
        try:
            if hasattr(self, "generation"):
                report = report or self.reports()[-1]
                for op in ("load", "save"):
                    records = self.generation.transfers.get(op, [])
                    self.span.moved(op, records, self.generation.moved_at.get(op, 0.0))
            self.span.end(outcome, report, self.why_recomputed)
        except Exception as exc:  # noqa: BLE001 - no answer depends on it
            logger.error("a span of %s is lost: %s", self.job.request_id, where(exc))  # noqa: TRY400

    @abstractmethod
    async def work(self) -> Any:
        """The way itself; returns what is to become of it in the task."""

    def outcome(self, result: Any) -> str:
        """How a run has ended that raised nothing: "done", if all was done here."""
        return "done"

    def begin(self) -> None:
        """Tell who wants to know. Raises IncompatibleWorker for a request that is not for us."""
        self.here.check_origin(self.job.engine, self.job.model)
        if self.job.tells_start:
            self.here.answers.start(self.reply_to, self.name, self.job.request_id)

    def read_request(self, wire: bytes) -> EngineCoreRequest:
        """vLLM's request in a job. Raises InvalidRequest for what the engine would not survive."""
        request = decode_request(wire)
        require_runnable(request, self.here.engine.config.model_config)
        return request

    @property
    def engine_id(self) -> str:
        """A name for the engine that no other attempt has."""
        return f"{self.job.request_id}#{self.attempt:x}"

    async def seen_tokens(self, handed_on: int = 0) -> tuple[int, ...]:
        """Those of the answer that earlier attempts have published, as far as the asker says.

        Raises RequestAborted when nobody waits for it any more, GoesOnElsewhere when a job that was
        handed on more often than `handed_on` has taken it over.
        """
        if not self._is_again or self.reply_to is None:
            return ()
        ask = Ask(attempt=self.attempt, handed_on=handed_on)
        progress = await self.here.ask_progress(self.reply_to, self.name, self.job.request_id, ask)
        if progress is None:
            return ()
        if progress.state == "elsewhere":
            raise GoesOnElsewhere("another attempt answers this request")
        if progress.state == "gone":
            raise RequestAborted("it was answered, or the caller hung up")
        return progress.token_ids

    def new_generation(
        self, request: EngineCoreRequest, *, position: int, is_told: bool = True
    ) -> Generation:
        """`request` for this worker's engine.

        Args:
            position: tokens of the answer that are there.
            is_told: whoever reads along gets what the engine makes.
        """
        generation = Generation(
            request=request,
            request_id=self.job.request_id,
            reply_to=self.reply_to if is_told else None,
            position=position,
            stage=self.name,
            attempt=self.attempt,
            judge=self.judge,
        )
        self.generation = generation
        return generation

    async def generate(self) -> None:
        """Have the engine run `generation`; see `Worker.generate`."""
        self.span.given()
        prompt = len(self.generation.request.prompt_token_ids or ())
        self._is_held = True
        self.here.credit.begins(self.name, self.engine_id, prompt)
        try:
            await self.here.generate(self.generation, self.reports)
        finally:
            self.here.credit.computed(self.engine_id)
            self.span.made()

    def judge(self, output: EngineCoreOutput) -> Verdict:
        """Has the answer's text reached a stop string? Only the worker knows, without an asker."""
        if self.detokeniser is None:
            return Verdict()
        stopped = output.finish_reason == FinishReason.STOP
        return Verdict(self.detokeniser.update(output.new_token_ids, stopped))

    def fail(self, error: PdtasksError) -> None:
        """Tell the asker that there will be no answer, for a task that goes on with others."""
        error.attempt = self.attempt
        self.here.answers.fail(self.reply_to, self.name, self.job.request_id, error)

    @abstractmethod
    def reports(self) -> tuple[StageReport, ...]:
        """Those of the stages so far, with this one's."""

    def tell_of_aborted(self) -> None:
        """What was done for a request that the asker ended: at a stop string, perhaps."""
        self.here.answers.report(self.reply_to, self.name, self.job.request_id, self.reports())

    def prefix_figures(self) -> dict[str, Any]:
        """A report's figures of a prefix that earlier prompts have left in the store."""
        loaded = self.generation.transfers.get("load", [])
        blocks = min((r["blocks"] + r["missing"] for r in loaded), default=0)
        lost = any(r["missing"] for r in loaded)
        if lost:
            self.why_recomputed = why_missing(loaded)
        return {
            "kv_blocks_loaded": 0 if lost else blocks,
            "kv_bytes_loaded": sum(r["bytes"] for r in loaded),
            "kv_blocks_recomputed": blocks if lost else 0,
        }

    def make_report(self, *, since: float, prompt_tokens: int, **kv: Any) -> StageReport:
        """This stage's report. `since`: UNIX seconds when it could have begun."""
        return StageReport(
            stage=self.name,
            worker=self.here.name,
            queue_s=max(0.0, self._started_at - since),
            seconds=time.monotonic() - self._started,
            prompt_tokens=prompt_tokens,
            output_tokens=len(self.generation.token_ids),
            cached_tokens=self.generation.cached_tokens,
            **kv,
        )

    def make_answer(
        self, *, before: tuple[int, ...], prompt_tokens: int, first_token_at: float
    ) -> Answer | None:
        """The finished answer for who wants it as a result, after the tokens `before`."""
        if self.detokeniser is None:
            return None
        generation = self.generation
        return Answer(
            request_id=self.job.request_id,
            text=self.detokeniser.get_next_output_text(finished=True, delta=False),
            token_ids=before + tuple(generation.token_ids),
            finish_reason=str(generation.finish_reason),
            stop_reason=generation.stop_reason,
            prompt_tokens=prompt_tokens,
            stages=self.reports(),
            time_to_first_token_s=first_token_at - self.job.submitted_at,
        )


def why_missing(records: list[dict[str, Any]]) -> str:
    """Why blocks of a load were missing: the store did not answer as it should, or had them not."""
    return "transfer_failed" if any(r["error"] for r in records) else "missing"
