"""Workers, API, Flower and balancer: children that are watched, and restarted when they end.

A part is ready when it answers, not when it runs.  One that ends by itself after the start is
started again, later and later as long as it keeps failing.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import valkey

from pdtasks.bus.presence import read_workers
from pdtasks.cluster.console import Console
from pdtasks.cluster.probes import Tick, http_status, valkey_takes_writes
from pdtasks.cluster.process import Process, describe_exit
from pdtasks.cluster.stack import member_of
from pdtasks.cluster.steps import step_of
from pdtasks.messages import WorkerStatus
from pdtasks.naming import ROLES
from pdtasks.running_stack import Member
from pdtasks.tls import valkey_url

#: Between two looks at all children.
LOOP_S = 0.2

_ASK_S = 1.0  # between two questions to the same part
_BACKOFF_MAX_S = 60.0
_STEADY_S = 60.0  # ready for so long: the next failure is a new one

#: Has a worker write all threads' stacks into its log (`pdtasks.worker.celery_worker`).
_STACKS_SIGNAL = signal.SIGUSR2
_STACKS_S = 2.0
_STACKS_PAUSE_S = 0.2  # of the log: they are complete
#: Silent for so long, a worker is dead or stands; just after a restart of the bus all are silent.
_SURELY_SILENT_S = 3.0

#: Lines of a log in which the step of a start is looked for.
_LOG_LINES = 1000


@dataclass
class Part:
    """One child that is restarted when it ends: a worker, the API, Flower, the balancer."""

    process: Process
    role: str
    where: str  #: for people
    ready_url: str | None = None  #: answers 200 when it is ready
    ready: bool = False
    started_at: float = 0.0
    ready_at: float = 0.0
    asked_at: float = 0.0
    failures: int = 0  #: in a row
    restart_at: float | None = None  #: waiting for it
    told: str = ""  #: the state that was told last
    ill_since: float | None = None  #: a worker that takes no jobs by its own fault

    @property
    def name(self) -> str:
        """As in messages and in the file name of its log."""
        return self.process.name

    @property
    def is_worker(self) -> bool:
        """Does it take jobs, and say so on the bus?"""
        return self.role in ROLES


class Parts:
    """All parts of one stack, in the order of their start."""

    def __init__(
        self,
        console: Console,
        bus_url: Callable[[], str],
        tick: Tick,
        record: Tick,
        *,
        stall_timeout_s: float,
        stays_away: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Args:
        bus_url: where workers show signs of life; asked once a part is waited for.
        stall_timeout_s: seconds after which a worker that takes no jobs is replaced.
        stays_away: is the worker of that name not to be started again?
        tick: called while something is waited for; may raise to give up.
        record: called when a process has begun or ended.
        """
        self._console = console
        self._bus_url = bus_url
        self._tick = tick
        self._record = record
        self._parts: list[Part] = []
        self._bus: valkey.Valkey | None = None
        self._stall_timeout_s = stall_timeout_s
        self._stays_away = stays_away
        self._presence: dict[int, WorkerStatus] = {}
        self._presence_at = 0.0
        self._bus_answers = False

    @property
    def any_started(self) -> bool:
        """Was at least one started?"""
        return bool(self._parts)

    def members(self) -> list[Member]:
        """Their last processes, for the record."""
        return [member_of(part.process, part.role) for part in self._parts]

    # -- start ------------------------------------------------------------------------------------

    def add(self, part: Part) -> None:
        """Start `part` and keep it. Raises StartFailed when its program is not there."""
        self._launch(part)
        self._parts.append(part)
        self._record()

    def _launch(self, part: Part) -> None:
        part.restart_at = None
        part.ready = False
        part.told = "starting"
        part.started_at = time.monotonic()
        part.process.start()

    def wait(self, deadline_s: float, check: Tick) -> None:
        """Wait until all are ready.

        Args:
            check: called in each round; raises when something they need is lost.

        Raises StartFailed when one ends or the time is over, or what `check` and `tick` raise.
        """
        began = time.monotonic()
        while waiting := [part for part in self._parts if not part.ready]:
            self._tick()
            check()
            for part in waiting:
                code = part.process.poll()
                if code is not None:
                    raise part.process.failure(f"stopped while it started ({describe_exit(code)})")
                self._ask(part)
            elapsed = time.monotonic() - began
            if elapsed > deadline_s:
                raise waiting[0].process.failure(f"was not ready within {deadline_s:.0f} s")
            steps = (f"{p.name}: {step_of(p.process.log_tail(_LOG_LINES))}" for p in waiting)
            self._console.progress(f"{elapsed:4.0f} s  {', '.join(steps)}")
            time.sleep(LOOP_S)

    def _ask(self, part: Part) -> None:
        """Is it ready now? Not more often than needed: it is busy starting."""
        now = time.monotonic()
        if now - part.asked_at < _ASK_S:
            return
        part.asked_at = now
        if self._is_ready(part):
            part.ready, part.ready_at, part.told = True, now, "ready"
            took = now - part.started_at
            self._console.good(f"{part.name} ready after {took:.0f} s ({part.where})")

    def _is_ready(self, part: Part) -> bool:
        if part.ready_url is not None:
            return http_status(part.ready_url) == 200
        if not part.is_worker:
            return part.process.running
        status = self._signs_of_life().get(part.process.pid)
        return status is not None and status.state == "ready"

    def _signs_of_life(self) -> dict[int, WorkerStatus]:
        """What the workers of this host say on the bus, by pid; asked once a second."""
        now = time.monotonic()
        if now - self._presence_at >= _ASK_S:
            self._presence_at = now
            if self._bus is None:
                self._bus = valkey.Valkey.from_url(valkey_url(self._bus_url()), socket_timeout=1)
            workers = [part for part in self._parts if part.is_worker]
            own = {part.process.pid for part in workers if part.process.running}
            self._bus_answers = False
            with contextlib.suppress(valkey.ValkeyError):
                here = socket.gethostname()
                statuses = [s for s in read_workers(self._bus) if s.host == here]
                self._presence = {s.pid: s for s in statuses if s.pid in own}
                # One that is full has no room for signs of life: nobody is silent of itself then.
                self._bus_answers = own <= set(self._presence) or valkey_takes_writes(self._bus)
        return self._presence

    # -- watch ------------------------------------------------------------------------------------

    def watch(self) -> None:
        """One round: start again what ended, tell what changed."""
        for part in self._parts:
            part.process.bound_log()
            self._watch(part)

    def _watch(self, part: Part) -> None:
        if part.restart_at is not None:
            if part.is_worker and self._stays_away(part.name):
                return
            # One that the kernel does not let go of yet (a hung device) is in its successor's way.
            if time.monotonic() >= part.restart_at and not part.process.running:
                self._console.line(f"restarting {part.name}")
                self._launch(part)
                self._record()
            return
        code = part.process.poll()
        if code == 0 and part.ready and part.is_worker:
            # Asked to by somebody, and done in order: no failure.
            self._console.line(f"{part.name} was stopped")
            part.restart_at, part.ready, part.ill_since = time.monotonic(), False, None
        elif code is not None:
            self._restart_later(part, f"ended by itself ({describe_exit(code)})")
        elif not part.ready:
            self._ask(part)
        elif part.is_worker:
            self._watch_worker(part)

    def _restart_later(self, part: Part, why: str) -> None:
        now = time.monotonic()
        if part.ready and now - part.ready_at > _STEADY_S:
            part.failures = 0
        wait_s = min(2.0**part.failures, _BACKOFF_MAX_S)
        part.failures += 1
        part.restart_at = now + wait_s
        part.ready = False
        part.ill_since = None
        self._console.bad(
            f"{part.name} {why}, starting again in {wait_s:.0f} s. Its log is {part.process.log}"
        )
        self._record()

    def _watch_worker(self, part: Part) -> None:
        status = self._signs_of_life().get(part.process.pid)
        if not self._bus_answers:
            part.ill_since = None  # it proves nothing
            return
        said = _said(status, part.role)
        if _without_counts(said) != _without_counts(part.told):
            self._console.line(f"{part.name}: {part.told} → {said}")
        part.told = said
        if not _is_ill(status):
            part.ill_since = None
            return
        now = time.monotonic()
        part.ill_since = part.ill_since or now
        if now - part.ill_since > self._stall_timeout_s:
            self._replace(part, said)

    def _replace(self, part: Part, said: str) -> None:
        """End a worker that holds jobs and does none; where it stood is in its log."""
        self._console.line(f"{part.name} takes no jobs ({said}): its stacks go to its log")
        begun, size = False, _size(part.process.log)
        part.process.signal(_STACKS_SIGNAL)
        until = time.monotonic() + _STACKS_S
        # One that is stopped or hangs in the kernel writes none.
        while time.monotonic() < until:
            time.sleep(_STACKS_PAUSE_S)
            before, size = size, _size(part.process.log)
            begun = begun or size > before
            if begun and size == before:
                break
        part.process.kill()
        self._restart_later(part, f"was ended: {said}")

    # -- stop -------------------------------------------------------------------------------------

    def request_stop(self, *roles: str) -> None:
        """Ask those with one of `roles` to end, and do not wait."""
        for part in self._of(roles):
            part.process.request_stop()

    def stop(self, *roles: str, deadline_s: float) -> None:
        """End those with one of `roles`; killed after the deadline. Raises what `tick` raises."""
        for part in self._of(roles):
            if part.is_worker and part.ready and (said := self._surely_ill(part)):
                # It would neither hear of the stop nor finish anything.
                self._console.warn(f"{part.name} takes no jobs ({said}): ended")
                part.process.kill()
        self.request_stop(*roles)
        left = [part for part in self._of(roles) if part.process.running]
        began = time.monotonic()
        while left:
            self._tick()
            for part in list(left):
                if not part.process.running:
                    left.remove(part)
                    self._console.line(f"  {part.name} stopped")
            elapsed = time.monotonic() - began
            if elapsed > deadline_s:
                for part in left:
                    part.process.kill()
                    self._console.warn(f"{part.name} did not stop in {deadline_s:.0f} s: killed")
                return
            if left:
                names = ", ".join(part.name for part in left)
                self._console.progress(f"{elapsed:4.0f} s  draining {names}")
            time.sleep(LOOP_S)

    def _surely_ill(self, part: Part) -> str | None:
        """What a worker says that takes no jobs by its own fault; None: it may well take some."""
        began = part.ill_since or time.monotonic()
        while part.process.running:
            status = self._signs_of_life().get(part.process.pid)
            if not self._bus_answers or not _is_ill(status):
                return None
            if status is not None or time.monotonic() - began > _SURELY_SILENT_S:
                return _said(status, part.role)
            self._tick()
            time.sleep(LOOP_S)
        return None

    def kill(self) -> None:
        """End all at once."""
        for part in self._parts:
            part.process.kill()

    def close(self) -> None:
        """Let go of the bus."""
        if self._bus is not None:
            self._bus.close()

    def _of(self, roles: Sequence[str]) -> list[Part]:
        return [part for part in self._parts if part.role in roles]


def _said(status: WorkerStatus | None, started_as: str) -> str:
    if status is None:
        return "silent"
    changed = f", serves {status.role}" if status.role != started_as else ""
    return status.state + changed + (f": {status.reason}" if status.reason else "")


def _is_ill(status: WorkerStatus | None) -> bool:
    """Would a new process do better? Not while RabbitMQ is away."""
    if status is None:
        return True
    return status.state == "stalled" and not status.reason.startswith("RabbitMQ")


def _without_counts(said: str) -> str:
    return re.sub(r"\d+", "", said)


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:
        return 0
