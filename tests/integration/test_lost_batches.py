"""What becomes of a batch when API processes, workers or the bus are lost?"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any, cast

import pytest
import valkey

from api import batch_runner
from pdtasks.bus import batches as bus_batches
from pdtasks.bus.batches import BatchStore, Line
from pdtasks.bus.connection import connect_async
from pdtasks.bus.files import FileStore
from pdtasks.errors import BrokerUnavailable, WorkerLost
from pdtasks.settings import Settings
from tests.integration.batch_bench import (
    CHAT,
    Handler,
    a_line,
    an_api,
    becomes,
    begin,
    outcomes,
    own_settings,
    run,
    some_lines,
)
from tests.integration.conftest import Services
from tests.waiting import until


@pytest.fixture
def settings(services: Services) -> Settings:
    return own_settings(services)


def test_lines_that_ask_a_model_without_workers_keep_no_places(settings: Settings) -> None:
    async def test() -> None:
        async with connect_async(settings) as bus:
            store, kept = BatchStore(bus, ttl_s=60), FileStore(bus, ttl_s=60)
            for model in ("lost", "there"):
                async with kept.upload() as sent:
                    await sent.write(b"x")
                    file = await sent.keep(filename="f", purpose="batch", owner="", ttl_s=60)
                await store.create(CHAT, file.id)
                batch = await store.tend(model)
                assert batch is not None
                places = [bus_batches.Place(number, 0, 1, str(number)) for number in (1, 2)]
                assert await store.write(
                    batch, places, lease_s=0, status="in_progress", total=2, model=model
                )

            claimed = [await store.claim(str(number), ["lost"]) for number in range(3)]
            assert [line and line.batch.model for line in claimed] == ["there", "there", None]

            # One that was begun when its workers went is given back, and waits with the others.
            begun = await store.claim("begun")
            assert begun is not None
            assert begun.batch.model == "lost"
            await store.release(begun)
            assert await store.claim("none", ["lost"]) is None
            again = await store.claim("again")
            assert again is not None
            assert again.tries == 1, "it counts as no try"

    run(test())


def test_the_outcome_of_a_line_is_written_once_whoever_comes_late(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_batches, "LEASE_S", 0.1)

    async def test() -> None:
        async with connect_async(settings) as bus:
            store, kept = BatchStore(bus, ttl_s=60), FileStore(bus, ttl_s=60)
            async with kept.upload() as sent:
                await sent.write(b"x")
                file = await sent.keep(filename="f", purpose="batch", owner="", ttl_s=60)
            await store.create(CHAT, file.id)
            batch = await store.tend("t")
            assert batch is not None
            place = bus_batches.Place(1, 0, 1, "a")
            assert await store.write(batch, [place], lease_s=0, status="in_progress", total=1)

            # Given a line whose runner stands still, and another one that has it now
            frozen = await store.claim("frozen")
            own: Line | None = None
            while own is None:
                own = await store.claim("own")
                await asyncio.sleep(0.01)
            assert frozen is not None
            assert own.tries == 2

            # When the first one wakes up, it can change nothing
            assert await store.renew(frozen) == "lost"
            assert await store.finish(frozen, "output", "frozen\n") == "refused"
            await store.release(frozen)
            assert await store.renew(own) == "held"
            assert await store.finish(own, "output", "own\n") == "last"
            assert await store.finish(own, "output", "own\n") == "refused"
            assert await store.finish(frozen, "output", "frozen\n") == "refused"

            # Then there is one outcome
            batch = await store.tend("t2")
            assert batch is not None
            assert (batch.completed, batch.failed) == (1, 0)
            assert await store.end(batch, bus_batches.Status.COMPLETED)
            ended = await store.get(batch.id)
            assert ended is not None
            assert ended.output_file_id is not None
            output = await kept.get(ended.output_file_id)
            assert output is not None
            assert [piece async for piece in kept.pieces(output)] == [b"own\n"]

    run(test())


def test_an_api_that_stops_leaves_its_lines_to_another(settings: Settings) -> None:
    first, second = Handler(), Handler()
    first.may_answer.clear()

    async def test() -> None:
        async with an_api(settings, first) as client:
            batch = await begin(client, some_lines(30))
            await until(lambda: first.at_once == settings.batch_concurrency)
            began = time.monotonic()
        async with an_api(settings, second) as client:
            batch = await becomes(client, batch, "completed")

            assert time.monotonic() - began < 8  # nobody waited for a lease
            right, _ = await outcomes(client, batch)
            assert len({o["custom_id"] for o in right}) == len(right) == 30

    run(test())


def test_a_killed_api_process_loses_no_line_and_doubles_none(
    settings: Settings, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_batches, "LEASE_S", 2.0)
    own = Handler()
    own.may_answer.clear()

    class AnswersTen(Handler):
        async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
            if sum(self.asked.values()) >= 10:
                self.may_answer.clear()
            return await super().create_chat_completion(request, raw_request)

    async def be_an_api() -> None:
        async with an_api(settings, AnswersTen()):
            await asyncio.Event().wait()

    async def test(other: int) -> None:
        async with an_api(settings, own) as client:
            # Given two processes that run a batch
            batch = await begin(client, some_lines(40))
            name = f"pd:batch:{batch['id']}"
            await until(
                lambda: services.bus.zcard(f"{name}:running") == 2 * settings.batch_concurrency
            )
            await until(lambda: int(cast("bytes", services.bus.hget(name, "completed")) or 0) == 10)

            # When one is killed
            os.kill(other, signal.SIGKILL)
            own.may_answer.set()

            # Then the other one runs what that had, and the rest
            batch = await becomes(client, batch, "completed")
            assert batch["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
            right, _ = await outcomes(client, batch)
            assert len({o["custom_id"] for o in right}) == len(right) == 40
            assert (len(own.asked), set(own.asked.values())) == (30, {1})

    other = os.fork()
    if other == 0:
        try:
            asyncio.run(be_an_api())
        finally:
            os._exit(1)
    try:
        run(test(other))
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


def test_a_line_waits_for_better_times_but_not_if_it_may_be_to_blame(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "_RETRY_S", 0.01)
    handler = Handler()

    async def test() -> None:
        async with an_api(settings, handler) as client:
            handler.raises = [BrokerUnavailable("away") for _ in range(20)]
            batch = await becomes(client, await begin(client, [a_line("a")]), "completed")
            assert batch["request_counts"]["completed"] == 1

            handler.asked.clear()
            handler.raises = [WorkerLost("every worker that took it died") for _ in range(20)]
            batch = await becomes(client, await begin(client, [a_line("a")]), "completed")
            assert handler.asked == {"hello": 3}
            _, (wrong,) = await outcomes(client, batch)
            assert wrong["response"]["status_code"] == 503

    run(test())


def test_outcomes_wait_for_a_bus_that_is_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "_RETRY_S", 0.01)
    finish = BatchStore.finish
    failures = [valkey.TimeoutError("canary") for _ in range(3)]

    async def seldom(self: BatchStore, *args: Any) -> Any:
        done = await finish(self, *args)
        if failures:  # it was written, and nobody hears of it
            raise failures.pop()
        return done

    monkeypatch.setattr(BatchStore, "finish", seldom)
    handler = Handler()

    async def test() -> None:
        async with an_api(settings, handler) as client:
            batch = await becomes(client, await begin(client, some_lines(2)), "completed")
            right, _ = await outcomes(client, batch)
            assert sorted(o["custom_id"] for o in right) == ["id-0", "id-1"]

    run(test())
    assert set(handler.asked.values()) == {1}
