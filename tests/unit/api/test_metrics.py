"""What does the API tell a scraper of itself, bus and broker?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import valkey
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from vllm.config import CacheConfig
from vllm.v1.engine import FinishReason

from api.metrics import Figures, Scrapes
from pdtasks.broker.depths import Depth
from pdtasks.bus.figures import BusFigures
from pdtasks.errors import BrokerUnavailable, RequestTimeout
from tests.unit.api.core_bench import READY, Bench, with_bench
from tests.unit.factories import an_output

ON_BUS = BusFigures(
    memory_bytes=900,
    memory_max_bytes=1000,
    jobs_queued=3,
    jobs_running=2,
    jobs_ended=1,
    batches_open=1,
    lines=10,
    lines_completed=6,
    lines_failed=1,
)


#: What tells of each model, and the one that there is here.
BY_MODEL = ("pdtasks_open_requests", "pdtasks_oldest_request_seconds", "pdtasks_workers")
MODEL = "SmolLM2-135M-Instruct"


class StubQueues:
    """RabbitMQ, or none."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    async def read(self) -> dict[str, Depth]:
        if self._error is not None:
            raise self._error
        return {"prefill": Depth(ready=7, consumers=2)}


class Told:
    """What a scrape finds."""

    def __init__(self, figures: Figures) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(figures)

    def __getitem__(self, name: str) -> float:
        value = self.get(name)
        assert value is not None, name
        return value

    def get(self, name: str, **labels: str) -> float | None:
        if name in BY_MODEL:
            labels = {"model": MODEL} | labels
        return self._registry.get_sample_value(name, labels)


def with_figures(
    test: Callable[[Bench, Figures, Told], Awaitable[None]],
    monkeypatch: Any,
    *,
    bus: BusFigures | Exception = ON_BUS,
    queues: StubQueues | None = None,
    leaves: tuple[str, ...] = (),
) -> None:
    async def read(_bus: Any) -> BusFigures:
        if isinstance(bus, Exception):
            raise bus
        return bus

    monkeypatch.setattr("api.metrics.read_figures", read)

    async def run(bench: Bench) -> None:
        figures = Figures({MODEL: (bench.core, CacheConfig())}, None, queues or StubQueues())
        await test(bench, figures, Told(figures))

    with_bench(run, leaves=leaves)


def test_bus_and_broker_are_asked_when_somebody_scrapes(monkeypatch: Any) -> None:
    async def test(_bench: Bench, figures: Figures, told: Told) -> None:
        await figures.gather()

        assert told["pdtasks_bus_up"] == told["pdtasks_broker_up"] == 1
        assert told["pdtasks_bus_memory_bytes"] == 900
        assert told.get("pdtasks_jobs", state="queued") == 3
        assert told.get("pdtasks_batch_lines", state="left") == 3
        assert told.get("pdtasks_queue_messages", queue="prefill") == 7
        assert told.get("pdtasks_queue_consumers", queue="prefill") == 2
        assert told.get("pdtasks_queue_messages", queue="decode") is None, "not declared yet"

    with_figures(test, monkeypatch)


def test_what_does_not_answer_is_down_and_the_rest_is_told_all_the_same(monkeypatch: Any) -> None:
    async def test(_bench: Bench, figures: Figures, told: Told) -> None:
        await figures.gather()

        assert told["pdtasks_bus_up"] == told["pdtasks_broker_up"] == 0
        assert told.get("pdtasks_bus_memory_bytes") is None
        assert told.get("pdtasks_workers", stage="decode", state="ready") == 1

    with_figures(
        test,
        monkeypatch,
        bus=valkey.ConnectionError("gone"),
        queues=StubQueues(BrokerUnavailable("gone")),
    )


def test_a_stage_without_workers_is_a_nought_and_no_gap(monkeypatch: Any) -> None:
    async def test(bench: Bench, _figures: Figures, told: Told) -> None:
        bench.core.workers.known = [msgspec.structs.replace(READY[0], state="stalled")]

        assert told.get("pdtasks_workers", stage="prefill", state="stalled") == 1
        assert told.get("pdtasks_workers", stage="prefill", state="ready") == 0
        assert told.get("pdtasks_workers", stage="decode", state="ready") == 0

    with_figures(test, monkeypatch)


def test_each_request_is_in_one_place_and_the_longest_wait_there_is_told(
    monkeypatch: Any,
) -> None:
    async def test(bench: Bench, _figures: Figures, told: Told) -> None:
        await bench.ask("new", "old", "first", "second")
        bench.core._open["old"].record._began -= 100
        await bench.take((0, an_output([1], "first")), (0, an_output([1], "second")))
        await bench.take((1, an_output([2], "second")), stage="decode")

        counts = {
            at: told.get("pdtasks_open_requests", stage=at)
            for at in ("line", "prefill", "handover", "decode")
        }
        assert counts == {"line": 0, "prefill": 2, "handover": 1, "decode": 1}
        oldest = bench.core.under_way(time.monotonic())
        assert 100 <= oldest["prefill"][1] < 200
        assert 0 < oldest["handover"][1] < 100
        assert oldest["decode"][1] == 0

    with_figures(test, monkeypatch, leaves=("new", "old", "first", "second"))


def test_ends_are_counted_by_how_they_came_and_the_gap_once_for_each_answer(
    monkeypatch: Any,
) -> None:
    def ended(outcome: str) -> float:
        labels = {"model": MODEL, "kind": "interactive", "outcome": outcome}
        return REGISTRY.get_sample_value("pdtasks_requests_total", labels) or 0.0

    def gaps() -> float:
        return REGISTRY.get_sample_value("pdtasks_first_to_second_token_seconds_count") or 0.0

    async def test(bench: Bench, _figures: Figures, _told: Told) -> None:
        outcomes = ("length", "RequestTimeout", "ended_here")
        before, gaps_before = [ended(o) for o in outcomes], gaps()

        await bench.ask("done", "late", "left")
        await bench.take((0, an_output([1], "done")))
        await bench.take((1, an_output([2], "done")), stage="decode")
        await bench.take((2, an_output([3], "done", FinishReason.LENGTH)), stage="decode")
        await bench.core._give_up("late", RequestTimeout("late"))
        await bench.core.abort_requests_async(["left"])

        after = [ended(o) for o in outcomes]
        assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]
        assert gaps() - gaps_before == 1

    with_figures(test, monkeypatch)


def test_a_scrape_waits_for_the_figures_and_another_request_does_not() -> None:
    class Counting:
        gathered = 0

        async def gather(self) -> None:
            await asyncio.sleep(0)
            self.gathered += 1

    async def answer(_request: Any) -> PlainTextResponse:
        return PlainTextResponse(str(app.state.pdtasks_figures.gathered))

    app = Starlette(routes=[Route("/metrics", answer), Route("/v1/models", answer)])
    app.state.pdtasks_figures = Counting()
    app.add_middleware(Scrapes, state=app.state)
    client = TestClient(app)

    assert client.get("/v1/models").text == "0"
    assert client.get("/metrics").text == "1"


def test_vllms_description_of_the_cache_is_there_with_all_decode_engines_blocks(
    monkeypatch: Any,
) -> None:
    async def test(bench: Bench, figures: Figures, _told: Told) -> None:
        def labels() -> dict[str, str]:
            (info,) = (m for m in figures.collect() if m.name == "vllm:cache_config_info")
            (sample,) = info.samples
            assert sample.value == 1
            return sample.labels

        assert labels()["engine"] == "0", "also before a worker has said"
        bench.core.workers.known = [
            msgspec.structs.replace(w, kv_blocks=70, kv_block_size=16) for w in READY
        ]
        assert (labels()["num_gpu_blocks"], labels()["block_size"]) == ("70", "16")

    with_figures(test, monkeypatch)
