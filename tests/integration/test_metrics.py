"""What does a scraper find at workers that are at work? With stub engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from pdtasks.bus import keys
from pdtasks.bus.connection import connect_async
from pdtasks.bus.figures import BusFigures, read_figures
from pdtasks.bus.jobs import JobStore
from pdtasks.bus.presence import read_workers
from pdtasks.cluster.rights import User
from pdtasks.messages import WorkerStatus
from pdtasks.naming import DECODE, PREFILL
from pdtasks.scraping import targets
from pdtasks.settings import Settings
from tests.integration.conftest import Services, StartWorker
from tests.scraping import complaints, samples, scrape
from tests.waiting import wait_until


def by_role(services: Services) -> dict[str, WorkerStatus]:
    return {worker.role: worker for worker in read_workers(services.bus)}


def test_each_worker_tells_what_it_does_at_the_port_that_presence_names(
    services: Services, start_worker: StartWorker, make_asker: Callable[[], Any]
) -> None:
    # Given both stages, and requests that they have answered
    start_worker(PREFILL)
    start_worker(DECODE)
    asker = make_asker()
    names = [f"canary-{number}" for number in range(3)]
    for name in names:
        asker.ask(name, max_tokens=4)
    wait_until(lambda: all(asker.finished(name) for name in names))

    # When Prometheus scrapes the targets that it is told
    workers = by_role(services)
    addresses = [group["targets"][0] for group in targets(workers.values())]
    assert len(set(addresses)) == 2
    done = 'pdtasks_stage_requests_total{outcome="done",stage="%s"}'

    def all_is_counted() -> bool:  # a moment after the last token
        return all(
            samples(scrape(worker.metrics)).get(done % role) == 3
            for role, worker in workers.items()
        )

    wait_until(all_is_counted)
    prefill, decode = (samples(scrape(workers[role].metrics)) for role in (PREFILL, DECODE))

    # Then each has counted its part
    assert prefill["pdtasks_engine_output_tokens_total"] == 3
    assert decode["pdtasks_engine_output_tokens_total"] == 9
    assert prefill['pdtasks_stage_seconds_count{stage="prefill"}'] == 3
    assert prefill['pdtasks_handover_seconds_count{part="publish"}'] == 3
    assert prefill['pdtasks_handover_seconds_count{part="save"}'] == 3
    assert prefill['pdtasks_kv_bytes_total{op="save"}'] == 3 * 13
    assert decode['pdtasks_handover_seconds_count{part="queue"}'] == 3
    # the stub engine loads nothing, which is a recompute with its reason
    recomputes = 'pdtasks_kv_recomputes_total{reason="not_loaded",stage="decode"}'
    assert decode[recomputes] == 3
    for found in (prefill, decode):
        assert found['pdtasks_worker_state{state="ready"}'] == 1
        assert found["pdtasks_worker_slots"] == 8
        assert found["pdtasks_worker_overdue_stages"] == 0
        assert found["pdtasks_worker_unsent_replies"] == 0
        assert found['pdtasks_kv_server_up{server="0"}'] == 1
        assert found['pdtasks_kv_server_memory_bytes{server="0"}'] > 0
    # and nothing names a request
    for worker in workers.values():
        text = scrape(worker.metrics)
        assert "canary" not in text
        assert complaints(text) == []


def test_jobs_and_batches_on_the_bus_are_counted_with_the_apis_rights(services: Services) -> None:
    services.bus.flushall()
    settings = Settings(bus_url=services.bus_server.url_for(User.API))

    async def look() -> tuple[BusFigures, BusFigures]:
        bus = connect_async(settings)
        try:
            empty = await read_figures(bus)
            store = JobStore(bus, ttl_s=60)
            for _ in range(3):
                await store.create("/v1/completions", {"model": "m"}, timeout_s=60)
            await store.claim("me")
            return empty, await read_figures(bus)
        finally:
            await bus.aclose()

    counts = {"total": 10, "completed": 6, "failed": 1}
    services.bus.zadd(keys.BATCHES_OPEN, {"b": 1, "damaged": 2})
    services.bus.hset(keys.BATCH + "b", mapping={k: json.dumps(v) for k, v in counts.items()})
    services.bus.set(keys.BATCH + "damaged", "no record")
    empty, found = asyncio.run(look())

    assert (empty.jobs_queued, empty.jobs_running, empty.jobs_ended) == (0, 0, 0)
    assert (found.jobs_queued, found.jobs_running, found.jobs_ended) == (2, 1, 0)
    assert (found.batches_open, found.lines, found.lines_completed, found.lines_failed) == (
        *(2, 10, 6, 1),
    )
    assert 0 < found.memory_bytes < found.memory_max_bytes
    services.bus.flushall()
