"""What does `pdtasks down` do? Ask the supervisor of the running stack to stop, and wait for it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import wait_until
from pdtasks.cluster.stack import StackLock, clean_stale
from pdtasks.running_stack import read_stack

#: Draining API and workers may take two drain timeouts; longer than any sensible one.
_DEADLINE_S = 600.0


def stop_stack(home: Path, console: Console) -> int:
    """Stop the stack of `home`; returns the exit code, 0 as well when nothing runs.

    Raises UnreadableStack, and AlreadyRunning when a new stack is just being started.
    """
    stack = read_stack(home)
    if stack is None:
        console.line("nothing runs here")
        return 0
    if not stack.supervisor.alive():
        with StackLock(home):
            for name in clean_stale(home):
                console.line(f"ended {name}, left behind by a stack that was killed")
        console.good("cleaned up")
        return 0

    os.kill(stack.pid, signal.SIGTERM)
    console.line(f"stopping the stack (pid {stack.pid})")
    began = time.monotonic()
    left = [member for member in stack.services if member.identity.alive()]

    def stopped() -> bool:
        for member in list(left):
            if not member.identity.alive():
                left.remove(member)
                console.line(f"  {member.name} stopped")
        # The supervisor, which is no member, ends after them all.
        names = ", ".join(member.name for member in left) or "the supervisor"
        console.progress(f"{time.monotonic() - began:4.0f} s  waiting for {names}")
        return not stack.supervisor.alive()

    if not wait_until(stopped, _DEADLINE_S):
        console.bad(f"pid {stack.pid} did not stop; `pdtasks down` again stops it at once")
        return 1
    console.good("stopped")
    return 0
