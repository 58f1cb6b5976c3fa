"""What does `pdtasks role` do? It tells a worker which stages to serve, and waits until it does."""

from __future__ import annotations

import time

import valkey

from pdtasks.bus.connection import BUS_ERRORS, connect
from pdtasks.bus.orders import order_role
from pdtasks.bus.presence import read_workers
from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import wait_until
from pdtasks.errors import PdtasksError
from pdtasks.messages import WorkerStatus
from pdtasks.roles import why_not, worker_called
from pdtasks.settings import Settings

#: Seconds beyond the longest request that a worker may have begun.
_GRACE_S = 15.0
#: Seconds in which a worker hears of it, if nobody has ordered something else meanwhile.
_HEARS_S = 30.0


def change_role(settings: Settings, name: str, role: str, console: Console, *, force: bool) -> int:
    """Have the worker called `name` take `role`; returns the exit code.

    Args:
        force: also where that leaves a stage without a worker.

    Raises UnknownWorker, PdtasksError when it had better not or nobody can tell it.
    """
    try:
        with connect(settings) as bus:
            return _change(bus, settings, name, role, console, force=force)
    except BUS_ERRORS as exc:
        raise PdtasksError(
            f"the bus cannot be reached ({type(exc).__name__}): does the stack run?"
        ) from None


def _change(
    bus: valkey.Valkey, settings: Settings, name: str, role: str, console: Console, *, force: bool
) -> int:
    known = read_workers(bus)
    worker = worker_called(name, known)
    if why := why_not(worker, role, known):
        if not force:
            raise PdtasksError(f"{why}; --force does it all the same")
        console.warn(why)
    began = time.monotonic()
    order_role(bus, worker, role)

    def now() -> WorkerStatus | None:
        return next((w for w in read_workers(bus) if w.process == worker.process), None)

    def is_done() -> bool:
        found = now()
        state = "away" if found is None else f"{found.role}, {found.state}; {found.active} requests"
        console.progress(f"{time.monotonic() - began:4.0f} s  {worker.name}: {state}")
        if found is None or (found.role, found.state) == (role, "ready"):
            return True
        return found.state == "ready" and time.monotonic() > began + _HEARS_S

    in_time = wait_until(is_done, settings.request_timeout_s + _GRACE_S)
    if (found := now()) is None:
        console.bad(f"{worker.name} has gone: see `pdtasks status`")
        return 1
    if in_time and found.role != role:
        console.bad(f"{worker.name} serves {found.role}: somebody else has ordered that")
        return 1
    if not in_time:
        console.bad(f"{worker.name} still ends what it has begun: see `pdtasks status`")
        return 1
    console.good(f"{worker.name} serves {role} after {time.monotonic() - began:.1f} s")
    return 0
