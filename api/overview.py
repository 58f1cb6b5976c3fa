"""What goes on in the whole stack? What this API process knows, and what the others tell it."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, Final, Literal

import msgspec
import valkey.asyncio
from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel

import pdtasks
from api.core import PipelineCore
from api.neighbours import Neighbours
from api.reports import Record, is_called
from api.stored import from_bus
from api.viewing import require_admin, sees, viewer_of
from api.window import window_of
from pdtasks.broker.depths import Depth, Depths
from pdtasks.bus.apis import Share
from pdtasks.bus.connection import BUS_ERRORS, connect_async
from pdtasks.bus.jobs import Job, JobStore
from pdtasks.bus.records import Unreadable
from pdtasks.errors import BrokerUnavailable
from pdtasks.messages import WorkerStatus
from pdtasks.naming import DEAD_QUEUE, DECODE, PREFILL, ROLES, STAGES
from pdtasks.overview import (
    Api,
    InFlight,
    Jobs,
    JobView,
    Overview,
    QueueView,
    RequestReport,
    RequestView,
    Viewer,
    WorkerView,
)
from pdtasks.roles import UnknownWorker, why_not, worker_called
from pdtasks.scraping import address_of
from pdtasks.settings import Settings

router = APIRouter(prefix="/pdtasks")

#: Longest lists of requests and jobs that are shown.
_MOST_SHOWN: Final = 200


class Overviews:
    """Puts together what is known. For one event loop, in the app's state."""

    def __init__(
        self,
        cores: Sequence[PipelineCore],
        jobs: JobStore,
        settings: Settings,
        depths: Depths,
        bus: valkey.asyncio.Valkey,
    ) -> None:
        """`cores`: of all models that this process serves, the default one's first."""
        self._core = cores[0]  # all of them know all workers
        self._jobs = jobs
        self._depths = depths
        self.metrics = address_of(settings)  #: where Prometheus finds this process
        since = time.time()
        # To others this process is one for each model: no figure is of two.
        self._own = {
            secrets.token_hex(8): (
                core,
                Api(
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    since=since,
                    version=pdtasks.__version__,
                    model=core.model,
                ),
            )
            for core in cores
        }
        self.tellers = [Neighbours(bus, id_, partial(self._share, id_)) for id_ in self._own]
        self.neighbours = self.tellers[0]

    async def make(self, viewer: Viewer, limit: int, model: str | None = None) -> Overview:
        """Everything that `viewer` may see, with `limit` requests and jobs at most.

        `model`: only what is of this one. Raises HTTPException when it is none of ours.
        """
        own = [
            self._share(id_, limit, lambda owner: sees(viewer, owner))
            for id_, (core, _) in self._own.items()
            if model in (None, core.model)
        ]
        if not own:
            raise HTTPException(404, f"The model `{model}` does not exist.")
        problems = [problem for share in own for problem in share.problems]
        others: list[Share] = []
        try:
            others = await self._others(model)
        except BUS_ERRORS as exc:
            problems.append(f"other API processes are not known: {type(exc).__name__}")
        for other in others:
            where = f"API process {other.api.pid} on {other.api.host}"
            problems += [f"{where}: {problem}" for problem in other.problems]
        shares = [*own, *others]
        workers = [w for w in self._core.workers.known if model in (None, w.model)]
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
        return Overview(
            at=time.time(),
            api=own[0].api,
            others=_processes(others),
            viewer=viewer,
            workers=tuple(map(_worker, sorted(workers, key=_place))),
            queues=_queues(self._queue_names(model), depths, shares),
            in_flight=_in_flight_of(shares),
            stores=next((w.stores for w in self._core.workers.known if w.stores), ()),
            window=window_of([share.counts for share in shares]),
            requests=_newest(shares, viewer, limit),
            jobs=jobs,
            problems=tuple(problems),
        )

    async def _others(self, model: str | None = None) -> list[Share]:
        """Other processes', of one model or of all."""
        return [
            share
            for share in await self.neighbours.others()
            if share.id not in self._own and model in (None, share.api.model)
        ]

    def _queue_names(self, model: str | None) -> list[str]:
        cores = [core for core, _ in self._own.values() if model in (None, core.model)]
        return [*(core.queue_of(stage) for core in cores for stage in STAGES), DEAD_QUEUE]

    def _share(self, id_: str, limit: int, seen: Callable[[str], bool] = lambda _: True) -> Share:
        """What this process knows of one model, with `limit` requests of owners that are `seen`."""
        core, api = self._own[id_]
        under_way = core.records()
        oldest = _oldest(under_way, time.monotonic())
        return Share(
            id=id_,
            api=api,
            metrics=self.metrics,
            in_flight=_in_flight(under_way),
            oldest_s={core.queue_of(stage): seconds for stage, seconds in oldest.items()},
            counts=core.reports.recently.counts(),
            requests=tuple(core.reports.newest(limit, seen)),
            problems=tuple(core.background.problems()),
        )

    async def report(self, request_id: str, viewer: Viewer) -> RequestReport | None:
        """What is known of one request; None: nothing, or it is not the viewer's."""
        found: list[Record] = []
        for core, _ in self._own.values():
            found += await core.reports.of(request_id, lambda owner: sees(viewer, owner))
        if not found:
            return await self._report_of_others(request_id, viewer)
        now = time.monotonic()
        return RequestReport(
            id=request_id,
            sequences=tuple({report.stage: report for report in one.reports()} for one in found),
            times=tuple(one.shown(now) for one in found),
        )

    async def _report_of_others(self, request_id: str, viewer: Viewer) -> RequestReport | None:
        try:
            others = await self._others()
        except BUS_ERRORS:
            return None
        found = [
            request
            for request in _newest(others, viewer, None)
            if request.stages and is_called(request.id, request_id)
        ]
        if not found:
            return None
        return RequestReport(
            id=request_id,
            sequences=tuple({report.stage: report for report in one.stages} for one in found),
            times=tuple(found),
        )

    async def drain(self, name: str) -> WorkerStatus:
        """Ask a worker to drain; `name` may leave out its host where that is not ambiguous.

        Raises HTTPException when there is none, what is in `BUS_ERRORS` when nobody can ask it.
        """
        worker = await self._worker_called(name)
        await self._core.workers.drain(worker)
        return worker

    async def change_role(self, name: str, role: str, *, force: bool) -> WorkerStatus:
        """Ask a worker to take `role`, also where that leaves a stage without one: `force`.

        Raises likewise.
        """
        worker = await self._worker_called(name)
        if not force and (why := why_not(worker, role, self._core.workers.known)):
            raise HTTPException(409, f"{why}; with `force` it is done all the same")
        await self._core.workers.change_role(worker, role)
        return worker

    async def _worker_called(self, name: str) -> WorkerStatus:
        await self._core.workers.look()
        try:
            return worker_called(name, self._core.workers.known)
        except UnknownWorker as exc:
            raise HTTPException(404, str(exc)) from None

    async def _read_jobs(self, viewer: Viewer, limit: int) -> Jobs:
        waiting, running = await self._jobs.counts()
        recent: list[Job] = []
        if viewer.sees_all or viewer.key:
            owner = "" if viewer.sees_all else viewer.key
            found = await self._jobs.newest(limit=min(limit, 100), after=None, owner=owner)
            recent = found[0] if found else []
        return Jobs(waiting=waiting, running=running, recent=tuple(map(_job, recent)))


@asynccontextmanager
async def telling(
    cores: Sequence[PipelineCore], jobs: JobStore, settings: Settings, depths: Depths
) -> AsyncIterator[Overviews]:
    """Overviews, while the other API processes are told of this one."""
    bus = connect_async(settings)
    overviews = Overviews(cores, jobs, settings, depths, bus)
    tasks = [
        core.background.task("neighbours", teller.keep_telling)
        for core, teller in zip(cores, overviews.tellers, strict=True)
    ]
    try:
        yield overviews
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bus.aclose()


def _processes(shares: Sequence[Share]) -> tuple[Api, ...]:
    """One that serves several models has left several shares."""
    found: dict[tuple[str, int, float], Api] = {}
    for share in shares:
        api = share.api
        found.setdefault((api.host, api.pid, api.since), api)
    return tuple(found.values())


def _place(worker: WorkerStatus) -> tuple[int, str]:
    return ROLES.index(worker.role), worker.name


def _worker(status: WorkerStatus) -> WorkerView:
    return WorkerView(**{name: getattr(status, name) for name in WorkerView.__struct_fields__})


def _newest(shares: Sequence[Share], viewer: Viewer, limit: int | None) -> tuple[RequestView, ...]:
    """The last requests of all that he may see, the newest first."""
    seen = [r for share in shares for r in share.requests if sees(viewer, r.key)]
    return tuple(sorted(seen, key=lambda request: -request.submitted_at)[:limit])


def _queues(
    names: Sequence[str], depths: Mapping[str, Depth], shares: Sequence[Share]
) -> tuple[QueueView, ...]:
    views = []
    for name in names:
        waits = [share.oldest_s[name] for share in shares if name in share.oldest_s]
        depth = depths.get(name)
        views.append(
            QueueView(
                name=name,
                ready=depth.ready if depth else None,
                consumers=depth.consumers if depth else None,
                oldest_s=max(waits, default=None),
            )
        )
    return tuple(views)


def _oldest(under_way: list[Record], now: float) -> dict[str, float]:
    """By stage, the longest wait for that stage's first token. `now`: monotonic seconds."""
    found: dict[str, float] = {}
    for record in under_way:
        if stage := record.waits_for:
            found[stage] = max(found.get(stage, 0.0), now - record.waits_since)
    return found


def _in_flight_of(shares: Sequence[Share]) -> InFlight:
    names = InFlight.__struct_fields__
    return InFlight(**{n: sum(getattr(share.in_flight, n) for share in shares) for n in names})


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
    request: Request,
    limit: Annotated[int, Query(ge=0, le=_MOST_SHOWN)] = 30,
    model: str | None = None,
) -> Any:
    """Workers, queues, requests, latencies, KV and jobs; `model`: of this one alone."""
    return StructResponse(await _overviews(request).make(viewer_of(request), limit, model))


@router.post("/workers/{name}/drain", status_code=202)
async def drain(name: str, request: Request) -> dict[str, str]:
    """Have a worker finish or hand on what it has, and end; for admins."""
    require_admin(request)
    with from_bus("worker"):
        worker = await _overviews(request).drain(name)
    return {"worker": worker.name, "state": "asked to drain"}


class RoleWish(BaseModel):
    """What a worker is to serve from now on."""

    role: Literal["prefill", "decode", "both"]
    force: bool = False  #: also where that leaves a stage without a worker


@router.post("/workers/{name}/role", status_code=202)
async def role(name: str, wish: RoleWish, request: Request) -> dict[str, str]:
    """Have a worker serve other stages, with its engine as it is; for admins."""
    require_admin(request)
    with from_bus("worker"):
        worker = await _overviews(request).change_role(name, wish.role, force=wish.force)
    return {"worker": worker.name, "state": f"asked to become {wish.role}"}


@router.get("/requests/{request_id}")
async def request_report(request_id: str, request: Request) -> Any:
    """What each stage did for a request that this process answered lately."""
    report = await _overviews(request).report(request_id, viewer_of(request))
    if report is None:
        raise HTTPException(404, f"no request {request_id!r} has finished here lately")
    return StructResponse(report)
