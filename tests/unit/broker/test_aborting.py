"""How are workers told to drop requests? `Aborter` without a broker: its last step is a stub."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import kombu
import pytest
from kombu.exceptions import OperationalError
from prometheus_client import REGISTRY

from pdtasks import background
from pdtasks.app import app
from pdtasks.background import Background
from pdtasks.broker import aborting
from pdtasks.broker.aborting import Aborter
from tests.waiting import wait_until


def unsaid() -> float:
    return REGISTRY.get_sample_value("pdtasks_aborts_unsaid_total") or 0.0


class StubBroker:
    """Takes the place of `Aborter._broadcast`."""

    def __init__(self) -> None:
        self.said: list[list[str]] = []
        self.failures = 0
        self.surprises = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def take(self, request_ids: list[str]) -> None:
        self.said.append(request_ids)
        assert self.may_answer.wait(10)
        if self.surprises:
            self.surprises -= 1
            raise KeyError("surprise")
        if self.failures:
            self.failures -= 1
            raise OperationalError("gone")


class StubConnection:
    """A connection that is there, and knows the exchange."""

    default_channel: Any = SimpleNamespace(
        connection=SimpleNamespace(
            client=SimpleNamespace(declared_entities={app.control.mailbox.exchange})
        )
    )

    def ensure_connection(self, **_: Any) -> None:
        """It is."""

    def collect(self) -> None:
        """Nothing to close."""


@pytest.fixture
def broker() -> StubBroker:
    return StubBroker()


@pytest.fixture
def beside() -> Background:
    return Background()


@pytest.fixture
def ten_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aborting, "MOST_AT_ONCE", 10)
    monkeypatch.setattr(aborting, "MOST_PENDING", 100)


@pytest.fixture
def aborter(
    broker: StubBroker, beside: Background, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Aborter]:
    monkeypatch.setattr(aborting, "ABORT_PAUSE_S", 0.0)
    monkeypatch.setattr(background, "_PAUSE_S", 0.05)
    made = Aborter(beside)
    monkeypatch.setattr(made, "_broadcast", broker.take)
    yield made
    broker.may_answer.set()
    made.close()
    assert not made._thread.is_alive()


def test_an_abort_is_sent_by_another_thread(aborter: Aborter, broker: StubBroker) -> None:
    aborter.abort(["a"])

    wait_until(lambda: broker.said == [["a"]])


def test_who_asks_never_waits_and_what_waits_is_said_once(
    aborter: Aborter, broker: StubBroker
) -> None:
    # Given a broker that hangs with the first
    broker.may_answer.clear()
    aborter.abort(["a"])
    wait_until(lambda: broker.said)

    # When every step of a worker that has not heard asks again
    for _ in range(1000):
        aborter.abort(["b", "c"])
    broker.may_answer.set()

    wait_until(lambda: len(broker.said) == 2)
    assert broker.said == [["a"], ["b", "c"]]


def test_what_a_hanging_broker_was_being_told_counts_as_unsaid_at_a_close(
    aborter: Aborter, broker: StubBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = unsaid()
    broker.may_answer.clear()
    aborter.abort(["a", "b"])
    wait_until(lambda: broker.said)
    aborter.abort(["c"])

    with monkeypatch.context() as patch:
        patch.setattr(aborting, "_CLOSE_S", 0.1)
        aborter.close()

    assert unsaid() == before + 3


def test_a_broker_that_is_away_does_not_lose_what_is_to_be_said(
    aborter: Aborter, broker: StubBroker
) -> None:
    broker.failures = 2
    aborter.abort(["a"])

    wait_until(lambda: broker.said == [["a"], ["a"], ["a"]])


def test_a_surprise_loses_nothing_and_is_counted(
    aborter: Aborter, broker: StubBroker, beside: Background
) -> None:
    broker.surprises = 1
    aborter.abort(["a"])
    wait_until(lambda: beside.failures()["aborter"] == 1)

    aborter.abort(["b"])

    wait_until(lambda: {name for said in broker.said[1:] for name in said} == {"a", "b"})
    assert beside.problems() == []


def test_a_connection_that_surprises_is_not_used_again(
    beside: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a connection that is broken in a way that no list of errors knows
    connections: list[HalfBroken] = []
    said: list[dict[str, list[str]]] = []

    class HalfBroken:
        def __init__(self) -> None:
            connections.append(self)
            self.is_closed = False

        def ensure_connection(self, **_: Any) -> None:
            """It seems to be there."""

        @property
        def default_channel(self) -> Any:
            if self is connections[0]:
                raise AttributeError("'NoneType' object has no attribute 'send'")
            return StubConnection.default_channel

        def collect(self) -> None:
            self.is_closed = True

    def producer(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(publish=lambda body, **_: said.append(body["arguments"]))

    monkeypatch.setattr(background, "_PAUSE_S", 0.05)
    monkeypatch.setattr(app, "connection_for_write", lambda **_: HalfBroken())
    monkeypatch.setattr(kombu, "Producer", producer)
    aborter = Aborter(beside)

    aborter.abort(["a"])

    wait_until(lambda: said == [{"request_ids": ["a"]}])
    assert [connection.is_closed for connection in connections] == [True, False]
    assert beside.failures() == {"aborter": 1}
    aborter.close()


def test_a_broker_that_refuses_connections_is_tried_after_pauses_with_one_line_a_try(
    beside: Background, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a port where nobody listens
    made: list[kombu.Connection] = []

    def connection(**_: Any) -> kombu.Connection:
        made.append(kombu.Connection(f"amqp://127.0.0.1:{port}//", connect_timeout=4))
        return made[-1]

    def lines() -> int:
        return sum("aborts wait" in record.message for record in caplog.records)

    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        monkeypatch.setattr(app, "connection_for_write", connection)
        aborter = Aborter(beside)

        aborter.abort(["a"])

        # Then the pauses are ours, not kombu's: it sleeps for seconds in each, and says nothing
        wait_until(lambda: lines() >= 3)
        aborter.close()

    assert not aborter._thread.is_alive(), "a close does not wait for a pause"
    assert len(made) == lines()
    assert beside.failures() == {"aborter": 0}


def test_a_connection_that_broke_while_nobody_looked_is_replaced_at_once(
    beside: Background, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a connection that has worked once
    broken: list[bool] = []
    said: list[list[str]] = []

    def publish(body: dict[str, Any], **_: Any) -> None:
        if broken:
            broken.clear()
            raise ConnectionResetError
        said.append(body["arguments"]["request_ids"])

    monkeypatch.setattr(aborting, "ABORT_PAUSE_S", 0.0)
    monkeypatch.setattr(app, "connection_for_write", lambda **_: StubConnection())
    monkeypatch.setattr(kombu, "Producer", lambda *_, **__: SimpleNamespace(publish=publish))
    aborter = Aborter(beside)
    aborter.abort(["a"])
    wait_until(lambda: said == [["a"]])

    # When RabbitMQ was restarted meanwhile
    broken.append(True)
    aborter.abort(["b"])

    wait_until(lambda: said == [["a"], ["b"]])
    aborter.close()
    assert "aborts wait" not in caplog.text


def test_many_are_said_in_messages_of_bounded_size(
    ten_at_most: None, aborter: Aborter, broker: StubBroker
) -> None:
    aborter.abort(f"r{n:02}" for n in range(25))

    wait_until(lambda: sum(map(len, broker.said)) == 25)
    assert [len(request_ids) for request_ids in broker.said] == [10, 10, 5]


def test_what_could_not_be_said_by_the_end_is_counted(
    beside: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_request_ids: list[str]) -> None:
        raise OperationalError("gone")

    aborter = Aborter(beside)
    monkeypatch.setattr(aborter, "_broadcast", away)
    before = unsaid()

    aborter.abort(["a", "b"])
    aborter.close()

    assert unsaid() == before + 2


def test_what_can_never_be_said_does_not_pile_up(
    ten_at_most: None, aborter: Aborter, broker: StubBroker
) -> None:
    broker.may_answer.clear()
    aborter.abort(["first"])
    wait_until(lambda: broker.said)

    for n in range(200):
        aborter.abort([f"r{n:03}"])
    broker.may_answer.set()

    wait_until(lambda: len(broker.said) == 11)
    assert [r for said in broker.said[1:] for r in said] == [f"r{n:03}" for n in range(100, 200)]


def test_what_waits_at_the_end_is_still_said(aborter: Aborter, broker: StubBroker) -> None:
    broker.may_answer.clear()
    aborter.abort(["a"])
    wait_until(lambda: broker.said)
    aborter.abort(["b"])
    broker.may_answer.set()

    aborter.close()

    assert broker.said == [["a"], ["b"]]
