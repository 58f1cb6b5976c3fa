"""What runs beside the requests, and is it well?

Threads and tasks that a process cannot do without survive whatever is raised in them: they begin
again after a pause, and whoever asks (`/ready`, a worker's sign of life, Prometheus) is told.
ARCHITECTURE.md lists each with its name.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from prometheus_client import Counter

from pdtasks.backoff import Backoff
from pdtasks.errors import where

logger = logging.getLogger(__name__)

#: Seconds before the first new try; doubled with each failure in a row.
_PAUSE_S = 0.5
#: Seconds of work after which the next failure is the first of a row again.
_STEADY_S = 60.0

_FAILURES = Counter(
    "pdtasks_background_failures", "Unforeseen errors in background threads and tasks", ["name"]
)


@dataclass
class _Entry:
    """One thread or task. Written by it alone."""

    name: str
    failures: int = 0
    backoff: Backoff = field(default_factory=lambda: Backoff(first_s=_PAUSE_S))
    began: float = 0.0  # monotonic
    is_paused: bool = False

    def begin(self) -> None:
        self.began = time.monotonic()
        self.is_paused = False

    def fail(self, exc: Exception) -> float:
        """Note `exc`; returns the seconds until the next try."""
        if time.monotonic() - self.began > _STEADY_S:
            self.backoff.succeed()
        self.backoff.fail()
        self.failures += 1
        self.is_paused = True
        _FAILURES.labels(self.name).inc()
        pause_s = self.backoff.pause_s
        logger.error("%s begins again in %.1f s after %s", self.name, pause_s, where(exc))
        return pause_s


class Background:
    """The background threads and tasks of one owner."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._closed = threading.Event()

    def thread(self, name: str, body: Callable[[], None]) -> threading.Thread:
        """Run `body` in a daemon thread until it returns; again after anything it raises."""
        entry = self._add(name)

        def run() -> None:
            while not self._closed.is_set():
                entry.begin()
                try:
                    body()
                except Exception as exc:  # noqa: BLE001 - whatever it is, the thread goes on
                    self._closed.wait(entry.fail(exc))
                else:
                    return

        # A daemon: what hangs in the network must not keep the process.
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def task(self, name: str, body: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """The same on the running event loop, until `body` returns or the task is cancelled."""
        entry = self._add(name)

        async def run() -> None:
            while True:
                entry.begin()
                try:
                    await body()
                except Exception as exc:  # noqa: BLE001 - whatever it is, the task goes on
                    await asyncio.sleep(entry.fail(exc))
                else:
                    return

        return asyncio.create_task(run(), name=name)

    def problems(self) -> list[str]:
        """A sentence for each that is not at work because it has failed."""
        return [
            f"{entry.name} has failed {entry.failures} times and begins again soon"
            for entry in self._entries.values()
            if entry.is_paused
        ]

    def failures(self) -> dict[str, int]:
        """How often each has failed."""
        return {entry.name: entry.failures for entry in self._entries.values()}

    def close(self) -> None:
        """Let threads that pause after a failure end; those at work are told by their owner."""
        self._closed.set()

    def _add(self, name: str) -> _Entry:
        entry = self._entries[name] = _Entry(name)
        return entry
