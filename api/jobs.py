"""The routes of jobs: submit, ask, read along, cancel, from any API process.

A job is a chat or completion request that does not need its connection: `pdtasks.bus.jobs` keeps
it on the bus, `api.runner` runs it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse

from api.asking import Refused, check, read_request, without_what_is_ours
from api.guard import error_response
from api.runner import STREAMED, JobRunner
from api.stored import from_bus, own
from api.tracing import span_around
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.jobs import (
    Job,
    JobStore,
    KeyReused,
    UnreadableJob,
    is_event_id,
    is_job_id,
)
from pdtasks.keys import asker_name


class AnyTextResponse(JSONResponse):
    """JSON in ASCII: a record with half a surrogate pair, from wherever, spoils no list."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


router = APIRouter(prefix="/v1/jobs", default_response_class=AnyTextResponse)

#: Seconds that a reader's connection waits in the bus; a comment keeps it alive after each.
_BLOCK_S = 1.0
_KEEP_ALIVE_S = 15.0
#: Chosen by the caller, kept as a digest.
_MAX_KEY_LENGTH = 255


class Jobs:
    """What the routes need, in the app's state."""

    def __init__(self, store: JobStore, runner: JobRunner, *, timeout_s: float) -> None:
        """`timeout_s`: of a job that names none, and the longest that one may name."""
        self.store = store
        self.runner = runner
        self.timeout_s = timeout_s


def _jobs(request: Request) -> Jobs:
    found: Jobs = request.app.state.pdtasks_jobs
    return found


@router.post("", status_code=202)
async def submit(
    request: Request,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=_MAX_KEY_LENGTH)] = None,
) -> JSONResponse:
    """Take the body of a chat or completion request; it is answered later."""
    body = await _read_body(request)
    jobs = _jobs(request)
    timeout_s = _take_timeout(body, jobs.timeout_s)
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    try:
        meaning = _meaning(path, body)
        await check(request.app, path, body)
        with from_bus("job"):
            job = await jobs.store.create(
                path,
                body,
                timeout_s=timeout_s,
                seed=random.getrandbits(32),
                idempotency_key=idempotency_key,
                meaning={"path": path, "timeout": timeout_s, "body": meaning},
                owner=asker_name(),
                trace=span_around().headers,
            )
    except Refused as exc:
        return error_response(exc.status, exc.message, exc.param)
    except KeyReused as exc:
        raise HTTPException(
            409, "this Idempotency-Key came before with another request: use a new key"
        ) from exc
    jobs.runner.wake()
    return AnyTextResponse(_shown(job), 202, headers={"Location": f"/v1/jobs/{job.id}"})


@router.get("")
async def list_jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> dict[str, Any]:
    """Jobs, newest first; results are left out."""
    with from_bus("job"):
        found = await _jobs(request).store.newest(limit=limit, after=after, owner=asker_name())
    if found is None:
        raise HTTPException(404, f"there is no job {after!r} to begin behind (any more)")
    page, has_more = found
    data = [_shown(job) | {"result": None} for job in page]
    return {"object": "list", "data": data, "has_more": has_more}


@router.get("/{job_id}")
async def get_job(job_id: str, request: Request) -> dict[str, Any]:
    """State and, when it has succeeded, the result."""
    return _shown(await _find(request, job_id))


@router.get("/{job_id}/events")
async def events(
    job_id: str,
    request: Request,
    last_event_id: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """The chunks as server-sent events, from the beginning or behind `Last-Event-ID`."""
    last = last_event_id or "0-0"  # a browser that has seen none sends an empty one
    if not is_event_id(last):
        raise HTTPException(400, "Last-Event-ID is none of this job's events")
    job = await _find(request, job_id)
    return StreamingResponse(
        _follow(_jobs(request).store, job.id, last),
        media_type="text/event-stream",
        # A proxy that keeps pieces back, or an answer of yesterday, is no stream.
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


@router.delete("/{job_id}")
async def cancel(job_id: str, request: Request) -> dict[str, Any]:
    """End a job; one that has ended stays as it is."""
    job = await _find(request, job_id)
    with from_bus("job"):
        job = await cancelled(_jobs(request).store, job)
    return _shown(job)


async def cancelled(store: JobStore, job: Job) -> Job:
    """`job` as it is when its runner has heard that nobody wants it, or some seconds later."""
    if not job.ended:
        await store.cancel(job.id)
        with suppress(TimeoutError):  # the runner is gone; its successor will end the job
            async with asyncio.timeout(5):
                while not job.ended:
                    await asyncio.sleep(0.05)  # its runner hears of it within a second
                    job = await store.get(job.id) or job
    return job


async def _read_body(request: Request) -> dict[str, Any]:
    # Any web page may have a browser send text or a form here, unasked; JSON it may not.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "the body has to be sent as Content-Type: application/json")
    try:
        body = await request.json()
    except ValueError as exc:
        raise HTTPException(400, "the body is not JSON") from exc
    except RecursionError as exc:
        raise HTTPException(400, "the body is nested too deeply") from exc
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return without_what_is_ours(body)


def _take_timeout(body: dict[str, Any], longest_s: float) -> float:
    timeout = body.pop("timeout", longest_s)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise HTTPException(400, "timeout must be a number of seconds above 0")
    return min(float(timeout), longest_s)


def _meaning(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What `body` says, the same for 4 and 4.0, for null and for nothing. Raises Refused."""
    if ("messages" in body) == ("prompt" in body):
        raise HTTPException(400, "give either messages, for a chat, or a prompt")
    if body.get("use_beam_search"):
        raise HTTPException(400, "jobs cannot use beam search")
    request = read_request(path, body)
    try:
        read_request(path, body | STREAMED)
    except Refused as exc:
        why = f"not as a job, for a job is streamed: {exc.message}"
        raise Refused(exc.status, why, exc.param) from exc
    return request.model_dump(mode="json", exclude_unset=True, exclude_none=True)


async def _find(request: Request, job_id: str) -> Job:
    with from_bus("job"):
        job = await _jobs(request).store.get(job_id) if is_job_id(job_id) else None
    return own(job, "job", job_id)


async def _follow(store: JobStore, job_id: str, last: str) -> AsyncIterator[str]:
    silent_s = 0.0
    while True:
        try:
            found = await store.events(job_id, after=last, block_s=_BLOCK_S)
            # A reader that begins behind the end, or whose job has expired meanwhile.
            ended = not found and ((job := await store.get(job_id)) is None or job.ended)
        except UnreadableJob as exc:
            why = f"the bus has something else under this job's name: {exc}"
            error = error_response(500, why).body
            yield f"data: {bytes(error).decode()}\n\ndata: [DONE]\n\n"
            return
        except BUS_ERRORS:
            return  # the reader comes again with its Last-Event-ID
        if ended and not await _has_more(store, job_id, last):
            yield "data: [DONE]\n\n"
            return
        silent_s = 0.0 if found else silent_s + _BLOCK_S
        if silent_s >= _KEEP_ALIVE_S:
            silent_s = 0.0
            yield ": waiting\n\n"
        for event in found:
            last = event.id
            if event.data is None:
                yield f"id: {event.id}\ndata: [DONE]\n\n"
                return
            yield f"id: {event.id}\ndata: {event.data}\n\n"


async def _has_more(store: JobStore, job_id: str, last: str) -> bool:
    """It may have ended between the two questions."""
    return bool(await store.events(job_id, after=last, block_s=0.001, limit=1))


def _shown(job: Job) -> dict[str, Any]:
    last = job.stages[-1] if job.stages else None
    deliveries = max((sum(s.stage == n.stage for s in job.stages) for n in job.stages), default=0)
    return {
        "id": job.id,
        "object": "job",
        "endpoint": job.path,
        "model": job.model,
        "state": job.state,
        "stage": last.stage if last else None,
        "worker": last.worker if last else None,
        "attempts": max(job.attempts, deliveries),
        "created_at": job.created_at,
        "started_at": job.stages[0].at if job.stages else None,
        "first_token_at": job.first_token_at,
        "finished_at": job.finished_at,
        "deadline": job.deadline,
        "expires_at": job.finished_at + job.ttl_s if job.finished_at else None,
        "stages": [vars(start) for start in job.stages],
        "result": job.result,
        "error": job.error,
    }
