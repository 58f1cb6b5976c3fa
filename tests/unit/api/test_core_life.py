"""Deadlines, leaks, surprises and the close of the API's engine core. Without network."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import valkey
from prometheus_client import REGISTRY

from api import core
from pdtasks import background
from pdtasks.bus import buses
from pdtasks.errors import (
    RequestTimeout,
)
from pdtasks.messages import WorkerStatus
from tests.unit.api.core_bench import (
    READY,
    Bench,
    StubBus,
    presence,
    watch_until,
    with_bench,
)
from tests.unit.factories import a_request
from tests.waiting import until


def test_a_request_beyond_its_deadline_fails_and_the_workers_drop_it(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    presence(monkeypatch, lambda: READY)

    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await watch_until(bench, lambda: "r" in bench.failed)

        assert type(bench.failed["r"]) is RequestTimeout
        assert bench.aborted == ["r"]

    with_bench(test, request_timeout_s=0.05)


def test_a_deadline_holds_although_the_bus_is_away(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> list[WorkerStatus]:
        raise valkey.ConnectionError("refused")

    presence(monkeypatch, away)

    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await watch_until(bench, lambda: "r" in bench.failed)

        assert type(bench.failed["r"]) is RequestTimeout

    with_bench(test, request_timeout_s=0.05)


def test_a_bus_that_does_not_answer_makes_no_deadline_late(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(_bus: Any) -> list[WorkerStatus]:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("api.workers.read_workers_async", silent)

    async def test(bench: Bench) -> None:
        await bench.ask("r")
        async with asyncio.timeout(2):
            await watch_until(bench, lambda: "r" in bench.failed)

        assert type(bench.failed["r"]) is RequestTimeout

    with_bench(test, request_timeout_s=0.05)


def leaks() -> float:
    return REGISTRY.get_sample_value("pdtasks_api_leaks_total") or 0.0


def test_what_vllm_knows_nothing_of_any_more_is_dropped_and_told(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    presence(monkeypatch, lambda: READY)

    async def test(bench: Bench) -> None:
        await bench.ask("leak", "r")
        bench.forgotten = {"leak"}
        before = leaks()

        await watch_until(bench, lambda: "leak" in bench.aborted)

        assert leaks() == before + 1

        assert list(bench.core._open) == ["r"]
        assert "leak has ended without our hearing of it" in caplog.text

    with_bench(test, leaves=("r",))


@pytest.mark.parametrize("name", ["reply-stream", "replies", "workers"])
def test_a_surprise_in_a_background_task_is_told_while_it_lasts_and_survived(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(background, "_PAUSE_S", 0.3)
    looks: list[int] = []

    def found() -> list[WorkerStatus]:
        looks.append(1)
        if name == "workers" and len(looks) == 2:
            raise KeyError("surprise")
        return READY

    presence(monkeypatch, found)

    async def test(bench: Bench) -> None:
        stream = bench.stream
        stream.surprises = {"keep": int(name == "reply-stream"), "read": int(name == "replies")}
        await bench.core.open()
        try:
            # It has failed: whoever asks is told
            await until(bench.core.background.problems)
            assert bench.core.background.problems() == [
                f"{name} has failed 1 times and begins again soon"
            ]
            # and it goes on
            await until(lambda: not bench.core.background.problems())
            seen = len(looks)
            await until(lambda: stream.calls["keep"] and stream.calls["read"])
            await until(lambda: len(looks) >= seen + 3)
            assert bench.core.background.failures()[name] == 1
        finally:
            await bench.core.close()

    with_bench(test)


def test_a_close_is_bounded_whatever_hangs(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "_CLOSE_S", 0.2)
    presence(monkeypatch, lambda: READY)

    async def test(bench: Bench) -> None:
        bench.stream.hangs = True
        await bench.core.open()
        bench.broker.hangs = True
        await bench.core.add_request_async(a_request("r"))

        began = time.monotonic()
        await bench.core.close()

        assert time.monotonic() - began < 3

    with_bench(test, leaves=("r",))


@pytest.mark.parametrize(
    "what",
    ["stream hangs", "stream fails", "bus hangs", "bus fails", "broker hangs", "task stays"],
)
def test_whatever_hangs_or_fails_in_a_close_keeps_nothing_else_open(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(core, "_CLOSE_S", 0.2)
    presence(monkeypatch, lambda: READY)
    bus = StubBus()
    bus.hangs, bus.fails = what == "bus hangs", what == "bus fails"
    monkeypatch.setattr(buses, "connect_async", lambda _: bus)

    async def test(bench: Bench) -> None:
        bench.stream.hangs = what == "stream hangs"
        bench.stream.fails = what == "stream fails"
        bench.stream.stays = what == "task stays"
        await bench.core.open()
        await until(lambda: bench.stream.calls["keep"] and bench.stream.calls["read"])
        if what == "broker hangs":
            bench.broker.may_close.clear()

        began = time.monotonic()
        try:
            await bench.core.close()
            assert time.monotonic() - began < 3
            assert bus.closed == (not what.startswith("bus"))
            assert bench.broker.num_closed == (0 if what == "broker hangs" else 2)
        finally:
            bench.broker.may_close.set()

    with_bench(test)
