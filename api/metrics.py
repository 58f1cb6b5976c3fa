"""What does this process tell Prometheus that nobody counts as it goes? Looked at for each scrape.

What this process knows by itself is there always; bus and broker are asked first, for so long and
no longer (`Scrapes`), and what does not answer is said to be down.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.config import CacheConfig

from api.core import PipelineCore
from api.engine_stats import kv_blocks
from pdtasks.broker.depths import Depth
from pdtasks.bus.connection import BUS_ERRORS, connect_async
from pdtasks.bus.figures import BusFigures, read_figures
from pdtasks.errors import BrokerUnavailable
from pdtasks.messages import WORKER_STATES
from pdtasks.naming import STAGES, stages_of
from pdtasks.settings import Settings

if TYPE_CHECKING:
    from api.front import Front

logger = logging.getLogger(__name__)

#: Seconds that a scrape waits for the bus, and for the broker beside it.
_WITHIN_S: Final = 3.0


class LooksAtQueues(Protocol):
    """`pdtasks.broker.depths.Depths`, as far as this module needs it."""

    async def read(self) -> Mapping[str, Depth]: ...


class Figures:
    """A collector for `prometheus_client`, in one event loop."""

    def __init__(
        self,
        models: Mapping[str, tuple[PipelineCore, CacheConfig]],
        bus: Any,
        queues: LooksAtQueues,
    ) -> None:
        """Args:
        models: by name, what stands for each one's engine.
        bus: an asynchronous client of Valkey.
        """
        self._models = models
        self._bus = bus
        self._queues = queues
        self._on_bus: BusFigures | None = None
        self._in_queues: Mapping[str, Depth] | None = None

    async def gather(self) -> None:
        """Ask bus and broker. Bounded, and raises nothing of theirs."""
        for core, _ in self._models.values():
            core.tell_stats()
        self._on_bus, self._in_queues = await asyncio.gather(self._ask_bus(), self._ask_broker())

    async def _ask_bus(self) -> BusFigures | None:
        try:
            async with asyncio.timeout(_WITHIN_S):
                return await read_figures(self._bus)
        except (*BUS_ERRORS, TimeoutError) as exc:
            logger.warning("bus is away: %s", type(exc).__name__)
            return None

    async def _ask_broker(self) -> Mapping[str, Depth] | None:
        try:
            return await self._queues.read()
        except BrokerUnavailable as exc:
            logger.warning("lengths of queues are not known: %s", exc)
            return None

    def describe(self) -> Iterable[Metric]:
        """Nothing is looked at before somebody asks."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All of it."""
        yield from self._of_requests()
        yield from self._of_workers()
        yield from self._of_queues()
        yield from self._of_bus()

    def _of_requests(self) -> Iterable[Metric]:
        requests = GaugeMetricFamily(
            "pdtasks_open_requests",
            "Requests of this process by where they are",
            labels=["model", "stage"],
        )
        oldest = GaugeMetricFamily(
            "pdtasks_oldest_request_seconds",
            "Longest wait now for the first token of a stage: from submission, or the first token",
            labels=["model", "stage"],
        )
        now = time.monotonic()
        for model, (core, _) in self._models.items():
            for stage, (count, oldest_s) in core.under_way(now).items():
                requests.add_metric([model, stage], count)
                oldest.add_metric([model, stage], oldest_s)
        yield requests
        yield oldest

    def _of_workers(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily(
            "pdtasks_workers", "Workers for this API's models", labels=["model", "stage", "state"]
        )
        info = Metric("vllm:cache_config_info", "Information of the LLMEngine CacheConfig", "gauge")
        for model, (core, cache_config) in self._models.items():
            ours = core.workers.ours()
            counts = Counter((stage, w.state) for w in ours for stage in stages_of(w.role))
            for stage in STAGES:
                for state in WORKER_STATES:
                    workers.add_metric([model, stage, state], counts[stage, state])
            # vLLM's own would be written once, when its engine starts; here engines come and go.
            labels = cache_config.metrics_info() | {"engine": "0"}
            blocks, block_size = kv_blocks(ours)
            if blocks:
                labels |= {"num_gpu_blocks": str(blocks), "block_size": str(block_size)}
            if len(self._models) > 1:  # vLLM's dashboard expects no further label
                labels |= {"model_name": model}
            info.add_sample(info.name, labels, 1)
        yield workers
        yield info

    def _of_queues(self) -> Iterable[Metric]:
        found = self._in_queues
        yield GaugeMetricFamily(
            "pdtasks_broker_up", "1: RabbitMQ answers", value=float(found is not None)
        )
        messages = GaugeMetricFamily(
            "pdtasks_queue_messages", "Messages that no worker has yet", labels=["queue"]
        )
        consumers = GaugeMetricFamily(
            "pdtasks_queue_consumers", "Workers that consume from it", labels=["queue"]
        )
        for queue, length in (found or {}).items():
            messages.add_metric([queue], length.ready)
            consumers.add_metric([queue], length.consumers)
        yield messages
        yield consumers

    def _of_bus(self) -> Iterable[Metric]:
        found = self._on_bus
        yield GaugeMetricFamily(
            "pdtasks_bus_up", "1: the bus answers", value=float(found is not None)
        )
        if found is None:
            return
        yield GaugeMetricFamily(
            "pdtasks_bus_memory_bytes", "Memory that the bus uses", value=found.memory_bytes
        )
        yield GaugeMetricFamily(
            "pdtasks_bus_memory_max_bytes",
            "Memory from which it takes nothing; 0: no limit",
            value=found.memory_max_bytes,
        )
        jobs = GaugeMetricFamily("pdtasks_jobs", "Jobs on the bus", labels=["state"])
        jobs.add_metric(["queued"], found.jobs_queued)
        jobs.add_metric(["running"], found.jobs_running)
        jobs.add_metric(["ended"], found.jobs_ended)
        yield jobs
        yield GaugeMetricFamily(
            "pdtasks_open_batches", "Batches that have not ended", value=found.batches_open
        )
        lines = GaugeMetricFamily("pdtasks_batch_lines", "Lines of open batches", labels=["state"])
        lines.add_metric(["completed"], found.lines_completed)
        lines.add_metric(["failed"], found.lines_failed)
        lines.add_metric(["left"], found.lines - found.lines_completed - found.lines_failed)
        yield lines


@asynccontextmanager
async def observed(
    state: Any,
    fronts: Iterable[Front],
    settings: Settings,
    queues: LooksAtQueues,
) -> AsyncIterator[None]:
    """Have `Figures` told; `Scrapes` finds them in `state`, the application's."""
    bus = connect_async(settings)
    models = {front.name: (front.core, front.config.cache_config) for front in fronts}
    figures = state.pdtasks_figures = Figures(models, bus, queues)
    REGISTRY.register(figures)
    try:
        yield
    finally:
        REGISTRY.unregister(figures)
        await bus.aclose()


class Scrapes:
    """ASGI layer: figures are gathered before they are told."""

    def __init__(self, app: ASGIApp, *, state: Any) -> None:
        """`state`: of the application, where its lifespan puts `pdtasks_figures`."""
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/metrics":
            await self._state.pdtasks_figures.gather()
        await self._app(scope, receive, send)
