"""Stage 2: load the prompt's KV and write the rest of the answer.

Tokens go to the asker from the engine's steps.  For a caller without a reply stream the finished
answer is the task's result.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec
from vllm.v1.engine import EngineCoreOutput, FinishReason

from pdtasks.app import app
from pdtasks.engine.generation import Generation
from pdtasks.engine.handover import make_decode
from pdtasks.engine.wire import decode_request
from pdtasks.errors import RequestAborted
from pdtasks.kv.handle import KVHandle
from pdtasks.messages import Answer, DecodeJob, StageReport, read_message
from pdtasks.naming import DECODE, DECODE_TASK
from pdtasks.worker import service
from pdtasks.worker.task import StageTask

logger = logging.getLogger(__name__)


@app.task(base=StageTask, bind=True, name=DECODE_TASK)
def decode(self: StageTask, wire: bytes) -> dict[str, Any] | None:
    """Run a `DecodeJob`; returns an `Answer` as plain values when the caller wants text."""
    job = read_message(DecodeJob, wire)
    here = service.current()
    try:
        answer = here.stages.run(
            self.request.id, _Decode(here, job, self.reply_stream).run, job.deadline
        )
    except RequestAborted:
        self.end_aborted()
        return None
    return None if answer is None else msgspec.to_builtins(answer)


class _Decode:
    """One request's way through stage 2."""

    def __init__(self, here: service.Worker, job: DecodeJob, reply_to: str | None) -> None:
        self._here = here
        self._job = job
        self._reply_to = reply_to
        self._started = time.monotonic()
        self._started_at = time.time()
        self._text_stop: str | None = None
        self._detokeniser: Any = None

    async def run(self) -> Answer | None:
        try:
            return await self._run()
        finally:
            # Also when the request was aborted or has failed: nobody else will read it.
            self._here.discard(self._job.request_id)

    async def _run(self) -> Answer | None:
        job = self._job
        self._here.check_origin(job.engine, job.model)
        if job.tells_start:
            self._here.answers.start(self._reply_to, job.request_id)
        request = decode_request(job.request)
        if job.detokenise:
            self._detokeniser = self._here.text.detokeniser(request)
            self._detokeniser.update(list(job.output_token_ids), False)
        make_decode(
            request,
            self._here.engine_id(job.request_id),
            tokens=list(job.output_token_ids),
            handle=job.handle,
        )
        self._generation = generation = Generation(
            request=request,
            request_id=job.request_id,
            reply_to=self._reply_to,
            position=len(job.output_token_ids),
            on_output=self._on_output,
        )
        try:
            await self._here.generate(generation, lambda: (job.prefill, self._report()))
        except RequestAborted:
            # At a stop string, perhaps: then the asker may want to know.
            reports = (job.prefill, self._report())
            self._here.answers.report(self._reply_to, job.request_id, reports)
            raise
        finally:
            self._here.engine.forget(generation)
        return self._answer() if job.detokenise else None

    def _on_output(self, generation: Generation, output: EngineCoreOutput) -> None:
        # The asker has them from prefill, by that engine's clock.
        output.events = None
        output.prefill_stats = None
        if self._detokeniser is None:
            return
        stopped = generation.finish_reason == FinishReason.STOP
        self._text_stop = self._detokeniser.update(output.new_token_ids, stopped)
        if self._text_stop is not None:
            generation.finish_reason = FinishReason.STOP
            generation.stop_reason = self._text_stop

    def _report(self) -> StageReport:
        generation, job = self._generation, self._job
        records = generation.transfers.get("load", [])
        loaded, recomputed = self._blocks(records)
        return StageReport(
            stage=DECODE,
            worker=self._here.name,
            queue_s=max(0.0, self._started_at - job.prefilled_at),
            seconds=time.monotonic() - self._started,
            prompt_tokens=job.prefill.prompt_tokens,
            output_tokens=len(generation.token_ids),
            cached_tokens=generation.cached_tokens,
            kv_blocks_loaded=loaded,
            kv_bytes_loaded=sum(r["bytes"] for r in records),
            kv_blocks_recomputed=recomputed,
            kv_seconds=max((r["seconds"] for r in records), default=0.0),
        )

    def _blocks(self, records: list[dict[str, Any]]) -> tuple[int, int]:
        """Blocks of the prompt that were loaded, and that had to be computed again."""
        block_size = self._here.engine.config.cache_config.block_size
        in_prompt = -(-self._job.prefill.prompt_tokens // block_size)
        if self._job.handle is not None:
            in_prompt = KVHandle.from_wire(self._job.handle).num_blocks
        if records and not any(r["missing"] for r in records):
            return min(r["blocks"] for r in records), 0
        # vLLM recomputes the whole prompt, but for what its own prefix cache holds.
        return 0, in_prompt - self._generation.cached_tokens // block_size

    def _answer(self) -> Answer:
        generation, job = self._generation, self._job
        return Answer(
            request_id=job.request_id,
            text=self._detokeniser.get_next_output_text(finished=True, delta=False),
            token_ids=(*job.output_token_ids, *generation.token_ids),
            finish_reason=str(generation.finish_reason),
            stop_reason=generation.stop_reason,
            prompt_tokens=job.prefill.prompt_tokens,
            stages=(job.prefill, self._report()),
            time_to_first_token_s=job.first_token_at - job.submitted_at,
        )
