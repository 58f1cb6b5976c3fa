"""What runs, and whose is it? The stack's file, its lock, and what a killed supervisor left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdtasks.cluster import process as process_module
from pdtasks.cluster.process import Process, StartFailed, describe_exit
from pdtasks.cluster.stack import (
    AlreadyRunning,
    StackLock,
    clean_stale,
    home_marker,
    redact,
    write_stack,
)
from pdtasks.running_stack import (
    Identity,
    Member,
    Stack,
    UnreadableStack,
    identify,
    read_stack,
    running_stack,
    stack_path,
)
from tests.waiting import wait_until

_SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def _own() -> Identity:
    own = identify(os.getpid())
    assert own is not None
    return own


def _stack(supervisor: Identity, *members: Member, **values: object) -> Stack:
    return Stack(
        pid=supervisor.pid,
        pid_started=supervisor.started,
        services=members,
        **values,  # type: ignore[arg-type]
    )


def _member(process: Process) -> Member:
    identity = process.identity
    return Member(process.name, "bus", identity.pid, identity.started, str(process.log))


def _gone() -> Identity:
    child = subprocess.Popen([sys.executable, "-c", ""])
    identity = identify(child.pid) or Identity(child.pid, 1)
    child.wait()
    return identity


def _wait_for(path: Path) -> str:
    deadline = time.monotonic() + 10
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)
    return path.read_text()


def _wait_for_exit(process: Process) -> None:
    deadline = time.monotonic() + 10
    while process.running:
        assert time.monotonic() < deadline, f"{process.name} still runs"
        time.sleep(0.02)


# -- the file --------------------------------------------------------------------------------------


def test_a_stack_reads_back_as_it_was_written(tmp_path: Path) -> None:
    stack = _stack(
        _own(),
        Member("rabbitmq", "broker", 7, 8, "/log"),
        state="ready",
        env={"PDTASKS_BUS_URL": "valkey://:pw@127.0.0.1:1/0"},
        urls={"bus": "valkey://:pw@127.0.0.1:1/0"},
        operator_urls={"kv": "unix://operator:pw@/run/kv.sock?db=0"},
        helpers=(Member("epmd", "broker", 9, 10, "/log"),),
        folders=("/tmp/x",),
    )

    write_stack(tmp_path, stack)

    assert read_stack(tmp_path) == stack
    assert running_stack(tmp_path) == stack


def test_the_file_holds_passwords_so_only_its_owner_can_read_it(tmp_path: Path) -> None:
    write_stack(tmp_path, _stack(_own()))

    assert stack_path(tmp_path).stat().st_mode & 0o777 == 0o600


def test_a_write_leaves_nothing_but_the_file(tmp_path: Path) -> None:
    write_stack(tmp_path, _stack(_own()))
    write_stack(tmp_path, _stack(_own(), state="ready"))

    assert [path.name for path in tmp_path.iterdir()] == ["stack.json"]


def test_without_a_file_nothing_runs(tmp_path: Path) -> None:
    assert read_stack(tmp_path) is None
    assert running_stack(tmp_path) is None


def test_a_stack_whose_supervisor_died_does_not_run(tmp_path: Path) -> None:
    write_stack(tmp_path, _stack(_gone()))

    assert read_stack(tmp_path) is not None
    assert running_stack(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 99}', '{"version": 1}'])
def test_a_damaged_file_says_what_to_do(tmp_path: Path, content: str) -> None:
    stack_path(tmp_path).write_text(content)

    with pytest.raises(UnreadableStack, match="remove"):
        read_stack(tmp_path)


# -- the lock --------------------------------------------------------------------------------------


def test_a_second_supervisor_is_told_who_runs_and_how_to_stop_it(tmp_path: Path) -> None:
    with StackLock(tmp_path), pytest.raises(AlreadyRunning) as refused, StackLock(tmp_path):
        pass

    assert f"pid {os.getpid()}" in str(refused.value)
    assert "pdtasks down" in str(refused.value)


def test_the_lock_is_free_again_afterwards(tmp_path: Path) -> None:
    with StackLock(tmp_path):
        pass
    with StackLock(tmp_path):
        pass


# -- what a killed supervisor left -----------------------------------------------------------------


def test_left_processes_are_ended_with_all_they_started(tmp_path: Path) -> None:
    # Given a child that has a child of its own, as a worker has vLLM's engine
    note = tmp_path / "grandchild"
    parent = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)']); "
        f"open({str(note)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    home = tmp_path / "home"
    home.mkdir()
    marker = dict([home_marker(home).split("=", 1)])
    process = Process("bus", [sys.executable, "-c", parent], env=marker, log=tmp_path / "log")
    process.start()
    grandchild = identify(int(_wait_for(note)))
    assert grandchild is not None
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    write_stack(home, _stack(_gone(), _member(process), folders=(str(sockets),)))

    # When the next supervisor cleans up
    left = clean_stale(home)

    # Then nothing of it is there any more
    assert left == ["bus"]
    assert not process.running
    assert not grandchild.alive()
    assert not sockets.exists()
    assert read_stack(home) is None


def test_what_a_dead_child_left_behind_is_ended_too(tmp_path: Path) -> None:
    # Given a child that was killed, and its own child that lives on in the same session
    note = tmp_path / "grandchild"
    parent = (
        "import os, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)']); "
        f"open({str(note)!r}, 'w').write(str(child.pid)); os.kill(os.getpid(), 9)"
    )
    environment = dict([home_marker(tmp_path).split("=", 1)])
    child = subprocess.Popen(
        [sys.executable, "-c", parent], env=environment, start_new_session=True
    )
    started = identify(child.pid)
    grandchild = identify(int(_wait_for(note)))
    child.wait()
    assert started is not None
    assert grandchild is not None
    member = Member("decode1", "decode", started.pid, started.started, "")
    write_stack(tmp_path, _stack(_gone(), member))

    # When
    clean_stale(tmp_path)

    # Then
    assert not grandchild.alive()


def test_a_pid_that_names_another_process_by_now_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(_SLEEP) as stranger:
        try:
            member = Member("bus", "bus", stranger.pid, 12345, "")
            write_stack(tmp_path, _stack(_gone(), member))

            assert clean_stale(tmp_path) == []
            assert stranger.poll() is None
        finally:
            stranger.kill()


# -- one child -------------------------------------------------------------------------------------


def test_a_child_ends_with_all_it_started(tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    parent = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)'], start_new_session=True); "
        f"open({str(note)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    process = Process("p", [sys.executable, "-c", parent], env={}, log=tmp_path / "log")
    process.start()
    grandchild = identify(int(_wait_for(note)))
    assert grandchild is not None

    process.kill()

    assert process.poll() == -9
    assert not grandchild.alive()


def test_a_process_that_cannot_be_killed_is_waited_for_no_longer_than_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a process of a child's session that the kernel does not let go of
    process = Process("p", [sys.executable, "-c", ""], env={}, log=tmp_path / "log")
    process.start()
    monkeypatch.setattr(process_module, "_session_members", lambda _session: [_own()])
    monkeypatch.setattr(process_module, "_signal", lambda _identity, _number: None)
    monkeypatch.setattr(process_module, "_KILL_S", 0.2)

    # When
    began = time.monotonic()
    _wait_for_exit(process)

    # Then
    assert process.poll() == 0
    assert time.monotonic() - began < 5


def test_a_log_does_not_grow_for_ever_and_its_child_goes_on_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a child that writes and writes
    monkeypatch.setattr(process_module, "MOST_LOGGED", 100_000)
    # (What is written while its log is cut may be lost: its last line comes when nobody cuts.)
    written, may_end = tmp_path / "written", tmp_path / "may end"
    code = (
        "import pathlib, time\n"
        "for n in range(30_000): print(f'line {n:05d}', flush=True)\n"
        f"pathlib.Path({str(written)!r}).touch()\n"
        f"while not pathlib.Path({str(may_end)!r}).exists(): time.sleep(0.01)\n"
        "print('line 29999 was not the last', flush=True)"
    )
    process = Process("p", [sys.executable, "-c", code], env={}, log=tmp_path / "p.log")

    process.start()
    largest = 0
    while process.running and not written.exists():
        largest = max(largest, process.log.stat().st_size)
        process.bound_log()
    may_end.touch()
    wait_until(lambda: not process.running)
    process.bound_log()

    # Then neither file is much larger than it may be, and the end is there
    assert largest < 2_000_000
    assert (tmp_path / "p.log.1").stat().st_size > 100_000
    assert process.log.stat().st_size < 2_000_000
    both = (tmp_path / "p.log.1").read_text() + process.log.read_text()
    assert both.endswith("line 29999 was not the last\n")
    assert process.poll() == 0


def test_a_child_that_ignores_sigterm_is_killed_at_the_deadline(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('up', flush=True); time.sleep(60)"
    )
    process = Process("p", [sys.executable, "-c", stubborn], env={}, log=tmp_path / "log")
    process.start()
    _wait_for(tmp_path / "log")

    assert process.stop(deadline_s=0.2) == -9


def test_a_child_does_not_outlive_a_killed_supervisor(tmp_path: Path) -> None:
    # Given a supervisor in a process of its own, with a child
    note = tmp_path / "child"
    supervisor = (
        "import sys, time; from pathlib import Path; from pdtasks.cluster.process import Process; "
        f"p = Process('p', {_SLEEP!r}, env={{}}, log=Path({str(tmp_path / 'log')!r})); p.start(); "
        f"open({str(note)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", supervisor], env={**os.environ, "PYTHONPATH": root}
    ) as parent:
        child = identify(int(_wait_for(note)))
        assert child is not None

        # When
        parent.kill()
        parent.wait()

    # Then
    deadline = time.monotonic() + 10
    while child.alive():
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    process = Process("flower", ["/nowhere/flower"], env={}, log=tmp_path / "log")

    with pytest.raises(StartFailed, match="flower: the program /nowhere/flower is not there"):
        process.start()


def test_a_failure_shows_the_last_lines_of_this_start_and_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a line of the start before\n")
    process = Process("p", [sys.executable, "-c", "print('no room')"], env={}, log=log)
    process.start()
    _wait_for_exit(process)

    message = str(process.failure("stopped"))

    assert message == f"p stopped. Its log is {log}:\n    no room"


def test_an_input_reaches_the_child_and_not_its_command_line(tmp_path: Path) -> None:
    process = Process(
        "p",
        [sys.executable, "-c", "import sys; print(sys.stdin.read().upper(), flush=True)"],
        env={},
        log=tmp_path / "log",
        stdin="secret",
    )
    process.start()

    _wait_for_exit(process)
    assert (tmp_path / "log").read_text() == "SECRET\n"


def test_an_exit_is_described_in_words() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-9) == "signal SIGKILL"


# -- passwords -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://user:pa:ss@host:5672/vhost", "amqp://user:***@host:5672/vhost"),
        ("valkey://:pw@127.0.0.1:1/0", "valkey://:***@127.0.0.1:1/0"),
        ("unix://u:pw@/run/kv.sock?db=0", "unix://u:***@/run/kv.sock?db=0"),
        ("unix:///run/kv.sock?db=0&password=pw", "unix:///run/kv.sock?db=0&password=***"),
        ("valkeys://u:a@h:1/0?ssl_password=b", "valkeys://u:***@h:1/0?ssl_password=***"),
        ("valkey://:a@h:1,valkey://:b@h:2", "valkey://:***@h:1,valkey://:***@h:2"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("amqp://host:5672//", "amqp://host:5672//"),
    ],
)
def test_passwords_in_urls_are_not_shown(url: str, shown: str) -> None:
    assert redact(url) == shown
