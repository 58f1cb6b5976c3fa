"""Stage 2: load the prompt's KV and write the rest of the answer; or all of it.

A short prompt comes without a first token (`DecodeJob.is_whole`): to compute it here, between other
answers' tokens, costs less than to hand it over.

Tokens go to the asker from the engine's steps.  A worker that stops hands what it has begun to
another one, tokens and all.  For a caller without a reply stream the finished
answer is the task's result.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import Any

import msgspec
from celery.exceptions import Ignore, Reject
from vllm.v1.engine import EngineCoreOutput

from pdtasks.app import app
from pdtasks.broker.publishing import Publish
from pdtasks.engine.generation import Verdict
from pdtasks.engine.handover import make_decode, make_whole
from pdtasks.engine.wire import require_tokens
from pdtasks.errors import PdtasksError, RequestAborted
from pdtasks.kv.handle import KVHandle
from pdtasks.messages import Answer, DecodeJob, StageReport, read_message
from pdtasks.naming import DECODE, DECODE_TASK
from pdtasks.pipeline import same_stage
from pdtasks.tracing import Carried
from pdtasks.worker import service
from pdtasks.worker.stage import GoesOnElsewhere, Stage, why_missing
from pdtasks.worker.task import StageTask

logger = logging.getLogger(__name__)

#: Seconds for RabbitMQ to take a job that is handed on; nobody makes tokens of it meanwhile.
_HAND_ON_S = 5.0


@app.task(base=StageTask, bind=True, name=DECODE_TASK)
def decode(self: StageTask, wire: bytes) -> dict[str, Any] | None:
    """Run a `DecodeJob`; returns an `Answer` as plain values when the caller wants text."""
    job = read_message(DecodeJob, wire)
    here = service.current()
    request = self.request
    again = partial(
        same_stage,
        task_id=request.id,
        chain=request.chain,
        parent_id=request.parent_id,
        root_id=request.root_id,
        reply_to=request.reply_to,
        ignore_result=request.ignore_result,
    )
    is_again = self.is_again or job.handed_on > 0
    stage = _Decode(here, job, self.reply_stream, again, is_again=is_again, carried=self.carried)
    # One that was handed on does not join the run that has handed it on.
    run_id = f"{request.id}#{job.handed_on}"
    try:
        answer = here.stages.run(run_id, stage.run, job.deadline, stage.attempt)
    except RequestAborted:
        self.end_aborted()
        return None
    if answer is Left.HANDED_ON:
        raise Ignore  # there is no result yet
    if answer is Left.GIVEN_BACK:
        raise Reject("this worker stops", requeue=True)
    return None if answer is None else msgspec.to_builtins(answer)


class Left(Enum):
    """Another worker goes on with a request that this one leaves."""

    HANDED_ON = auto()  #: it has a job of its own
    GIVEN_BACK = auto()  #: RabbitMQ takes no job now, but gives this one to somebody again


class _Decode(Stage[DecodeJob]):
    """One request's way through stage 2."""

    name = DECODE

    def __init__(
        self,
        here: service.Worker,
        job: DecodeJob,
        reply_to: str | None,
        same_stage: Callable[..., Publish],
        *,
        is_again: bool,
        carried: Carried,
    ) -> None:
        super().__init__(here, job, reply_to, is_again=is_again, carried=carried)
        self._same_stage = same_stage
        self._is_new = False  # its first token is made here
        self._prompt_tokens = 0

    async def work(self) -> Answer | Left | None:
        """Returns the answer if somebody waits for it as a result."""
        goes_on = False
        try:
            outcome = await self._run()
            goes_on = isinstance(outcome, Left)
        except GoesOnElsewhere:
            goes_on = True
            raise
        finally:
            if not goes_on and not self.job.is_whole:
                # Also when the request was aborted or has failed: nobody else will read it.
                self.here.discard(self.job.request_id)
        return outcome

    async def _run(self) -> Answer | Left | None:
        job = self.job
        self.begin()
        request = self.read_request(job.request)
        if job.detokenise:
            self.detokeniser = self.here.text.detokeniser(request)
            self.detokeniser.update(list(job.output_token_ids), False)
        tokens = await self._tokens()
        require_tokens(tokens, self.here.engine.config.model_config)
        self._is_new = job.is_whole and not tokens
        self._prompt_tokens = len(request.prompt_token_ids or ())
        if job.is_whole:
            make_whole(request, self.engine_id, tokens=list(tokens))
        else:
            make_decode(request, self.engine_id, tokens=list(tokens), handle=job.handle)
        generation = self.new_generation(request, position=len(tokens))
        try:
            await self.generate()
            await self.here.replies_taken(self.reply_to, job.request_id)
        except service.HandsOn:
            return await self._hand_on(tokens + tuple(generation.token_ids))
        except RequestAborted:
            self.tell_of_aborted()
            raise
        finally:
            self.here.engine.forget(generation)
        return self.make_answer(
            before=tokens,
            prompt_tokens=self._prompt_tokens,
            first_token_at=job.first_token_at,
        )

    async def _hand_on(self, tokens: tuple[int, ...]) -> Left:
        """Leave the job to another worker of this stage; returns when RabbitMQ knows."""
        # What the next one asks about lies behind what was published here.
        await self.here.replies_taken(self.reply_to, self.job.request_id)
        job = msgspec.structs.replace(
            self.job, output_token_ids=tokens, handed_on=self.job.handed_on + 1
        )
        publish = self._same_stage(job, trace=self.span.headers)
        sent = self.here.sender.send(publish, within_s=_HAND_ON_S, insist=True)
        try:
            await asyncio.wrap_future(sent)
        except PdtasksError as exc:
            logger.warning("%s is given back: %s", job.request_id, exc)
            return Left.GIVEN_BACK
        return Left.HANDED_ON

    async def _tokens(self) -> tuple[int, ...]:
        """Of the answer, those that are there: from prefill, or from an attempt that was lost."""
        own = self.job.output_token_ids
        seen = await self.seen_tokens(self.job.handed_on)
        if not seen:
            return own
        if any(a != b for a, b in zip(own, seen, strict=False)):
            # Prefill has run twice, and the asker has taken the other one's first token.
            raise GoesOnElsewhere("another attempt answers this request")
        logger.info("%s goes on after %d tokens", self.job.request_id, len(seen))
        return seen

    def outcome(self, result: Answer | Left | None) -> str:
        return result.name.lower() if isinstance(result, Left) else "done"

    def judge(self, output: EngineCoreOutput) -> Verdict:
        if not self._is_new:
            # The asker has them from the engine that made the first token, by its clock.
            output.events = None
            output.prefill_stats = None
        return super().judge(output)

    def reports(self) -> tuple[StageReport, ...]:
        if self.job.prefill is None:
            report = self.make_report(
                since=self.job.submitted_at,
                prompt_tokens=self._prompt_tokens,
                is_whole=True,
                **self.prefix_figures(),
            )
            return (report,)
        records = self.generation.transfers.get("load", [])
        loaded, recomputed = self._blocks(records)
        report = self.make_report(
            since=self.job.prefilled_at,
            prompt_tokens=self._prompt_tokens,
            kv_blocks_loaded=loaded,
            kv_bytes_loaded=sum(r["bytes"] for r in records),
            kv_blocks_recomputed=recomputed,
            kv_seconds=max((r["seconds"] for r in records), default=0.0),
        )
        return (self.job.prefill, report)

    def _blocks(self, records: list[dict[str, Any]]) -> tuple[int, int]:
        """Blocks of the prompt that were loaded, and that had to be computed again."""
        block_size = self.here.engine.config.cache_config.block_size
        in_prompt = -(-self._prompt_tokens // block_size)
        if self.job.handle is not None:
            in_prompt = KVHandle.from_wire(self.job.handle).num_blocks
        if records and not any(r["missing"] for r in records):
            return min(r["blocks"] for r in records), 0
        if records:
            self.why_recomputed = why_missing(records)
        else:
            self.why_recomputed = "not_loaded" if self.job.handle is not None else "not_written"
        # vLLM recomputes the whole prompt, but for what its own prefix cache holds.
        return 0, in_prompt - self.generation.cached_tokens // block_size
