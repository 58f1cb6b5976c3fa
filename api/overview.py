"""What goes on in the whole stack, as this API process sees it. For the page and `pdtasks top`."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response

import pdtasks
from api.core import PipelineCore
from api.reports import Record
from api.stored import from_bus
from api.viewing import require_admin, sees, viewer_of
from pdtasks.broker.depths import Depth, Depths
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.jobs import Job, JobStore
from pdtasks.bus.records import Unreadable
from pdtasks.errors import BrokerUnavailable
from pdtasks.messages import WorkerStatus
from pdtasks.naming import DEAD_QUEUE, DECODE, PREFILL, STAGES
from pdtasks.overview import (
    Api,
    InFlight,
    Jobs,
    JobView,
    Overview,
    QueueView,
    RequestReport,
    Viewer,
    WorkerView,
)
from pdtasks.settings import Settings

router = APIRouter(prefix="/pdtasks")

#: Longest lists of requests and jobs that are shown.
_MOST_SHOWN: Final = 200
_QUEUES: Final = (PREFILL, DECODE, DEAD_QUEUE)
#: In which states a request waits for a stage to give it a token.
_WAITS_FOR: Final = {PREFILL: ("line", "prefill"), DECODE: ("handover",)}


class Overviews:
    """Puts together what is known. For one event loop, in the app's state."""

    def __init__(
        self, core: PipelineCore, jobs: JobStore, settings: Settings, depths: Depths
    ) -> None:
        self._core = core
        self._jobs = jobs
        self._depths = depths
        self._api = Api(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.time(),
            version=pdtasks.__version__,
            model=settings.model_name,
        )

    async def make(self, viewer: Viewer, limit: int) -> Overview:
        """Everything that `viewer` may see, with `limit` requests and jobs at most."""
        core = self._core
        problems = list(core.background.problems())
        depths: Mapping[str, Depth] = {}
        try:
            depths = await self._depths.read()
        except BrokerUnavailable as exc:
            problems.append(str(exc))
        jobs = Jobs()
        try:
            jobs = await self._read_jobs(viewer, limit)
        except (*BUS_ERRORS, Unreadable) as exc:
            problems.append(f"the bus does not tell its jobs: {type(exc).__name__}")
        under_way = core.records()
        return Overview(
            at=time.time(),
            api=self._api,
            viewer=viewer,
            workers=tuple(map(_worker, sorted(core.workers.known, key=_place))),
            queues=_queues(depths, under_way, time.monotonic()),
            in_flight=_in_flight(under_way),
            stores=next((w.stores for w in core.workers.known if w.stores), ()),
            window=core.reports.recently.window(),
            requests=tuple(core.reports.newest(limit, lambda owner: sees(viewer, owner))),
            jobs=jobs,
            problems=tuple(problems),
        )

    async def report(self, request_id: str, viewer: Viewer) -> RequestReport | None:
        """What is known of one request; None: nothing, or it is not the viewer's."""
        found = await self._core.reports.of(request_id, lambda owner: sees(viewer, owner))
        if not found:
            return None
        now = time.monotonic()
        return RequestReport(
            id=request_id,
            sequences=tuple({report.stage: report for report in one.reports()} for one in found),
            times=tuple(one.shown(now) for one in found),
        )

    async def drain(self, name: str) -> WorkerStatus:
        """Ask a worker to drain; `name` may leave out its host where that is not ambiguous.

        Raises HTTPException when there is none, what is in `BUS_ERRORS` when nobody can ask it.
        """
        await self._core.workers.look()
        known = self._core.workers.known
        meant = [w for w in known if w.name == name] or [
            w for w in known if w.name.partition("@")[0] == name
        ]
        if len(meant) != 1:
            what = "several workers are" if meant else "no worker is"
            raise HTTPException(404, f"{what} called {name!r}")
        await self._core.workers.drain(meant[0])
        return meant[0]

    async def _read_jobs(self, viewer: Viewer, limit: int) -> Jobs:
        waiting, running = await self._jobs.counts()
        recent: list[Job] = []
        if viewer.sees_all or viewer.key:
            owner = "" if viewer.sees_all else viewer.key
            found = await self._jobs.newest(limit=min(limit, 100), after=None, owner=owner)
            recent = found[0] if found else []
        return Jobs(waiting=waiting, running=running, recent=tuple(map(_job, recent)))


def _place(worker: WorkerStatus) -> tuple[int, str]:
    return STAGES.index(worker.role), worker.name


def _worker(status: WorkerStatus) -> WorkerView:
    return WorkerView(**{name: getattr(status, name) for name in WorkerView.__struct_fields__})


def _queues(
    depths: Mapping[str, Depth], under_way: list[Record], now: float
) -> tuple[QueueView, ...]:
    views = []
    for name in _QUEUES:
        states = _WAITS_FOR.get(name, ())
        since = [record.waits_since for record in under_way if record.state in states]
        depth = depths.get(name)
        views.append(
            QueueView(
                name=name,
                ready=depth.ready if depth else None,
                consumers=depth.consumers if depth else None,
                oldest_s=now - min(since) if since else None,
            )
        )
    return tuple(views)


def _in_flight(under_way: list[Record]) -> InFlight:
    counts = dict.fromkeys(("line", PREFILL, "handover", DECODE), 0)
    for record in under_way:
        counts[record.state] = counts.get(record.state, 0) + 1
    return InFlight(
        in_line=counts["line"],
        prefill=counts[PREFILL],
        handover=counts["handover"],
        decode=counts[DECODE],
    )


def _job(job: Job) -> JobView:
    return JobView(
        id=job.id,
        key=job.owner,
        state=str(job.state),
        created_at=job.created_at,
        finished_at=job.finished_at,
        first_token_at=job.first_token_at,
        attempts=job.attempts,
        stages=tuple((start.stage, start.worker, start.at) for start in job.stages),
    )


# -- routes ----------------------------------------------------------------------------------------


class StructResponse(Response):
    """JSON of a structure of msgspec's, never of yesterday."""

    media_type = "application/json"

    def __init__(self, content: msgspec.Struct) -> None:
        super().__init__(msgspec.json.encode(content), headers={"Cache-Control": "no-store"})


def _overviews(request: Request) -> Overviews:
    found: Overviews = request.app.state.pdtasks_overviews
    return found


@router.get("/overview")
async def overview(
    request: Request, limit: Annotated[int, Query(ge=0, le=_MOST_SHOWN)] = 30
) -> Any:
    """Workers, queues, requests, latencies, KV and jobs."""
    return StructResponse(await _overviews(request).make(viewer_of(request), limit))


@router.post("/workers/{name}/drain", status_code=202)
async def drain(name: str, request: Request) -> dict[str, str]:
    """Have a worker finish or hand on what it has, and end; for admins."""
    require_admin(request)
    with from_bus("worker"):
        worker = await _overviews(request).drain(name)
    return {"worker": worker.name, "state": "asked to drain"}


@router.get("/requests/{request_id}")
async def request_report(request_id: str, request: Request) -> Any:
    """What each stage did for a request that this process answered lately."""
    report = await _overviews(request).report(request_id, viewer_of(request))
    if report is None:
        raise HTTPException(404, f"no request {request_id!r} has finished here lately")
    return StructResponse(report)
