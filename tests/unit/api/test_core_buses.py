"""What does an API process do while the bus of its replies, one of several, is away?"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import valkey

from api import core as core_module
from pdtasks.bus.buses import place_of
from pdtasks.bus.reply import STREAM_TTL_S
from pdtasks.errors import RepliesLost
from tests.unit.api.core_bench import READY, Bench, StubStream, presence, watch_until, with_bench

#: Of two buses the second one has the stub's stream.
TWO_BUSES: dict[str, Any] = {"bus_url": "valkey://first", "bus_urls": ("valkey://second",)}


@pytest.fixture(autouse=True)
def workers(fast_watch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there: the first bus answers."""
    presence(monkeypatch, lambda: READY)


def test_the_stubs_stream_is_on_the_second_of_two_buses() -> None:
    assert place_of(StubStream.name, 2) == 1


def test_nobody_is_let_in_until_it_is_back() -> None:
    async def test(bench: Bench) -> None:
        bench.stream.away_s = 2.0  # a restart
        bench.core.require_room(1)

        bench.stream.away_s = 6.0
        with pytest.raises(RepliesLost, match="does not answer"):
            bench.core.require_room(1)

        bench.stream.away_s = 0.0
        bench.core.require_room(1)

    with_bench(test, **TWO_BUSES)


def test_the_first_bus_refuses_nobody_for_without_it_nobody_is_answered_anyhow() -> None:
    async def test(bench: Bench) -> None:
        bench.stream.away_s = 600.0
        bench.core.require_room(1)

    with_bench(test)


def test_answers_are_lost_when_it_is_away_for_longer_than_a_stream_lives() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a")
        looks = iter(range(20))
        bench.stream.away_s = STREAM_TTL_S - 1.0
        await watch_until(bench, lambda: next(looks, None) is None)
        assert bench.failed == {}

        bench.stream.away_s = STREAM_TTL_S + 1.0
        await watch_until(bench, lambda: "a" in bench.failed)

        assert isinstance(bench.failed["a"], RepliesLost)
        assert bench.aborted == ["a"]

    with_bench(test, **TWO_BUSES)


def test_a_process_starts_on_another_bus_where_one_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []

    class Drawn(StubStream):
        def __init__(self, bus: Any, lost: Any, name: str) -> None:
            super().__init__()
            self.name = name
            drawn.append(name)

        async def open(self) -> None:
            if place_of(self.name, 2) == 1:
                raise valkey.ConnectionError("refused")

    names = iter(["pd:reply:stub", StubStream.name, _name_on(0)])
    monkeypatch.setattr(core_module, "ReplyStream", Drawn)
    monkeypatch.setattr(core_module, "new_stream", lambda: next(names))

    async def test(bench: Bench) -> None:
        core: Any = bench.core
        core._stream = Drawn(None, None, StubStream.name)
        await core._open_stream()
        assert place_of(core._stream.name, 2) == 0
        assert len(drawn) >= 2

    with_bench(test, **TWO_BUSES)


def _name_on(place: int) -> str:
    names = (f"pd:reply:{number}" for number in itertools.count())
    return next(name for name in names if place_of(name, 2) == place)
