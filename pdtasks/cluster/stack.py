"""What does the running stack consist of, and whose is it?

`<home>/stack.json` is written by the supervisor at each change and removed at a clean stop.  It
holds the processes (with start times, for a pid alone may name another process by now), the URLs
and the `PDTASKS_*` variables that let a worker started by hand join.  URLs contain passwords, so
only the owner can read the file, and `redact` takes them out of everything that is shown.  URLs
with more rights than the stack itself needs (`operator_urls`) are in the file and nowhere else: no
child gets them, and `status` does not show them.

A lock held by the supervisor decides whether a stack runs; the kernel frees it when the supervisor
dies.  What such a stack left behind is ended by the next `up` (`clean_stale`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pdtasks.cluster.probes import Tick
from pdtasks.cluster.process import Process, end
from pdtasks.errors import PdtasksError
from pdtasks.running_stack import (
    VERSION,
    Member,
    Stack,
    StackState,
    identify,
    read_stack,
    stack_path,
)

_STOP_S = 40.0


class AlreadyRunning(PdtasksError):
    """Another supervisor runs a stack in this home."""


def member_of(process: Process, role: str) -> Member:
    """The last start of `process`, which has been started."""
    identity = process.identity
    return Member(process.name, role, identity.pid, identity.started, str(process.log))


def write_stack(home: Path, stack: Stack) -> None:
    """Replace the stack's file in one step, readable by its owner only."""
    with tempfile.NamedTemporaryFile(  # mode 0600
        "w", dir=home, prefix=".stack-", suffix=".json", delete=False
    ) as file:
        try:
            json.dump({"version": VERSION} | asdict(stack), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, stack_path(home))
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def remove_stack(home: Path) -> None:
    """Forget the stack: it has stopped."""
    stack_path(home).unlink(missing_ok=True)


class StackRecord:
    """Keeps `stack.json` true for the stack that this process runs."""

    def __init__(self, home: Path) -> None:
        own = identify(os.getpid())
        assert own is not None, "this process runs"
        self._home = home
        self._stack = Stack(pid=own.pid, pid_started=own.started)
        self._written: Stack | None = None

    def update(
        self,
        *,
        state: StackState,
        env: Mapping[str, str],
        urls: Mapping[str, str],
        operator_urls: Mapping[str, str],
        services: Iterable[Member],
        helpers: Iterable[Member],
        folders: Iterable[Path],
    ) -> None:
        """What is true now; written only when something changed, so call it at any time."""
        stack = replace(
            self._stack,
            state=state,
            env=dict(env),
            urls=dict(urls),
            operator_urls=dict(operator_urls),
            services=tuple(services),
            helpers=tuple(helpers),
            folders=tuple(map(str, folders)),
        )
        if stack != self._written:
            write_stack(self._home, stack)
            self._written = stack

    def remove(self) -> None:
        """The stack has stopped."""
        remove_stack(self._home)


def clean_stale(home: Path, tick: Tick | None = None) -> list[str]:
    """End what a dead supervisor left behind; returns the names of what still ran.

    Call it with the lock held: then no supervisor is alive. Raises UnreadableStack.
    """
    stack = read_stack(home)
    if stack is None:
        return []
    members = [*stack.services, *stack.helpers]
    left = [m.name for m in members if m.identity.alive()]
    end([m.identity for m in members], home_marker(home), _STOP_S, tick)
    for folder in stack.folders:
        shutil.rmtree(folder, ignore_errors=True)
    remove_stack(home)
    return left


def home_marker(home: Path) -> str:
    """The line in the environment of every process that the stack of `home` starts."""
    return f"PDTASKS_HOME={home}"


class StackLock:
    """Held by the one supervisor of a home::

    with StackLock(home):   # raises AlreadyRunning, naming the pid and how to stop it
        ...
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._file: int | None = None

    def __enter__(self) -> Self:
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._home / "lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 32).decode().strip() or "?"
            os.close(file)
            raise AlreadyRunning(
                f"a stack already runs here (pid {holder}, home {self._home}): "
                "stop it with `pdtasks down`, or choose another PDTASKS_HOME"
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None


# user:password@, where the password may hold anything but "@" and "/"; also ?password=… (ssl_ too)
_PASSWORD = re.compile(r"(?P<start>[a-z][a-z0-9+.-]*://[^:/@\s]*:)[^@/\s]+(?=@)", re.IGNORECASE)
_QUERY_PASSWORD = re.compile(r"(?P<start>[?&](?:ssl_)?password=)[^&\s]+", re.IGNORECASE)


def redact(text: str) -> str:
    """`text` with every password in a URL replaced by ***."""
    text = _PASSWORD.sub(r"\g<start>***", text)
    return _QUERY_PASSWORD.sub(r"\g<start>***", text)
