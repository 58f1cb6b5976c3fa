"""vLLM's OpenAI app on our engine client, and what pdtasks adds to it.

No weights and no GPU in this process: the models' configurations and tokenizers suffice.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request
from starlette.middleware import Middleware

from api import device
from pdtasks import collecting
from pdtasks.bus.batches import BatchStore
from pdtasks.bus.connection import BUS_ERRORS, connect_async
from pdtasks.bus.files import FileStore
from pdtasks.bus.jobs import JobStore
from pdtasks.errors import NoWorker, RepliesLost
from pdtasks.keys import KEYS_VARIABLE, require_keys
from pdtasks.naming import DEAD_QUEUE, KEPT_QUEUE, STAGES
from pdtasks.settings import Settings
from pdtasks.tracing import NO_TRACER, Tracer, make_tracer, require_usable

if TYPE_CHECKING:
    from api.core import PipelineCore
    from api.front import Fronts
    from api.parameters import Parameters
    from pdtasks.background import Background

router = APIRouter()


def create_app(settings: Settings) -> FastAPI:
    """The whole application; its lifespan connects to bus and broker."""
    device.use_none(settings)
    from api import batches, dashboard, files, jobs, models, overview, targets
    from api.front import Fronts

    fronts = Fronts(settings)
    app = fronts.default.app
    app.include_router(router)
    for routes in (jobs, files, batches, overview, dashboard, targets):
        app.include_router(routes.router)
    models.install(app, fronts)
    tracer = _add_layers(app, settings, fronts)
    vllm_lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        from api.metrics import observed
        from api.overview import telling
        from pdtasks.broker.depths import Depths

        try:
            await fronts.open()
            running_jobs = _running_jobs(
                app,
                settings,
                fronts.default.core.background,
                fronts,
                away=lambda: fronts.without_workers,
            )
            with closing(Depths((*_stage_queues(settings), DEAD_QUEUE, KEPT_QUEUE))) as depths:
                figures = observed(app.state, fronts, settings, depths)
                async with vllm_lifespan(app), running_jobs, figures:
                    jobs_of_all = app.state.pdtasks_jobs
                    for front in fronts:  # background responses of each are jobs
                        front.app.state.pdtasks_jobs = jobs_of_all
                    async with telling(
                        fronts.cores, jobs_of_all.store, settings, depths
                    ) as app.state.pdtasks_overviews:
                        yield
        finally:
            await fronts.close()
            # (not from the app's state: vLLM has taken that away by now)
            await asyncio.to_thread(tracer.close)

    app.router.lifespan_context = lifespan
    return app


def _stage_queues(settings: Settings) -> list[str]:
    """Of all models."""
    names = (settings.model_name, *settings.models)
    return [settings.queue_of(stage, name) for name in names for stage in STAGES]


def _add_layers(app: FastAPI, settings: Settings, fronts: Fronts) -> Tracer:
    """What a request passes before any route. Returns what traces it, to be closed."""
    from api import files, models
    from api.access import Access
    from api.admission import Visits
    from api.guard import Guard
    from api.metrics import Scrapes
    from api.route import RouteWishes
    from api.tracing import STATE, Traces
    from pdtasks.keys import Key, Keys

    keys = Keys(settings.keys_file, os.environ.pop(KEYS_VARIABLE, ""))

    async def count(key: Key) -> None:
        await app.state.pdtasks_client.engine_core.usage.begin(key)

    async def look_again() -> None:
        await app.state.pdtasks_client.engine_core.workers.look_again()

    # Behind vLLM's own layers, which know whom they let in.
    app.user_middleware.append(Middleware(Access, keys=keys, begin=count))
    tracer = make_tracer("pdtasks-api", f"{socket.gethostname()}:{settings.api_port}")
    setattr(app.state, STATE, tracer)
    if tracer is not NO_TRACER:
        # Only of who was let in: anybody can ask to be traced.
        app.user_middleware.append(Middleware(Traces, tracer=tracer))
    app.user_middleware.append(
        Middleware(
            Guard,
            max_body_bytes=settings.max_body_bytes,
            before=look_again,
            streamed=(files.PATH,),
            refuse=fronts.refusal,
        )
    )
    app.user_middleware.append(Middleware(RouteWishes))
    app.user_middleware.append(Middleware(Visits))
    app.user_middleware.append(Middleware(Scrapes, state=app.state))
    if len(fronts) > 1:
        app.user_middleware.append(Middleware(models.ByModel, fronts=fronts))
    # vLLM has built it already, without what came since.
    app.middleware_stack = app.build_middleware_stack()
    return tracer


@asynccontextmanager
async def _running_jobs(
    app: FastAPI,
    settings: Settings,
    background: Background,
    parameters: Parameters | Fronts,
    away: Callable[[], Collection[str]] = tuple,
) -> AsyncIterator[None]:
    """Run jobs and batches in this process, of all models but, of batches, those `away`."""
    from api.batch_runner import BatchTender, LineRunner
    from api.batches import Batches
    from api.files import Files
    from api.jobs import Jobs
    from api.runner import JobRunner

    bus = connect_async(settings)
    files = FileStore(bus, ttl_s=settings.file_ttl_s)
    batches = BatchStore(bus, ttl_s=settings.file_ttl_s)
    lines = LineRunner(
        app,
        batches,
        files,
        refuse=parameters.refusal_of_fields,
        away=away,
        concurrency=settings.batch_concurrency,
        background=background,
    )
    tender = BatchTender(
        batches,
        files,
        lines,
        models=(settings.model_name, *settings.models),
        max_line_bytes=settings.max_body_bytes,
        background=background,
    )
    app.state.pdtasks_files = Files(files, max_bytes=settings.max_file_bytes)
    app.state.pdtasks_batches = Batches(batches, tender)
    store = JobStore(bus, ttl_s=settings.result_ttl_s, most_waiting=settings.max_waiting_jobs)
    runner = JobRunner(app, store, concurrency=settings.job_concurrency, background=background)
    app.state.pdtasks_jobs = Jobs(store, runner, timeout_s=settings.request_timeout_s)
    running = (runner, lines, tender)
    for claims in running:
        claims.start()
    try:
        yield
    finally:
        await asyncio.gather(*(claims.stop() for claims in running))
        await bus.aclose()


@router.get("/ready")
async def ready(
    request: Request, *, split: bool = False, model: str | None = None
) -> dict[str, Any]:
    """200 when requests have workers that take jobs and this process is well, else 503.

    Args:
        split: workers for both stages, also where decode workers could do all of it.
        model: that is asked; None: the default one.
    """
    core = _core_of(request, model)
    try:
        await core.workers.look()
        core.workers.require(split=split)
        core.require_replies()
    except (NoWorker, RepliesLost) as exc:
        raise HTTPException(exc.http_status, str(exc)) from exc
    except BUS_ERRORS as exc:
        raise HTTPException(503, f"the bus does not answer: {type(exc).__name__}") from exc
    if problems := core.background.problems():
        raise HTTPException(503, "; ".join(problems))
    failures = {name: count for name, count in core.background.failures().items() if count}
    return {"status": "ready"} | ({"background": failures} if failures else {})


def _core_of(request: Request, model: str | None) -> PipelineCore:
    if model is None:
        default: PipelineCore = request.app.state.pdtasks_client.engine_core
        return default
    fronts: Fronts = request.app.state.pdtasks_fronts
    if model not in fronts:
        raise HTTPException(404, f"The model `{model}` does not exist.")
    return fronts.of(model).core


def serve(settings: Settings, host: str, port: int) -> None:
    """Run the API until SIGTERM; open streams get `drain_timeout_s` to finish.

    Raises ConfigurationError when it would be open to other hosts without a key, or cannot send
    traces as it is asked to.
    """
    require_keys(settings, host)
    require_usable()
    settings = settings.model_copy(update={"api_host": host, "api_port": port})  # to be told
    with collecting.rarely():
        from vllm.envs import enable_envs_cache

        from api.connections import WatchedConnection

        app = create_app(settings)
    enable_envs_cache()  # vLLM looks into its environment for each token
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=WatchedConnection,
            log_level="info",
            access_log=False,
            timeout_graceful_shutdown=int(settings.drain_timeout_s),
        )
    )
    for front in app.state.pdtasks_fronts:
        front.app.state.server = server  # vLLM's error handlers look for it
    server.run()
