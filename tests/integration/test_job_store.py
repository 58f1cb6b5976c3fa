"""What becomes of a job on a real bus?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from pdtasks import jobs
from pdtasks.bus import connect_async
from pdtasks.jobs import Job, JobStore, KeyReused
from pdtasks.settings import Settings
from tests.integration.conftest import Services

PATH = "/v1/completions"
BODY = {"model": "m", "prompt": "hello", "seed": 1}


@pytest.fixture
def with_store(services: Services) -> Callable[[Callable[[JobStore], Awaitable[None]]], None]:
    """Run a test on an empty bus."""
    services.bus.flushall()

    def run(test: Callable[[JobStore], Awaitable[None]]) -> None:
        async def main() -> None:
            bus = connect_async(Settings(bus_url=services.bus_server.url))
            try:
                async with asyncio.timeout(20):
                    await test(JobStore(bus, ttl_s=60))
            finally:
                await bus.aclose()

        asyncio.run(main())

    return run


Run = Callable[[Callable[[JobStore], Awaitable[None]]], None]


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


def test_a_job_is_run_to_its_result(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        job = await submit(store)
        assert (job.state, job.body, job.attempts) == ("queued", BODY, 0)

        own = await claimed(store, "t")
        assert (own.id, own.attempts) == (job.id, 1)
        assert await store.claim("other") is None
        assert await store.write(own, '{"a": 1}', state="prefill", first_token_at=1.5)
        assert await store.finish(own, "succeeded", result={"text": "é"})

        ended = await seen(store, job)
        assert (ended.state, ended.result, ended.first_token_at) == (
            "succeeded",
            {"text": "é"},
            1.5,
        )
        assert ended.ended
        assert ended.finished_at is not None
        events = await store.events(job.id, after="0", block_s=0.1)
        assert [event.data for event in events] == ['{"a": 1}', None]
        assert await store.events(job.id, after=events[0].id, block_s=0.1) == events[1:]

    with_store(test)


def test_jobs_are_run_oldest_first_each_by_one(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        made = [await submit(store) for _ in range(20)]

        found = await asyncio.gather(*(store.claim(str(n)) for n in range(25)))

        assert sorted(job.id for job in found if job) == sorted(job.id for job in made)

    with_store(test)


def test_a_seed_is_added_where_there_is_none(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        plain = await submit(store, {"prompt": "p"}, seed=7)
        seeded = await submit(store, {"prompt": "p", "seed": 3}, seed=7)

        assert (plain.body["seed"], seeded.body["seed"]) == (7, 3)

    with_store(test)


def test_a_lost_runners_job_goes_to_another_one(
    with_store: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LEASE_S", 0.1)

    async def test(store: JobStore) -> None:
        await submit(store)
        lost = await claimed(store, "lost")
        assert await store.write(lost, '"first"')

        while (own := await store.claim("own")) is None:  # noqa: ASYNC110 - the server's clock
            await asyncio.sleep(0.01)

        # The lost one wakes up again and can change nothing
        assert (own.id, own.attempts) == (lost.id, 2)
        assert await store.renew(lost) == "lost"
        assert not await store.write(lost, '"late"')
        assert not await store.finish(lost, "failed")
        assert await store.renew(own) == "held"
        assert await store.finish(own, "succeeded", result={})
        events = await store.events(own.id, after="0", block_s=0.1)
        assert [event.data for event in events] == ['"first"', None]

    with_store(test)


def test_a_runner_that_renews_keeps_its_job(
    with_store: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LEASE_S", 0.5)

    async def test(store: JobStore) -> None:
        await submit(store)
        own = await claimed(store, "own")
        loop = asyncio.get_running_loop()
        end = loop.time() + 1

        while loop.time() < end:
            assert await store.renew(own) == "held"
            assert await store.claim("other") is None
            await asyncio.sleep(0.05)

    with_store(test)


def test_a_released_job_can_be_claimed_at_once(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        await submit(store)
        own = await claimed(store, "own")

        await store.release(own)

        assert (await claimed(store, "next")).attempts == 2
        assert not await store.write(own, '"late"')

    with_store(test)


def test_a_job_that_waits_is_cancelled_at_once(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        job = await submit(store)

        assert await store.cancel(job.id)

        assert (await seen(store, job)).state == "cancelled"
        assert await store.claim("t") is None
        assert [e.data for e in await store.events(job.id, after="0", block_s=0.1)] == [None]

    with_store(test)


def test_a_job_that_runs_is_cancelled_by_its_runner(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        job = await submit(store)
        own = await claimed(store, "t")

        assert not await store.cancel(job.id)

        assert await store.renew(own) == "cancel"
        assert await store.finish(own, "cancelled")
        assert (await seen(store, job)).state == "cancelled"

    with_store(test)


def test_what_has_ended_stays_as_it_is(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        job = await submit(store)
        await store.finish(await claimed(store, "t"), "succeeded", result={})

        await store.cancel(job.id)
        await store.cancel("job-nobody-has-made")

        assert (await seen(store, job)).state == "succeeded"
        assert await store.get("job-nobody-has-made") is None

    with_store(test)


def test_an_idempotency_key_gives_the_same_job(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        made = await asyncio.gather(
            *(submit(store, {"prompt": "p"}, seed=n, idempotency_key="k") for n in range(5))
        )
        other = await submit(store, {"prompt": "p"}, idempotency_key="l")

        assert len({job.id for job in made}) == 1
        assert other.id != made[0].id
        with pytest.raises(KeyReused):
            await submit(store, {"prompt": "q"}, idempotency_key="k")

    with_store(test)


def test_jobs_are_listed_newest_first_page_by_page(with_store: Run, services: Services) -> None:
    async def test(store: JobStore) -> None:
        made = [(await submit(store)).id for _ in range(5)][::-1]
        services.bus.delete(f"pd:job:{made[1]}")  # has expired
        left = [made[0], *made[2:]]

        first = await store.newest(limit=2, after=None)
        assert first is not None
        assert ([job.id for job in first[0]], first[1]) == (left[:2], True)
        second = await store.newest(limit=2, after=left[1])
        assert second is not None
        assert ([job.id for job in second[0]], second[1]) == (left[2:], False)
        assert await store.newest(limit=2, after="job-nobody-has-made") is None

    with_store(test)


def test_nothing_stays_for_ever(with_store: Run, services: Services) -> None:
    async def test(store: JobStore) -> None:
        for key in ("a", "b"):
            await submit(store, idempotency_key=key)
        own = await claimed(store, "t")
        await store.write(own, '"token"')
        await store.finish(own, "succeeded", result={})

        lives = {key: cast("int", services.bus.ttl(key)) for key in services.bus.scan_iter()}
        indexes = {b"pd:jobs", b"pd:jobs:waiting", b"pd:jobs:running"}
        assert all(ttl > 0 for key, ttl in lives.items() if key not in indexes), lives

    with_store(test)
