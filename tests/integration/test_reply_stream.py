"""How do tokens get back to the process that asked? On a real bus."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import valkey
import valkey.asyncio

from pdtasks.bus import connection as bus
from pdtasks.bus import reply
from pdtasks.bus.connection import connect_async
from pdtasks.bus.reply import ReplyStream, ReplyWriter
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.messages import StepReply
from pdtasks.settings import Settings
from tests.integration.conftest import Services
from tests.waiting import until


def a_reply(number: int) -> StepReply:
    return StepReply(worker="w", stage="decode", engine="e", positions=(number,))


class Bench:
    """A writer and an asker's stream on one bus."""

    def __init__(self, url: str) -> None:
        settings = Settings(bus_url=url)
        self.bus = valkey.Valkey.from_url(url)
        self._clients = [connect_async(settings) for _ in range(2)]
        self.gone: list[str] = []
        self.times_lost = 0
        self.writer = ReplyWriter(self._clients[0], self.gone.append)
        self.stream = ReplyStream(self._clients[1], self._lost)
        self.read: list[int] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def _lost(self) -> None:
        self.times_lost += 1

    async def _read(self) -> None:
        async for message in self.stream.read():
            self.read += message.positions

    def start(self, *runs: Callable[[], Awaitable[None]]) -> None:
        self._tasks += [asyncio.ensure_future(run()) for run in runs]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients:
            await client.aclose()
        self.bus.close()


@asynccontextmanager
async def bench_on(url: str, *, reading: bool = True) -> Any:
    bench = Bench(url)
    try:
        async with asyncio.timeout(20):
            await bench.stream.open()
            bench.start(bench.writer.run)
            if reading:
                bench.start(bench._read)
            yield bench
    finally:
        await bench.close()


@pytest.fixture
def bus_url(services: Services) -> str:
    services.bus.flushall()
    return services.bus_server.operator_url


@pytest.fixture
def own_bus(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A bus that a test may stop."""
    with ValkeyServer(tmp_path / "bus", "bus") as server:
        yield server


def test_replies_arrive_in_order_and_are_removed_when_read(bus_url: str) -> None:
    async def test() -> None:
        async with bench_on(bus_url) as bench:
            for number in range(2000):
                bench.writer.put(bench.stream.name, a_reply(number))

            await until(lambda: len(bench.read) == 2000)

            assert bench.read == list(range(2000))
            await until(lambda: bench.bus.xlen(bench.stream.name) == 0)

    asyncio.run(test())


def test_two_askers_get_each_their_own(bus_url: str) -> None:
    async def test() -> None:
        async with bench_on(bus_url) as one, bench_on(bus_url) as other:
            one.writer.put(one.stream.name, a_reply(1))
            one.writer.put(other.stream.name, a_reply(2))

            await until(lambda: one.read and other.read)

            assert (one.read, other.read) == ([1], [2])

    asyncio.run(test())


def test_an_owner_that_closes_is_noticed_and_leaves_nothing(bus_url: str) -> None:
    async def test() -> None:
        async with bench_on(bus_url, reading=False) as gone, bench_on(bus_url) as other:
            gone.writer.put(gone.stream.name, a_reply(1))
            await until(lambda: gone.bus.xlen(gone.stream.name) == 1)

            await gone.stream.close()
            gone.writer.put(gone.stream.name, a_reply(2))
            gone.writer.put(other.stream.name, a_reply(3))

            await until(lambda: gone.gone and other.read)
            assert gone.gone == [gone.stream.name]
            assert other.read == [3]
            assert gone.bus.keys() == [other.stream.name.encode()]

    asyncio.run(test())


def test_an_owner_that_dies_is_forgotten_in_time(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply, "STREAM_TTL_S", 1)

    async def test() -> None:
        async with bench_on(bus_url, reading=False) as bench:
            bench.writer.put(bench.stream.name, a_reply(1))

            # Nobody renews the stream.
            await until(lambda: not bench.bus.exists(bench.stream.name))

            bench.writer.put(bench.stream.name, a_reply(2))
            await until(lambda: bench.gone)
            assert bench.bus.keys() == []

    asyncio.run(test())


def test_an_owner_that_lives_keeps_its_stream(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply, "STREAM_TTL_S", 1)
    monkeypatch.setattr(reply, "_RENEW_S", 0.1)

    async def test() -> None:
        async with bench_on(bus_url) as bench:
            bench.start(bench.stream.keep)
            loop = asyncio.get_running_loop()
            end = loop.time() + 1.5  # longer than the stream lives by itself
            await until(lambda: loop.time() > end)

            bench.writer.put(bench.stream.name, a_reply(1))

            await until(lambda: bench.read == [1])
            assert bench.times_lost == 0

    asyncio.run(test())


def test_a_bus_that_is_restarted_is_survived_and_the_loss_is_told(own_bus: ValkeyServer) -> None:
    async def test() -> None:
        async with bench_on(own_bus.operator_url) as bench:
            bench.writer.put(bench.stream.name, a_reply(1))
            await until(lambda: bench.read == [1])

            # When the server comes back, empty, under the same address
            own_bus.stop()
            bench.writer.put(bench.stream.name, a_reply(2))
            _start_again(own_bus)

            # Then the owner learns that replies may be lost, and the next ones arrive
            await until(lambda: bench.times_lost)
            bench.writer.put(bench.stream.name, a_reply(3))
            await until(lambda: 3 in bench.read)
            assert bench.read in ([1, 3], [1, 2, 3])

    asyncio.run(test())


def _start_again(server: ValkeyServer) -> None:
    """Start the same server process description again: same port, same passwords."""
    process = server.process
    assert process._stdin is not None
    assert f"port {urlsplit(server.url).port}" in process._stdin
    process.start()


def test_a_bus_that_freezes_looks_like_one_that_is_away(
    own_bus: ValkeyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bus, "_ANSWER_TIMEOUT_S", 0.3)

    async def test() -> None:
        async with bench_on(own_bus.operator_url) as bench:
            bench.writer.put(bench.stream.name, a_reply(1))
            await until(lambda: bench.read == [1])

            os.kill(own_bus.process.pid, signal.SIGSTOP)
            try:
                bench.writer.put(bench.stream.name, a_reply(2))
                # Both ends have noticed
                await until(lambda: "bus is away, replies wait: TimeoutError" in caplog.text)
                await until(lambda: "bus is away: TimeoutError" in caplog.text)
            finally:
                os.kill(own_bus.process.pid, signal.SIGCONT)

            bench.writer.put(bench.stream.name, a_reply(3))
            await until(lambda: 3 in bench.read)
            # One that was on its way may come twice; the API drops tokens it has.
            assert list(dict.fromkeys(bench.read)) == [1, 2, 3]
            assert bench.times_lost == 0

    asyncio.run(test())


def test_one_entry_that_the_bus_refuses_does_not_stop_the_others(bus_url: str) -> None:
    async def test() -> None:
        async with bench_on(bus_url) as bench:
            odd = bench.stream.name + ".odd"
            bench.bus.set(odd, "no stream at all")

            bench.writer.put(bench.stream.name, a_reply(1))
            bench.writer.put(odd, a_reply(2))
            bench.writer.put(bench.stream.name, a_reply(3))

            await until(lambda: len(bench.read) == 2)
            bench.writer.put(bench.stream.name, a_reply(4))
            await until(lambda: len(bench.read) == 3)
            assert bench.read == [1, 3, 4], "each arrives once"
            # The worker drops what it does for whoever cannot hear it.
            assert bench.gone == [odd]

    asyncio.run(test())


def test_a_reply_for_which_the_bus_has_no_room_is_kept_and_sent_later(
    own_bus: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with bench_on(own_bus.operator_url) as bench:
            # Given a bus whose memory is full
            bench.bus.config_set("maxmemory", 1)
            bench.writer.put(bench.stream.name, a_reply(1))
            flushed = asyncio.create_task(bench.writer.flush())
            await until(lambda: "the bus refused 1 replies" in caplog.text)
            # Then it does not count as sent: the job is not acknowledged
            assert not flushed.done()

            # When there is room again
            bench.bus.config_set("maxmemory", 0)

            await flushed
            await until(lambda: bench.read == [1])
            assert bench.gone == []

    asyncio.run(test())


def test_an_asker_whose_stream_is_none_any_more_hears_of_the_loss(bus_url: str) -> None:
    async def test() -> None:
        async with bench_on(bus_url) as bench:
            # When somebody writes over its stream
            bench.bus.set(bench.stream.name, "no stream at all")

            await until(lambda: bench.times_lost >= 1)
            # and the stream is one again
            await until(lambda: bench.bus.type(bench.stream.name) == b"stream")
            bench.writer.put(bench.stream.name, a_reply(2))
            await until(lambda: bench.read == [2])

    asyncio.run(test())


def test_what_is_no_reply_is_dropped_and_its_neighbours_are_read(
    bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = a_reply(7).to_wire()
    deep = b"\x81\xa7reports" + b"\x81\xa1x" * 50_000
    odd: list[dict[bytes, bytes]] = [
        {b"other": b"canary"},  # without the field
        {b"m": b"\xc1"},
        {b"m": b"canary"},
        {b"m": b""},
        {b"m": good[:-5]},  # cut
        {b"m": good + b"canary"},  # too long
        {b"m": good.replace(b"decode", b"\xff\xfe\xfd\xfc\xfb\xfa")},  # no UTF-8
        {b"m": deep},
        {b"m": b"\xc6" + (30 << 20).to_bytes(4) + b"x" * (30 << 20)},  # huge
        {b"m": pickle.dumps("canary")},
    ]

    async def test() -> None:
        async with bench_on(bus_url, reading=False) as bench:
            # Given honest replies and others, all of which one read brings
            for number, fields in enumerate(odd):
                bench.bus.xadd(bench.stream.name, {b"m": a_reply(number).to_wire()})
                bench.bus.xadd(bench.stream.name, fields)
            bench.start(bench._read)

            await until(lambda: len(bench.read) == len(odd))
            await until(lambda: bench.bus.xlen(bench.stream.name) == 0)

            assert bench.read == list(range(len(odd)))
            assert bench.times_lost == 0

    asyncio.run(test())
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if line.startswith("dropped a reply: unreadable")]) == len(
        odd
    )
    assert not any("canary" in line or "\n" in line for line in told)


def test_a_bus_that_cannot_be_reached_is_an_error_at_the_start(own_bus: ValkeyServer) -> None:
    url = own_bus.operator_url
    own_bus.stop()

    async def test() -> None:
        with suppress(AttributeError):
            async with bench_on(url):
                raise AssertionError("opened a stream on nothing")

    with pytest.raises(valkey.ConnectionError):
        asyncio.run(test())


def test_a_reader_ends_at_whatever_moment_it_is_cancelled(bus_url: str) -> None:
    """Python 3.11's `wait_for` lost about every fifth cancellation of a client that sent."""

    async def test() -> None:
        client = connect_async(Settings(bus_url=bus_url))
        for turns in range(200):
            stream = ReplyStream(client, _nothing)
            await stream.open()
            reader = asyncio.create_task(_drain(stream))
            for _ in range(turns % 20):
                await asyncio.sleep(0)

            reader.cancel()  # once

            _, running = await asyncio.wait([reader], timeout=10)
            assert not running, f"after {turns % 20} turns of the loop"
        await client.aclose()

    asyncio.run(test())


async def _nothing() -> None:
    pass


async def _drain(stream: ReplyStream) -> None:
    async for _ in stream.read():
        pass
