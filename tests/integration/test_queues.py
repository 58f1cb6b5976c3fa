"""What do queues look like on a real broker, and what if it does not take a message?"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from pdtasks import pipeline
from pdtasks.cluster.probes import free_ports
from pdtasks.errors import BrokerUnavailable, PdtasksError
from pdtasks.messages import PrefillJob
from pdtasks.pipeline import Aborter, Publisher, submit
from tests.integration.conftest import DELIVERY_LIMIT, Services, StartWorker, wait_until


def a_job(request_id: str = "r") -> PrefillJob:
    now = time.time()
    return PrefillJob(
        request_id=request_id, engine="e", request=b"", submitted_at=now, deadline=now + 60
    )


@pytest.fixture
def api(services: Services) -> Iterator[httpx.Client]:
    """RabbitMQ's management API."""
    with httpx.Client(base_url=services.rabbit.api_url, timeout=10) as client:
        yield client


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's own patience would make these tests long."""
    monkeypatch.setattr(pipeline, "CONFIRM_TIMEOUT_S", 1.0)


@pytest.fixture
def publisher(our_app: Any) -> Iterator[Publisher]:
    made = Publisher()
    yield made
    made.close()


@pytest.fixture
def aborter(our_app: Any) -> Iterator[Aborter]:
    made = Aborter()
    yield made
    made.close()


@pytest.fixture
def no_broker(our_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """New connections go where nobody listens."""
    (port,) = free_ports(1)
    connect = our_app.connection_for_write
    monkeypatch.setattr(
        our_app, "connection_for_write", lambda **kw: connect(f"amqp://127.0.0.1:{port}//", **kw)
    )


@pytest.fixture
def freeze_broker(services: Services) -> Iterator[Callable[[], None]]:
    """Call it, and RabbitMQ neither answers nor hangs up, as under a memory alarm."""
    pid = services.rabbit.process.pid
    yield lambda: os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGCONT)


def test_a_worker_declares_its_queue_as_configured(
    start_worker: StartWorker, api: httpx.Client
) -> None:
    start_worker("prefill")
    start_worker("decode")

    found = wait_until(
        lambda: (q := {q["name"]: q for q in api.get("queues").json()}) and len(q) >= 5 and q
    )

    for stage in ("prefill", "decode"):
        assert found[stage]["durable"]
        assert found[stage]["arguments"] == {
            "x-queue-type": "quorum",
            "x-delivery-limit": DELIVERY_LIMIT,
            "x-dead-letter-exchange": "pdtasks.dead",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
    assert found["pdtasks.dead"]["arguments"] == {"x-queue-type": "quorum"}
    assert not [name for name in found if name.startswith("celery_delayed")]


def test_a_job_waits_in_the_queue_until_somebody_takes_it(
    start_worker: StartWorker, publisher: Publisher, channel: Any
) -> None:
    publisher.publish(a_job(), "pd:reply:x")

    (_, count, consumers) = channel.queue_declare("prefill", passive=True)
    assert (count, consumers) == (1, 0)


def test_a_broker_that_is_away_is_told_fast(no_broker: None, publisher: Publisher) -> None:
    began = time.monotonic()

    with pytest.raises(BrokerUnavailable, match="is it running"):
        publisher.publish(a_job(), "pd:reply:x")

    assert time.monotonic() - began < 12


def test_an_abort_that_cannot_be_sent_is_let_be(no_broker: None, aborter: Aborter) -> None:
    began = time.monotonic()

    aborter.abort(["r"])

    assert time.monotonic() - began < 12


def outcome_of(call: Callable[[], object], within_s: float) -> BaseException | None:
    """What `call` raised; fails the test when it does not come back."""
    raised: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
        except PdtasksError as exc:
            raised.append(exc)
        else:
            raised.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(within_s)
    assert raised, f"did not come back within {within_s} s"
    return raised[0]


def test_a_broker_that_answers_nothing_is_told_in_time(
    start_worker: StartWorker, publisher: Publisher, freeze_broker: Callable[[], None]
) -> None:
    publisher.publish(a_job("before"), "pd:reply:x")
    freeze_broker()

    raised = outcome_of(lambda: publisher.publish(a_job("during"), "pd:reply:x"), within_s=15)

    assert type(raised) is BrokerUnavailable


def test_an_abort_does_not_hang_on_a_broker_that_answers_nothing(
    start_worker: StartWorker, aborter: Aborter, freeze_broker: Callable[[], None]
) -> None:
    aborter.abort(["before"])
    freeze_broker()

    assert outcome_of(lambda: aborter.abort(["during"]), within_s=15) is None


def test_submit_does_not_hang_on_a_broker_that_answers_nothing(
    start_worker: StartWorker, freeze_broker: Callable[[], None]
) -> None:
    submit("before")
    freeze_broker()

    assert type(outcome_of(lambda: submit("during"), within_s=15)) is BrokerUnavailable


def test_a_connection_that_broke_meanwhile_is_replaced(
    start_worker: StartWorker, publisher: Publisher, aborter: Aborter, channel: Any
) -> None:
    publisher.publish(a_job("before"), "pd:reply:x")
    aborter.abort(["before"])
    for holder in (publisher, aborter):
        holder._connection.connection.transport.sock.shutdown(socket.SHUT_RDWR)

    publisher.publish(a_job("after"), "pd:reply:x")
    aborter.abort(["after"])

    (_, count, _) = channel.queue_declare("prefill", passive=True)
    assert count == 2


def test_a_queue_that_is_another_than_configured_is_told_and_not_for_ever(
    start_worker: StartWorker, publisher: Publisher, channel: Any
) -> None:
    # Given a queue from before a change of the delivery limit
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT + 5}
    channel.queue_declare("prefill", durable=True, auto_delete=False, arguments=arguments)

    with pytest.raises(BrokerUnavailable):
        publisher.publish(a_job(), "pd:reply:x")

    # When somebody has removed it, the next request goes through
    channel.queue_delete("prefill")
    publisher.publish(a_job(), "pd:reply:x")
