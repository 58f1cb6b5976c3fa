"""Is a worker whose main loop stands seen as such, and does it hold up anybody?"""

from __future__ import annotations

import signal
import time
from typing import Any

from pdtasks.bus.presence import read_workers
from pdtasks.messages import WorkerStatus
from pdtasks.worker.liveness import EXIT_STALLED
from tests.integration.asker import Asker
from tests.integration.conftest import Services, StartWorker, StubWorker, cut_connections
from tests.integration.steering import STALL_SIGNAL
from tests.waiting import wait_until

#: Seconds; the product's 10 and 30 would make these tests long.
SOON = {"stub_stalled_after_s": "2"}


def said_of(services: Services, worker: StubWorker) -> WorkerStatus | None:
    """The worker's sign of life."""
    return next((w for w in read_workers(services.bus) if w.pid == worker.pid), None)


def state_of(services: Services, worker: StubWorker) -> str:
    status = said_of(services, worker)
    return status.state if status else "gone"


def test_a_worker_whose_main_loop_stands_says_so(
    start_worker: StartWorker, services: Services
) -> None:
    worker = start_worker("prefill", **SOON, stall_timeout_s="60")

    worker.signal(STALL_SIGNAL)

    wait_until(lambda: state_of(services, worker) == "stalled")
    status = said_of(services, worker)
    assert status is not None
    assert status.reason == "its main loop does not turn"


def test_a_worker_that_stands_too_long_shows_why_ends_and_its_jobs_go_to_others(
    start_worker: StartWorker, asker: Asker
) -> None:
    # Given a worker with a job under way
    worker = start_worker("prefill", held=True, **SOON, stall_timeout_s="1")
    asker.ask("r", max_tokens=1)
    wait_until(worker.steering.added)

    worker.signal(STALL_SIGNAL)

    # Then it ends by itself, with its own code, and the log shows where it stood
    wait_until(worker.has_ended)
    assert worker.wait() == EXIT_STALLED
    assert "its main loop does not turn: ending the process" in worker.log
    assert "_stand" in worker.log
    # and another worker answers
    start_worker("prefill", 2)
    wait_until(asker.finished)


def test_a_stalled_worker_does_not_hold_up_a_stop(
    start_worker: StartWorker, services: Services
) -> None:
    worker = start_worker("prefill", **SOON, stall_timeout_s="60")
    worker.signal(STALL_SIGNAL)
    wait_until(lambda: state_of(services, worker) == "stalled")

    began = time.monotonic()
    worker.signal(signal.SIGTERM)

    wait_until(worker.has_ended, 5)
    assert time.monotonic() - began < 3
    assert worker.wait() == EXIT_STALLED


def test_all_stacks_can_be_asked_for_when_the_interpreter_stands(
    start_worker: StartWorker, services: Services
) -> None:
    worker = start_worker("prefill", **SOON, stall_timeout_s="60")
    worker.signal(STALL_SIGNAL)
    wait_until(lambda: state_of(services, worker) == "stalled")

    worker.signal(signal.SIGUSR2)

    wait_until(lambda: "Current thread" in worker.log and "_stand" in worker.log)


def test_a_connection_that_is_lost_again_and_again_is_made_again_with_pauses(
    start_worker: StartWorker, services: Services, asker: Asker
) -> None:
    worker = start_worker("prefill")

    def has_said(words: str, times: int) -> None:
        wait_until(lambda: worker.log.count(words) == times, what=f"{times} times {words}")

    for losses in range(1, 4):
        has_said("Connected to amqp", losses)
        wait_until(lambda: state_of(services, worker) == "ready")
        with cut_connections(services, worker):
            has_said("Connection to broker lost", losses)

    # Each loss but the first is followed by a pause, each longer
    wait_until(lambda: "connecting again in 1.0 s" in worker.log)
    assert worker.log.count("connecting again in") == 2
    assert "connecting again in 0.5 s" in worker.log
    # and the worker goes on
    asker.ask("r", max_tokens=1)
    wait_until(asker.finished)
    wait_until(lambda: state_of(services, worker) == "ready")


def test_control_commands_are_answered_without_further_connections(
    start_worker: StartWorker, our_app: Any
) -> None:
    worker = start_worker("prefill")

    answers: Any = our_app.control.inspect(timeout=2).ping()

    assert answers == {"prefill1@test": {"ok": "pong"}}
    assert worker.log.count("Connected to amqp") == 1
