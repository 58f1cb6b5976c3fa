"""Has each worker a name of its own, and does a command reach every process all the same?"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdtasks.bus.presence import read_workers, worker_key
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.messages import WorkerStatus
from pdtasks.naming import ABORT
from pdtasks.running_stack import identify, place
from tests.integration.asker import Asker
from tests.integration.conftest import (
    HalfAnswered,
    Nursery,
    Services,
    StartWorker,
)
from tests.integration.steering import steering_url
from tests.waiting import wait_until

Start = Callable[..., tuple[int, Path]]


@pytest.fixture
def by_hand(
    start_worker: StartWorker, nursery: Nursery, services: Services, tmp_path: Path
) -> Iterator[Start]:
    """Starts what a person types; returns pid and log."""
    started: list[int] = []

    def start(*argv: str) -> tuple[int, Path]:
        log = tmp_path / f"by-hand-{len(started)}.log"
        steering = steering_url(services.bus_server.operator_url)
        env = services.worker_env | {"STUB_NAME": "by-hand", "STUB_STEERING": steering}
        started.append(nursery.start([*argv, "-c", "8", "-l", "INFO"], env, log))
        return started[-1], log

    yield start
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        nursery.wait(pid)


def ready_pids(services: Services) -> set[int]:
    return {w.pid for w in read_workers(services.bus) if w.state == "ready"}


def a_holder(**fields: Any) -> WorkerStatus:
    """Of `decode1@test`, as another process of this host says it."""
    own = identify(os.getpid())
    assert own is not None
    status = WorkerStatus(
        name="decode1@test",
        role="decode",
        host=socket.gethostname(),
        pid=own.pid,
        state="ready",
        since=1e9,
        place=place(),
        pid_started=own.started,
    )
    return msgspec.structs.replace(status, **fields)


# -- names -----------------------------------------------------------------------------------------


def test_as_typed_one_worker_of_each_stage_serves_on_one_host(
    by_hand: Start, services: Services, asker: Asker
) -> None:
    pids = {by_hand("-Q", stage)[0] for stage in ("prefill", "decode")}
    wait_until(lambda: ready_pids(services) == pids)

    asker.ask()

    wait_until(asker.finished)
    host = socket.gethostname()
    assert {w.name for w in read_workers(services.bus)} == {f"prefill@{host}", f"decode@{host}"}


def test_a_second_worker_of_one_name_says_who_has_it_and_what_to_do(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    start_worker("prefill")
    first = start_worker("decode")

    second = start_worker("decode", wait=False)

    wait_until(second.has_ended)
    assert second.wait() == 2
    said = second.log.splitlines()[-1]
    assert said.startswith("pdtasks: a worker named decode1@test runs already (decode, ready, ")
    assert f"host {socket.gethostname()}, pid {first.pid}, since 20" in said
    assert said.endswith("`-n other@%h`")
    # and the first has noticed nothing
    assert first.pid in ready_pids(services)
    asker.ask()
    wait_until(asker.finished)


def test_of_another_hosts_worker_its_signs_of_life_tell(
    start_worker: StartWorker, services: Services
) -> None:
    status = a_holder(host="elsewhere", place="elsewhere")

    def say_again() -> bool:
        return bool(services.bus.set(worker_key(status.name), status.to_wire(), px=10_000))

    say_again()
    second = start_worker("decode", wait=False)
    wait_until(lambda: say_again() and second.has_ended())

    assert second.wait() == 2
    assert "to see whether it lives" in second.log
    assert "(decode, ready, on host elsewhere, pid" in second.log.splitlines()[-1]


def test_a_lost_worker_of_another_host_is_waited_for_no_longer_than_its_sign_of_life(
    start_worker: StartWorker, services: Services
) -> None:
    status = a_holder(host="elsewhere", place="elsewhere")
    services.bus.set(worker_key(status.name), status.to_wire(), px=1000)

    worker = start_worker("decode")

    assert "waiting up to 1 s" in worker.log


@pytest.mark.parametrize(
    "other",
    [
        {"pid_started": 1},  # its pid is another process's by now
        {"pid": 2**22 + 1},  # no process can have it
    ],
)
def test_the_name_of_a_process_that_is_gone_is_free_at_once(
    start_worker: StartWorker, services: Services, other: dict[str, int]
) -> None:
    status = a_holder(**other)
    services.bus.set(worker_key(status.name), status.to_wire(), px=60_000)

    worker = start_worker("decode")

    assert "waiting" not in worker.log


def test_a_killed_worker_is_replaced_at_once(start_worker: StartWorker, services: Services) -> None:
    # The sign of life that it leaves would hold for a minute
    first = start_worker("decode", worker_ttl_s="60")
    first.signal(signal.SIGKILL)
    wait_until(first.has_ended)

    second = start_worker("decode", worker_ttl_s="60")

    assert ready_pids(services) == {second.pid}


def test_a_worker_that_wakes_and_finds_its_name_taken_hands_on_and_ends(
    half_answered: HalfAnswered, start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    # Given one that has begun an answer, is frozen for longer than its sign of life holds
    frozen, tokens = half_answered(max_tokens=20)
    frozen.signal(signal.SIGSTOP)
    wait_until(lambda: not any(w.role == "decode" for w in read_workers(services.bus)))
    # and another one that has its name since
    successor = start_worker("decode")

    frozen.signal(signal.SIGCONT)

    # Then it stops in order, says why, and takes no sign of life but its own away
    wait_until(asker.questions)
    asker.tell(tokens)
    successor.steering.release()
    wait_until(frozen.has_ended)
    assert frozen.wait() == 0
    assert f"pid {successor.pid}" in frozen.log
    assert "This one stops" in frozen.log
    wait_until(asker.finished)
    assert asker.tokens() == list(range(100, 120))
    assert {w.pid for w in read_workers(services.bus) if w.role == "decode"} == {successor.pid}


# -- commands --------------------------------------------------------------------------------------


def test_hang_ups_reach_both_of_two_workers_of_one_name(
    start_worker: StartWorker, tcp_server: ValkeyServer, our_app: Any
) -> None:
    # Given two that cannot know of each other: they have different buses
    start_worker("decode")
    other = start_worker("decode", wait=False, bus_url=tcp_server.operator_url)
    wait_until(lambda: other.log_file.exists() and "decode1@test ready." in other.log)

    answers = our_app.control.broadcast(
        ABORT, arguments={"request_ids": ["r"]}, reply=True, limit=2, timeout=10
    )

    assert answers == [{"decode1@test": {"ok": "aborting"}}] * 2
    assert "connecting again" not in other.log
