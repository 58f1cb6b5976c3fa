"""What a key has had in this minute, on a real bus, with the API's rights."""

from __future__ import annotations

import asyncio
import time

import pytest

from api.usage import Usage
from pdtasks.bus.connection import connect_async
from pdtasks.cluster.rights import User
from pdtasks.errors import TooManyRequests
from pdtasks.keys import Key
from pdtasks.settings import Settings
from tests.integration.conftest import Services
from tests.waiting import until


@pytest.fixture(autouse=True)
def one_minute(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    services.bus.flushall()
    now = time.time() // 60 * 60 + 20
    monkeypatch.setattr(time, "time", lambda: now)


def run(services: Services, test: object) -> None:
    async def main() -> None:
        bus = connect_async(Settings(bus_url=services.bus_server.url_for(User.API)))
        try:
            async with asyncio.timeout(20):
                await test(bus)  # type: ignore[operator]
        finally:
            await bus.aclose()

    asyncio.run(main())


def test_requests_of_all_api_processes_count(services: Services) -> None:
    async def test(bus: object) -> None:
        one, other = Usage(bus), Usage(bus)
        key = Key("alice", b"", requests_per_minute=3)
        for each in (one, other, one):
            await each.begin(key)

        with pytest.raises(TooManyRequests, match="3 requests a minute") as refused:
            await other.begin(key)
        assert refused.value.retry_after_s == 40
        await other.begin(Key("bob", b"", requests_per_minute=3))

    run(services, test)


def test_tokens_count_at_once_here_and_soon_elsewhere(services: Services) -> None:
    async def test(bus: object) -> None:
        here, elsewhere = Usage(bus), Usage(bus)
        key = Key("alice", b"", tokens_per_minute=100)
        await here.begin(key)
        here.charge("alice", 60)
        here.charge("alice", 60)

        with pytest.raises(TooManyRequests, match="100 tokens a minute"):
            await here.begin(key)
        telling = asyncio.create_task(here.tell())
        try:
            await until(lambda: not here.has_to_tell)
        finally:
            telling.cancel()
        for each in (here, elsewhere):
            with pytest.raises(TooManyRequests):
                await each.begin(key)
        await elsewhere.begin(Key("bob", b"", tokens_per_minute=100))

    run(services, test)


def test_nothing_of_it_stays(services: Services) -> None:
    async def test(bus: object) -> None:
        await Usage(bus).begin(Key("alice", b"", requests_per_minute=3))

    run(services, test)
    (name,) = services.bus.keys("pd:usage:*")  # type: ignore[misc]
    assert 0 < int(services.bus.ttl(name)) <= 120  # type: ignore[arg-type]
