"""Which stack runs on this host, if one does? The one reader of `<home>/stack.json`.

`pdtasks up` writes it (`cluster/stack.py`).  A file outlives a supervisor that was killed: what it
says holds only while that very process is there.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pdtasks.errors import PdtasksError

Role = Literal["broker", "bus", "kv", "api", "flower", "balancer", "prefill", "decode"]
#: What the supervisor does: `starting`, then `ready`, then `draining` until it is gone.
StackState = Literal["starting", "ready", "draining"]

VERSION: Final = 1


class UnreadableStack(PdtasksError):
    """The stack's file is damaged or of another version."""


@dataclass(frozen=True)
class Identity:
    """One process for ever: its pid and when the kernel started it (clock ticks since boot)."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Does this very process still run?"""
        return identify(self.pid) == self


def place() -> str:
    """Whose pids are they that this process sees? Differs between kernels and pid namespaces.

    Empty where the system does not tell: then nobody else's are the same.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def identify(pid: int) -> Identity | None:
    """The identity of the process that has `pid` now; None if there is none, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name is in parentheses and may contain anything, parentheses too.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else Identity(pid, int(fields[19]))


@dataclass(frozen=True)
class Member:
    """One process of the stack."""

    name: str
    role: str
    pid: int
    pid_started: int
    log: str

    @property
    def identity(self) -> Identity:
        """The process that this entry means, and no other."""
        return Identity(self.pid, self.pid_started)


@dataclass(frozen=True)
class Stack:
    """The content of `stack.json`."""

    pid: int
    pid_started: int
    state: StackState = "starting"
    env: dict[str, str] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)
    operator_urls: dict[str, str] = field(default_factory=dict)  #: by role; for a person
    services: tuple[Member, ...] = ()
    #: Processes and folders outside home that belong to a service but are none (epmd, sockets).
    helpers: tuple[Member, ...] = ()
    folders: tuple[str, ...] = ()

    @property
    def supervisor(self) -> Identity:
        """The process that runs this stack."""
        return Identity(self.pid, self.pid_started)


def stack_path(home: Path) -> Path:
    """Where the stack of `home` is described."""
    return home / "stack.json"


def read_stack(home: Path) -> Stack | None:
    """The stack described in `home`, alive or not; None when there is none.

    Raises UnreadableStack.
    """
    path = stack_path(home)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content.pop("version") != VERSION:
            raise UnreadableStack(
                f"{path} was written by another version of pdtasks: stop that stack with the "
                "version that started it, or remove the file when nothing of it runs"
            )
        for key in ("services", "helpers"):
            content[key] = tuple(Member(**member) for member in content[key])
        content["folders"] = tuple(content["folders"])
        return Stack(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UnreadableStack(
            f"{path} cannot be read ({exc}): remove it when nothing of that stack runs"
        ) from exc


def running_stack(home: Path) -> Stack | None:
    """The stack whose supervisor is alive; None when nothing runs. Raises UnreadableStack."""
    stack = read_stack(home)
    return stack if stack is not None and stack.supervisor.alive() else None
