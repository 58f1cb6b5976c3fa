"""Do API processes of one bus know of each other? With a real bus, as the API's own user."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from api.neighbours import Neighbours
from pdtasks.bus import apis
from pdtasks.bus.apis import Share, WindowCounts, read_shares
from pdtasks.bus.connection import connect_async
from pdtasks.bus.keys import API, APIS
from pdtasks.cluster.rights import User
from pdtasks.overview import Api, InFlight, RequestView, Way
from pdtasks.settings import Settings
from tests.integration.conftest import Services
from tests.waiting import until

A_REQUEST = RequestView(
    id="cmpl-1",
    key="alice",
    state="done",
    submitted_at=1.0,
    prompt_tokens=1,
    output_tokens=1,
    seconds=1.0,
    way=Way(),
)


def share_of(name: str) -> Callable[[int], Share]:
    def share(requests: int) -> Share:
        return Share(
            id=name,
            api=Api(host="h", pid=len(name), since=1.0, version="1", model="m"),
            metrics=f"{name}:8000",
            in_flight=InFlight(decode=2),
            oldest_s={"prefill": 3.0},
            counts=WindowCounts(5.0, []),
            requests=(A_REQUEST,)[:requests],
        )

    return share


async def eventually(ask: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """The first answer that is true."""
    async with asyncio.timeout(20):
        while not (found := await ask()):  # noqa: ASYNC110 - of others, on the bus
            await asyncio.sleep(0.01)
    return found


def with_bus(services: Services, body: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        url = services.bus_server.url_for(User.API)
        bus = connect_async(Settings(bus_url=url, device="cpu"))
        try:
            await body(bus)
        finally:
            await bus.aclose()

    services.bus.delete(APIS)
    services.bus.acl_log_reset()
    asyncio.run(run())
    assert services.bus.acl_log() == []


def test_each_knows_what_the_others_tell_until_they_end(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.neighbours.TELL_S", 0.05)

    async def body(bus: Any) -> None:
        one, other = (Neighbours(bus, name, share_of(name)) for name in ("one", "other"))
        first = asyncio.create_task(one.keep_telling())

        # One that is alone tells no request: nobody would read it
        shares = await eventually(lambda: read_shares(bus))
        assert [(share.id, share.requests) for share in shares] == [("one", ())]
        assert await one.others() == []

        second = asyncio.create_task(other.keep_telling())
        assert await eventually(one.others) == [share_of("other")(1)]

        async def tells_requests() -> bool:
            return (await other.others())[0].requests == (A_REQUEST,)

        await eventually(tells_requests)

        # When one ends
        second.cancel()
        await asyncio.wait([second])
        assert await one.others() == []
        first.cancel()
        await asyncio.wait([first])
        assert await read_shares(bus) == []

    with_bus(services, body)


def test_what_one_has_left_that_was_killed_expires(services: Services) -> None:
    async def body(bus: Any) -> None:
        assert not await apis.sign_in(bus, "killed")
        await apis.leave_share(bus, share_of("killed")(1))
        for key in (API + "killed", APIS):
            assert 0 < cast("int", services.bus.ttl(key)) <= 10
        services.bus.zadd(APIS, {"killed": 1.0})  # long ago
        assert not await apis.sign_in(bus, "one"), "it is alone"
        assert await read_shares(bus) == []

    with_bus(services, body)


@pytest.mark.parametrize("value", [b"", b"\xff", b"\x80", b"text"])
def test_what_another_release_has_left_is_passed_over(services: Services, value: bytes) -> None:
    async def body(bus: Any) -> None:
        await apis.sign_in(bus, "older")
        services.bus.set(API + "older", value, ex=10)
        assert await read_shares(bus) == []

    with_bus(services, body)


def test_a_bus_that_is_away_is_told_of_again_when_it_is_back(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.neighbours.TELL_S", 0.05)
    told: list[int] = []

    def share(requests: int) -> Share:
        told.append(requests)
        if len(told) == 1:
            raise ConnectionError("away")
        return share_of("one")(requests)

    async def body(bus: Any) -> None:
        task = asyncio.create_task(Neighbours(bus, "one", share).keep_telling())
        await until(lambda: len(told) > 2)
        assert [found.id for found in await read_shares(bus)] == ["one"]
        task.cancel()
        await asyncio.wait([task])

    with_bus(services, body)
