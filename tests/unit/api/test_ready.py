"""What does `/ready` say of workers, the bus and this process's own threads and tasks?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import valkey
from fastapi import HTTPException

from api import core as api_core
from api.core import PipelineCore
from api.main import ready
from pdtasks import background
from pdtasks.broker.aborting import Aborter
from pdtasks.broker.publishing import ConfirmedSender
from pdtasks.messages import WorkerStatus
from pdtasks.settings import Settings
from tests.unit.api.core_bench import READY, StubStream, presence
from tests.unit.factories import a_request
from tests.waiting import until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_PAUSE_S", 0.3)
    monkeypatch.setattr(api_core, "_WATCH_S", 0.01)


async def answer(core: PipelineCore) -> tuple[int, Any]:
    """Status and body of `/ready`."""
    app = SimpleNamespace(state=SimpleNamespace(pdtasks_client=SimpleNamespace(engine_core=core)))
    request: Any = SimpleNamespace(app=app)
    try:
        return 200, await ready(request)
    except HTTPException as exc:
        return exc.status_code, exc.detail


def with_core(
    test: Callable[[PipelineCore], Awaitable[None]], stream: StubStream | None = None
) -> None:
    """Run `test` with a core whose threads and tasks are real, and reach nobody."""

    async def fail(_request_id: str, _error: Exception) -> None:
        """Nobody waits."""

    async def run() -> None:
        settings = Settings(broker_url="amqp://nowhere", bus_url="valkey://nowhere")
        core = PipelineCore(settings, fail, stream=stream or StubStream())
        await core.open()
        try:
            async with asyncio.timeout(10):
                await test(core)
        finally:
            await core.close()

    asyncio.run(run())


def test_when_all_is_well_it_says_no_more_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    presence(monkeypatch, lambda: READY)

    async def test(core: PipelineCore) -> None:
        assert await answer(core) == (200, {"status": "ready"})

    with_core(test)


def test_a_stalled_worker_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    stalled = msgspec.structs.replace(
        READY[1], state="stalled", reason="its main loop does not turn"
    )
    presence(monkeypatch, lambda: [READY[0], stalled])

    async def test(core: PipelineCore) -> None:
        status, detail = await answer(core)
        assert status == 503
        assert "decode1@h is stalled: its main loop does not turn" in detail

    with_core(test)


def test_a_stalled_worker_beside_one_that_is_ready_keeps_nothing_from_working(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = msgspec.structs.replace(READY[1], name="decode2@h", state="stalled", reason="odd")
    presence(monkeypatch, lambda: [*READY, other])

    async def test(core: PipelineCore) -> None:
        assert await answer(core) == (200, {"status": "ready"})

    with_core(test)


def test_a_bus_that_is_away_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    is_away = False

    def found() -> list[WorkerStatus]:
        if is_away:
            raise valkey.ConnectionError("refused")
        return READY

    presence(monkeypatch, found)

    async def test(core: PipelineCore) -> None:
        nonlocal is_away
        is_away = True
        assert await answer(core) == (503, "the bus does not answer: ConnectionError")

    with_core(test)


def raises_once(body: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[int] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("surprise")
        return body(*args, **kwargs)

    return run


async def hang_up(core: PipelineCore, request_id: str) -> None:
    """Ask and leave, before anything was sent."""
    await core.add_request_async(a_request(request_id))
    await core.abort_requests_async([request_id])


@pytest.mark.parametrize(
    "name", ["aborter", "publisher", "replies", "reply-stream", "workers", "deadlines"]
)
def test_each_thread_and_task_that_dies_is_told_and_lives_on(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    presence(monkeypatch, lambda: READY)
    stream = StubStream()
    stream.surprises = {"keep": int(name == "reply-stream"), "read": int(name == "replies")}
    said: list[list[str]] = []

    tell = raises_once(said.append) if name == "aborter" else said.append
    monkeypatch.setattr(Aborter, "_broadcast", lambda _, request_ids: tell(request_ids))
    monkeypatch.setattr(ConfirmedSender, "_is_connected", lambda _: False)
    if name == "publisher":
        monkeypatch.setattr(ConfirmedSender, "_take", raises_once(ConfirmedSender._take))

    async def test(core: PipelineCore) -> None:
        # Given something unforeseen in one of them
        if name == "aborter":
            await hang_up(core, "a")
        if name == "publisher":
            await core.add_request_async(a_request("r"))
        if name == "deadlines":
            monkeypatch.setattr(core, "_look_for_leaks", raises_once(core._look_for_leaks))
        if name == "workers":
            # (`/ready` looks as well, by itself)
            look = core.workers.look
            monkeypatch.setattr(core.workers, "look", raises_once(look))

        # Then it is told while it lasts
        await until(core.background.problems)
        assert await answer(core) == (503, f"{name} has failed 1 times and begins again soon")

        # and afterwards that it was
        await until(lambda: not core.background.problems())
        assert await answer(core) == (200, {"status": "ready", "background": {name: 1}})
        await hang_up(core, "b")
        await until(lambda: "b" in {request_id for ids in said for request_id in ids})
        if name == "aborter":
            assert "a" in {request_id for ids in said for request_id in ids}

    with_core(test, stream)
