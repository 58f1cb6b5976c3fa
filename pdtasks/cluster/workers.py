"""What do `pdtasks restart` and `pdtasks drain` do? Workers of the running stack stop, in turn.

Each is asked to stop: it takes nothing more, and what it has begun goes to another worker of its
stage where there is one, or is finished.  After a restart the supervisor starts it at once, and
the next one's turn comes when it is ready; a drained one stays away until `restart` names it: a
file with its name says so to the supervisor.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence

from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import wait_until
from pdtasks.cluster.status import Status, read_status
from pdtasks.drained import Drained
from pdtasks.errors import PdtasksError
from pdtasks.naming import ROLES, stages_of
from pdtasks.running_stack import Member, read_stack
from pdtasks.settings import Settings

#: Seconds from the request to stop until its successor is ready: a drain, and a start that captures
#: CUDA graphs.
_DEADLINE_S = 900.0
#: Seconds beyond `drain_timeout_s`: an engine needs a moment to end.
_GRACE_S = 15.0

Ask = Callable[[Settings], Status]


def restart_workers(
    settings: Settings, names: Sequence[str], console: Console, *, ask: Ask = read_status
) -> int:
    """Restart the workers called `names`, all without one; returns the exit code.

    Raises PdtasksError for a name that is not there, or when nothing runs; UnreadableStack.
    """
    workers = _workers(settings, names)
    for name in names or workers:
        if not _restart(settings, workers[name], console, ask):
            return 1
    return 0


def drain_workers(
    settings: Settings, names: Sequence[str], console: Console, *, ask: Ask = read_status
) -> int:
    """Stop the workers called `names`, which stay away; returns the exit code. Raises likewise."""
    workers = _workers(settings, names)
    for name in names:
        if not _drain(settings, workers[name], console, ask):
            return 1
    return 0


def _workers(settings: Settings, names: Sequence[str]) -> dict[str, Member]:
    stack = read_stack(settings.home)
    if stack is None or not stack.supervisor.alive():
        raise PdtasksError("nothing runs here: start a stack with `pdtasks up`")
    workers = {m.name: m for m in stack.services if m.role in ROLES}
    for name in names:
        if name not in workers:
            raise PdtasksError(f"no worker is called {name!r}, only {', '.join(workers)}")
    return workers


def _ask_to_stop(
    settings: Settings, member: Member, console: Console, ask: Ask, until: str
) -> None:
    workers = ask(settings).workers
    # (It may have another one by now than it was started with.)
    role = next((w.role for w in workers if w.pid == member.pid), member.role)
    others = [w for w in workers if w.pid != member.pid and w.state == "ready"]
    for stage in stages_of(role):
        if not any(stage in stages_of(other.role) for other in others):
            console.warn(
                f"{member.name} is the only {stage} worker: it finishes what it has, and new "
                f"requests are refused until {until}"
            )
    if member.identity.alive():
        os.kill(member.pid, signal.SIGTERM)


def _drain(settings: Settings, member: Member, console: Console, ask: Ask) -> bool:
    Drained(settings.home).add(member.name)
    began = time.monotonic()
    _ask_to_stop(settings, member, console, ask, f"`pdtasks restart {member.name}`")

    def is_gone() -> bool:
        console.progress(f"{time.monotonic() - began:4.0f} s  {member.name} stops")
        return not member.identity.alive()

    if not wait_until(is_gone, settings.drain_timeout_s + _GRACE_S):
        console.bad(
            f"{member.name} still runs after {time.monotonic() - began:.0f} s: see `pdtasks status`"
        )
        return False
    console.good(
        f"{member.name} has stopped after {time.monotonic() - began:.0f} s, and stays away until "
        f"`pdtasks restart {member.name}`"
    )
    return True


def _restart(settings: Settings, member: Member, console: Console, ask: Ask) -> bool:
    began = time.monotonic()
    _ask_to_stop(settings, member, console, ask, "it is back")
    Drained(settings.home).discard(member.name)

    def is_back() -> bool:
        # Other hosts may have workers of this name; one that has said nothing yet has no host.
        names = (member.name, f"{member.name}@{socket.gethostname()}")
        rows = [w for w in ask(settings).workers if w.name in names]
        state = rows[0].state if rows else "away"
        console.progress(f"{time.monotonic() - began:4.0f} s  {member.name}: {state}")
        return any(w.pid != member.pid and w.state == "ready" for w in rows)

    if not wait_until(is_back, _DEADLINE_S):
        console.bad(f"{member.name} is not back after {_DEADLINE_S:.0f} s: see `pdtasks status`")
        return False
    console.good(f"{member.name} is back after {time.monotonic() - began:.0f} s")
    return True
