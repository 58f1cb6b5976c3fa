"""Is this worker's name its own? Two of one name are one to everybody else.

Its sign of life on the bus is its claim.  Whoever finds another process's there asks whether that
one lives: on the same host the kernel knows; of another host's the sign of life tells, which is
given again long before it would expire.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime

import valkey

from pdtasks.bus.presence import Holder, leave_status
from pdtasks.errors import PdtasksError
from pdtasks.messages import WorkerStatus
from pdtasks.running_stack import Identity, identify

#: Seconds by which the bus's clock and ours may have gone apart within a sign of life.
_MARGIN_S = 0.5


class NameTaken(PdtasksError):
    """Another worker that lives has this one's name."""


class Name:
    """One worker's claim to its name. For one thread at a time."""

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`ttl_s`: how long a claim holds that is not renewed."""
        self._ttl_ms = int(ttl_s * 1000)
        self._clock = clock
        self._rival: tuple[str, str, int, int] | None = None
        self._expires_by = 0.0  # at the latest, what the rival had said when it was seen first

    def renew(self, bus: valkey.Valkey, status: WorkerStatus) -> Holder | None:
        """Leave `status` on the bus. Returns who may still have its name: try again soon.

        Raises NameTaken when another one lives, and valkey.ValkeyError.
        """
        asked_at = self._clock()

        def sees(other: WorkerStatus) -> bool:
            return bool(other.place) and other.place == status.place

        holder = leave_status(bus, status, self._ttl_ms, lambda o: sees(o) and _is_gone(o))
        if holder is None:
            self._rival = None
            return None
        other = holder.status
        if self._rival != other.process:
            self._rival = other.process
            self._expires_by = self._clock() + holder.ttl_s
        elif asked_at + holder.ttl_s > self._expires_by + _MARGIN_S:
            raise _taken(other)  # it has said so again since
        if sees(other):
            raise _taken(other)
        return holder


def _is_gone(other: WorkerStatus) -> bool:
    """For a process whose pid means here what it means there."""
    found = identify(other.pid)
    if found is not None:
        return found != Identity(other.pid, other.pid_started)
    try:
        os.kill(other.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # of another user, whose processes this system may hide
    return True  # dead, and nobody has asked how it ended


def _taken(other: WorkerStatus) -> NameTaken:
    since = datetime.fromtimestamp(other.since).astimezone().isoformat(" ", "seconds")
    return NameTaken(
        f"a worker named {other.name} runs already ({other.role}, {other.state}, on host "
        f"{other.host}, pid {other.pid}, since {since}): give this one another name with "
        "`-n other@%h`"
    )
