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
from pdtasks.engine.generation import Generation, Verdict
from pdtasks.engine.handover import make_prefill, may_go_on
from pdtasks.engine.text import TextFrontend
from pdtasks.engine.wire import encode_request
from pdtasks.errors import EngineFailed, InvalidRequest, PdtasksError, RequestAborted, where
from pdtasks.kv import params
from pdtasks.kv.handle import KVHandle
from pdtasks.messages import Answer, DecodeJob, PrefillJob, StageReport, read_message
from pdtasks.naming import PREFILL, PREFILL_TASK
from pdtasks.pipeline import next_stage
from pdtasks.siblings import apart
from pdtasks.tracing import Carried
from pdtasks.worker import counting, service
from pdtasks.worker.stage import Stage
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
    begin = partial(
        _Prefill,
        here,
        reply_to=self.reply_stream,
        next_stage=hand_over,
        is_again=self.is_again,
        carried=self.carried,
    )
    answer = None
    try:
        if job.siblings:
            here.stages.run(request.id, partial(_run_family, job, begin), job.deadline)
        else:
            stage = begin(job)
            answer = here.stages.run(request.id, stage.run, job.deadline, stage.attempt)
    except InvalidRequest as exc:
        # Not raised: the text of a task's exception goes into events and logs, and this one may
        # quote the request.
        self.refuse(job.request_ids, exc)
    except RequestAborted:
        self.end_aborted()
    self.end_chain(answer)


async def _run_family(job: PrefillJob, begin: Callable[[PrefillJob], _Prefill]) -> None:
    """Answer `job` and its siblings, each in a stage of its own: what ends one ends no other.

    The engine computes their prompt once, for it finds the first one's blocks in its cache, and
    draws a first token for each.
    """
    stages = [begin(one) for one in apart(job)]
    ends = await asyncio.gather(*(stage.run() for stage in stages), return_exceptions=True)
    for stage, error in zip(stages, ends, strict=True):
        if isinstance(error, PdtasksError):
            if not isinstance(error, RequestAborted):
                stage.fail(error)
        elif isinstance(error, Exception):
            logger.error("%s failed: %s", stage.job.request_id, where(error))
            stage.fail(EngineFailed(f"the stage failed: {type(error).__name__}"))
    # Acknowledged is only what the askers can read.
    await stages[0].here.replies_taken(stages[0].reply_to, *job.request_ids)


class _Prefill(Stage[PrefillJob]):
    """One request's way through stage 1."""

    name = PREFILL

    def __init__(
        self,
        here: service.Worker,
        job: PrefillJob,
        reply_to: str | None,
        next_stage: Callable[..., Publish],
        *,
        is_again: bool,
        carried: Carried,
    ) -> None:
        super().__init__(here, job, reply_to, is_again=is_again, carried=carried)
        self._next_stage = next_stage
        self._seen: tuple[int, ...] = ()  # a first token that the asker has already
        self._first_token_at = 0.0
        self._goes_on = False  # whether there is anything for the next stage to do

    async def work(self) -> Answer | None:
        """Returns the answer that ends here and that somebody waits for."""
        job = self.job
        self.here.aborted.require_wanted(job.request_id)
        self.begin()
        try:
            self._seen = await self.seen_tokens()
        except RequestAborted:
            # An attempt that was lost may have written it.
            self.here.discard(job.request_id)
            raise
        if len(self._seen) > 1:
            # Stage 2 has begun: this one had done all its work, and was lost before it could say
            # so. RabbitMQ has stage 2's job until that is done.
            return None
        original = await self._request(self.here.text)
        wire = job.request if job.request is not None else encode_request(original)
        self._goes_on = may_go_on(original, self.here.engine.config.model_config.max_model_len)
        # What was made of a text keeps its stop strings, for the detokeniser.
        request = original if job.request is not None else self.read_request(wire)
        make_prefill(request, self.engine_id, transfer_id=job.request_id)
        # A first token that was seen stays; the engine's new one is of no interest then.
        generation = self.new_generation(request, position=0, is_told=not self._seen)
        try:
            await self.generate()
            # Also so that the next stage's tokens come behind the first one on the reply stream.
            await self.here.replies_taken(self.reply_to, job.request_id)
            if self._goes_on and self._can_be_awaited():
                self.here.aborted.require_wanted(job.request_id)
                await self._hand_over(wire, generation)
                await self._saved(generation)
                self.here.answers.report(self.reply_to, self.name, job.request_id, self.reports())
            else:
                await self._saved(generation)
                self.here.aborted.require_wanted(job.request_id)
                if self._goes_on:
                    await self._hand_over(wire, generation)
        except (asyncio.CancelledError, Exception) as exc:
            if isinstance(exc, RequestAborted):
                self.tell_of_aborted()
            # The engine may be computing the prompt all the same, and write it when it is done.
            self.here.discard_when_saved(generation)
            raise
        self.here.engine.forget(generation)
        if self._goes_on:
            return None
        self.here.discard(job.request_id)
        return self.make_answer(
            before=(),
            prompt_tokens=len(original.prompt_token_ids or ()),
            first_token_at=self._first_token_at,
        )

    async def _hand_over(self, wire: bytes, generation: Generation) -> None:
        """Send the next stage's job; returns when RabbitMQ has confirmed it."""
        job = self.job
        next_job = DecodeJob(
            request_id=job.request_id,
            engine=ENGINE_VERSION,
            model=job.model,
            request=wire,
            output_token_ids=self._seen or tuple(generation.token_ids),
            handle=self._handle() if self._can_be_awaited() or self._is_complete() else None,
            prefill=self._report(),
            detokenise=job.text is not None,
            submitted_at=job.submitted_at,
            prefilled_at=time.time(),
            first_token_at=self._first_token_at,
            deadline=job.deadline,
            tells_start=job.tells_start,
        )
        publish = self._next_stage(next_job, trace=self.span.headers)
        within_s = max(0.0, job.deadline - time.time())
        began = time.monotonic()
        sent = self.here.sender.send(publish, within_s=within_s, insist=True)
        await asyncio.wrap_future(sent)
        seconds = time.monotonic() - began
        counting.published(seconds)
        self.span.published(next_job.prefilled_at, seconds)

    async def _request(self, text: TextFrontend) -> EngineCoreRequest:
        if self.job.request is not None:
            return self.read_request(self.job.request)
        if self.job.text is None:
            raise InvalidRequest("the job has no request")
        request = await text.prepare(self.job.request_id, self.job.text)
        self.detokeniser = text.detokeniser(request)
        return request

    def judge(self, output: EngineCoreOutput) -> Verdict:
        self._first_token_at = self._first_token_at or time.time()
        if self._seen:
            # It has not ended the answer, or nobody would wait for more.
            return Verdict(hides_end=True)
        stopped_at = super().judge(output).stopped_at
        # An end by length is only the end of this stage.
        if output.finish_reason != FinishReason.LENGTH or stopped_at is not None:
            self._goes_on = False
        return Verdict(stopped_at, hides_end=self._goes_on)

    async def _saved(self, generation: Generation) -> None:
        """Wait until the blocks are in the store, or it is clear that they will not be."""
        try:
            async with asyncio.timeout(SAVE_TIMEOUT_S):
                await generation.saved.wait()
        except TimeoutError:
            logger.warning("KV of %s is late: decode will recompute it", self.job.request_id)

    def _handle(self) -> dict[str, Any] | None:
        return params.ours(self.generation.transfer_params).get("handle")

    def _num_promised(self) -> int:
        """Blocks that the next stage may wait for."""
        handle = self._handle()
        return KVHandle.from_wire(handle).num_blocks if handle and handle.get("ring") else 0

    def _can_be_awaited(self) -> bool:
        """Will the next stage wait for blocks that are on their way (`pdtasks.kv.ring`)?"""
        return bool((self._handle() or {}).get("ring"))

    def _is_complete(self) -> bool:
        records = self.generation.transfers.get("save", [])
        return bool(records) and all(not r["error"] for r in records)

    def outcome(self, result: Answer | None) -> str:
        # The asker had its tokens from an attempt that was lost.
        return "done" if hasattr(self, "generation") else "repeated"

    def reports(self) -> tuple[StageReport, ...]:
        return (self._report(),)

    def _report(self) -> StageReport:
        generation = self.generation
        records = generation.transfers.get("save", [])
        return self.make_report(
            since=self.job.submitted_at,
            prompt_tokens=len(generation.request.prompt_token_ids or ()),
            # Each rank writes its part of every block; a hand-over may leave before.
            kv_blocks_written=(
                min(r["blocks"] for r in records) if records else self._num_promised()
            ),
            kv_bytes_written=sum(r["bytes"] for r in records),
            kv_seconds=max((r["seconds"] for r in records), default=0.0),
            **self.prefix_figures(),
        )
