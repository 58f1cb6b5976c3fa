"""Which workers is Prometheus to scrape?"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request

from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.scraping import PATH, targets

router = APIRouter()


@router.get(PATH)
async def worker_targets(request: Request) -> list[dict[str, Any]]:
    """Prometheus' http_sd, of all workers with a sign of life; 503 when the bus does not answer.

    (Prometheus keeps what it knew then.)
    """
    workers = request.app.state.pdtasks_client.engine_core.workers
    try:
        await workers.look()
    except BUS_ERRORS as exc:
        raise HTTPException(503, f"the bus does not answer: {type(exc).__name__}") from exc
    return targets(workers.known)
