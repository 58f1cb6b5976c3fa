"""What does a supervisor do with workers that take no jobs? With children that only sleep."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import valkey

from pdtasks.cluster import parts
from pdtasks.cluster.console import Console
from pdtasks.cluster.parts import Part, Parts
from pdtasks.cluster.process import Process
from pdtasks.messages import WorkerStatus

HERE = socket.gethostname()

#: Ends for no SIGTERM, and notes that its stacks were asked for.
STUBBORN = """
import faulthandler, signal, sys, time

def write_slowly(*_):
    for thread in ("the first thread", "another thread", "the last thread"):
        print(thread, flush=True)
        time.sleep(0.1)

def be_slow(*_):
    faulthandler.unregister(signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, write_slowly)
    print("slow", flush=True)

faulthandler.register(signal.SIGUSR2)
signal.signal(signal.SIGRTMIN, be_slow)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
print("up", flush=True)
time.sleep(60)
"""
SLOW_STACKS_SIGNAL = signal.SIGRTMIN


class Bench:
    """One worker, and what the bus says of it."""

    def __init__(self, folder: Path, stall_timeout_s: float) -> None:
        self.output = io.StringIO()
        self.said: list[WorkerStatus] | None = []  #: None: the bus does not answer
        self.away: set[str] = set()  #: workers that are not to be started
        self.is_full = False  #: the bus answers, but takes nothing
        self.log = folder / "decode1.log"
        self.parts = Parts(
            Console(self.output),
            lambda: "valkey://127.0.0.1:1",
            lambda: None,
            lambda: None,
            stall_timeout_s=stall_timeout_s,
            stays_away=lambda name: name in self.away,
        )
        process = Process(
            "decode1", [sys.executable, "-c", STUBBORN], env=dict(os.environ), log=self.log
        )
        self.part = Part(process, "decode", "cpu")
        self.parts.add(self.part)
        self.until(lambda: "up" in self.log.read_text())
        self.say("ready")
        self.until(lambda: self.part.ready)
        self.first_pid = process.pid

    def say(self, state: str, reason: str = "", role: str = "decode") -> None:
        pid = self.part.process.pid
        self.said = [
            WorkerStatus(
                name="decode1@h", role=role, host=HERE, pid=pid, state=state, reason=reason
            )
        ]

    def read(self, _bus: object) -> list[WorkerStatus]:
        if self.said is None:
            raise valkey.ConnectionError("refused")
        return self.said

    def until(self, condition: Callable[[], object], within_s: float = 10) -> None:
        """Watch until then."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, self.output.getvalue()
            self.parts.watch()
            time.sleep(0.01)

    def watch_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.parts.watch()
            time.sleep(0.01)

    def stayed(self) -> bool:
        """Is the first process there? (Between an end and the next start its pid is told too.)"""
        return self.part.process.running and self.part.process.pid == self.first_pid

    def replaced(self) -> bool:
        return self.part.process.running and self.part.process.pid != self.first_pid


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeBench]:
    made: list[Bench] = []
    monkeypatch.setattr(parts, "_ASK_S", 0.0)

    def read(bus: object) -> list[WorkerStatus]:
        return made[-1].read(bus)

    monkeypatch.setattr(parts, "read_workers", read)
    monkeypatch.setattr(parts, "valkey_takes_writes", lambda _: not made[-1].is_full)

    def make(stall_timeout_s: float = 0.3) -> Bench:
        bench = Bench.__new__(Bench)
        made.append(bench)
        bench.__init__(tmp_path, stall_timeout_s)  # type: ignore[misc]  # it asks the bus already
        return bench

    yield make
    for bench in made:
        bench.parts.kill()
        bench.parts.close()


def test_a_worker_that_was_asked_to_stop_is_back_at_once_and_it_is_no_failure(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()

    bench.part.process.signal(signal.SIGALRM)

    bench.until(lambda: bench.part.process.pid != bench.first_pid)
    told = bench.output.getvalue()
    assert "decode1 was stopped" in told
    assert "restarting decode1" in told
    assert "ended by itself" not in told
    assert bench.part.failures == 0


def test_a_drained_worker_is_not_started_until_it_may_be(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.away = {"decode1"}

    bench.part.process.signal(signal.SIGALRM)
    bench.until(lambda: "decode1 was stopped" in bench.output.getvalue())
    for _ in range(5):
        bench.parts.watch()
    assert not bench.part.process.running

    bench.away = set()
    bench.until(bench.replaced)


def test_a_stalled_worker_is_replaced_and_where_it_stood_is_in_its_log(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()

    bench.say("stalled", "its main loop does not turn")

    bench.until(bench.replaced)
    told = bench.output.getvalue()
    assert "decode1: ready → stalled: its main loop does not turn" in told
    assert "decode1 was ended: stalled: its main loop does not turn, starting again in 1 s" in told
    assert str(bench.log) in told
    assert "most recent call first" in bench.log.read_text()


def test_a_silent_worker_is_replaced(make_bench: MakeBench) -> None:
    bench = make_bench()

    bench.said = []

    bench.until(bench.replaced)
    assert "decode1 was ended: silent" in bench.output.getvalue()


def test_a_worker_that_is_well_again_in_time_stays(make_bench: MakeBench) -> None:
    bench = make_bench(stall_timeout_s=0.5)

    for _ in range(3):
        bench.say("stalled", "its main loop does not turn")
        bench.watch_for(0.3)
        bench.say("ready")
        bench.watch_for(0.1)

    assert bench.stayed()
    assert "stalled: its main loop does not turn → ready" in bench.output.getvalue()


def test_a_bus_that_is_away_replaces_nobody(make_bench: MakeBench) -> None:
    bench = make_bench(stall_timeout_s=0.1)

    bench.said = None
    bench.watch_for(0.6)

    assert bench.stayed()


def test_a_bus_that_has_no_room_for_signs_of_life_replaces_and_kills_nobody(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(stall_timeout_s=0.1)

    bench.said, bench.is_full = [], True
    bench.watch_for(0.6)
    assert bench.stayed()

    bench.parts.stop("decode", deadline_s=0.5)
    assert "did not stop in 0 s: killed" in bench.output.getvalue()  # it had its time


def test_a_worker_without_rabbitmq_is_not_replaced_and_the_reason_is_told(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(stall_timeout_s=0.1)

    bench.say("stalled", "RabbitMQ cannot be reached")
    bench.watch_for(0.6)

    assert bench.stayed()
    assert "decode1: ready → stalled: RabbitMQ cannot be reached" in bench.output.getvalue()


@pytest.mark.parametrize("state", ["stalled", "silent"])
def test_a_worker_that_takes_no_jobs_does_not_hold_up_a_stop(
    make_bench: MakeBench, state: str
) -> None:
    # Given one that ignores SIGTERM as well
    bench = make_bench(stall_timeout_s=60)
    if state == "stalled":
        bench.say("stalled", "its main loop does not turn")
    else:
        bench.said = []
    bench.watch_for(0.1)

    began = time.monotonic()
    bench.parts.stop("decode", deadline_s=30)

    # (3 s: so long one may be silent because the bus has just been restarted)
    assert time.monotonic() - began < 6
    assert bench.part.process.poll() == -signal.SIGKILL


def test_just_after_a_restart_of_the_bus_silence_is_no_reason_to_kill(
    make_bench: MakeBench,
) -> None:
    # Given a bus that has forgotten everything
    bench = make_bench(stall_timeout_s=60)
    bench.said = []
    bench.watch_for(0.1)
    back = threading.Timer(1.0, bench.say, ["ready"])
    back.start()

    # When the stack is stopped
    bench.parts.stop("decode", deadline_s=0.5)
    back.join()

    # Then a worker that is about to show itself gets its time to stop (this one does not use it)
    assert "takes no jobs" not in bench.output.getvalue()
    assert "did not stop in 0 s: killed" in bench.output.getvalue()


def test_a_reason_that_only_counts_up_is_told_once(make_bench: MakeBench) -> None:
    bench = make_bench(stall_timeout_s=60)

    for count in range(1, 5):
        bench.say("ready", f"results has failed {count} times")
        bench.watch_for(0.05)

    assert bench.output.getvalue().count("has failed") == 1


def test_stacks_that_come_slowly_are_in_the_log_before_the_end(make_bench: MakeBench) -> None:
    # Given a worker whose many threads take a while to write down
    bench = make_bench()
    os.kill(bench.first_pid, SLOW_STACKS_SIGNAL)
    bench.until(lambda: "slow" in bench.log.read_text())
    bench.say("stalled", "its main loop does not turn")

    bench.until(bench.replaced)

    assert "the last thread" in bench.log.read_text()


def test_a_worker_that_is_well_gets_its_time_to_stop(make_bench: MakeBench) -> None:
    bench = make_bench(stall_timeout_s=60)

    bench.parts.stop("decode", deadline_s=0.5)

    # (this one does not use it)
    assert "did not stop in 0 s: killed" in bench.output.getvalue()


def test_a_worker_elsewhere_with_the_same_pid_is_another_one(make_bench: MakeBench) -> None:
    # Given a bus that several hosts share
    bench = make_bench(stall_timeout_s=0.1)
    ours = bench.said or []
    stranger = WorkerStatus(
        name="decode1@other",
        role="decode",
        host="other",
        pid=bench.part.process.pid,
        state="stalled",
        reason="its main loop does not turn",
    )

    # When that one stands
    bench.said = [*ours, stranger]
    bench.watch_for(0.6)

    # Then ours stays
    assert bench.stayed()


def test_a_worker_that_the_kernel_does_not_let_go_of_ends_no_supervisor(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a stalled worker that hangs in a device: no signal ends it
    bench = make_bench(stall_timeout_s=0.1)
    monkeypatch.setattr(bench.part.process, "kill", lambda: None)
    bench.say("stalled", "its main loop does not turn")

    # When its time for a new start has come
    bench.until(lambda: bench.part.restart_at is not None)
    bench.watch_for(1.5)

    # Then it is in the way of its successor, until it is gone
    assert bench.part.process.pid == bench.first_pid
    monkeypatch.undo()
    bench.part.process.kill()
    bench.part.restart_at = 0.0
    bench.until(bench.replaced)


def test_a_worker_that_has_changed_its_role_is_told(make_bench: MakeBench) -> None:
    bench = make_bench()

    bench.say("changing")
    bench.until(lambda: "decode1: ready → changing" in bench.output.getvalue())
    bench.say("ready", role="prefill")

    bench.until(lambda: "decode1: changing → ready, serves prefill" in bench.output.getvalue())
    assert bench.stayed()


def test_a_part_that_nobody_can_ask_is_ready_while_it_runs(make_bench: MakeBench) -> None:
    bench = make_bench()
    log = bench.log.with_name("balancer.log")
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    part = Part(Process("balancer", argv, env=dict(os.environ), log=log), "balancer", "targets")
    bench.parts.add(part)
    bench.until(lambda: part.ready)
    first = part.process.pid

    part.process.signal(signal.SIGKILL)

    bench.until(lambda: part.ready and part.process.pid != first)
    assert "balancer ended by itself (signal SIGKILL)" in bench.output.getvalue()
