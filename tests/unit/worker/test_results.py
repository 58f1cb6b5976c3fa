"""Are results that no task stores itself stored in the background, and is a failure told?"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import states

from pdtasks.errors import WorkerLost
from pdtasks.worker import results
from pdtasks.worker.results import ResultStore


class StubBackend:
    """Keeps states; may hang or fail."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.errors: list[Exception] = []
        self.answers = threading.Event()
        self.answers.set()

    def store_result(self, task_id: str, result: Any, state: str) -> None:
        assert self.answers.wait(10)
        if self.errors:
            raise self.errors.pop(0)
        self.states[task_id] = state

    def get_state(self, task_id: str) -> str:
        return self.states.get(task_id, str(states.PENDING))

    def mark_as_revoked(self, task_id: str, reason: str, store_result: bool) -> None:
        self.store_result(task_id, None, states.REVOKED)


class StubApp:
    """Has a result backend."""

    def __init__(self) -> None:
        self.backend = StubBackend()


@pytest.fixture
def app() -> Any:
    return StubApp()


@pytest.fixture
def store(app: Any) -> Iterator[ResultStore]:
    made = ResultStore(app)
    yield made
    app.backend.answers.set()
    made.close()


def wait_until_stored(app: Any, task_id: str) -> None:
    deadline = time.monotonic() + 5
    while task_id not in app.backend.states:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_who_asks_does_not_wait_for_a_bus_that_hangs(store: ResultStore, app: Any) -> None:
    app.backend.answers.clear()

    began = time.monotonic()
    store.fail("r", WorkerLost("gone"))

    assert time.monotonic() - began < 1
    app.backend.answers.set()
    wait_until_stored(app, "r")
    assert app.backend.states == {"r": states.FAILURE}


def test_a_result_that_is_not_stored_is_told_and_the_next_is_stored(
    store: ResultStore, app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app.backend.errors = [ConnectionError("canary")]
    told: list[bool] = []
    done = threading.Event()

    def tell(well: bool) -> None:
        told.append(well)
        done.set()

    with caplog.at_level(logging.ERROR):
        store.fail("a", WorkerLost("gone"), tell)
        assert done.wait(5)
    store.fail("b", WorkerLost("gone"))

    wait_until_stored(app, "b")
    assert told == [False]
    assert "no result was stored for a: ConnectionError" in caplog.text
    assert "canary" not in caplog.text


def test_what_has_ended_is_not_revoked(store: ResultStore, app: Any) -> None:
    app.backend.states = {"done": states.SUCCESS, "begun": states.STARTED}

    store.revoke("done")
    store.revoke("begun", only_waiting=True)
    store.revoke("waiting", only_waiting=True)

    wait_until_stored(app, "waiting")
    assert app.backend.states == {
        "done": states.SUCCESS,
        "begun": states.STARTED,
        "waiting": states.REVOKED,
    }
    store.revoke("begun")
    store.revoke("last")
    wait_until_stored(app, "last")
    assert app.backend.states["begun"] == states.REVOKED


def test_results_do_not_pile_up(
    store: ResultStore, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_MOST_WAITING", 3)
    app.backend.answers.clear()
    told: list[bool] = []

    for n in range(10):
        store.fail(f"r{n}", WorkerLost("gone"), told.append)

    assert told == [False] * 7
    app.backend.answers.set()
    wait_until_stored(app, "r2")
