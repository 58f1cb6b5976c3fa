"""A consumer takes jobs of other stages when it is told to; RabbitMQ is a stub."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from celery.bootsteps import CLOSE, RUN

from pdtasks.errors import PdtasksError
from pdtasks.worker.consumer import StageConsumer


class StubConsumer:
    """What `StageConsumer.take_from` needs of itself."""

    _take_from = StageConsumer._take_from

    def __init__(self) -> None:
        self.blueprint = SimpleNamespace(state=RUN)
        self.taken = ["decode"]
        self.app = SimpleNamespace(amqp=SimpleNamespace(queues=self))
        self.error: Exception | None = None

    @property
    def consume_from(self) -> dict[str, Any]:
        return dict.fromkeys(self.taken)

    def add_task_queue(self, queue: str) -> None:
        if self.error is not None:
            raise self.error
        self.taken.append(queue)

    def cancel_task_queue(self, queue: str) -> None:
        self.taken.remove(queue)


def take_from(consumer: StubConsumer, *stages: str) -> Future[None]:
    done: Future[None] = Future()
    consumer._take_from(stages, done)  # type: ignore[misc]  # a stub
    return done


def test_it_takes_what_it_is_told_and_nothing_else() -> None:
    consumer = StubConsumer()
    for stages in (["prefill"], ["decode", "prefill"], [], ["decode"]):
        assert take_from(consumer, *stages).done()
        assert sorted(consumer.taken) == stages


def test_an_error_of_the_connection_reaches_the_main_loop_and_who_waits() -> None:
    consumer = StubConsumer()
    consumer.error = OSError("canary")
    done: Future[None] = Future()
    with pytest.raises(OSError, match="canary"):
        consumer._take_from(["prefill"], done)  # type: ignore[misc]
    assert isinstance(done.exception(), OSError)


def test_who_waits_no_more_costs_the_main_loop_nothing() -> None:
    # Else its error would end the worker.
    consumer = StubConsumer()
    done: Future[None] = Future()
    done.cancel()
    consumer._take_from(["prefill"], done)  # type: ignore[misc]
    assert consumer.taken == ["decode"]


def test_a_worker_that_stops_consumes_nothing_again() -> None:
    consumer = StubConsumer()
    consumer.blueprint.state = CLOSE
    assert isinstance(take_from(consumer, "prefill").exception(), PdtasksError)
    assert consumer.taken == ["decode"]
