"""Do replies go over several buses, and does one that is away concern nobody else?

Real buses with the users of each role, stub workers, and API processes of which each has its stream
on another bus.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import valkey

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bus.buses import Buses, place_of
from pdtasks.bus.reply import ReplyStream, new_stream
from pdtasks.bus.writers import ReplyWriters
from pdtasks.cluster.rights import User
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.messages import StepReply
from pdtasks.settings import Settings
from tests.integration.conftest import Services, StartWorker, StubWorker
from tests.integration.freezing import frozen
from tests.integration.real_api import running_api
from tests.waiting import until, wait_until

PATIENCE_S = 30.0
#: Of every request: no test waits for it.
DEADLINE_S = 120.0


@pytest.fixture
def further(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A second bus, which a test may stop."""
    with ValkeyServer(tmp_path / "bus2", "bus") as server:
        yield server


def stream_at(place: int) -> str:
    """A name for a stream on this one of two buses."""
    while place_of(name := new_stream(), 2) != place:
        pass
    return name


def a_reply(number: int) -> StepReply:
    return StepReply(worker="w", stage="decode", engine="e", positions=(number,))


# -- a worker's end --------------------------------------------------------------------------------


class Askers:
    """One with its stream on each bus, and a worker's writers, each with its role's user."""

    def __init__(self, *servers: ValkeyServer) -> None:
        def buses(user: User) -> Buses:
            first, *others = (server.url_for(user) for server in servers)
            return Buses(Settings(bus_url=first, bus_urls=tuple(others)))

        self.gone: list[str] = []
        self.read: list[list[int]] = [[], []]
        self._clients = [buses(User.WORKER), buses(User.API)]
        self.writers = ReplyWriters(self._clients[0], self.gone.append)
        self.streams = []
        for place in (0, 1):
            name = stream_at(place)
            self.streams.append(ReplyStream(self._clients[1].of(name), self._lost, name))
        self._tasks: list[asyncio.Task[None]] = []

    async def _lost(self) -> None:
        """Nobody waits."""

    async def _read(self, place: int) -> None:
        async for reply in self.streams[place].read():
            self.read[place] += reply.positions

    def put(self, place: int, number: int) -> None:
        self.writers.put(self.streams[place].name, a_reply(number))

    async def run(self, test: Callable[[], Any]) -> None:
        try:
            for stream in self.streams:
                await stream.open()
            self._tasks = [asyncio.create_task(self._read(place)) for place in (0, 1)]
            self._tasks.append(asyncio.create_task(self.writers.run()))
            async with asyncio.timeout(PATIENCE_S):
                await test()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for clients in self._clients:
                await clients.aclose()


def test_a_bus_that_stands_delays_no_reply_that_goes_over_another_one(
    services: Services, further: ValkeyServer
) -> None:
    async def run() -> None:
        askers = Askers(services.bus_server, further)
        first, second = (stream.name for stream in askers.streams)

        async def test() -> None:
            askers.put(0, 1)
            askers.put(1, 2)
            await until(lambda: askers.read == [[1], [2]])

            # When the second one stands
            with frozen(further):
                askers.put(1, 3)
                askers.put(0, 4)

                # Then the first one's replies arrive, and its jobs can be acknowledged
                await askers.writers.flush(first)
                await until(lambda: askers.read[0] == [1, 4])
                standing = asyncio.create_task(askers.writers.flush(second))
                await asyncio.sleep(0.1)
                assert not standing.done()
                assert askers.writers.num_unsent == 1

            # and the other's follow
            await standing
            await until(lambda: askers.read[1] == [2, 3])
            await askers.writers.flush_all()
            assert askers.writers.num_unsent == 0
            assert askers.gone == []

        await askers.run(test)

    asyncio.run(run())


def test_a_reader_that_is_gone_is_noticed_on_whichever_bus_it_was(
    services: Services, further: ValkeyServer
) -> None:
    async def run() -> None:
        askers = Askers(services.bus_server, further)

        async def test() -> None:
            for place, stream in enumerate(askers.streams):
                await stream.close()
                askers.put(place, 1)

            await until(lambda: len(askers.gone) == 2)

            assert set(askers.gone) == {stream.name for stream in askers.streams}

        await askers.run(test)

    asyncio.run(run())


# -- all of it -------------------------------------------------------------------------------------


@pytest.fixture
def workers(start_worker: StartWorker, further: ValkeyServer) -> list[StubWorker]:
    """One of each stage, which know both buses."""
    url = further.url_for(User.WORKER)
    prefill = start_worker("prefill", bus_urls=url, concurrency=1)
    return [prefill, start_worker("decode", bus_urls=url)]


@pytest.fixture
def apis(
    services: Services,
    further: ValkeyServer,
    workers: list[StubWorker],
    bench_nursery: Nursery,
    tmp_path: Path,
) -> Iterator[list[httpx.Client]]:
    """Two API processes, one for each bus; the second one's replies go over the second."""
    programs = []
    for place in (0, 1):
        folder = tmp_path / f"api{place}"
        folder.mkdir()
        programs.append(
            running_api(
                services,
                bench_nursery,
                folder,
                DEADLINE_S,
                program="tests.integration.placed_api",
                bus_urls=further.url_for(User.API),
                stream_place=str(place),
            )
        )
    with programs[0] as first, programs[1] as second:
        for api in (first, second):
            wait_until(partial(is_ready, api), PATIENCE_S)
        yield [first, second]


def is_ready(api: httpx.Client) -> bool:
    return api.get("/ready").status_code == 200


def ask(api: httpx.Client, max_tokens: int = 4, **options: Any) -> httpx.Response:
    model = api.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "a b c", "max_tokens": max_tokens, "temperature": 0}
    return api.post("/v1/completions", json=body, **options)


def streams_on(server: ValkeyServer) -> int:
    with valkey.Valkey.from_url(server.operator_url) as bus:
        return len(bus.keys("pd:reply:*"))


def refused_by(server: ValkeyServer) -> list[Any]:
    """What somebody has tried there who may not."""
    with valkey.Valkey.from_url(server.operator_url) as bus:
        return list(bus.acl_log())


def test_only_the_requests_of_an_api_process_whose_bus_is_away_end(
    services: Services,
    further: ValkeyServer,
    workers: list[StubWorker],
    apis: list[httpx.Client],
) -> None:
    first, second = apis
    assert (streams_on(services.bus_server), streams_on(further)) == (1, 1)
    for api in apis:
        answer = ask(api)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 4

    # When the second bus ends while both have an answer under way
    decode = workers[1]
    decode.steering.hold()
    with ThreadPoolExecutor(2) as callers:
        asked = [callers.submit(ask, api) for api in apis]
        wait_until(lambda: len(decode.steering.added()) == 4)
        further.process.stop(10)
        decode.steering.release()

        # Then the first one's is answered, and so is what is asked now
        assert asked[0].result(PATIENCE_S).status_code == 200
        assert ask(first).status_code == 200
        # while the other one lets nobody in
        wait_until(lambda: not is_ready(second), PATIENCE_S)
        assert "does not answer" in second.get("/ready").text
        refused = ask(second)
        assert refused.status_code == 503
        assert "the bus of this API process's replies does not answer" in refused.text
        assert is_ready(first)

        # and when its bus is back, empty, what was under way ends
        further.restart()
        lost = asked[1].result(PATIENCE_S)
        assert lost.status_code == 503
        assert "tokens of this answer are lost: ask again" in lost.text

    # and it works again
    wait_until(lambda: is_ready(second), PATIENCE_S)
    assert [ask(api).status_code for api in apis] == [200, 200]
    assert streams_on(further) == 1
    # Nobody has done what his role may not.
    assert refused_by(further) == []
    for worker in workers:
        assert "bus2 is away, replies wait" in worker.log or worker.role == "prefill"
        assert further.url_for(User.WORKER) not in worker.log


def test_who_hangs_up_keeps_no_place_of_a_worker_although_the_bus_of_his_answer_is_away(
    further: ValkeyServer, workers: list[StubWorker], apis: list[httpx.Client]
) -> None:
    prefill = workers[0]
    first, second = apis
    further.process.stop(10)

    # Given a request that has the prefill worker's only place, for its first token cannot be told
    with ThreadPoolExecutor(2) as callers:
        hangs_up = callers.submit(ask, second, timeout=3)
        wait_until(lambda: "bus2 is away, replies wait" in prefill.log)
        asked = callers.submit(ask, first)

        # When its caller goes
        with pytest.raises(httpx.ReadTimeout):
            hangs_up.result(PATIENCE_S)

        # Then the next one is answered, long before the deadline
        assert asked.result(PATIENCE_S).status_code == 200


def test_a_request_that_runs_again_asks_along_its_own_stream(
    services: Services,
    workers: list[StubWorker],
    apis: list[httpx.Client],
    start_worker: StartWorker,
    further: ValkeyServer,
) -> None:
    _, second = apis
    decode = workers[1]
    decode.steering.hold()
    with ThreadPoolExecutor(1) as callers:
        asked = callers.submit(ask, second, 6)
        wait_until(decode.steering.added)
        decode.steering.step(2)
        other = start_worker("decode", 2, bus_urls=further.url_for(User.WORKER))
        decode.signal(signal.SIGKILL)

        answer = asked.result(PATIENCE_S)

    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 6
    assert "goes on after" in other.log
    assert refused_by(further) == []
