"""The routes of batches, as OpenAI has them: make, look, list, cancel, from any API process."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from pydantic import BaseModel, StringConstraints
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from api.asking import ROUTES
from api.batch_runner import BatchTender
from api.files import PURPOSE
from api.files import find as find_file
from api.stored import from_bus, own, page
from pdtasks.bus.batches import Batch, BatchStore, FileGone
from pdtasks.keys import asker_name

router = APIRouter(prefix="/v1/batches")

_MOST_METADATA: Final = 16
_Key = Annotated[str, StringConstraints(max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]


class BatchRequest(BaseModel):
    """What makes a batch."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[_Key, _Value] | None = None


class Batches:
    """What the routes need, in the app's state."""

    def __init__(self, store: BatchStore, tender: BatchTender) -> None:
        self.store = store
        self.tender = tender


def _batches(request: Request) -> Batches:
    found: Batches = request.app.state.pdtasks_batches
    return found


@router.post("", dependencies=[Depends(validate_json_request)])
async def create(body: BatchRequest, request: Request) -> dict[str, Any]:
    """Take a batch in; its file is checked behind this answer."""
    if body.endpoint not in ROUTES:
        raise HTTPException(
            400, f"endpoint: batches are for {', '.join(ROUTES)}; nothing else is served in them"
        )
    if body.completion_window != "24h":
        raise HTTPException(400, "completion_window has to be 24h")
    if body.metadata is not None and len(body.metadata) > _MOST_METADATA:
        raise HTTPException(400, f"metadata may have {_MOST_METADATA} entries")
    file = await find_file(request, body.input_file_id)
    if file.purpose != PURPOSE:
        raise HTTPException(400, f"input_file_id: the file's purpose is not {PURPOSE!r}")
    batches = _batches(request)
    try:
        with from_bus("batch"):
            batch = await batches.store.create(
                body.endpoint, file.id, metadata=body.metadata, owner=asker_name()
            )
    except FileGone as exc:
        raise HTTPException(404, f"there is no file {file.id!r} (any more)") from exc
    batches.tender.wake()
    return shown(batch)


@router.get("")
async def list_batches(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> dict[str, Any]:
    """Batches, newest first."""
    with from_bus("batch"):
        found = await _batches(request).store.newest(limit=limit, after=after, owner=asker_name())
    return page("batch", after, found and ([shown(batch) for batch in found[0]], found[1]))


@router.get("/{batch_id}")
async def get_batch(batch_id: str, request: Request) -> dict[str, Any]:
    """Its state, and how far it is."""
    return shown(await _find(request, batch_id))


@router.post("/{batch_id}/cancel")
async def cancel(batch_id: str, request: Request) -> dict[str, Any]:
    """Begin no further line, end those that run; one that has ended stays as it is."""
    batch = await _find(request, batch_id)
    batches = _batches(request)
    with from_bus("batch"):
        await batches.store.cancel(batch.id)
    batches.tender.wake()
    return shown(await _find(request, batch_id))


async def _find(request: Request, batch_id: str) -> Batch:
    with from_bus("batch"):
        batch = await _batches(request).store.get(batch_id)
    return own(batch, "batch", batch_id)


def shown(batch: Batch) -> dict[str, Any]:
    """As OpenAI shows it."""
    names = (
        *("id", "endpoint", "model", "input_file_id", "completion_window", "status"),
        *("output_file_id", "error_file_id", "created_at", "in_progress_at", "expires_at"),
        *("finalizing_at", "completed_at", "failed_at", "expired_at"),
        *("cancelling_at", "cancelled_at", "metadata"),
    )
    errors = {"object": "list", "data": batch.errors} if batch.errors else None
    counts = {name: getattr(batch, name) for name in ("total", "completed", "failed")}
    return {
        "object": "batch",
        **{name: getattr(batch, name) for name in names},
        "errors": errors,
        "request_counts": counts,
    }
