"""How is one child process started, recognised and ended?

`Process` runs a command in a session of its own, with its output in a log file::

    process = Process("valkey-kv", argv, env=env, log=home / "logs" / "valkey-kv.log")
    process.start()
    process.identity          # pid and kernel start time: unique, unlike the pid alone
    process.poll()            # None while it runs, else the exit code
    process.log_tail()        # the last lines it said
    process.stop(deadline_s=20)

Its own session means that Ctrl-C in the terminal reaches the supervisor only, which then stops
the parts in order.  `stop` signals the one process, never the group: vLLM's engine process would
otherwise go down while Celery still drains.  What is left in the session after that is killed.

When the supervisor is killed, the kernel sends SIGTERM to each child (PR_SET_PDEATHSIG).  The
kernel means the *thread* that called `start`: call it from one that lives as long as the child.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from pdtasks.cluster.probes import Tick, wait_until
from pdtasks.errors import PdtasksError
from pdtasks.running_stack import Identity, identify

#: Bytes of a child's log, beyond which it begins anew.
MOST_LOGGED = 32 * 2**20
_KILL_S = 10.0  # a killed process can take a moment to give back its memory
# Runs before the command, in its process: a fresh interpreter and exec instead of `preexec_fn`,
# which runs Python after a fork and can deadlock when the parent has threads.
_PRELUDE = """\
import ctypes, os, signal, sys
parent, argv = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    sys.exit("the supervisor went away before the start")
try:
    os.execvp(argv[0], argv)
except OSError as exc:
    sys.exit(f"cannot run {argv[0]}: {exc.strerror}")
"""


class StartFailed(PdtasksError):
    """A service or worker did not start; the message says why and where its log is."""


def end(
    leaders: Iterable[Identity], marker: str, deadline_s: float, tick: Tick | None = None
) -> None:
    """End children of a supervisor that died, and whatever they started.

    A pid that names another process by now is left alone. `marker` is a line in the environment
    of each child: it tells what a dead one left behind from a stranger.
    """
    leaders = list(leaders)
    ours = [leader for leader in leaders if leader.alive()]
    rest = [d for leader in ours for d in _descendants(leader.pid)]
    for leader in ours:
        _signal(leader, signal.SIGTERM)
    wait_until(lambda: not any(leader.alive() for leader in ours), deadline_s, tick)
    for leader in leaders:
        rest += [m for m in _session_members(leader.pid) if _has_variable(m.pid, marker)]
    for identity in [*ours, *rest]:
        _signal(identity, signal.SIGKILL)
    wait_until(lambda: not any(i.alive() for i in [*ours, *rest]), _KILL_S)


def kill_session(session: int) -> None:
    """SIGKILL every process of a session that one of our children led.

    One that the kernel does not let go (a hung disk or device) is left to it after a while.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)  # one step for the kernel: nobody can fork away
    # Then those who made a group of their own, until none is found.
    until = time.monotonic() + _KILL_S
    while (members := _session_members(session)) and time.monotonic() < until:
        for identity in members:
            _signal(identity, signal.SIGKILL)
        time.sleep(0.01)


class Child(Protocol):
    """What `Process` needs of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def wait(self) -> int: ...


class Process:
    """One supervised child."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        stdin: str | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Args:
        name: for messages.
        argv: the command. Secrets belong into `env` or `stdin`: everybody can see this one.
        env: the whole environment.
        log: where output goes, appended; only its owner can read it.
        stdin: what the child reads from standard input (up to 64 KiB); None: nothing.
        """
        self.name = name
        self.log = log
        self._argv = list(argv)
        self._env = dict(env)
        self._stdin = stdin
        self._cwd = cwd
        self._child: Child | None = None
        self._identity: Identity | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        """The pid of the last start."""
        return self.identity.pid

    @property
    def identity(self) -> Identity:
        """Pid and start time of the last start."""
        if self._identity is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._identity

    @property
    def running(self) -> bool:
        """Is it there?"""
        return self._child is not None and self.poll() is None

    def start(self) -> None:
        """Start the command. Raises StartFailed when it is not there."""
        if self.running:
            raise RuntimeError(f"{self.name} already runs")
        if shutil.which(self._argv[0], path=self._env.get("PATH")) is None:
            raise StartFailed(f"{self.name}: the program {self._argv[0]} is not there")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._log_start = os.fstat(log).st_size
            self._child = self._spawn(log)
        finally:
            os.close(log)
        # (None: it is gone already. No process has started at tick 0, so this matches nobody.)
        self._identity = identify(self._child.pid) or Identity(self._child.pid, 0)

    def _spawn(self, log: int) -> Child:
        child = subprocess.Popen(
            [sys.executable, "-ISc", _PRELUDE, str(os.getpid()), *self._argv],
            env=self._env,
            cwd=self._cwd,
            stdin=subprocess.DEVNULL if self._stdin is None else subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        if self._stdin is not None and child.stdin is not None:
            with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
                pipe.write(self._stdin.encode())
        return child

    def poll(self) -> int | None:
        """None while it runs, else the exit code (negative: the signal that ended it).

        Nothing that the process started outlives it.
        """
        if self._child is None:
            return None
        if self._child.returncode is None and self._exited():
            # Before the pid is given back, after which it could name somebody else's session.
            kill_session(self._child.pid)
            self._child.wait()
        return self._child.returncode

    def _exited(self) -> bool:
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, how) is not None

    def request_stop(self) -> None:
        """SIGTERM to the process alone, not to its children."""
        self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone; harmless when it is gone."""
        if self.running:
            os.kill(self.pid, number)

    def stop(self, deadline_s: float, tick: Tick | None = None) -> int | None:
        """SIGTERM, then SIGKILL at the deadline. Returns the exit code."""
        self.request_stop()
        try:
            wait_until(lambda: not self.running, deadline_s, tick)
        finally:
            self.kill()
        return self.poll()

    def kill(self) -> None:
        """End the process and everything it started, at once; harmless when it is gone."""
        if self.running:
            descendants = _descendants(self.pid)  # those with a session of their own, too
            os.kill(self.pid, signal.SIGKILL)
            for identity in descendants:
                _signal(identity, signal.SIGKILL)
            wait_until(
                lambda: not self.running and not any(d.alive() for d in descendants), _KILL_S
            )

    def log_tail(self, lines: int = 15) -> str:
        """The last lines that this start wrote."""
        try:
            with self.log.open("rb") as log:
                size = os.fstat(log.fileno()).st_size
                log.seek(max(self._log_start, size - 65536))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def bound_log(self) -> None:
        """Keep the log, and with it the disk, from growing for ever. Call it now and then.

        Its last part stays as `*.log.1`.  The child goes on writing into the same file.
        """
        with contextlib.suppress(OSError):
            if self.log.stat().st_size <= MOST_LOGGED:
                return
            # (A line between copy and cut is lost: better than a child that has to reopen it.)
            shutil.copyfile(self.log, self.log.with_name(self.log.name + ".1"))
            os.truncate(self.log, 0)
            self._log_start = 0

    def failure(self, problem: str, lines: str | None = None) -> StartFailed:
        """An error that says `problem`, where the log is, and its telling `lines` (the last)."""
        lines = self.log_tail() if lines is None else lines
        shown = "".join(f"\n    {line}" for line in lines.splitlines())
        return StartFailed(f"{self.name} {problem}. Its log is {self.log}{shown and ':'}{shown}")


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _session_members(session: int) -> list[Identity]:
    members = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.getsid(int(name)) == session and (found := identify(int(name))):
                    members.append(found)
    return members


def _has_variable(pid: int, line: str) -> bool:
    try:
        return line.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _descendants(pid: int) -> list[Identity]:
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    found = (identify(child.pid) for child in children)
    return [identity for identity in found if identity is not None]


def _signal(identity: Identity, number: signal.Signals) -> None:
    if identity.alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(identity.pid, number)
