"""On which of several buses is a reply stream?"""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from pdtasks.bus.buses import Buses, place_of
from pdtasks.bus.reply import is_reply_stream, new_stream
from pdtasks.settings import Settings

STREAMS = [f"pd:reply:{number:032x}" for number in range(3000)]


@pytest.mark.parametrize(
    ("stream", "places"),
    [
        ("pd:reply:0", [0, 0, 0, 0, 0, 0, 0, 0]),
        ("pd:reply:1", [0, 1, 1, 1, 1, 1, 1, 1]),
        ("pd:reply:6f1c0d6a3f4b4c58a3a8b1f0f2c3d4e5", [0, 0, 2, 2, 2, 2, 2, 2]),
        ("pd:reply:\ud800 whatever somebody sends", [0, 1, 1, 1, 1, 5, 5, 5]),
    ],
)
def test_a_stream_has_the_same_place_in_every_process_and_release(
    stream: str, places: list[int]
) -> None:
    assert [place_of(stream, buses) for buses in range(1, 9)] == places


def test_each_bus_has_about_as_many_streams_as_the_others() -> None:
    for buses in (2, 3, 10):
        found = Counter(place_of(stream, buses) for stream in STREAMS)

        assert set(found) == set(range(buses))
        assert max(found.values()) < 1.3 * len(STREAMS) / buses


def test_one_bus_more_takes_its_share_and_moves_no_other_stream() -> None:
    for before in (1, 2, 3, 9):
        moved = [s for s in STREAMS if place_of(s, before) != place_of(s, before + 1)]

        assert {place_of(stream, before + 1) for stream in moved} == {before}
        share = len(STREAMS) / (before + 1)
        assert 0.8 * share < len(moved) < 1.2 * share


def test_new_streams_are_reply_streams_and_no_two_are_the_same() -> None:
    names = {new_stream() for _ in range(100)}

    assert len(names) == 100
    assert all(map(is_reply_stream, names))


def test_api_and_workers_reach_a_stream_by_their_own_urls_at_the_same_place() -> None:
    async def test() -> None:
        ports = {}
        for user in ("pdtasks-api", "pdtasks-worker"):
            urls = [f"valkey://{user}:pw@127.0.0.1:{port}/0" for port in (1, 2, 3)]
            buses = Buses(Settings(bus_url=urls[0], bus_urls=tuple(urls[1:])))
            found = [buses.of(stream) for stream in STREAMS[:50]]
            ports[user] = [bus.connection_pool.connection_kwargs["port"] for bus in found]
            assert buses.names == ("bus", "bus2", "bus3")
            await buses.aclose()

        assert ports["pdtasks-api"] == ports["pdtasks-worker"]
        assert set(ports["pdtasks-api"]) == {1, 2, 3}

    asyncio.run(test())


def test_a_single_bus_has_all_streams() -> None:
    async def test() -> None:
        buses = Buses(Settings(bus_url="valkey://127.0.0.1:1/0", bus_urls=()))

        assert {buses.of(stream) for stream in STREAMS} == {buses.first}
        await buses.aclose()

    asyncio.run(test())
