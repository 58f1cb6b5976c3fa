"""A store of jobs on a real bus, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from pdtasks.bus.connection import connect_async
from pdtasks.bus.jobs import Job, JobStore
from pdtasks.cluster.rights import User
from pdtasks.settings import Settings
from tests.integration.conftest import Services

PATH = "/v1/completions"
BODY = {"model": "m", "prompt": "hello", "seed": 1}
MOST_WAITING = 20

Run = Callable[[Callable[[JobStore], Awaitable[None]]], None]


def on_an_empty_bus(services: Services) -> Run:
    """Runs a test with a store there."""
    services.bus.flushall()

    def run(test: Callable[[JobStore], Awaitable[None]]) -> None:
        async def main() -> None:
            bus = connect_async(Settings(bus_url=services.bus_server.url_for(User.API)))
            try:
                async with asyncio.timeout(20):
                    await test(JobStore(bus, ttl_s=60, most_waiting=MOST_WAITING))
            finally:
                await bus.aclose()

        asyncio.run(main())

    return run


async def submit(store: JobStore, body: dict[str, Any] | None = None, **options: Any) -> Job:
    return await store.create(PATH, BODY if body is None else body, timeout_s=60, **options)


async def claimed(store: JobStore, token: str) -> Job:
    job = await store.claim(token)
    assert job is not None
    return job


async def seen(store: JobStore, job: Job) -> Job:
    found = await store.get(job.id)
    assert found is not None
    return found
