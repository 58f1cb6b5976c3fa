"""What do Celery's own ways to end a task do to a request, and whom do they hold up?"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from pdtasks.pipeline import submit
from tests.integration.conftest import Services, StartWorker
from tests.integration.leftovers import wait_until_nothing_is_left
from tests.waiting import wait_until


def ping(our_app: Any) -> float:
    """Seconds until the workers' main loops answer."""
    began = time.monotonic()
    assert our_app.control.inspect(timeout=10, limit=1).ping()
    return time.monotonic() - began


@pytest.mark.parametrize("terminate", [True, False])
def test_a_request_that_is_revoked_during_prefill_ends_and_says_so(
    start_worker: StartWorker, terminate: bool
) -> None:
    # Given a request in prefill; its caller has the id of its last stage
    prefill = start_worker("prefill", held=True)
    decode = start_worker("decode")
    result = submit("hello", max_tokens=20)
    wait_until(prefill.steering.added)

    result.revoke(terminate=terminate)

    # Then its caller hears of it, and decode never begins
    with pytest.raises(TaskRevokedError):
        result.get(timeout=20)
    prefill.steering.release()
    if not terminate:
        wait_until(lambda: "Discarding revoked task" in decode.log)
    assert decode.steering.added() == []


def test_a_request_that_is_revoked_in_decode_leaves_nothing(
    start_worker: StartWorker, services: Services, our_app: Any
) -> None:
    start_worker("prefill")
    decode = start_worker("decode", held=True)
    result = submit("hello", max_tokens=20)
    wait_until(decode.steering.added)

    result.revoke(terminate=True)

    with pytest.raises(TaskRevokedError):
        result.get(timeout=20)
    # (a task that ends late must not take the word back)
    wait_until(lambda: "] ignored" in decode.log, what="its task has ended")
    with pytest.raises(TaskRevokedError):
        our_app.AsyncResult(result.id).get(timeout=5)
    result.forget()
    wait_until_nothing_is_left(services)


def test_a_revoke_does_not_hold_up_the_main_loop_while_the_bus_is_frozen(
    start_worker: StartWorker, services: Services, our_app: Any
) -> None:
    worker = start_worker("prefill", held=True)
    running, waiting = submit("hello"), submit("hello")
    wait_until(lambda: len(worker.steering.added()) == 2)

    os.kill(services.bus_server.process.pid, signal.SIGSTOP)
    try:
        our_app.control.revoke(running.id, terminate=True)
        our_app.control.revoke(["nobody", waiting.id])
        assert ping(our_app) < 5
    finally:
        os.kill(services.bus_server.process.pid, signal.SIGCONT)

    with pytest.raises(TaskRevokedError):
        running.get(timeout=30)


def test_a_dead_job_is_answered_for_when_the_bus_is_back(
    start_worker: StartWorker, services: Services, our_app: Any, channel: Any
) -> None:
    # Given a worker, and a job that no worker can read
    worker = start_worker("prefill")
    result = our_app.AsyncResult("r")
    our_app.backend.add_pending_result(result)  # sending would wait for the bus to do it

    # When it dies while the bus is frozen
    os.kill(services.bus_server.process.pid, signal.SIGSTOP)
    try:
        our_app.send_task("no.such.task", task_id="r", queue="prefill", retry=False)
        wait_until(lambda: "gave up r" in worker.log)
        assert ping(our_app) < 5
    finally:
        os.kill(services.bus_server.process.pid, signal.SIGCONT)

    # Then its caller hears of it all the same
    with pytest.raises(Exception, match="cannot read it"):
        result.get(timeout=60)


def test_a_workers_last_event_says_that_it_is_offline(
    start_worker: StartWorker, our_app: Any
) -> None:
    """Those of tasks that end after its stop began would be taken for signs of life."""
    start_worker("prefill")
    decode = start_worker("decode", held=True)
    events: list[dict[str, Any]] = []
    with our_app.connection_for_read() as connection:
        receiver = our_app.events.Receiver(connection, handlers={"*": events.append})
        listener = threading.Thread(
            target=lambda: receiver.capture(limit=None, timeout=None), daemon=True
        )
        listener.start()
        wait_until(lambda: any(e["hostname"] == "decode1@test" for e in events))
        result = submit("hello", max_tokens=20)
        wait_until(decode.steering.added)

        # When it stops, and what it has begun ends meanwhile
        decode.signal(signal.SIGTERM)
        wait_until(lambda: any(e["type"] == "worker-offline" for e in events))
        decode.steering.release()
        assert result.get(timeout=20)["text"]
        decode.wait()

        def of_it() -> list[str]:
            return [e["type"] for e in events if e["hostname"] == "decode1@test"]

        wait_until(lambda: "task-succeeded" in of_it() and of_it()[-1] == "worker-offline")
        receiver.should_stop = True
        listener.join(5)
