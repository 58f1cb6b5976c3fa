"""When does a worker count as stalled, and when has it to end?"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from pdtasks.worker.liveness import EXIT_STALLED, STALLED_AFTER_S, Liveness

STALL_TIMEOUT_S = 30.0
DRAIN_TIMEOUT_S = 20.0


@dataclass
class StubClock:
    """A clock that a test sets."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> StubClock:
    return StubClock()


@pytest.fixture
def liveness(clock: StubClock) -> Liveness:
    """Of a worker whose main loop has begun to turn."""
    made = Liveness(clock)
    made.connecting("RabbitMQ cannot be reached")
    made.beat(consumes=True)
    return made


def overdue(liveness: Liveness) -> str | None:
    return liveness.overdue(STALL_TIMEOUT_S, DRAIN_TIMEOUT_S)


def test_an_engine_may_take_any_time_to_start(clock: StubClock) -> None:
    liveness = Liveness(clock)

    clock.now += 1000

    assert liveness.stall() is None
    assert overdue(liveness) is None


def test_a_loop_that_turns_takes_jobs(liveness: Liveness, clock: StubClock) -> None:
    for _ in range(100):
        clock.now += 1
        liveness.beat(consumes=True)
        assert liveness.stall() is None


def test_a_loop_that_stands_is_stalled_and_ends_after_its_time(
    liveness: Liveness, clock: StubClock
) -> None:
    clock.now += STALLED_AFTER_S + 1
    stall = liveness.stall()
    assert stall is not None
    assert (stall.reason, stall.own_fault) == ("its main loop does not turn", True)
    assert overdue(liveness) is None

    clock.now += STALL_TIMEOUT_S + 5
    assert overdue(liveness) == "its main loop does not turn"


def test_a_loop_that_turns_again_is_well_again(liveness: Liveness, clock: StubClock) -> None:
    clock.now += STALLED_AFTER_S + 1
    assert liveness.stall() is not None

    liveness.beat(consumes=True)

    assert liveness.stall() is None


def test_without_rabbitmq_a_worker_is_stalled_and_goes_on_for_ever(
    liveness: Liveness, clock: StubClock
) -> None:
    liveness.connecting("RabbitMQ closed the connection")

    clock.now += 10_000

    stall = liveness.stall()
    assert stall is not None
    assert (stall.reason, stall.own_fault) == ("RabbitMQ closed the connection", False)
    assert overdue(liveness) is None


def test_without_a_consumer_a_worker_is_stalled(liveness: Liveness) -> None:
    liveness.beat(consumes=False)

    stall = liveness.stall()

    assert stall is not None
    assert stall.reason == "RabbitMQ has no consumer of it"


def test_a_stalled_worker_that_is_told_to_stop_ends_at_once(
    liveness: Liveness, clock: StubClock
) -> None:
    clock.now += STALLED_AFTER_S + 1

    liveness.stop_requested()

    clock.now += 0.1
    assert overdue(liveness) is not None


def test_a_loop_that_turns_gets_the_time_to_hear_of_a_stop(
    liveness: Liveness, clock: StubClock
) -> None:
    liveness.stop_requested()

    clock.now += STALLED_AFTER_S - 1
    assert overdue(liveness) is None
    clock.now += 2
    assert overdue(liveness) == "a stop was asked for, but its main loop does not turn"


def test_a_stop_may_take_as_long_as_running_requests_are_given(
    liveness: Liveness, clock: StubClock
) -> None:
    liveness.stop_requested()
    liveness.stopping()

    clock.now += DRAIN_TIMEOUT_S + 10
    assert liveness.stall() is None, "it takes no jobs, as it should"
    assert overdue(liveness) is None
    clock.now += 10
    assert overdue(liveness) == "the stop takes too long"


@pytest.mark.parametrize("is_full", [False, True])
def test_a_process_ends_and_says_why_whether_or_not_anybody_reads_what_it_says(
    is_full: bool,
) -> None:
    # Given a process whose main thread stands: in a write, if its standard error is a full pipe
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys, threading, time\n"
            "from pdtasks.worker import liveness\n"
            "end = lambda: liveness.end_process('it stands', liveness.EXIT_STALLED)\n"
            "threading.Timer(0.5, end).start()\n"
            + ("sys.stderr.write('x' * 1_000_000)\n" if is_full else "time.sleep(60)\n"),
        ],
        stderr=writer,
    )
    os.close(writer)
    try:
        # Then it ends
        assert process.wait(timeout=10) == EXIT_STALLED
        said = os.read(reader, 1_000_000).decode()
    finally:
        process.kill()
        os.close(reader)
    assert is_full or "pdtasks: it stands: ending the process" in said
    assert is_full or "in <module>" in said


#: A process whose clean-up takes long.
_SLOW = """
import time
from pdtasks.worker import liveness

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(60)

slow = Slow()
liveness.leave_at_exit(3)
print("the last word")
"""


def test_a_process_that_has_stopped_does_not_wait_for_pythons_clean_up() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SLOW], capture_output=True, text=True, timeout=30, check=False
    )

    # It ends at once, with its exit code and all that it has said.
    assert done.returncode == 3
    assert done.stdout == "the last word\n"
