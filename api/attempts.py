"""Which of several attempts at a request makes its answer?

A request may be run more than once at its last stage: its worker was lost, or is cut off from
RabbitMQ and lives; it stops, and has handed the job on; or the stage before was run twice and there
are two jobs.  One attempt counts, that which asked last where to go on, else the first to come.
"""

from __future__ import annotations

import time

from pdtasks.messages import Ask
from pdtasks.naming import STAGES

#: Seconds without a token after which another attempt may take over that has not asked.
SILENCE_S = 5.0


class Attempts:
    """Those at one request's last stage."""

    def __init__(self) -> None:
        self._current: int | None = None
        self._heard_at = 0.0  # monotonic
        self._handed_on = 0
        self._past: set[int] = set()

    def takes_over(self, ask: Ask) -> bool:
        """An attempt asks where to go on: from now on it counts, and none before it.

        False: its job was handed on, and who has got it goes on already.
        """
        if ask.handed_on < self._handed_on:
            return False
        if self._current not in (None, ask.attempt):
            assert self._current is not None
            self._past.add(self._current)
        self._handed_on = ask.handed_on
        self._hear(ask.attempt)
        return True

    def counts(self, attempt: int, *, fits: bool) -> bool:
        """Are tokens of `attempt` the answer's?

        Args:
            fits: they repeat what is there, or follow on it.
        """
        if self._current not in (None, attempt):
            is_silent = time.monotonic() - self._heard_at >= SILENCE_S
            if attempt in self._past or not (is_silent and fits):
                return False
        self._hear(attempt)
        return True

    def ended_by(self, stage: str, attempt: int) -> bool:
        """Does the failure of `attempt` at `stage` end the request?

        Not while another one goes on: a stage whose job was delivered again may fail where it has
        been lost before.
        """
        if attempt == 0:
            return True
        return self._current is None or (stage == STAGES[-1] and attempt == self._current)

    def _hear(self, attempt: int) -> None:
        self._current, self._heard_at = attempt, time.monotonic()
