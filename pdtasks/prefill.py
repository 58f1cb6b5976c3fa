"""Stage 1: compute the prompt, publish the first token, hand the KV to stage 2.

The first token goes to the asker from the engine's step, before the hand-over is done.  The stage
itself sends the decode task that is chained to this one (`pipeline.next_stage`): Celery would only
begin when this task has returned, and wait for RabbitMQ without a bound.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from pdtasks.app import app
from pdtasks.broker.publishing import Publish
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.engine.generation import Generation
from pdtasks.engine.handover import make_prefill, may_go_on
from pdtasks.engine.text import TextFrontend
from pdtasks.engine.wire import decode_request, encode_request
from pdtasks.errors import InvalidRequest, RequestAborted
from pdtasks.kv import params
from pdtasks.messages import Answer, DecodeJob, PrefillJob, StageReport, read_message
from pdtasks.naming import PREFILL, PREFILL_TASK
from pdtasks.pipeline import next_stage
from pdtasks.worker import service
from pdtasks.worker.task import StageTask

logger = logging.getLogger(__name__)

#: Longest wait for the last blocks to reach the store; decode recomputes after that.
SAVE_TIMEOUT_S = 20.0


@app.task(base=StageTask, bind=True, name=PREFILL_TASK, ignore_result=True)
def prefill(self: StageTask, wire: bytes) -> None:
    """Run a `PrefillJob`, and hand it to the next stage unless it ends here."""
    job = read_message(PrefillJob, wire)
    here = service.current()
    request = self.request
    hand_over = partial(
        next_stage, chain=request.chain, parent_id=request.id, root_id=request.root_id
    )
    stage = _Prefill(here, job, self.reply_stream, hand_over)
    answer = None
    try:
        answer = here.stages.run(request.id, stage.run, job.deadline)
    except InvalidRequest as exc:
        # Not raised: the text of a task's exception goes into events and logs, and this one may
        # quote the request.
        self.refuse(job.request_id, exc)
    except RequestAborted:
        self.end_aborted()
    self.end_chain(answer)


class _Prefill:
    """One request's way through stage 1."""

    def __init__(
        self,
        here: service.Worker,
        job: PrefillJob,
        reply_to: str | None,
        next_stage: Callable[[DecodeJob], Publish],
    ) -> None:
        self._here = here
        self._job = job
        self._reply_to = reply_to
        self._next_stage = next_stage
        self._started = time.monotonic()
        self._started_at = time.time()
        self._first_token_at = 0.0
        self._text_stop: str | None = None
        self._detokeniser: Any = None

    async def run(self) -> Answer | None:
        """Returns the answer that ends here and that somebody waits for."""
        job = self._job
        self._here.aborted.require_wanted(job.request_id)
        if job.tells_start:
            self._here.answers.start(self._reply_to, job.request_id)
        original = await self._request(self._here.text)
        wire = job.request if job.request is not None else encode_request(original)
        request = decode_request(wire)
        make_prefill(request, self._here.engine_id(job.request_id), transfer_id=job.request_id)
        self._goes_on = may_go_on(original, self._here.engine.config.model_config.max_model_len)
        generation = Generation(
            request=request,
            request_id=job.request_id,
            reply_to=self._reply_to,
            position=0,
            on_output=self._on_output,
        )
        self._generation = generation
        try:
            await self._here.generate(generation, lambda: (self._report(),))
            await self._saved(generation)
            self._here.aborted.require_wanted(job.request_id)
            if self._goes_on:
                await self._hand_over(wire, generation)
        except (asyncio.CancelledError, Exception) as exc:
            if isinstance(exc, RequestAborted):
                # At a stop string, perhaps: then the asker may want to know.
                self._here.answers.report(self._reply_to, job.request_id, (self._report(),))
            # The engine may be computing the prompt all the same, and write it when it is done.
            self._here.discard_when_saved(generation)
            raise
        self._here.engine.forget(generation)
        if self._goes_on:
            return None
        self._here.discard(job.request_id)
        return self._make_answer(original)

    async def _hand_over(self, wire: bytes, generation: Generation) -> None:
        """Send the next stage's job; returns when RabbitMQ has confirmed it."""
        job = self._job
        next_job = DecodeJob(
            request_id=job.request_id,
            engine=ENGINE_VERSION,
            model=job.model,
            request=wire,
            output_token_ids=tuple(generation.token_ids),
            handle=self._handle() if self._is_complete(generation) else None,
            prefill=self._report(),
            detokenise=job.text is not None,
            submitted_at=job.submitted_at,
            prefilled_at=time.time(),
            first_token_at=self._first_token_at,
            deadline=job.deadline,
            tells_start=job.tells_start,
        )
        publish = self._next_stage(next_job)
        within_s = max(0.0, job.deadline - time.time())
        sent = self._here.sender.send(publish, within_s=within_s, insist=True)
        await asyncio.wrap_future(sent)

    async def _request(self, text: TextFrontend) -> EngineCoreRequest:
        self._here.check_origin(self._job.engine, self._job.model)
        if self._job.request is not None:
            return decode_request(self._job.request)
        assert self._job.text is not None
        request = await text.prepare(self._job.request_id, self._job.text)
        self._detokeniser = text.detokeniser(request)
        return request

    def _on_output(self, generation: Generation, output: EngineCoreOutput) -> None:
        self._first_token_at = self._first_token_at or time.time()
        stopped = generation.finish_reason == FinishReason.STOP
        if self._detokeniser is not None:
            self._text_stop = self._detokeniser.update(output.new_token_ids, stopped)
        if generation.finish_reason != FinishReason.LENGTH or self._text_stop is not None:
            self._goes_on = False
        if self._goes_on:
            output.finish_reason = None

    async def _saved(self, generation: Generation) -> None:
        """Wait until the blocks are in the store, or it is clear that they will not be."""
        try:
            async with asyncio.timeout(SAVE_TIMEOUT_S):
                await generation.saved.wait()
        except TimeoutError:
            logger.warning("KV of %s is late: decode will recompute it", self._job.request_id)

    def _handle(self) -> dict[str, Any] | None:
        return params.ours(self._generation.transfer_params).get("handle")

    def _is_complete(self, generation: Generation) -> bool:
        records = generation.transfers.get("save", [])
        return bool(records) and all(not r["error"] for r in records)

    def _report(self) -> StageReport:
        generation = self._generation
        records = generation.transfers.get("save", [])
        # A prefix that earlier prompts have left in the store.
        loaded = generation.transfers.get("load", [])
        prefix_blocks = min((r["blocks"] + r["missing"] for r in loaded), default=0)
        lost = any(r["missing"] for r in loaded)
        prompt = generation.request.prompt_token_ids or ()
        return StageReport(
            stage=PREFILL,
            worker=self._here.name,
            queue_s=max(0.0, self._started_at - self._job.submitted_at),
            seconds=time.monotonic() - self._started,
            prompt_tokens=len(prompt),
            output_tokens=len(generation.token_ids),
            cached_tokens=generation.cached_tokens,
            # Each rank writes its part of every block.
            kv_blocks_written=min((r["blocks"] for r in records), default=0),
            kv_bytes_written=sum(r["bytes"] for r in records),
            kv_blocks_loaded=0 if lost else prefix_blocks,
            kv_bytes_loaded=sum(r["bytes"] for r in loaded),
            kv_blocks_recomputed=prefix_blocks if lost else 0,
            kv_seconds=max((r["seconds"] for r in records), default=0.0),
        )

    def _make_answer(self, original: EngineCoreRequest) -> Answer | None:
        if self._detokeniser is None:
            return None
        generation = self._generation
        reason = FinishReason.STOP if self._text_stop is not None else generation.finish_reason
        return Answer(
            request_id=self._job.request_id,
            text=self._detokeniser.get_next_output_text(finished=True, delta=False),
            token_ids=tuple(generation.token_ids),
            finish_reason=str(reason),
            stop_reason=self._text_stop or generation.stop_reason,
            prompt_tokens=len(original.prompt_token_ids or ()),
            stages=(self._report(),),
            time_to_first_token_s=self._first_token_at - self._job.submitted_at,
        )
