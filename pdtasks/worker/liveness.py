"""Does this worker really take jobs? Only while its main loop turns and RabbitMQ has its consumer.

The main loop says so itself, once a second (`beat`); everybody else draws conclusions from its
silence: the sign of life on the bus, and the watchdog, which ends a process that would otherwise
hold jobs and answer none.
"""

from __future__ import annotations

import atexit
import enum
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

logger = logging.getLogger(__name__)

#: Seconds between two beats.
BEAT_S = 1.0
#: Seconds without a beat after which the main loop is taken to stand.
STALLED_AFTER_S = 10.0
#: Seconds that a supervisor has to replace a stalled worker before it ends by itself.
_SUPERVISOR_FIRST_S = 5.0
#: Seconds beyond `drain_timeout_s` in which a worker has to end.
_STOP_GRACE_S = 15.0
_LOOK_S = 0.5

#: Exit code of a worker whose engine, or the way of its answers, has ended.
EXIT_NO_ENGINE = 70
#: Exit code of a worker that took no jobs any more.
EXIT_STALLED = 71


class _Phase(enum.Enum):
    STARTING = "starting"  # the engine comes up: may take minutes
    CONNECTING = "connecting"  # to RabbitMQ, again and again while it is away
    CONSUMING = "consuming"  # the main loop turns
    STOP_REQUESTED = "stop requested"
    STOPPING = "stopping"  # the main loop waits for running jobs


@dataclass(frozen=True)
class Stall:
    """Why a worker takes no jobs."""

    reason: str
    seconds: float  #: since when
    own_fault: bool  #: a new process would do better


class Liveness:
    """What the main loop says of itself. Written by the main thread, read by any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = _Phase.STARTING
        self._since = clock()  # when the phase began
        self._beat_at = clock()
        self._why = ""
        self._consumes = False
        self._patience_s = STALLED_AFTER_S

    # -- the main thread ---------------------------------------------------------------------------

    def connecting(self, why: str) -> None:
        """There is no connection to RabbitMQ; `why` begins with its name."""
        if self._phase in (_Phase.STARTING, _Phase.CONSUMING):
            self._enter(_Phase.CONNECTING)
        self._why = why

    def beat(self, *, consumes: bool) -> None:
        """The main loop turns; `consumes`: RabbitMQ has its consumer."""
        self._consumes = consumes
        self._beat_at = self._clock()
        if self._phase in (_Phase.STARTING, _Phase.CONNECTING):
            self._enter(_Phase.CONSUMING)

    def stop_requested(self) -> None:
        """A signal has come; the main loop hears of it when it turns."""
        if self._phase in (_Phase.STOP_REQUESTED, _Phase.STOPPING):
            return
        stall = self.stall()
        # One that stands will not hear it; any other gets the time to.
        self._patience_s = 0.0 if stall is not None and stall.own_fault else STALLED_AFTER_S
        self._enter(_Phase.STOP_REQUESTED)

    def stopping(self) -> None:
        """The stop has begun: the main loop may stand now."""
        self._enter(_Phase.STOPPING)

    def _enter(self, phase: _Phase) -> None:
        self._phase, self._since = phase, self._clock()

    # -- any thread ------------------------------------------------------------------------------

    def stall(self) -> Stall | None:
        """Why no jobs are taken; None when they are, or when that is as it should be."""
        now = self._clock()
        silent_s = now - self._beat_at
        if self._phase is _Phase.CONNECTING:
            return Stall(self._why, now - self._since, own_fault=False)
        if self._phase is _Phase.CONSUMING:
            if silent_s > STALLED_AFTER_S:
                return Stall("its main loop does not turn", silent_s, own_fault=True)
            if not self._consumes:
                return Stall("RabbitMQ has no consumer of it", 0.0, own_fault=False)
        return None

    def overdue(self, stall_timeout_s: float, drain_timeout_s: float) -> str | None:
        """Why this process should end at once; None when it need not."""
        now = self._clock()
        if self._phase is _Phase.STOP_REQUESTED and now - self._since > self._patience_s:
            return "a stop was asked for, but its main loop does not turn"
        if self._phase is _Phase.STOPPING and now - self._since > drain_timeout_s + _STOP_GRACE_S:
            return "the stop takes too long"
        stall = self.stall()
        limit_s = STALLED_AFTER_S + stall_timeout_s + _SUPERVISOR_FIRST_S
        if stall is not None and stall.own_fault and stall.seconds > limit_s:
            return stall.reason
        return None


def watch(
    liveness: Liveness, stall_timeout_s: float, drain_timeout_s: float, ended: threading.Event
) -> None:
    """End the process when it is overdue. A thread's body; it does nothing that could wait."""
    while not ended.wait(_LOOK_S):
        if why := liveness.overdue(stall_timeout_s, drain_timeout_s):
            end_process(why, EXIT_STALLED)


def end_process(why: str, code: int) -> None:
    """Say `why`, with all threads' stacks, and end; RabbitMQ gives the jobs to others.

    Whatever hangs: perhaps nobody reads the pipe that standard error is, and another thread stands
    in a write to it, with the lock of `logging`.
    """
    with suppress(OSError, ValueError, AttributeError):
        output = sys.__stderr__.fileno()  # type: ignore[union-attr]  # None: AttributeError
        os.set_blocking(output, False)
        line = f"pdtasks: {why}: ending the process; RabbitMQ hands its jobs to others\n"
        os.write(output, line.encode())
        faulthandler.dump_traceback(file=output, all_threads=True)
        # The terminal it may be outlives us.
        os.set_blocking(output, True)
    os._exit(code)


def leave_at_exit(code: int) -> None:
    """Have the process end with `code` as soon as Python would clean up; call it when all stopped.

    That goes once more through all that vLLM and torch have made, which took 15 s and more on busy
    cores: long enough for a supervisor to take a silent worker for one that hangs.
    """
    atexit.register(_leave, code)


def _leave(code: int) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
