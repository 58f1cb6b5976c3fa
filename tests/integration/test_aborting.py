"""Do aborts reach the workers when RabbitMQ struggles, and does nobody wait for them?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import pytest

from pdtasks.background import Background
from pdtasks.broker import aborting
from pdtasks.broker.aborting import Aborter
from tests.integration.conftest import Services
from tests.integration.test_publishing import alarm
from tests.waiting import wait_until


@pytest.fixture
def beside() -> Background:
    return Background()


@pytest.fixture
def aborter(our_app: Any, beside: Background) -> Iterator[Aborter]:
    made = Aborter(beside)
    yield made
    made.close()


@pytest.fixture
def heard(our_app: Any, channel: Any) -> Callable[[], list[list[str]]]:
    """What a worker would have heard so far, message by message."""
    exchange = our_app.control.mailbox.exchange(channel)
    exchange.declare()
    queue = kombu.Queue("", exchange, exclusive=True)(channel)
    queue.declare()
    messages: list[list[str]] = []

    def take() -> list[list[str]]:
        while (got := queue.get(no_ack=True)) is not None:
            messages.append(got.payload["arguments"]["request_ids"])
        return messages

    return take


def test_a_memory_alarm_delays_aborts_and_nobody_else(
    services: Services,
    aborter: Aborter,
    beside: Background,
    heard: Callable[[], list[list[str]]],
) -> None:
    aborter.abort(["before"])
    wait_until(lambda: heard() == [["before"]])

    with alarm(services, "memory"):
        # Who asks does not wait, however long it lasts
        began = time.monotonic()
        for n in range(20):
            aborter.abort([f"during-{n}"])
            time.sleep(0.05)
        assert time.monotonic() - began < 3

    wait_until(
        lambda: {f"during-{n}" for n in range(20)} <= {i for ids in heard() for i in ids}, 40
    )
    assert beside.failures() == {"aborter": 0}


def test_a_stop_during_a_memory_alarm_is_bounded(
    services: Services, our_app: Any, heard: Callable[[], list[list[str]]]
) -> None:
    aborter = Aborter(Background())
    aborter.abort(["before"])
    wait_until(lambda: heard() == [["before"]])

    with alarm(services, "memory"):
        for n in range(5):
            aborter.abort([f"during-{n}"])
            time.sleep(0.2)
        began = time.monotonic()
        aborter.close()
        assert time.monotonic() - began < 7


def test_a_full_backlog_arrives(aborter: Aborter, heard: Callable[[], list[list[str]]]) -> None:
    # 20 MB, which as one message RabbitMQ 4 would refuse
    names = [f"{n:0200d}" for n in range(aborting.MOST_PENDING)]
    aborter.abort(names)

    wait_until(lambda: sum(map(len, heard())) >= len(names), 60)
    assert {i for ids in heard() for i in ids} == set(names)
    assert max(map(len, heard())) <= aborting.MOST_AT_ONCE
