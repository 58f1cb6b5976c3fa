"""A consumer takes jobs of other stages when it is told to; RabbitMQ is a stub."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from celery.bootsteps import CLOSE, RUN

from pdtasks.errors import PdtasksError
from pdtasks.worker.consumer import StageConsumer


class StubConsumer:
    """What `StageConsumer.take_from` needs of itself."""

    _take_from = StageConsumer._take_from
    _consume_from = StageConsumer._consume_from

    def __init__(self) -> None:
        self.blueprint = SimpleNamespace(state=RUN)
        self.taken = ["decode"]
        self.app = SimpleNamespace(amqp=SimpleNamespace(queues=self))
        self.error: Exception | None = None
        self.prefetch_count = 8
        self.said: list[tuple[str, int]] = []  # queues, and how many jobs at once
        self._credit = {"decode": 8}
        transport = SimpleNamespace(having_timeout=nullcontext)
        self.connection = SimpleNamespace(connection=SimpleNamespace(transport=transport))

    @property
    def consume_from(self) -> dict[str, Any]:
        return dict.fromkeys(self.taken)

    @property
    def task_consumer(self) -> StubConsumer:
        return self

    def qos(self, *, prefetch_count: int, apply_global: bool) -> None:
        assert not apply_global, "quorum queues know no other"
        self.prefetch_count = prefetch_count

    def add_task_queue(self, queue: str) -> None:
        if self.error is not None:
            raise self.error
        self.taken.append(queue)
        self.said.append((queue, self.prefetch_count))

    def cancel_task_queue(self, queue: str) -> None:
        self.taken.remove(queue)
        self.said.append((queue, 0))


def take_from(consumer: StubConsumer, **queues: int) -> Future[None]:
    done: Future[None] = Future()
    consumer._take_from(queues, done)  # type: ignore[misc]  # a stub
    return done


def test_it_takes_what_it_is_told_and_nothing_else() -> None:
    consumer = StubConsumer()
    for stages in (["prefill"], ["decode", "prefill"], [], ["decode"]):
        assert take_from(consumer, **dict.fromkeys(stages, 8)).done()
        assert sorted(consumer.taken) == stages


def test_a_queue_of_which_it_takes_more_at_once_has_another_consumer() -> None:
    consumer = StubConsumer()
    take_from(consumer, decode=8, prefill=4)
    assert consumer.said == [("prefill", 4)], "decode had eight before"
    take_from(consumer, decode=8, prefill=16)
    assert consumer.said == [("prefill", 4), ("prefill", 0), ("prefill", 16)]
    take_from(consumer, decode=8, prefill=16)
    assert len(consumer.said) == 3


def test_an_error_of_the_connection_reaches_the_main_loop_and_who_waits() -> None:
    consumer = StubConsumer()
    consumer.error = OSError("canary")
    done: Future[None] = Future()
    with pytest.raises(OSError, match="canary"):
        consumer._take_from({"prefill": 1}, done)  # type: ignore[misc]
    assert isinstance(done.exception(), OSError)


def test_who_waits_no_more_costs_the_main_loop_nothing() -> None:
    # Else its error would end the worker.
    consumer = StubConsumer()
    done: Future[None] = Future()
    done.cancel()
    consumer._take_from({"prefill": 1}, done)  # type: ignore[misc]
    assert consumer.taken == ["decode"]


def test_a_worker_that_stops_consumes_nothing_again() -> None:
    consumer = StubConsumer()
    consumer.blueprint.state = CLOSE
    assert isinstance(take_from(consumer, prefill=8).exception(), PdtasksError)
    assert consumer.taken == ["decode"]
