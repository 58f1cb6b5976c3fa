"""Does every command to the bus end in time, and is every answer its own?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import valkey
import valkey.asyncio

from pdtasks.bus import connection as bus
from pdtasks.bus.connection import BUS_ERRORS, connect_async
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.settings import Settings
from tests.integration.freezing import frozen

Client = valkey.asyncio.Valkey


@pytest.fixture(autouse=True)
def _short_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "_ANSWER_TIMEOUT_S", 0.3)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A bus that a test may freeze."""
    with ValkeyServer(tmp_path / "bus", "bus") as server:
        yield server


def with_client(url: str, test: Callable[[Client], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), connect_async(Settings(bus_url=url)) as client:
            await test(client)

    asyncio.run(main())


async def together(client: Client, *keys: str) -> list[bytes]:
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.get(key)
    return list(await pipeline.execute())


def test_a_frozen_bus_looks_like_one_that_is_away(server: ValkeyServer) -> None:
    async def test(client: Client) -> None:
        await client.ping()  # there is a connection; the second try needs a new one

        with frozen(server):
            for _ in range(2):
                with pytest.raises(BUS_ERRORS):
                    await client.get("key")
                with pytest.raises(BUS_ERRORS):
                    await together(client, "key")
                with pytest.raises(BUS_ERRORS):
                    await client.xread({"stream": "0"}, block=100)

        assert await client.ping()

    with_client(server.operator_url, test)


def test_no_command_reads_the_late_answer_of_another(server: ValkeyServer) -> None:
    async def test(client: Client) -> None:
        await client.set("wanted", "right")
        await client.set("late", "wrong")

        with frozen(server):
            with pytest.raises(valkey.TimeoutError, match=r"did not answer within 0.3 s"):
                await client.get("late")
            with pytest.raises(BUS_ERRORS):
                await together(client, "late", "late")

        for _ in range(5):
            assert await client.get("wanted") == b"right"
            assert await together(client, "wanted") == [b"right"]

    with_client(server.operator_url, test)


def test_a_cancelled_command_leaves_no_answer_behind(server: ValkeyServer) -> None:
    async def test(client: Client) -> None:
        await client.set("wanted", "right")
        await client.set("late", "wrong")

        for turns in range(60):
            task = asyncio.ensure_future(client.get("late"))
            for _ in range(turns % 12):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

            assert await client.get("wanted") == b"right"

    with_client(server.operator_url, test)


def test_a_read_that_waits_in_the_server_gets_that_time_too(server: ValkeyServer) -> None:
    async def test(client: Client) -> None:
        assert await client.xread({"stream": "$"}, block=900) == []

    with_client(server.operator_url, test)


def test_the_url_cannot_bring_the_other_timeout_back(server: ValkeyServer) -> None:
    async def test(client: Client) -> None:
        connection = client.connection_pool.make_connection()

        assert connection.socket_timeout is None
        assert connection.socket_connect_timeout == bus._CONNECT_TIMEOUT_S

    with_client(f"{server.operator_url}?socket_timeout=3", test)
