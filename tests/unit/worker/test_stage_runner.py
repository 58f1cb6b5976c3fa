"""What does a task's thread hear of the stage that it runs, or joins?"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from pdtasks.errors import EngineFailed, PdtasksError, WorkerLost
from pdtasks.worker.stage_runner import StageRunner
from tests.waiting import wait_until

T = TypeVar("T")


class Waited(Future[Any]):
    """Counts who waits for it."""

    num_waiting = 0

    def result(self, timeout: float | None = None) -> Any:
        self.num_waiting += 1
        return super().result(timeout)


class Loop:
    """An event loop in a thread, as the engine's."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.called: list[Waited] = []

    def call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        waited = Waited()
        self.called.append(waited)

        def end(running: Future[T]) -> None:
            error = running.exception()
            assert error is not None
            waited.set_exception(error)

        asyncio.run_coroutine_threadsafe(coroutine, self._loop).add_done_callback(end)
        return waited

    def soon(self, what: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(what)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.mark.parametrize("raised", [WorkerLost("gone"), ValueError("a prompt")])
def test_a_failure_names_the_attempt_that_has_failed_also_to_who_has_joined_it(
    loop: Loop, raised: Exception
) -> None:
    runner = StageRunner(loop)
    may_fail = asyncio.Event()

    async def stage() -> None:
        await may_fail.wait()
        raise raised

    def attempt_that_fails(number: int) -> PdtasksError:
        with pytest.raises(PdtasksError) as failure:
            runner.run("r", stage, time.time() + 20, number)
        return failure.value

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(attempt_that_fails, 7)
        wait_until(lambda: loop.called)
        again = threads.submit(attempt_that_fails, 8)
        wait_until(lambda: loop.called[0].num_waiting == 2)
        loop.soon(may_fail.set)
        failures = [first.result(10), again.result(10)]

    assert [failure.attempt for failure in failures] == [7, 7]
    assert len(loop.called) == 1
    assert "prompt" not in str(failures)
    assert isinstance(failures[0], WorkerLost | EngineFailed)
