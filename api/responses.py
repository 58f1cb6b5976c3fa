"""The routes of responses: vLLM's own, but for those in the background, which are jobs.

vLLM keeps background responses in the memory of one process, as long as that lives.  Here one is a
job on the bus: any API process answers for it, and another one goes on with it.  Nothing else is
stored, whatever `store` says.
"""

from __future__ import annotations

import random
from typing import Any, Final

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.openai.responses.api_router import create_responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from api.asking import Refused, app_of, check, without_what_is_ours
from api.guard import error_response
from api.jobs import AnyTextResponse, Jobs, cancelled
from api.runner import IN_FOREGROUND, RESPONSES
from api.stored import from_bus, own
from pdtasks.bus.jobs import Job, State, is_job_id
from pdtasks.keys import asker_name

router = APIRouter()

_JOB: Final = "job-"
_RESPONSE: Final = "resp_"
_STATUS: Final = {
    State.QUEUED: "queued",
    State.PREFILL: "in_progress",
    State.DECODE: "in_progress",
    State.SUCCEEDED: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
}


def install(app: FastAPI) -> None:
    """Have `app` answer here instead of in vLLM's routes."""
    app.router.routes[:] = [
        route for route in app.router.routes if not getattr(route, "path", "").startswith(RESPONSES)
    ]
    app.include_router(router)


def _jobs(request: Request) -> Jobs:
    found: Jobs = request.app.state.pdtasks_jobs
    return found


@router.post(RESPONSES, dependencies=[Depends(validate_json_request)])
async def create(request: ResponsesRequest, raw_request: Request) -> Any:
    """vLLM's answer; for `background` a response that is answered later."""
    if not request.background:
        return await create_responses(request, raw_request)
    if request.stream:
        return error_response(400, "a background response is not streamed: ask for it", "stream")
    if request.previous_response_id is not None:
        why = "no response is kept to go on from: send the whole conversation as `input`"
        return error_response(400, why, "previous_response_id")
    body = without_what_is_ours(await raw_request.json())
    jobs = _jobs(raw_request)
    try:
        await check(raw_request.app, RESPONSES, body | IN_FOREGROUND)
    except Refused as exc:
        return error_response(exc.status, exc.message, exc.param)
    with from_bus("response"):
        job = await jobs.store.create(
            RESPONSES,
            body,
            timeout_s=jobs.timeout_s,
            seed=random.getrandbits(32),
            owner=asker_name(),
        )
    jobs.runner.wake()
    return AnyTextResponse(_shown(raw_request.app, job))


@router.get(RESPONSES + "/{response_id}")
async def retrieve(response_id: str, request: Request, stream: bool = False) -> JSONResponse:
    """A background response as it is now."""
    job = await _find(request, response_id)
    if stream:
        return error_response(400, "a background response is not streamed", "stream")
    return AnyTextResponse(_shown(request.app, job))


@router.post(RESPONSES + "/{response_id}/cancel")
async def cancel(response_id: str, request: Request) -> JSONResponse:
    """End a background response; one that has ended stays as it is."""
    job = await _find(request, response_id)
    with from_bus("response"):
        job = await cancelled(_jobs(request).store, job)
    return AnyTextResponse(_shown(request.app, job))


async def _find(request: Request, response_id: str) -> Job:
    job_id = _JOB + response_id.removeprefix(_RESPONSE)
    is_one = response_id.startswith(_RESPONSE) and is_job_id(job_id)
    with from_bus("response"):
        job = await _jobs(request).store.get(job_id) if is_one else None
    if job is not None and job.path != RESPONSES:
        job = None
    if job is None and is_one:
        why = f"there is no background response {response_id!r} (any more): others are not kept"
        raise HTTPException(404, why)
    return own(job, "response", response_id)


def response_id_of(job_id: str) -> str:
    """What the response is called that is this job."""
    return _RESPONSE + job_id.removeprefix(_JOB)


def _shown(app: FastAPI, job: Job) -> dict[str, Any]:
    if job.result is not None:
        return job.result | {"background": True}
    handler = app_of(app, job.body).state.openai_serving_responses
    request = ResponsesRequest.model_validate(
        job.body | {"request_id": response_id_of(job.id), "background": True, "stream": False}
    )
    longest = request.max_output_tokens or handler.model_config.max_model_len
    shown = ResponsesResponse.from_request(
        request,
        request.to_sampling_params(longest, handler.default_sampling_params),
        model_name=str(request.model),
        created_time=int(job.created_at),
        output=[],
        status="queued",
    ).model_dump(mode="json", by_alias=True)
    error = None
    if job.error is not None:
        is_callers = job.error.get("code", 500) < 500
        code = "invalid_prompt" if is_callers else "server_error"
        error = {"code": code, "message": job.error.get("message", "")}
    return shown | {"status": _STATUS[job.state], "error": error}
