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
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

from celery import states
from fastapi import FastAPI, Request
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import GracefulHTTPError

from api.continuation import AnswerDiffers, Continuation
from api.core import stage_watcher
from api.errors import explained
from api.recording import Checked, Tape, only_checking, using
from pdtasks.app import app as celery_app
from pdtasks.background import Background
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.jobs import Job, JobStore, StageStart, State
from pdtasks.errors import PdtasksError, RequestAborted, RequestTimeout, WorkerLost, where
from pdtasks.keys import asking_for

logger = logging.getLogger(__name__)

#: Seconds between two looks for a job that another process has lost.
_LOOK_S = 1.0
#: Seconds between two renewals, and the pace at which a cancellation is heard.
_RENEW_S = 1.0
#: Seconds before a request that the stack has no room for is tried again.
_RETRY_S = 1.0
#: Seconds that vLLM's handler gets to end when its answer is not wanted any more.
_CLEAN_UP_S = 5.0
#: Seconds that the jobs under way get at a stop: to clean up, and to tell the bus.
_STOP_S = 11.0

#: Why a run is looked at no longer.
_Verdict = Literal["done", "stopping", "late", "lost", "cancel"]

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

#: How a job's answer is asked for, whatever its body says.
STREAMED: Final[dict[str, Any]] = {"stream": True, "stream_options": {"include_usage": True}}


class _Lost(Exception):
    """Another process runs the job now."""


class _Failed(Exception):
    """The job's answer is this error, in OpenAI's format."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error.get("type"))
        self.error = error


class JobRunner:
    """Runs jobs in this process, at most `concurrency` at once."""

    def __init__(
        self, app: FastAPI, store: JobStore, *, concurrency: int, background: Background
    ) -> None:
        """`background`: watches the task that looks for jobs."""
        self._app = app
        self._store = store
        self._concurrency = concurrency
        self._background = background
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._claiming: asyncio.Task[bool] | None = None
        self._looking: asyncio.Task[None]
        self._stopping: asyncio.Future[None]  # a future, for `asyncio.wait`

    @property
    def num_running(self) -> int:
        """Jobs under way here."""
        return len(self._running)

    def wake(self) -> None:
        """There may be a new job."""
        self._wake.set()

    def start(self) -> None:
        """Take jobs until `stop`."""
        self._stopping = asyncio.get_running_loop().create_future()
        self._looking = self._background.task("job-runner", self._look_for_jobs)

    async def stop(self) -> None:
        """Leave the jobs under way to other processes; returns when they can be claimed.

        Nothing that writes to the bus is cancelled: jobs are told, and clean up in their own time.
        """
        if not self._stopping.done():
            self._stopping.set_result(None)
        self._looking.cancel()
        await asyncio.wait([self._looking])
        if self._claiming is not None:
            await asyncio.wait([self._claiming])
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=_STOP_S)
            if late:
                logger.warning("%d jobs wait for the end of their leases", len(late))
                for task in late:
                    task.cancel()
                await asyncio.wait(late, timeout=_CLEAN_UP_S)

    async def _look_for_jobs(self) -> None:
        while True:
            self._wake.clear()
            try:
                while self.num_running < self._concurrency and await self._take_one():
                    pass
            except BUS_ERRORS as exc:
                logger.warning("bus is away, jobs wait: %s", type(exc).__name__)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()

    async def _take_one(self) -> bool:
        # Shielded: a job that the bus has given to a task which is cancelled would be nobody's.
        self._claiming = asyncio.create_task(self._claim())
        return await asyncio.shield(self._claiming)

    async def _claim(self) -> bool:
        """Begin a job; False when there is none."""
        job = await self._store.claim(uuid.uuid4().hex)
        if job is None:
            return False
        task = asyncio.create_task(self._run(job), name=f"job {job.id}")
        self._running.add(task)
        task.add_done_callback(self._has_ended)
        return True

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake.set()
        if not task.cancelled() and (exc := task.exception()) is not None:
            # The lease runs out, and the job is begun again: at most `jobs.MAX_ATTEMPTS` times.
            logger.error("%s was left: %s", task.get_name(), where(exc))

    async def _run(self, job: Job) -> None:
        if self._stopping.done():
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
            try:
                verdict = await self._watch(job, work)
            finally:
                await _cancel(work)
            if verdict == "done":
                await self._take_answer(job, work)
            else:
                await self._conclude(job, verdict)

    async def _watch(self, job: Job, work: asyncio.Task[dict[str, Any]]) -> _Verdict:
        """Hold the lease as long as `work` runs and is wanted."""
        ends: list[asyncio.Future[Any]] = [work, self._stopping]
        while True:
            await asyncio.wait(ends, timeout=_RENEW_S, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return "done"
            if self._stopping.done():
                return "stopping"
            if time.time() > job.deadline:
                return "late"
            try:
                held = await self._store.renew(job)
            except BUS_ERRORS as exc:
                logger.warning("bus is away: %s", type(exc).__name__)
                continue
            if held != "held":
                return held

    async def _conclude(self, job: Job, verdict: _Verdict) -> None:
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
        except _Failed as exc:
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


async def _cancel(task: asyncio.Task[Any]) -> None:
    """End `task`, or leave it after a while; what it raises is for whoever asks it."""
    task.cancel()
    task.add_done_callback(_look_away)
    _, running = await asyncio.wait([task], timeout=_CLEAN_UP_S)
    if running:
        logger.error("%s does not end", task.get_name())


def _look_away(task: asyncio.Task[Any]) -> None:
    """Else asyncio logs what was raised, text and all."""
    if not task.cancelled():
        task.exception()


async def check(app: FastAPI, path: str, body: dict[str, Any]) -> None:
    """Find out all that can be known of a request before it is begun.

    Raises Refused with the answer that its route would give at once.
    """
    handler = getattr(app.state, ROUTES[path].handler)
    with only_checking():
        try:
            request = ROUTES[path].request.model_validate(body | {"stream": False})
            answer = await getattr(handler, ROUTES[path].method)(request, None)
        except Checked:
            return
        except PdtasksError as exc:
            raise Refused(exc.http_status, str(exc), None) from exc
        except Exception as exc:
            error = handler.create_error_response(explained(exc, body)).error
            raise Refused(error.code, error.message, error.param) from exc
    if getattr(answer, "error", None) is not None:
        raise Refused(answer.error.code, answer.error.message, answer.error.param)


class Refused(Exception):
    """A request is not taken."""

    def __init__(self, status: int, message: str, param: str | None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


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
        tape = Tape()
        try:
            with using(tape), stage_watcher(self._note_stage), asking_for(self._job.owner):
                await self._publish_chunks()
                tape.is_full = True
                return dict((await self._answer({"stream": False})).model_dump())
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
                error = handler.create_error_response(explained(exc, self._job.body)).error
                raise _Failed(error.model_dump()) from exc
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
    except Exception as exc:  # noqa: BLE001 - the backend's client raises errors of its own
        logger.warning("no Celery result for %s: %s", job.id, where(exc))
