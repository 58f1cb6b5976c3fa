"""How are workers told to drop requests? `Aborter` without a broker: its last step is a stub."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from kombu.exceptions import OperationalError

from pdtasks import pipeline
from pdtasks.errors import InvalidRequest
from pdtasks.pipeline import Aborter, submit


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class StubBroker:
    """Takes the place of `Aborter._broadcast`."""

    def __init__(self) -> None:
        self.said: list[list[str]] = []
        self.failures = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def take(self, request_ids: list[str]) -> None:
        self.said.append(request_ids)
        assert self.may_answer.wait(10)
        if self.failures:
            self.failures -= 1
            raise OperationalError("gone")


@pytest.fixture
def broker() -> StubBroker:
    return StubBroker()


@pytest.fixture
def aborter(broker: StubBroker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Aborter]:
    monkeypatch.setattr(pipeline, "ABORT_PAUSE_S", 0.0)
    made = Aborter()
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


def test_a_connection_that_has_gone_stale_is_tried_once_more(
    aborter: Aborter, broker: StubBroker
) -> None:
    broker.failures = 1

    aborter.abort(["a"])

    wait_until(lambda: broker.said == [["a"], ["a"]])


def test_a_broker_that_is_away_does_not_end_the_thread(
    aborter: Aborter, broker: StubBroker
) -> None:
    broker.failures = 2
    aborter.abort(["a"])
    wait_until(lambda: broker.failures == 0)

    aborter.abort(["b"])

    wait_until(lambda: broker.said[-1] == ["b"])


def test_what_waits_at_the_end_is_still_said(aborter: Aborter, broker: StubBroker) -> None:
    broker.may_answer.clear()
    aborter.abort(["a"])
    wait_until(lambda: broker.said)
    aborter.abort(["b"])
    broker.may_answer.set()

    aborter.close()

    assert broker.said == [["a"], ["b"]]


@pytest.mark.parametrize("both", [True, False])
def test_a_request_has_either_a_prompt_or_messages(both: bool) -> None:
    with pytest.raises(InvalidRequest, match="either"):
        submit("a" if both else None, messages=[] if both else None)
