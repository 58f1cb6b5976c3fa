"""What do queues look like on a real broker, and what if it does not take a message?"""

from __future__ import annotations

import gc
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
from pdtasks.broker.aborting import Aborter
from pdtasks.cluster.probes import free_ports
from pdtasks.errors import BrokerUnavailable, PdtasksError
from pdtasks.messages import PrefillJob
from pdtasks.pipeline import Publisher, submit
from tests.integration.asker import Asker
from tests.integration.conftest import DELIVERY_LIMIT, Services, StartWorker
from tests.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


def a_job(request_id: str = "r") -> PrefillJob:
    now = time.time()
    return PrefillJob(
        request_id=request_id, engine="e", model=None, submitted_at=now, deadline=now + 60
    )


@pytest.fixture
def api(services: Services) -> Iterator[httpx.Client]:
    """RabbitMQ's management API."""
    with httpx.Client(base_url=services.rabbit.api_url, timeout=10) as client:
        yield client


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The product's own patience would make these tests long."""
    monkeypatch.setattr(pipeline, "CONFIRM_TIMEOUT_S", 1.0)
    yield
    # py-amqp leaves the sockets of connections that broke to the garbage collector.
    gc.collect()


@pytest.fixture
def no_broker(our_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """New connections go where nobody listens."""
    (port,) = free_ports(1)
    connect = our_app.connection_for_write
    monkeypatch.setattr(
        our_app, "connection_for_write", lambda **kw: connect(f"amqp://127.0.0.1:{port}//", **kw)
    )


class Freezer:
    """Makes RabbitMQ neither answer nor hang up, as under a memory alarm."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def freeze(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._pid, signal.SIGCONT)


@pytest.fixture
def broker(services: Services) -> Iterator[Freezer]:
    freezer = Freezer(services.rabbit.process.pid)
    yield freezer
    freezer.thaw()


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
        } | ({"x-max-length": 20_000} if stage == "prefill" else {})
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
    start_worker: StartWorker, publisher: Publisher, broker: Freezer
) -> None:
    publisher.publish(a_job("before"), "pd:reply:x")
    broker.freeze()

    raised = outcome_of(lambda: publisher.publish(a_job("during"), "pd:reply:x"), within_s=15)

    assert type(raised) is BrokerUnavailable


def test_submit_does_not_hang_on_a_broker_that_answers_nothing(
    start_worker: StartWorker, broker: Freezer
) -> None:
    submit("before")
    broker.freeze()

    assert type(outcome_of(lambda: submit("during"), within_s=15)) is BrokerUnavailable


def test_a_connection_that_broke_meanwhile_is_replaced(
    start_worker: StartWorker, publisher: Publisher, channel: Any
) -> None:
    publisher.publish(a_job("before"), "pd:reply:x")
    publisher._sender._connection.connection.transport.sock.shutdown(socket.SHUT_RDWR)

    publisher.publish(a_job("after"), "pd:reply:x")

    (_, count, _) = channel.queue_declare("prefill", passive=True)
    assert count == 2


def test_an_abort_reaches_the_worker_also_over_a_connection_that_broke(
    start_worker: StartWorker, asker: Asker, aborter: Aborter
) -> None:
    worker = start_worker("prefill", held=True)
    asker.ask("a")
    asker.ask("b")
    wait_until(lambda: len(worker.steering.added()) == 2)

    aborter.abort(["a"])
    wait_until(lambda: "aborted a" in worker.log)
    aborter._connection.connection.transport.sock.shutdown(socket.SHUT_RDWR)
    aborter.abort(["b"])

    wait_until(lambda: "aborted b" in worker.log)


def test_an_abort_during_an_outage_arrives_when_it_is_over(
    start_worker: StartWorker, asker: Asker, aborter: Aborter, broker: Freezer
) -> None:
    worker = start_worker("prefill", held=True)
    asker.ask("r")
    wait_until(worker.steering.added)
    aborter.abort(["somebody else"])
    wait_until(lambda: aborter._connection is not None)

    broker.freeze()
    aborter.abort(["r"])
    broker.thaw()

    wait_until(lambda: "aborted r" in worker.log)


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
