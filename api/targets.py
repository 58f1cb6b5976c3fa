"""Which API processes and workers is Prometheus to scrape?"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request

from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.scraping import PATH, api_targets, targets

router = APIRouter()


@router.get(PATH)
async def all_targets(request: Request) -> list[dict[str, Any]]:
    """Prometheus' http_sd, of all that show a sign of life; 503 when the bus does not answer.

    (Prometheus keeps what it knew then.)
    """
    workers = request.app.state.pdtasks_client.engine_core.workers
    overviews = request.app.state.pdtasks_overviews
    try:
        await workers.look()
        others = await overviews.neighbours.others()
    except BUS_ERRORS as exc:
        raise HTTPException(503, f"the bus does not answer: {type(exc).__name__}") from exc
    apis = {overviews.metrics, *(other.metrics for other in others)}
    return api_targets(sorted(apis)) + targets(workers.known)
