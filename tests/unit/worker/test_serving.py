"""A worker's role changes while it runs; RabbitMQ, engine and bus are stubs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future

import pytest

from pdtasks.worker import serving
from pdtasks.worker.serving import Serving
from tests.waiting import until


class StubWorker:
    """Worker, presence and consumer at once; writes down what is asked of it."""

    def __init__(self, role: str, patience_s: float = 60.0) -> None:
        self.presence = self
        self.is_draining = False
        self.num_jobs = 0
        self.said: list[str] = []
        self.connected = True
        self.of = {"prefill": 4, "decode": 8}  # its credit
        self.taken: dict[str, int] = {}
        self.serving = Serving(role, self, patience_s=patience_s)

    async def connect(self) -> None:
        """It consumes, and has told RabbitMQ how much it takes."""
        self.serving.consumed_by(self)
        await until(lambda: self.taken)
        self.said.clear()

    def serve(self, role: str, becomes: str = "") -> None:
        self.said.append(f"is {role}, changing" if becomes else f"is {role}")

    async def hand_on(self) -> None:
        self.said.append("hands on")

    def keeps_its_jobs(self) -> None:
        """Nothing to do."""

    def soon(self, call: Callable[[], None]) -> None:
        call()

    @property
    def credit(self) -> StubWorker:
        return self

    def take_from(self, credit: Mapping[str, int]) -> Future[None]:
        done: Future[None] = Future()
        if self.connected:
            self.taken = dict(credit)
            self.said.append(f"takes {'+'.join(sorted(credit)) or 'nothing'}")
            done.set_result(None)
        else:
            done.set_exception(OSError("canary"))
        return done


def with_worker(role: str, test: Callable[[StubWorker], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(10):
            worker = StubWorker(role)
            await worker.connect()
            await test(worker)

    asyncio.run(run())


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_PAUSE_S", 0.005)
    monkeypatch.setattr(serving, "_LOOK_S", 0.001)


def test_what_it_leaves_ends_before_it_takes_jobs_of_its_new_role() -> None:
    async def test(worker: StubWorker) -> None:
        worker.num_jobs = 1
        worker.serving.become("prefill")
        await until(lambda: "hands on" in worker.said)
        await asyncio.sleep(0.02)
        before = ["is prefill, changing", "takes nothing", "hands on"]
        assert worker.said == before

        worker.num_jobs = 0
        await until(lambda: len(worker.said) == 5)
        assert worker.said == [*before, "takes prefill", "is prefill"]

    with_worker("decode", test)


def test_prompts_are_not_handed_on_they_end_soon() -> None:
    async def test(worker: StubWorker) -> None:
        worker.serving.become("decode")
        await until(lambda: "is decode" in worker.said)
        assert "hands on" not in worker.said

    with_worker("prefill", test)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_further_stage_needs_no_wait(role: str) -> None:
    async def test(worker: StubWorker) -> None:
        worker.num_jobs = 1
        worker.serving.become("both")
        await until(lambda: "is both" in worker.said)
        assert worker.said == [f"takes {role}", f"is {role}", "takes decode+prefill", "is both"]

    with_worker(role, test)


def test_one_stage_less_needs_no_wait_either() -> None:
    async def test(worker: StubWorker) -> None:
        worker.num_jobs = 1
        worker.serving.become("prefill")
        await until(lambda: len(worker.said) == 5)
        assert worker.said == [
            *("takes prefill", "is prefill", "hands on", "takes prefill", "is prefill")
        ]

    with_worker("both", test)


def test_of_several_wishes_the_last_one_counts_and_the_same_again_does_nothing() -> None:
    async def test(worker: StubWorker) -> None:
        worker.num_jobs = 1
        worker.serving.become("prefill")
        await until(lambda: "hands on" in worker.said)
        worker.serving.become("decode")
        worker.num_jobs = 0
        await until(lambda: "is decode" in worker.said)

        told = len(worker.said)
        worker.serving.become("decode")
        await asyncio.sleep(0.02)
        assert len(worker.said) == told

    with_worker("decode", test)


def test_without_rabbitmq_it_tries_until_it_is_there() -> None:
    async def test(worker: StubWorker) -> None:
        worker.connected = False
        worker.serving.become("decode")
        await asyncio.sleep(0.05)
        assert "is decode" not in worker.said

        worker.connected = True
        await until(lambda: "is decode" in worker.said)
        assert worker.said[-2:] == ["takes decode", "is decode"]

    with_worker("prefill", test)


def test_a_worker_that_stops_changes_no_more() -> None:
    async def test(worker: StubWorker) -> None:
        worker.num_jobs = 1
        worker.serving.become("prefill")
        await until(lambda: "hands on" in worker.said)
        worker.is_draining = True
        worker.num_jobs = 0
        await until(
            lambda: worker.serving._changing is not None and worker.serving._changing.done()
        )
        assert "takes prefill" not in worker.said

    with_worker("decode", test)


def test_jobs_that_never_end_do_not_keep_it_from_its_role_for_ever() -> None:
    async def run() -> None:
        worker = StubWorker("prefill", patience_s=0.02)
        worker.num_jobs = 1
        worker.serving.become("decode")
        async with asyncio.timeout(10):
            await until(lambda: "is decode" in worker.said)

    asyncio.run(run())


def test_what_rabbitmq_takes_too_long_to_hear_is_told_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "_TAKE_FROM_S", 0.02)

    async def test(worker: StubWorker) -> None:
        asked: list[Future[None]] = []

        def take_from(_credit: Mapping[str, int]) -> Future[None]:
            done: Future[None] = Future()
            asked.append(done)
            if len(asked) > 2:
                done.set_result(None)
            return done

        monkeypatch.setattr(worker, "take_from", take_from)
        worker.serving.become("decode")
        await until(lambda: "is decode" in worker.said)
        assert asked[0].cancelled()
        # The main loop, which comes to it later, leaves it alone.
        assert not asked[0].set_running_or_notify_cancel()

    with_worker("prefill", test)


def test_rabbitmq_hears_how_many_jobs_at_once_are_taken() -> None:
    async def test(worker: StubWorker) -> None:
        assert worker.taken == {"prefill": 4, "decode": 8}

        worker.of = {"prefill": 16, "decode": 8}
        worker.serving.credit_changed()
        await until(lambda: worker.taken == {"prefill": 16, "decode": 8})

        # The same again is not told, a new connection is.
        worker.said.clear()
        worker.serving.credit_changed()
        await asyncio.sleep(0.01)
        assert worker.said == []
        worker.serving.consumed_by(worker)
        await until(lambda: worker.said == ["takes decode+prefill"])

    with_worker("both", test)


def test_credit_that_changes_while_the_role_does_is_told_for_the_new_role() -> None:
    async def test(worker: StubWorker) -> None:
        worker.num_jobs = 1
        worker.serving.become("prefill")
        await until(lambda: "takes nothing" in worker.said)
        worker.of = {"prefill": 2, "decode": 1}
        worker.serving.credit_changed()
        worker.num_jobs = 0

        await until(lambda: worker.taken == {"prefill": 2})
        assert worker.said[-1] == "is prefill"

    with_worker("decode", test)


def test_credit_without_a_connection_waits_for_one() -> None:
    async def test(worker: StubWorker) -> None:
        worker.connected = False
        worker.of = {"prefill": 2, "decode": 1}
        worker.serving.credit_changed()
        await asyncio.sleep(0.02)
        worker.connected = True
        await until(lambda: worker.taken == {"prefill": 2})

    with_worker("prefill", test)
