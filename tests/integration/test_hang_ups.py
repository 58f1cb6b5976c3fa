"""Does a reader that hangs up in the middle of an answer shift those of others? On a real bus.

Between client and bus stands somebody who cuts connections inside an answer, or holds it back.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import valkey.asyncio

from pdtasks.bus import connection
from pdtasks.bus.connection import BUS_ERRORS, connect, connect_async
from pdtasks.bus.progress import Progress, read_progress, tell_progress
from pdtasks.settings import Settings
from tests.integration.conftest import Services

KEYS = 20
SEED = 16


class Saboteur:
    """Passes on what two sides say, until it does not."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        #: Asked at each piece of an answer: how much of it passes; None: all.
        self.passes: Callable[[bytes], int | None] = lambda _: None
        self.holds = False  #: what does not pass is held back; else the connection is closed
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._open += (client, server)
                for pump, args in ((self._ask, (client, server)), (self._answer, (server, client))):
                    threading.Thread(target=pump, args=args, daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while piece := client.recv(65536):
                server.sendall(piece)
            server.shutdown(socket.SHUT_RDWR)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while piece := server.recv(65536):
                length = self.passes(piece)
                client.sendall(piece[:length])
                if length is not None and not self.holds:
                    break
            client.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def saboteur(services: Services) -> Iterator[Saboteur]:
    services.bus.flushall()
    parts = urlsplit(services.bus_server.operator_url)
    assert parts.hostname
    assert parts.port
    made = Saboteur(parts.hostname, parts.port)
    for number in range(KEYS):
        services.bus.set(f"key{number}", f"value{number}" * 20)
        services.bus.rpush(f"list{number}", *[f"value{number}"] * 5)
    yield made
    made.close()


@pytest.fixture
def settings(services: Services, saboteur: Saboteur, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of clients that go through the saboteur, and do not wait long."""
    monkeypatch.setattr(connection, "_ANSWER_TIMEOUT_S", 0.1)
    parts = urlsplit(services.bus_server.operator_url)
    netloc = parts.netloc.replace(f":{parts.port}", f":{saboteur.port}")
    return Settings(bus_url=parts._replace(netloc=netloc).geturl())


def value(number: int) -> bytes:
    return b"value%d" % number * 20


@pytest.mark.parametrize("holds", [False, True], ids=["cut", "held back"])
def test_a_thread_that_loses_its_answer_anywhere_leaves_nothing_of_it(
    saboteur: Saboteur, settings: Settings, *, holds: bool
) -> None:
    client = connect(settings)
    saboteur.holds = holds
    whole = len(b"$120\r\n" + value(1) + b"\r\n")
    places = range(0, whole, 30 if holds else 7)
    for place in places:
        assert client.get("key1") == value(1)

        def cut(piece: bytes, place: int = place) -> int | None:
            return place if b"value1" in piece else None

        saboteur.passes = cut

        with pytest.raises(BUS_ERRORS):
            client.get("key1")

        saboteur.passes = lambda _: None
        for number in (2, 3):
            assert client.get(f"key{number}") == value(number)
            assert cast("list[bytes]", client.mget([f"key{number}"])) == [value(number)]
    client.close()


def test_threads_that_share_a_client_get_each_their_own(
    saboteur: Saboteur, settings: Settings
) -> None:
    client, rnd = connect(settings), random.Random(SEED)
    saboteur.passes = lambda piece: (
        rnd.randrange(len(piece)) if b"value" in piece and rnd.random() < 0.2 else None
    )

    def ask(number: int) -> int:
        answers = 0
        for _ in range(60):
            with suppress(*BUS_ERRORS):
                pipeline = client.pipeline(transaction=False)
                pipeline.get(f"key{number}")
                pipeline.lrange(f"list{number}", 0, 0)
                assert client.get(f"key{number}") == value(number)
                assert pipeline.execute() == [value(number), [b"value%d" % number]]
                answers += 1
        return answers

    with ThreadPoolExecutor(6) as pool:
        assert all(count > 10 for count in pool.map(ask, range(6)))
    client.close()


async def _get(client: Any, number: int) -> None:
    assert await client.get(f"key{number}") == value(number)


async def _get_many(client: Any, number: int) -> None:
    assert await client.mget([f"key{number}", "none"]) == [value(number), None]


async def _in_a_pipeline(client: Any, number: int) -> None:
    pipeline = client.pipeline(transaction=False)
    pipeline.get(f"key{number}")
    pipeline.lrange(f"list{number}", 0, 0)
    assert await pipeline.execute() == [value(number), [b"value%d" % number]]


async def _wait_for_a_stream(client: Any, number: int) -> None:
    assert await client.xread({f"none{number}": "0"}, block=1) == []


async def _wait_for_a_list(client: Any, number: int) -> None:
    assert await client.blpop([f"none{number}"], timeout=0.001) is None


async def _scan(client: Any, number: int) -> None:
    found = [key async for key in client.scan_iter(match=f"key{number}", count=1000)]
    assert found == [f"key{number}".encode()]


#: Every kind of command that we use.
COMMANDS = [_get, _get_many, _in_a_pipeline, _wait_for_a_stream, _wait_for_a_list, _scan]


def test_tasks_that_hang_up_leave_nothing_of_their_answers(
    saboteur: Saboteur, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each turn of the loop, and then while connections are cut as well."""
    monkeypatch.setattr(connection, "_ANSWER_TIMEOUT_S", 5.0)
    rnd = random.Random(SEED)

    async def test() -> None:
        client = connect_async(settings)

        def ask() -> Any:
            return rnd.choice(COMMANDS)(client, rnd.randrange(KEYS))

        answered = 0
        for turns in range(160):
            if turns == 120:
                saboteur.passes = lambda piece: rnd.choice((*[None] * 8, 0, len(piece) // 2))
            hasty = [asyncio.create_task(ask()) for _ in range(3)]
            for _ in range(turns % 15):
                await asyncio.sleep(0)
            for task in hasty:
                task.cancel()
            found = await asyncio.gather(*hasty, return_exceptions=True)
            allowed = (*BUS_ERRORS, asyncio.CancelledError, type(None))
            assert all(isinstance(one, allowed) for one in found), found
            with suppress(*(BUS_ERRORS if turns >= 120 else ())):
                await ask()
                answered += 1
        assert answered > 125
        saboteur.passes = lambda _: None
        for number in range(KEYS):
            await _get(client, number)
        await client.aclose()

    asyncio.run(test())


def test_an_answer_about_progress_that_is_none_is_no_answer(
    services: Services, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    bus = services.bus
    odd: list[Callable[[str], object]] = [
        lambda key: bus.rpush(key, b"canary"),
        lambda key: bus.rpush(key, b"\x91" * 100_000),
        lambda key: bus.rpush(key, Progress(state="wanted", token_ids=(1, 2)).to_wire()[:-1]),
        lambda key: bus.rpush(key, Progress(state="wanted", token_ids=(-1,)).to_wire()),
        lambda key: bus.set(key, "canary"),
        lambda key: bus.hset(key, "canary", "canary"),
    ]

    async def test() -> None:
        async with valkey.asyncio.Valkey.from_url(services.bus_server.operator_url) as client:
            for attempt, spoil in enumerate(odd):
                spoil(f"pd:progress:r:{attempt:x}")
                assert await read_progress(client, "r", attempt, within_s=5) is None
            await tell_progress(client, "r", 99, Progress(state="wanted", token_ids=(7,)))
            assert await read_progress(client, "r", 99) == Progress(state="wanted", token_ids=(7,))

    asyncio.run(test())
    assert "canary" not in caplog.text
    assert len(caplog.records) == len(odd)
