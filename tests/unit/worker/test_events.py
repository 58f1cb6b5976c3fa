"""Does an event ever hold anybody up? `EventSender` without a broker: its last step is a stub."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from pdtasks.background import Background
from pdtasks.worker import events
from pdtasks.worker.events import EventSender
from tests.waiting import wait_until


class StubBroker:
    """Takes the place of `EventSender._send`."""

    def __init__(self) -> None:
        self.messages: list[list[tuple[str, dict[str, Any]]]] = []
        self.answers = threading.Event()
        self.answers.set()
        self.failures = 0
        self.surprises = 0

    def take(self, batch: list[tuple[str, dict[str, Any]]]) -> bool:
        assert self.answers.wait(10)
        if self.surprises:
            self.surprises -= 1
            raise KeyError("surprise")
        if self.failures:
            self.failures -= 1
            return False
        self.messages.append(batch)
        return True

    def told(self) -> list[int]:
        return [event["n"] for batch in self.messages for _, event in batch if "n" in event]


@pytest.fixture
def broker() -> StubBroker:
    return StubBroker()


@pytest.fixture
def background() -> Background:
    return Background()


@pytest.fixture
def sender(
    broker: StubBroker, background: Background, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EventSender]:
    monkeypatch.setattr(EventSender, "_send", lambda self, batch: broker.take(batch))
    made = EventSender(Celery("other", set_as_current=False), "w@h", background)
    yield made
    broker.answers.set()
    made.close()
    assert not made._thread.is_alive()


def test_events_arrive_in_order_those_of_tasks_together(
    sender: EventSender, broker: StubBroker
) -> None:
    for n in range(20):
        sender.send("task-succeeded", n=n)

    wait_until(lambda: len(broker.told()) == 20)
    assert broker.told() == list(range(20))
    assert len(broker.messages) < 20
    ((key, event), *_) = broker.messages[0]
    assert key == "task.multi"
    assert (event["type"], event["hostname"]) == ("task-succeeded", "w@h")
    assert {"timestamp", "utcoffset", "pid", "clock"} <= set(event)


def test_events_of_workers_travel_alone(sender: EventSender, broker: StubBroker) -> None:
    sender.send("worker-heartbeat", n=1, retry=True, freq=2.0)
    sender.send("worker-heartbeat", n=2)

    wait_until(lambda: broker.told() == [1, 2])
    assert [[key for key, _ in batch] for batch in broker.messages] == [["worker.heartbeat"]] * 2


def test_a_broker_that_hangs_holds_up_nobody_and_costs_the_oldest_events(
    sender: EventSender, broker: StubBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "BUFFER_SIZE", 100)
    broker.answers.clear()

    began = time.monotonic()
    for n in range(1000):
        sender.send("task-succeeded", n=n)
    assert time.monotonic() - began < 2
    broker.answers.set()

    wait_until(lambda: broker.told() and broker.told()[-1] == 999)
    assert sender.dropped == 1000 - len(broker.told()) > 0


def test_what_was_not_sent_is_sent_again(sender: EventSender, broker: StubBroker) -> None:
    broker.failures = 1

    sender.send("task-succeeded", n=1)

    wait_until(lambda: broker.told() == [1])


def test_a_surprise_ends_neither_thread_nor_later_events(
    sender: EventSender, broker: StubBroker, background: Background
) -> None:
    broker.surprises = 1
    sender.send("task-succeeded", n=1)
    wait_until(lambda: background.failures()["events"] == 1)

    sender.send("task-succeeded", n=2)

    wait_until(lambda: broker.told() and broker.told()[-1] == 2)


def test_a_stop_does_not_wait_for_a_broker_that_hangs(
    sender: EventSender, broker: StubBroker
) -> None:
    broker.answers.clear()
    sender.send("task-succeeded", n=1)

    began = time.monotonic()
    sender.close()

    assert time.monotonic() - began < 3


def test_what_nobody_asked_for_is_not_sent(sender: EventSender, broker: StubBroker) -> None:
    sender.groups = {"worker"}
    sender.send("task-succeeded", n=1)
    sender.groups = set()
    sender.disable()
    sender.send("task-succeeded", n=2)
    sender.enable()
    sender.send("task-succeeded", n=3)

    wait_until(lambda: broker.told() == [3])
