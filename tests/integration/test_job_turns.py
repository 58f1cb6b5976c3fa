"""Whose job is the next?"""

from __future__ import annotations

import time
import uuid

import pytest

from pdtasks.bus.jobs import JobStore
from tests.integration.conftest import Services
from tests.integration.job_bench import Run, claimed, on_an_empty_bus, submit


@pytest.fixture
def with_store(services: Services) -> Run:
    """Run a test on an empty bus."""
    return on_an_empty_bus(services)


async def owners_of(store: JobStore, count: int) -> list[str]:
    """Claim so many, and return whose they are."""
    return [(await claimed(store, uuid.uuid4().hex)).owner for _ in range(count)]


def test_owners_have_turns_however_many_jobs_each_has(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        many = [await submit(store, owner="greedy") for _ in range(12)]
        await owners_of(store, 3)
        few = [await submit(store, owner="modest") for _ in range(3)]

        found = [await claimed(store, str(n)) for n in range(9)]

        assert sorted(job.owner for job in found[:6]) == ["greedy"] * 3 + ["modest"] * 3
        assert [job.owner for job in found[6:]] == ["greedy"] * 3
        assert "modest" in {job.owner for job in found[:2]}
        # Of one owner the oldest is the next
        ours = [job.id for job in found if job.owner == "modest"]
        assert ours == [job.id for job in few]
        theirs = [job.id for job in found if job.owner == "greedy"]
        assert theirs == [job.id for job in many[3:9]]

    with_store(test)


def test_who_had_many_turns_while_nobody_else_asked_waits_for_none_of_them(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        for _ in range(10):
            await submit(store, owner="a")
        await owners_of(store, 10)

        # All have had their turns: both begin anew
        for owner in ("b", "b", "b", "b", "a", "a"):
            await submit(store, owner=owner)

        assert sorted(await owners_of(store, 4)) == ["a", "a", "b", "b"]

    with_store(test)


def test_cancelled_jobs_have_no_turns(with_store: Run) -> None:
    async def test(store: JobStore) -> None:
        for _ in range(8):
            await submit(store, owner="other")
        for job in [await submit(store, owner="undecided") for _ in range(8)]:
            assert await store.cancel(job.id)
        await submit(store, owner="undecided")

        assert "undecided" in await owners_of(store, 2)

    with_store(test)


def test_jobs_of_an_older_release_have_their_turns_among_new_ones(
    with_store: Run, services: Services
) -> None:
    async def test(store: JobStore) -> None:
        # Given jobs that wait by time, one in a second, and no turns
        old = [await submit(store, owner="a") for _ in range(6)]
        begin = time.time() - 60
        services.bus.zadd("pd:jobs:waiting", {job.id: begin + n for n, job in enumerate(old)})
        services.bus.delete("pd:jobs:turns")

        for _ in range(3):
            await submit(store, owner="b")

        assert sorted(await owners_of(store, 6)) == ["a"] * 3 + ["b"] * 3
        assert await owners_of(store, 3) == ["a"] * 3

    with_store(test)


@pytest.mark.parametrize("spoilt", [None, "nan", "inf", "no number"])
def test_spoilt_turns_stop_nobody(with_store: Run, services: Services, spoilt: str | None) -> None:
    async def test(store: JobStore) -> None:
        if spoilt is None:
            services.bus.set("pd:jobs:turns", "no map")
        await submit(store, owner="a")
        if spoilt is not None:
            services.bus.hset("pd:jobs:turns", "a", spoilt)
        gone = await submit(store, owner="a")

        assert await store.cancel(gone.id)
        await submit(store, owner="a")

        assert await owners_of(store, 2) == ["a", "a"]
        assert await store.claim("t") is None

    with_store(test)
