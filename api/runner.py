"""How are jobs run? By vLLM's own request handlers, in any API process that has room.

The chunks go to the job's events as they come, the whole answer into the record and into Celery's
result backend, where `AsyncResult(job_id).get()` finds it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Final

from celery import states
from fastapi import FastAPI

from api.asking import WHOLE, Failed, NotNow, ask, whole_body
from api.claiming import Claims, Verdict
from api.continuation import AnswerDiffers, Continuation
from api.core import stage_watcher
from api.recording import Tape, using
from api.service_class import ServiceClass, serving
from api.tracing import tracer_of, tracing
from pdtasks.app import app as celery_app
from pdtasks.background import Background
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.jobs import Job, JobStore, StageStart, State
from pdtasks.errors import PdtasksError, RequestAborted, RequestTimeout, WorkerLost, where
from pdtasks.keys import asking_for

logger = logging.getLogger(__name__)

#: Seconds before a request that the stack has no room for is tried again.
_RETRY_S = 1.0

#: The route whose chunks are events of another kind: its answer is not read along.
RESPONSES: Final = "/v1/responses"
#: How such an answer is asked for: what is kept of it is the job.
IN_FOREGROUND: Final[dict[str, Any]] = WHOLE | {"background": False, "store": False}
#: Event: what came before is void, the answer begins anew.
RESTART: Final[dict[str, Any]] = {"object": "job.restart", "choices": []}


#: How a job's chunks are asked for, whatever its body says.
STREAMED: Final[dict[str, Any]] = {"stream": True, "stream_options": {"include_usage": True}}


class _Lost(Exception):
    """Another process runs the job now."""


class JobRunner(Claims):
    """Runs jobs in this process, at most `concurrency` at once."""

    def __init__(
        self, app: FastAPI, store: JobStore, *, concurrency: int, background: Background
    ) -> None:
        super().__init__("job-runner", concurrency=concurrency, background=background)
        self._app = app
        self._store = store

    async def _claim(self) -> tuple[str, Coroutine[Any, Any, None]] | None:
        job = await self._store.claim(uuid.uuid4().hex)
        return None if job is None else (f"job {job.id}", self._run(job))

    async def _run(self, job: Job) -> None:
        if self.is_stopping:
            await self._conclude(job, "stopping")
        elif job.is_unwanted:
            await self._conclude(job, "cancel")
        elif job.is_given_up:
            await self._fail(job, WorkerLost("every API process that began the job was lost"))
        elif time.time() > job.deadline:
            await self._fail(job, RequestTimeout("the job waited longer than its timeout"))
        else:
            run = _Run(self._app, self._store, job).run()
            work = asyncio.create_task(run, name=f"work on {job.id}")
            verdict = await self._watch(work, lambda: self._store.renew(job), deadline=job.deadline)
            if verdict == "done":
                await self._take_answer(job, work)
            else:
                await self._conclude(job, verdict)

    async def _conclude(self, job: Job, verdict: Verdict) -> None:
        """After a run without an answer."""
        if verdict == "stopping":
            await self._store.release(job)
        elif verdict == "late":
            await self._fail(job, RequestTimeout("the job took longer than its timeout"))
        elif verdict == "cancel" and await self._store.finish(job, State.CANCELLED):
            await _tell_celery(job, RequestAborted("the job was cancelled"))

    async def _take_answer(self, job: Job, work: asyncio.Task[dict[str, Any]]) -> None:
        try:
            result = work.result()
        except _Lost:
            return
        except Failed as exc:
            if await self._store.finish(job, State.FAILED, error=exc.error):
                await _tell_celery(job, PdtasksError(str(exc)))
        except PdtasksError as exc:
            await self._fail(job, exc)
        except BUS_ERRORS as exc:
            # Whether the last event was written is not known.  The lease runs out, then another
            # attempt reads what was.
            logger.warning("%s is left, bus is away: %s", job.id, type(exc).__name__)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is this job's alone
            # No further attempt: the same request would most likely raise the same again, and each
            # costs a prefill and a decode of the whole answer.
            logger.error("%s failed: %s", job.id, where(exc))  # noqa: TRY400 - no prompts
            name = type(exc).__name__
            await self._fail(job, PdtasksError(f"an unforeseen {name} ended the job"))
        else:
            if await self._store.finish(job, State.SUCCEEDED, result=result):
                await _tell_celery(job, result)

    async def _fail(self, job: Job, error: PdtasksError) -> None:
        shown = {"message": str(error), "type": error.code, "param": None}
        if await self._store.finish(job, State.FAILED, error=shown | {"code": error.http_status}):
            await _tell_celery(job, error)


class _Run:
    """One attempt at one job."""

    def __init__(self, app: FastAPI, store: JobStore, job: Job) -> None:
        self._app = app
        self._store = store
        self._job = job
        self._stages = list(job.stages)
        self._has_token = job.first_token_at is not None
        self._writes: set[asyncio.Task[None]] = set()
        self._in_order = asyncio.Lock()

    async def run(self) -> dict[str, Any]:
        """The answer as OpenAI's body. Raises Failed or _Lost."""
        tape = Tape()
        job, now = self._job, time.time()
        begin = job.created_at if job.attempts == 1 else now
        attributes: dict[str, str | int] = {
            "pdtasks.job.id": job.id,
            "pdtasks.job.attempt": job.attempts,
        }
        try:
            with (
                tracing(tracer_of(self._app), "job", begin, attributes, job.trace) as span,
                serving(ServiceClass.JOB),
                stage_watcher(self._note_stage),
                asking_for(self._job.owner),
            ):
                span.part("wait", begin, now, {})
                if self._job.path == RESPONSES:
                    name = {"request_id": self._job.id.replace("job-", "resp_", 1)}
                    return whole_body(await self._answer(IN_FOREGROUND | name))
                with using(tape):
                    await self._publish_chunks()
                    tape.is_full = True
                    return dict((await self._answer(WHOLE)).model_dump())
        finally:
            if self._writes:  # each ends within the bus's bound
                await asyncio.wait(self._writes)

    async def _publish_chunks(self) -> None:
        continuation = Continuation(await self._published())
        seen: list[dict[str, Any]] = []
        # Closed at once, whatever is raised here: the engine would go on for nobody.
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                if self._job.attempts > 1:
                    seen.append(chunk)
                try:
                    rest = continuation.rest(chunk)
                except AnswerDiffers:
                    # The same seed is no promise: an engine computes a little otherwise in other
                    # company. Whoever reads along begins again.
                    continuation, rest = Continuation([]), None
                    for again in (RESTART, *seen):
                        await self._publish(again)
                if rest is not None:
                    await self._publish(rest)

    async def _published(self) -> list[dict[str, Any]]:
        if self._job.attempts == 1:
            return []
        found: list[dict[str, Any]] = []
        last = "0"
        while events := await self._store.events(self._job.id, after=last, block_s=0.001):
            found += [json.loads(event.data) for event in events if event.data is not None]
            last = events[-1].id
        restarts = [n for n, chunk in enumerate(found) if chunk == RESTART]
        return found[restarts[-1] + 1 :] if restarts else found

    async def _chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(await self._answer(STREAMED)) as stream:
            async for event in stream:
                data = event.removeprefix("data: ").strip()
                if data == "[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise Failed(chunk["error"])
                yield chunk

    async def _answer(self, changes: dict[str, Any]) -> Any:
        """Ask vLLM's handler; a stack without workers or room is waited for."""
        body = {k: v for k, v in self._job.body.items() if k != "stream_options"}
        while True:
            try:
                return await ask(self._app, self._job.path, body, changes, self._job.id)
            except NotNow:
                await asyncio.sleep(_RETRY_S)

    async def _publish(self, chunk: dict[str, Any]) -> None:
        fields: dict[str, Any] = {}
        if not self._has_token:
            self._has_token = True
            fields["first_token_at"] = time.time()
        if not await self._store.write(self._job, json.dumps(chunk), **fields):
            raise _Lost

    def _note_stage(self, stage: str, worker: str, route: str) -> None:
        # Not waited for: it is called between the replies of all requests.
        self._stages.append(StageStart(stage, worker, time.time(), route))
        writing = asyncio.create_task(self._write_stages())
        self._writes.add(writing)
        writing.add_done_callback(self._writes.discard)

    async def _write_stages(self) -> None:
        async with self._in_order:
            shown = [vars(start) for start in self._stages]
            with suppress(*BUS_ERRORS):  # the answer does not depend on it
                await self._store.write(self._job, state=self._stages[-1].stage, stages=shown)


async def _tell_celery(job: Job, result: dict[str, Any] | PdtasksError) -> None:
    """For `AsyncResult(job.id)`; whoever asks by HTTP does not need it."""
    state = states.FAILURE if isinstance(result, PdtasksError) else states.SUCCESS
    try:
        await asyncio.to_thread(celery_app.backend.store_result, job.id, result, state)
    except Exception as exc:  # noqa: BLE001 - the backend's client raises errors of its own
        logger.warning("no Celery result for %s: %s", job.id, where(exc))
