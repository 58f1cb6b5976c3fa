"""A `PipelineCore` for tests, whose bus and broker are stubs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import msgspec
import pytest
import valkey
from vllm.v1.engine import FinishReason

from api.core import PipelineCore
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.errors import (
    BrokerUnavailable,
    PdtasksError,
)
from pdtasks.messages import DecodeJob, PrefillJob, StepReply, WorkerStatus
from pdtasks.settings import Settings
from tests.unit.factories import a_reply, a_request
from tests.waiting import until

READY = [
    WorkerStatus(
        name=f"{role}1@h",
        role=role,
        host="h",
        pid=1,
        state="ready",
        model="SmolLM2-135M-Instruct",
        engine=ENGINE_VERSION,
    )
    for role in ("prefill", "decode")
]


class StubBroker:
    """Stands for both of the API's connections to RabbitMQ and remembers what was said."""

    def __init__(self) -> None:
        self.traces: list[Mapping[str, str]] = []
        self.published: list[Any] = []  # PrefillJobs and DecodeJobs
        self.aborted: list[str] = []
        self.unsent: list[Future[None]] = []
        self.away = False
        self.hangs = False
        self.may_close = threading.Event()
        self.may_close.set()
        self.num_closed = 0

    def send(
        self, job: PrefillJob | DecodeJob, reply_to: str | None, trace: Mapping[str, str]
    ) -> Future[None]:
        self.traces.append(trace)
        sent: Future[None] = Future()
        if self.hangs:
            self.unsent.append(sent)
        elif self.away:
            sent.set_exception(BrokerUnavailable("RabbitMQ cannot be reached: is it running?"))
        else:
            self.published.append(job)
            sent.set_result(None)
        return sent

    def abort(self, request_ids: Iterable[str]) -> None:
        self.aborted += request_ids

    def close(self) -> None:
        self.may_close.wait(10)
        self.num_closed += 1


class StubStream:
    """Takes the place of the API's reply stream; what it does is a test's."""

    name = "pd:reply:stub"
    away_s = 0.0  # for so long its bus has not answered

    def __init__(self) -> None:
        self.replies: list[StepReply] = []
        self.surprises = {"keep": 0, "read": 0}
        self.calls = {"keep": 0, "read": 0}
        self.hangs = False  # its close
        self.fails = False  # its close
        self.stays = False  # its `keep`, also when it is cancelled

    async def open(self) -> None:
        """Nothing to open."""

    async def keep(self) -> None:
        self._surprise("keep")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not self.stays:
                raise
            await asyncio.Event().wait()

    async def read(self) -> AsyncIterator[StepReply]:
        self._surprise("read")
        for reply in self.replies:
            yield reply
        await asyncio.Event().wait()

    def _surprise(self, name: str) -> None:
        self.calls[name] += 1
        if self.surprises[name]:
            self.surprises[name] -= 1
            raise KeyError("surprise")

    async def close(self) -> None:
        if self.fails:
            raise KeyError("surprise")
        if self.hangs:
            await asyncio.Event().wait()


class StubBus:
    """A bus whose end is a test's."""

    def __init__(self) -> None:
        self.closed = False
        self.hangs = False
        self.fails = False

    async def aclose(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails:
            raise valkey.ConnectionError("gone")
        self.closed = True


class Bench:
    """A `PipelineCore` whose bus and broker are stubs."""

    def __init__(self, *, vocabulary: int = 1 << 40, **settings: Any) -> None:
        values = {"broker_url": "amqp://nowhere", "bus_url": "valkey://nowhere"}
        self.broker = StubBroker()
        self.stream = StubStream()
        self.failed: dict[str, PdtasksError] = {}
        self.forgotten: set[str] = set()  # requests that vLLM knows nothing of
        self.core = PipelineCore(
            Settings(**values | settings),
            self._fail,
            is_known=lambda request_id: request_id not in self.forgotten,
            vocabulary=vocabulary,
            publisher=self.broker,
            aborter=self.broker,
            stream=self.stream,
        )
        self.core.workers.known = READY

    async def _fail(self, request_id: str, error: PdtasksError) -> None:
        assert request_id not in self.failed, "a request fails once"
        self.failed[request_id] = error

    async def ask(self, *request_ids: str) -> None:
        for request_id in request_ids or ("r",):
            await self.core.add_request_async(a_request(request_id))
        await self.published()

    async def published(self) -> None:
        """All that could be published is, or has failed."""
        while self.core._publications:
            await asyncio.gather(*self.core._publications)

    async def sent(self, count: int) -> None:
        """So many wait for a broker that hangs."""
        await until(lambda: len(self.broker.unsent) == count)

    async def take(self, *outputs: Any, **fields: Any) -> None:
        await self.core._take(a_reply(*outputs, **fields))

    def answer(self) -> list[tuple[str, list[int], FinishReason | None]]:
        """What vLLM's front half has got."""
        taken = []
        while not self.core._outputs.empty():
            outputs = self.core._outputs.get_nowait().outputs
            taken += [(o.request_id, list(o.new_token_ids), o.finish_reason) for o in outputs]
        return taken

    @property
    def aborted(self) -> list[str]:
        """What the workers were told to drop."""
        return self.broker.aborted

    def check(self, leaves: frozenset[str]) -> None:
        """Nothing is kept but what the test leaves unanswered on purpose."""
        assert set(self.core._open) == leaves


def with_bench(
    test: Callable[[Bench], Awaitable[None]], *, leaves: tuple[str, ...] = (), **settings: Any
) -> None:
    """Run `test`. `leaves`: the requests that it leaves open."""

    async def run() -> None:
        bench = Bench(**settings)
        async with asyncio.timeout(10):
            await test(bench)
        bench.check(frozenset(leaves))

    asyncio.run(run())


def one_that(state: str, reason: str = "") -> WorkerStatus:
    """A decode worker in another state than ready."""
    return msgspec.structs.replace(READY[1], state=state, reason=reason)


async def watch_until(bench: Bench, condition: Callable[[], bool]) -> None:
    watches = [
        asyncio.create_task(bench.core._watch_workers()),
        asyncio.create_task(bench.core._watch_deadlines()),
    ]
    try:
        while not condition():
            assert not any(watch.done() for watch in watches), "a watch has ended"
            await asyncio.sleep(0.005)
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)


def presence(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """Let the bus say that `found()` are the workers."""

    async def read(_bus: Any) -> list[WorkerStatus]:
        workers: list[WorkerStatus] = found()
        return workers

    monkeypatch.setattr("api.workers.read_workers_async", read)
