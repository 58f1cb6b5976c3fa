"""What becomes of the jobs of an API process that stops? On a real bus, with a stub of vLLM's."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI

from api.main import _running_jobs
from api.parameters import Parameters
from api.runner import JobRunner
from pdtasks.background import Background
from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bus.connection import connect_async
from pdtasks.bus.jobs import Job, JobStore
from pdtasks.cluster.probes import free_ports
from pdtasks.cluster.process import Process
from pdtasks.cluster.rights import User
from pdtasks.settings import Settings
from tests.integration.conftest import ROOT, Services
from tests.waiting import until, wait_until

NUM_JOBS = 8
BODY = {"model": "m", "prompt": "hello", "seed": 1}


class HangingHandler:
    """vLLM's handler of completions: one chunk, and no end."""

    async def create_completion(self, request: Any, raw_request: Any) -> Any:
        return self._stream()

    async def _stream(self) -> AsyncGenerator[str, None]:
        chunk = {"object": "text_completion", "choices": [{"index": 0, "text": "a"}]}
        yield f"data: {json.dumps(chunk)}\n\n"
        await asyncio.Event().wait()


@pytest.fixture
def settings(services: Services) -> Settings:
    services.bus.flushall()
    return Settings(bus_url=services.bus_server.url_for(User.API))


@asynccontextmanager
async def an_observer(settings: Settings) -> AsyncIterator[JobStore]:
    """Another API process's view of the jobs."""
    async with asyncio.timeout(30), connect_async(settings) as bus:
        yield JobStore(bus, ttl_s=60)


async def submit(store: JobStore, **changes: Any) -> Job:
    return await store.create("/v1/completions", BODY | changes, timeout_s=60)


async def ended(store: JobStore, job: Job) -> Job:
    while not job.ended:
        await asyncio.sleep(0.01)
        job = await store.get(job.id) or job
    return job


def test_the_jobs_of_an_api_that_stops_can_be_claimed_at_once(
    settings: Settings, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = JobStore.release

    async def slow_release(self: JobStore, job: Job) -> None:
        await asyncio.sleep(1)
        await release(self, job)

    monkeypatch.setattr(JobStore, "release", slow_release)
    app = FastAPI()
    app.state.openai_serving_completion = HangingHandler()

    async def test() -> None:
        async with an_observer(settings) as store:
            made = {(await submit(store)).id for _ in range(NUM_JOBS)}
            # Given an API that runs them
            async with _running_jobs(app, settings, Background(), Parameters(priorities=False)):
                runner: JobRunner = app.state.pdtasks_jobs.runner
                await until(lambda: all(services.bus.exists(f"pd:job:{i}:events") for i in made))
                assert await store.claim("early") is None
                began = time.monotonic()

            # When it has stopped, which takes as long as its slowest release
            assert time.monotonic() - began < 5
            assert runner.num_running == 0

            # Then all of them are there for the next: nobody waits for a lease
            claimed = [await store.claim(f"next{number}") for number in range(NUM_JOBS)]
            assert {job.id for job in claimed if job} == made
            assert not any(job.is_given_up for job in claimed if job)

    asyncio.run(test())


def test_an_api_process_that_is_stopped_hands_its_jobs_over_on_a_slow_bus(
    settings: Settings, services: Services, bench_nursery: Nursery, tmp_path: Path
) -> None:
    bus = services.bus

    def running() -> dict[str, float]:
        """The ends of the leases, UNIX seconds."""
        found = cast(
            "list[tuple[bytes, float]]", bus.zrange("pd:jobs:running", 0, -1, withscores=True)
        )
        return {name.decode(): until for name, until in found}

    async def submit_all() -> set[str]:
        async with an_observer(settings) as store:
            model = settings.model_name  # no stub here: it must be the API's
            return {(await submit(store, model=model)).id for _ in range(NUM_JOBS)}

    # Given an API process whose jobs wait for workers
    made = asyncio.run(submit_all())
    with an_api(services, bench_nursery, tmp_path / "api.log") as process:
        wait_until(lambda: running().keys() == made, within_s=60, what="all jobs are run")

        # When it is stopped while each change of a key takes more than a second
        bus.execute_command("CLIENT", "PAUSE", 1200, "WRITE")
        process.request_stop()
        wait_until(lambda: process.poll() is not None)

    # Then no job waits for the end of a lease
    log = (tmp_path / "api.log").read_text()
    assert "Application shutdown complete" in log, log[-3000:]
    assert running() == dict.fromkeys(made, 0.0)


@contextmanager
def an_api(services: Services, nursery: Nursery, log: Path) -> Iterator[Process]:
    (port,) = free_ports(1)
    process = nursery.make(
        "api",
        [sys.executable, "-m", "pdtasks.cli", "api", "--port", str(port)],
        env=os.environ | services.env | {"PYTHONPATH": str(ROOT)},
        log=log,
        cwd=log.parent,
    )
    process.start()
    try:
        yield process
    finally:
        process.kill()


def test_an_idle_runner_has_nothing_left_of_jobs_that_have_ended(
    settings: Settings, services: Services
) -> None:
    class EndingHandler(HangingHandler):
        async def _stream(self) -> AsyncGenerator[str, None]:
            for odd in ("data: {", ""):
                yield odd

    app = FastAPI()
    app.state.openai_serving_completion = EndingHandler()

    async def test() -> None:
        async with (
            an_observer(settings) as store,
            _running_jobs(app, settings, Background(), Parameters(priorities=False)),
        ):
            runner: JobRunner = app.state.pdtasks_jobs.runner
            made = [await submit(store) for _ in range(20)]
            late = await store.create("/v1/completions", BODY, timeout_s=-1)
            runner.wake()
            for job in (*made, late):
                found = await ended(store, job)
                assert found.error
                assert found.attempts == 1
                assert found.error["type"] == ("RequestTimeout" if job is late else "PdtasksError")

            await until(lambda: runner.num_running == 0)
            assert services.bus.zrange("pd:jobs:running", 0, -1) == []
            assert services.bus.zrange("pd:jobs:waiting", 0, -1) == []

    asyncio.run(test())
