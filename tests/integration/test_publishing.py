"""Do messages get to RabbitMQ for certain, and does nobody wait longer than he wants to?"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import kombu
import pytest

from pdtasks.background import Background
from pdtasks.broker.publishing import ConfirmedSender, Publish
from pdtasks.errors import BrokerUnavailable, PdtasksError, QueueFull
from tests.integration.asker import Asker
from tests.integration.conftest import Services, StartWorker
from tests.waiting import wait_until

QUEUE = "test.publishing"


def message(number: int, queue: str = QUEUE) -> Publish:
    def publish(producer: kombu.Producer) -> None:
        producer.publish(number, routing_key=queue, retry=False)

    return publish


@pytest.fixture
def sender(
    our_app: Any, services: Services, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ConfirmedSender]:
    # As the operator: no other user may write to queues of these names.
    connect = partial(our_app.connection_for_write, services.rabbit.operator_url)
    monkeypatch.setattr(our_app, "connection_for_write", connect)
    made = ConfirmedSender(our_app, Background())
    yield made
    made.close()


@pytest.fixture
def arrived(channel: Any) -> Iterator[Callable[[], list[int]]]:
    """What has arrived in the queue since the last look."""
    channel.queue_declare(QUEUE, durable=True, auto_delete=False)
    queue = kombu.Queue(QUEUE).bind(channel)

    def take() -> list[int]:
        found = []
        while (got := queue.get(no_ack=True)) is not None:
            found.append(got.payload)
        return found

    yield take
    channel.queue_delete(QUEUE)


@contextmanager
def alarm(services: Services, of: str) -> Iterator[None]:
    """RabbitMQ takes no messages in between, as it does when `of`, memory or disk, runs low."""
    setting, too_much, usual = {
        "memory": ("set_vm_memory_high_watermark", "0.000001", "0.4"),
        "disk": ("set_disk_free_limit", "1000000000000000", "50MB"),
    }[of]
    services.rabbit.control(setting, too_much)
    try:
        yield
    finally:
        services.rabbit.control(setting, usual)


def test_a_thousand_messages_arrive_in_order_each_confirmed(
    sender: ConfirmedSender, arrived: Callable[[], list[int]]
) -> None:
    sent = [sender.send(message(n), within_s=20) for n in range(1000)]

    for confirmed in sent:
        confirmed.result(20)
    assert arrived() == list(range(1000))


def test_what_a_lost_connection_left_unconfirmed_is_sent_again(
    sender: ConfirmedSender, arrived: Callable[[], list[int]], services: Services
) -> None:
    # Given a broker that takes messages and confirms none
    sender.send(message(0), within_s=20).result(20)
    os.kill(services.rabbit.process.pid, signal.SIGSTOP)
    try:
        sent = [sender.send(message(n), within_s=20) for n in (1, 2)]
        wait_until(lambda: len(sender._unconfirmed) == 2)
        # When the connection breaks
        sender._connection.connection.transport.sock.shutdown(2)
    finally:
        os.kill(services.rabbit.process.pid, signal.SIGCONT)

    for confirmed in sent:
        confirmed.result(20)
    # (the first time may have arrived as well)
    assert set(arrived()) == {0, 1, 2}


def test_a_message_that_no_queue_takes_is_told_and_takes_no_other_along(
    sender: ConfirmedSender, arrived: Callable[[], list[int]]
) -> None:
    # RabbitMQ would confirm what goes nowhere.
    sent = [sender.send(message(n, queue), within_s=20) for n, queue in enumerate((QUEUE, "none"))]
    sent.append(sender.send(message(2), within_s=20))

    sent[0].result(20)
    with pytest.raises(BrokerUnavailable, match="no queue"):
        sent[1].result(20)
    sent[2].result(20)
    assert arrived() == [0, 2]


def test_a_queue_that_is_full_is_told(
    sender: ConfirmedSender, channel: Any, arrived: Callable[[], list[int]]
) -> None:
    arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
    channel.queue_declare("test.full", durable=True, auto_delete=False, arguments=arguments)
    try:
        sent = [sender.send(message(n, "test.full"), within_s=20) for n in range(5)]
        outcomes = [type(confirmed.exception(20)) for confirmed in sent]
    finally:
        channel.queue_delete("test.full")

    assert QueueFull in outcomes
    assert outcomes[0] is type(None)
    # and the connection goes on
    sender.send(message(7), within_s=20).result(20)
    assert arrived() == [7]


def test_a_message_that_cannot_be_sent_fails_alone(
    sender: ConfirmedSender, arrived: Callable[[], list[int]]
) -> None:
    def odd(producer: kombu.Producer) -> None:
        raise KeyError("surprise")

    def unspeakable(producer: kombu.Producer) -> None:
        producer.publish(object(), routing_key=QUEUE, retry=False)

    good = sender.send(message(1), within_s=20)
    bad = sender.send(odd, within_s=20)
    worse = sender.send(unspeakable, within_s=20)
    later = sender.send(message(2), within_s=20)

    good.result(20)
    later.result(20)
    with pytest.raises(PdtasksError, match="KeyError"):
        bad.result(20)
    with pytest.raises(PdtasksError, match="EncodeError"):
        worse.result(20)
    assert arrived() == [1, 2]


def test_a_surprise_in_the_senders_thread_is_told_counted_and_survived(
    sender: ConfirmedSender, arrived: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender.send(message(0), within_s=20).result(20)
    takes = sender._take
    surprises = [KeyError("surprise")]

    def take() -> None:
        takes()
        if surprises:
            raise surprises.pop()

    monkeypatch.setattr(sender, "_take", take)

    with pytest.raises(BrokerUnavailable):
        sender.send(message(1), within_s=20).result(20)
    later = sender.send(message(2), within_s=20)

    later.result(20)
    assert sender._background.failures()["publisher"] == 1
    assert arrived() == [0, 2]


@pytest.mark.parametrize("of", ["memory", "disk"])
def test_an_alarm_costs_the_impatient_an_error_and_the_patient_their_time(
    sender: ConfirmedSender, arrived: Callable[[], list[int]], services: Services, of: str
) -> None:
    sender.send(message(0), within_s=20).result(20)
    with alarm(services, of):
        patient = sender.send(message(1), within_s=120, insist=True)
        wait_until(lambda: sender._blocked, what="RabbitMQ has said that it takes nothing")
        began = time.monotonic()
        impatient = sender.send(message(2), within_s=2)
        with pytest.raises(BrokerUnavailable, match="memory or disk"):
            impatient.result(20)
        assert time.monotonic() - began < 5
        assert not patient.done()

    patient.result(30)
    # What nobody waited for any more was not sent.
    assert arrived() == [0, 1]


def test_a_close_does_not_wait_for_a_broker_that_hangs(
    sender: ConfirmedSender, services: Services, arrived: Callable[[], list[int]]
) -> None:
    sender.send(message(0), within_s=20).result(20)
    os.kill(services.rabbit.process.pid, signal.SIGSTOP)
    try:
        late = sender.send(message(1), within_s=60, insist=True)
        wait_until(lambda: sender._unconfirmed)
        began = time.monotonic()
        sender.close()
        assert time.monotonic() - began < 4
    finally:
        os.kill(services.rabbit.process.pid, signal.SIGCONT)

    with pytest.raises(BrokerUnavailable):
        late.result(1)


def test_a_request_whose_hand_over_rabbitmq_does_not_take_ends_by_its_deadline(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    # Given requests in prefill
    worker = start_worker("prefill", held=True)
    start_worker("decode")
    # (To raise the alarm takes some seconds of a busy machine.)
    asker.ask("short", timeout_s=18.0)
    asker.ask("long", timeout_s=120.0)
    wait_until(lambda: len(worker.steering.added()) == 2)

    # When RabbitMQ is low on memory as they are handed over
    with alarm(services, "memory"):
        worker.steering.release()
        wait_until(lambda: len(asker.tokens("long")) == len(asker.tokens("short")) == 1)
        # Then one ends by its deadline, told as such
        wait_until(asker.failures, 30)
        assert {r: f.code for r, f in asker.failures().items()} == {"short": "RequestTimeout"}

    # and the other goes on when memory is there again
    wait_until(lambda: asker.finished("long"), 40)
    assert asker.tokens("long") == [100, 101, 102, 103]
    # and the worker takes further ones
    asker.ask("next")
    wait_until(lambda: asker.finished("next"))
