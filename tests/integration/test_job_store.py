"""What becomes of a job on a real bus?"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI

from api.jobs import Jobs, router
from api.runner import JobRunner
from pdtasks.bus import jobs
from pdtasks.bus.jobs import NEXT, Job, JobStore, KeyReused, State, UnreadableJob
from pdtasks.errors import NoRoomForJobs
from tests.integration.conftest import Services
from tests.integration.job_bench import (
    BODY,
    MOST_WAITING,
    Run,
    claimed,
    on_an_empty_bus,
    seen,
    submit,
)


@pytest.fixture
def with_store(services: Services) -> Run:
    """Run a test on an empty bus."""
    return on_an_empty_bus(services)


def test_a_job_is_run_to_its_result(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        job = await submit(store)
        assert (job.state, job.body, job.attempts) == ("queued", BODY, 0)

        own = await claimed(store, "t")
        assert (own.id, own.attempts) == (job.id, 1)
        assert await store.claim("other") is None
        assert await store.write(own, '{"a": 1}', state="prefill", first_token_at=1.5)
        assert await store.finish(own, State.SUCCEEDED, result={"text": "é"})

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


def test_no_more_jobs_are_kept_than_may_wait(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        made = [await submit(store, idempotency_key=str(n)) for n in range(MOST_WAITING)]

        with pytest.raises(NoRoomForJobs, match="PDTASKS_MAX_WAITING_JOBS"):
            await submit(store, idempotency_key="new")
        # one that is known is no new one
        assert (await submit(store, idempotency_key="3")).id == made[3].id

        await claimed(store, "runner")
        assert (await submit(store, idempotency_key="new")).attempts == 0

    with_store(test)


def test_jobs_leave_the_bus_memory_for_tokens(with_store: Run, services: Services) -> None:
    async def test(store: JobStore) -> None:
        await submit(store)
        before = cast("dict[str, Any]", services.bus.info("memory"))
        services.bus.config_set("maxmemory", int(before["used_memory"] / 0.8))
        try:
            with pytest.raises(NoRoomForJobs, match="more memory") as refused:
                await submit(store)
            assert refused.value.retry_after_s == 60
        finally:
            services.bus.config_set("maxmemory", before["maxmemory"])
        await submit(store)

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
        assert not await store.finish(lost, State.FAILED)
        assert await store.renew(own) == "held"
        assert await store.finish(own, State.SUCCEEDED, result={})
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
        assert await store.finish(own, State.CANCELLED)
        assert (await seen(store, job)).state == "cancelled"

    with_store(test)


def test_what_has_ended_stays_as_it_is(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        job = await submit(store)
        await store.finish(await claimed(store, "t"), State.SUCCEEDED, result={})

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


def test_a_list_has_neither_bodies_nor_results_and_reads_none(
    with_store: Run, services: Services
) -> None:
    async def test(store: JobStore) -> None:
        job = await submit(store)
        own = await claimed(store, "t")
        assert await store.finish(own, State.SUCCEEDED, result={"text": "é"})
        services.bus.config_resetstat()

        listed = await store.newest(limit=10, after=None)

        assert listed is not None
        (found,) = listed[0]
        assert (found.id, found.state, found.model) == (job.id, "succeeded", BODY["model"])
        assert (found.body, found.result) == ({}, None)
        assert "cmdstat_hgetall" not in cast("dict[str, Any]", services.bus.info("commandstats"))

    with_store(test)


def test_ones_own_few_are_listed_behind_thousands_of_others(
    with_store: Run, services: Services
) -> None:
    async def test(store: JobStore) -> None:
        mine = [(await submit(store, owner="modest")).id for _ in range(3)]
        others = await submit(store, owner="greedy")
        copy_record(services, others, 1200)
        mine.append((await submit(store, owner="modest")).id)
        services.bus.delete(f"pd:job:{mine[1]}")  # has expired
        left = [mine[3], mine[2], mine[0]]

        first = await store.newest(limit=2, after=None, owner="modest")
        assert first is not None
        assert ([job.id for job in first[0]], first[1]) == (left[:2], True)
        second = await store.newest(limit=2, after=left[1], owner="modest")
        assert second is not None
        assert ([job.id for job in second[0]], second[1]) == (left[2:], False)

    with_store(test)


def test_the_names_of_expired_jobs_are_forgotten(with_store: Run, services: Services) -> None:
    async def test(store: JobStore) -> None:
        made = [await submit(store) for _ in range(15)]
        for job in made:
            services.bus.delete(f"pd:job:{job.id}")  # has expired

        kept = [await submit(store) for _ in range(2)]

        for index in (b"pd:jobs", b"pd:jobs:waiting"):
            left = [
                name.decode() for name in cast("list[bytes]", services.bus.zrange(index, 0, -1))
            ]
            assert left == [job.id for job in kept], index

    with_store(test)


def test_nothing_stays_for_ever(with_store: Run, services: Services) -> None:
    def lives() -> dict[str, int]:
        bus = services.bus
        return {key.decode(): cast("int", bus.pttl(key)) for key in bus.scan_iter()}

    async def test(store: JobStore) -> None:
        for key in ("a", "b", "c"):
            await submit(store, idempotency_key=key)
        own = await claimed(store, "t")
        await store.renew(own)
        await store.write(own, '"token"')
        assert all(ms > 0 for ms in lives().values()), lives()
        await store.finish(own, State.SUCCEEDED, result={})
        await store.release(await claimed(store, "u"))

        after = lives()
        assert {"pd:jobs", "pd:jobs:running", "pd:jobs:waiting"} < after.keys()
        assert all(ms > 0 for ms in after.values()), after
        # A job's names do not go before it does
        for index in ("pd:jobs", "pd:jobs:running", "pd:jobs:waiting"):
            members = cast("list[bytes]", services.bus.zrange(index, 0, -1))
            assert after[index] >= max(after[f"pd:job:{name.decode()}"] for name in members) - 50

    with_store(test)


@pytest.mark.parametrize("ended", [state for state in State if not NEXT[state]])
def test_a_job_that_has_ended_is_in_no_queue(
    with_store: Run, services: Services, ended: State
) -> None:
    async def test(store: JobStore) -> None:
        for number in range(3):
            await submit(store)
            own = await claimed(store, f"t{number}")
            await store.renew(own)
            if number == 2:
                await store.release(own)
                own = await claimed(store, "next")
            assert await store.finish(own, ended)

        assert services.bus.zrange("pd:jobs:running", 0, -1) == []
        assert services.bus.zrange("pd:jobs:waiting", 0, -1) == []
        assert await store.claim("another") is None

    with_store(test)


def test_of_requests_with_one_expired_key_at_once_one_makes_the_job(
    with_store: Run, services: Services
) -> None:
    async def test(store: JobStore) -> None:
        for _ in range(20):
            # Given a key whose job has expired before it
            gone = await submit(store, idempotency_key="k")
            services.bus.delete(f"pd:job:{gone.id}")

            made = await asyncio.gather(*(submit(store, idempotency_key="k") for _ in range(8)))

            (job_id,) = {job.id for job in made}
            assert job_id != gone.id
            waiting = cast("list[bytes]", services.bus.zrange("pd:jobs:waiting", 0, -1))
            assert waiting == [job_id.encode()]
            services.bus.flushall()

    with_store(test)


def test_a_job_that_loses_its_runners_is_given_up(
    with_store: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(store: JobStore) -> None:
        job = await submit(store)

        # When it is handed over, which is nobody's fault, and lost again and again
        for number in range(3):
            await store.release(await claimed(store, f"stopped{number}"))
        monkeypatch.setattr(jobs, "LEASE_S", 0)
        lost = [await claimed(store, f"lost{number}") for number in range(jobs.MAX_ATTEMPTS)]
        assert not any(own.is_given_up for own in lost)

        # Then the next runner is only to end it
        last = await claimed(store, "last")
        assert last.is_given_up
        assert last.attempts == 3 + jobs.MAX_ATTEMPTS
        assert await store.finish(last, State.FAILED, error={"code": 503})
        assert (await seen(store, job)).state == "failed"
        assert await store.claim("another") is None

    with_store(test)


def test_who_claims_a_cancelled_job_is_told(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        job = await submit(store)
        await store.release(await claimed(store, "stopped"))
        assert not await store.cancel(job.id)

        assert (await claimed(store, "next")).is_unwanted

    with_store(test)


def test_a_job_that_cannot_be_read_does_not_hold_up_the_next(
    with_store: Run, services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(store: JobStore) -> None:
        odd, good = await submit(store), await submit(store)
        services.bus.hset(f"pd:job:{odd.id}", "body", '{"canary')

        assert (await claimed(store, "t")).id == good.id

        assert cast("bytes", services.bus.hget(f"pd:job:{odd.id}", "state")) == b"failed"
        assert cast("list[bytes]", services.bus.zrange("pd:jobs:running", 0, -1)) == [
            good.id.encode()
        ]
        assert f"{odd.id} cannot be read and ends: its record: JSONDecodeError" in caplog.text
        assert "canary" not in caplog.text

    with_store(test)


def spoil(services: Services, job: Job, how: str) -> None:
    """Write something else under a job's name, with a secret in it."""
    bus, record = services.bus, f"pd:job:{job.id}"
    if how.startswith("type"):
        bus.delete(record)
    match how:
        case "type: string":
            bus.set(record, "canary")
        case "type: list":
            bus.rpush(record, "canary")
        case "type: other fields":
            bus.hset(record, "canary", "canary")
        case "bytes":
            bus.hset(record, mapping={b"\xff": b"\xfe", "state": b"\x80canary"})
        case _:
            name, _, value = how.partition("=")
            bus.hset(record, name, value)


def copy_record(services: Services, job: Job, times: int) -> None:
    """As many more records as `job`'s, behind it in the index."""
    record = cast("dict[Any, Any]", services.bus.hgetall(f"pd:job:{job.id}"))
    score = cast("float", services.bus.zscore("pd:jobs", job.id))
    pipe = services.bus.pipeline()
    for number in range(times):
        name = f"job-{number:032x}"
        pipe.hset(f"pd:job:{name}", mapping=record)
        pipe.expire(f"pd:job:{name}", 600)
        pipe.zadd("pd:jobs", {name: score})
    pipe.execute()


SPOILT = [
    *("type: string", "type: list", "type: other fields", "bytes"),
    *("attempts=canary", "attempts=-9", "attempts=1e999", "state=canary", "body=[]"),
    *("body={canary", "body=" + "[" * 100_000, "created_at=NaN", 'created_at="canary"'),
    *('finished_at="canary"', 'stages=[{"canary": 1}]', "stages=7", "deadline=1e300", "result=[1]"),
]


@pytest.mark.parametrize("how", SPOILT, ids=lambda how: how[:30])
def test_a_spoilt_record_is_an_error_of_its_own_and_hides_no_other(
    with_store: Run, services: Services, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    async def test(store: JobStore) -> None:
        odd, good = await submit(store, idempotency_key="k"), await submit(store)
        spoil(services, odd, how)

        with pytest.raises(UnreadableJob) as caught:
            await store.get(odd.id)
        listed = await store.newest(limit=10, after=None)
        assert listed is not None
        # (A list has no bodies and no results.)
        shown = [good.id, odd.id] if how.startswith(("body", "result")) else [good.id]
        assert [job.id for job in listed[0]] == shown

        # It is no runner's, and the other one is
        assert (await claimed(store, "t")).id == good.id
        assert await store.claim("u") is None
        running = cast("list[bytes]", services.bus.zrange("pd:jobs:running", 0, -1))
        assert running == [good.id.encode()]
        assert "canary" not in caplog.text + str(caught.value)

    with_store(test)


@pytest.mark.parametrize("value", ["canary", "one two three", b"\xff", ""])
def test_a_spoilt_idempotency_key_is_a_new_one(
    with_store: Run, services: Services, value: str | bytes
) -> None:
    async def test(store: JobStore) -> None:
        await submit(store, idempotency_key="k")
        (key,) = services.bus.scan_iter(match="pd:jobs:key:*")
        services.bus.set(key, value)

        made = await submit(store, idempotency_key="k")

        assert (await submit(store, idempotency_key="k")).id == made.id

    with_store(test)


def test_spoilt_events_are_an_error_and_the_job_ends_all_the_same(
    with_store: Run, services: Services
) -> None:
    async def test(store: JobStore) -> None:
        odd, other = await submit(store), await submit(store)
        services.bus.set(f"pd:job:{odd.id}:events", "canary")
        services.bus.xadd(f"pd:job:{other.id}:events", {b"\xff": b"\xff"})

        for job in (odd, other):
            with pytest.raises(UnreadableJob):
                await store.events(job.id, after="0", block_s=0.1)
            own = await claimed(store, job.id)
            assert await store.finish(own, State.FAILED, error={"code": 500})
            assert (await seen(store, own)).state == "failed"
        assert services.bus.zrange("pd:jobs:running", 0, -1) == []

    with_store(test)


def test_names_that_are_none_are_forgotten(with_store: Run, services: Services) -> None:
    async def test(store: JobStore) -> None:
        good = await submit(store)
        services.bus.zadd("pd:jobs", {b"\xff\xfe": 1e300, b"canary\n": 2e300})

        listed = await store.newest(limit=10, after=None)

        assert listed is not None
        assert [job.id for job in listed[0]] == [good.id]
        assert services.bus.zrange("pd:jobs", 0, -1) == [good.id.encode()]

    with_store(test)


def test_a_spoilt_job_is_one_clear_error_over_http(with_store: Run, services: Services) -> None:
    async def test(store: JobStore) -> None:
        app = FastAPI()
        app.include_router(router)
        app.state.pdtasks_jobs = Jobs(store, cast("JobRunner", None), timeout_s=60)
        transport = httpx.ASGITransport(app)
        odd, good = await submit(store), await submit(store)
        await store.finish(await claimed(store, "t"), State.SUCCEEDED, result={})  # the odd one
        spoil(services, odd, "type: list")
        services.bus.delete(f"pd:job:{good.id}:events")
        services.bus.set(f"pd:job:{good.id}:events", "canary")

        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
                answer = await client.request(method, f"/v1/jobs/{odd.id}{path}")
                assert answer.status_code == 500
                assert "something else under this job's name" in answer.text
            listed = (await client.get("/v1/jobs")).json()["data"]
            assert [job["id"] for job in listed] == [good.id]
            assert (await client.get(f"/v1/jobs/{good.id}")).json()["state"] == "queued"
            events = (await client.get(f"/v1/jobs/{good.id}/events")).text
        assert '"code":500' in events
        assert events.endswith("data: [DONE]\n\n")
        assert "canary" not in events

    with_store(test)
