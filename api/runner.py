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
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from celery import states
from fastapi import FastAPI, Request
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import GracefulHTTPError

from api.continuation import AnswerDiffers, Continuation
from api.recording import Tape, using
from pdtasks.app import app as celery_app
from pdtasks.bus import BUS_ERRORS
from pdtasks.cancelling import end
from pdtasks.client import stage_watcher
from pdtasks.errors import PdtasksError, RequestAborted, RequestTimeout
from pdtasks.jobs import Job, JobStore, StageStart

logger = logging.getLogger(__name__)

#: Seconds between two looks for a job that another process has lost.
_LOOK_S = 1.0
#: Seconds between two renewals, and the pace at which a cancellation is heard.
_RENEW_S = 1.0
#: Seconds before a request that the stack has no room for is tried again.
_RETRY_S = 1.0


#: Event: what came before is void, the answer begins anew.
RESTART: Final[dict[str, Any]] = {"object": "job.restart", "choices": []}


@dataclass(frozen=True)
class Route:
    """How the body of one of vLLM's routes is served."""

    request: type[ChatCompletionRequest | CompletionRequest]
    handler: str  #: its name in the app's state
    method: str


ROUTES: Final = {
    "/v1/chat/completions": Route(
        ChatCompletionRequest, "openai_serving_chat", "create_chat_completion"
    ),
    "/v1/completions": Route(CompletionRequest, "openai_serving_completion", "create_completion"),
}


class _Lost(Exception):
    """Another process runs the job now."""


class _Failed(Exception):
    """The job's answer is this error, in OpenAI's format."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error.get("type"))
        self.error = error


class JobRunner:
    """Runs jobs in this process, at most `concurrency` at once."""

    def __init__(self, app: FastAPI, store: JobStore, *, concurrency: int) -> None:
        self._app = app
        self._store = store
        self._concurrency = concurrency
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There may be a new job."""
        self._wake.set()

    async def run(self) -> None:
        """Take jobs until cancelled; those under way are left to other processes then."""
        try:
            while True:
                self._wake.clear()
                try:
                    await self._take_what_fits()
                except BUS_ERRORS as exc:
                    logger.warning("bus is away, jobs wait: %s", type(exc).__name__)
                try:
                    async with asyncio.timeout(_LOOK_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            await end(self._running)

    async def _take_what_fits(self) -> None:
        while len(self._running) < self._concurrency:
            job = await self._store.claim(uuid.uuid4().hex)
            if job is None:
                return
            task = asyncio.create_task(self._run(job))
            self._running.add(task)
            task.add_done_callback(self._has_ended)

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake.set()
        if not task.cancelled() and (exc := task.exception()) is not None:
            # The lease runs out, and the job is begun again.
            logger.error("a job was left: %s", type(exc).__name__)

    async def _run(self, job: Job) -> None:
        work = asyncio.create_task(_Run(self._app, self._store, job).run())
        try:
            if await self._watch(job, work):
                await self._conclude(job, work)
        except asyncio.CancelledError:
            await end([work])
            await self._store.release(job)
            raise

    async def _watch(self, job: Job, work: asyncio.Task[dict[str, Any]]) -> bool:
        """Hold the lease until `work` ends. False: the job has been concluded, or is not ours."""
        while True:
            await asyncio.wait([work], timeout=_RENEW_S)
            if work.done():
                return True
            if time.time() > job.deadline:
                await end([work])
                await self._fail(job, RequestTimeout("the job took longer than its timeout"))
                return False
            try:
                held = await self._store.renew(job)
            except BUS_ERRORS as exc:
                logger.warning("bus is away: %s", type(exc).__name__)
                continue
            if held != "held":
                await end([work])
                if held == "cancel":
                    await self._store.finish(job, "cancelled")
                    await _tell_celery(job, RequestAborted("the job was cancelled"))
                return False

    async def _conclude(self, job: Job, work: asyncio.Task[dict[str, Any]]) -> None:
        try:
            result = work.result()
        except _Lost:
            return
        except _Failed as exc:
            if await self._store.finish(job, "failed", error=exc.error):
                await _tell_celery(job, PdtasksError(str(exc)))
        except PdtasksError as exc:
            await self._fail(job, exc)
        else:
            if await self._store.finish(job, "succeeded", result=result):
                await _tell_celery(job, result)

    async def _fail(self, job: Job, error: PdtasksError) -> None:
        shown = {"message": str(error), "type": error.code, "param": None}
        if await self._store.finish(job, "failed", error=shown | {"code": error.http_status}):
            await _tell_celery(job, error)


class _Run:
    """One attempt at one job."""

    def __init__(self, app: FastAPI, store: JobStore, job: Job) -> None:
        self._app = app
        self._store = store
        self._job = job
        self._route = ROUTES[job.path]
        self._stages = list(job.stages)
        self._has_token = job.first_token_at is not None
        self._writes: set[asyncio.Task[None]] = set()
        self._in_order = asyncio.Lock()

    async def run(self) -> dict[str, Any]:
        """The answer as OpenAI's body. Raises _Failed or _Lost."""
        continuation = Continuation(await self._published())
        tape = Tape()
        with using(tape), stage_watcher(self._note_stage):
            chunks: list[dict[str, Any]] = []
            async for chunk in self._chunks():
                if self._job.attempts > 1:
                    chunks.append(chunk)
                try:
                    rest = continuation.rest(chunk)
                except AnswerDiffers:
                    # The same seed is no promise: an engine computes a little otherwise in other
                    # company. Whoever reads along begins again.
                    continuation, rest = Continuation([]), None
                    for again in (RESTART, *chunks):
                        await self._publish(again)
                if rest is not None:
                    await self._publish(rest)
            tape.is_full = True
            return dict((await self._answer({"stream": False})).model_dump())

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
        stream = await self._answer({"stream": True, "stream_options": {"include_usage": True}})
        async for event in stream:
            data = event.removeprefix("data: ").strip()
            if data == "[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                raise _Failed(chunk["error"])
            yield chunk

    async def _answer(self, changes: dict[str, Any]) -> Any:
        """Ask vLLM's handler; a stack without workers or room is waited for."""
        body = {k: v for k, v in self._job.body.items() if k != "stream_options"} | changes
        handler = getattr(self._app.state, self._route.handler)
        while True:
            request = self._route.request.model_validate(body)
            try:
                answer = await getattr(handler, self._route.method)(request, self._raw_request())
            except GracefulHTTPError as exc:
                if exc.http_status in (429, 503):
                    await asyncio.sleep(_RETRY_S)
                    continue
                raise _Failed(handler.create_error_response(exc).error.model_dump()) from exc
            except Exception as exc:
                raise _Failed(handler.create_error_response(exc).error.model_dump()) from exc
            if hasattr(answer, "error") and answer.error is not None:
                raise _Failed(answer.error.model_dump())
            return answer

    def _raw_request(self) -> Request:
        headers = [(b"x-request-id", self._job.id.encode())]
        scope = {"type": "http", "method": "POST", "path": self._job.path, "headers": headers}
        return Request(scope | {"app": self._app, "query_string": b"", "state": {}})

    async def _publish(self, chunk: dict[str, Any]) -> None:
        fields: dict[str, Any] = {}
        if not self._has_token:
            self._has_token = True
            fields["first_token_at"] = time.time()
        if not await self._store.write(self._job, json.dumps(chunk), **fields):
            raise _Lost

    def _note_stage(self, stage: str, worker: str) -> None:
        # Not waited for: it is called between the replies of all requests.
        self._stages.append(StageStart(stage, worker, time.time()))
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
    except BUS_ERRORS as exc:
        logger.warning("no Celery result for %s: %s", job.id, type(exc).__name__)
