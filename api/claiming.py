"""How does an API process take work from the bus? As it has room, under leases, until its stop.

What is common to jobs, lines of batches and the care for batches.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Literal

from pdtasks.background import Background
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.errors import where

logger = logging.getLogger(__name__)

#: Seconds between two looks for what another process has lost.
_LOOK_S = 1.0
#: Seconds between two renewals, and the pace at which a cancellation is heard.
_RENEW_S = 1.0
#: Seconds that vLLM's handler gets to end when its answer is not wanted any more.
_CLEAN_UP_S = 5.0
#: Seconds that what is under way gets at a stop: to clean up, and to tell the bus.
_STOP_S = 11.0

#: Why a run is looked at no longer.
Verdict = Literal["done", "stopping", "late", "lost", "cancel"]


class Claims(ABC):
    """Takes work in this process, at most `concurrency` pieces at once."""

    def __init__(self, name: str, *, concurrency: int, background: Background) -> None:
        """Args:
        name: of the task that looks for work.
        background: watches that task.
        """
        self._name = name
        self._concurrency = concurrency
        self._background = background
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._claiming: asyncio.Task[bool] | None = None
        self._looking: asyncio.Task[None]
        self._stopping: asyncio.Future[None]  # a future, for `asyncio.wait`

    @abstractmethod
    async def _claim(self) -> tuple[str, Coroutine[Any, Any, None]] | None:
        """Take one piece of work: what it is called, and the work. None: there is none."""

    @property
    def num_running(self) -> int:
        """Pieces of work under way here."""
        return len(self._running)

    @property
    def is_stopping(self) -> bool:
        """Is nothing to be begun any more?"""
        return self._stopping.done()

    def wake(self) -> None:
        """There may be something new."""
        self._wake.set()

    def start(self) -> None:
        """Take work until `stop`."""
        self._stopping = asyncio.get_running_loop().create_future()
        self._looking = self._background.task(self._name, self._look)

    async def stop(self) -> None:
        """Leave what is under way to other processes; returns when it can be claimed.

        Nothing that writes to the bus is cancelled: it is told, and cleans up in its own time.
        """
        if not self._stopping.done():
            self._stopping.set_result(None)
        self._looking.cancel()
        await asyncio.wait([self._looking])
        if self._claiming is not None:
            await asyncio.wait([self._claiming])
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=_STOP_S)
            if late:
                logger.warning("%s: %d wait for the end of their leases", self._name, len(late))
                for task in late:
                    task.cancel()
                await asyncio.wait(late, timeout=_CLEAN_UP_S)

    async def _look(self) -> None:
        while True:
            self._wake.clear()
            try:
                while self.num_running < self._concurrency and await self._take_one():
                    pass
            except BUS_ERRORS as exc:
                logger.warning("bus is away, %s waits: %s", self._name, type(exc).__name__)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()

    async def _take_one(self) -> bool:
        # Shielded: what the bus has given to a task which is cancelled would be nobody's.
        self._claiming = asyncio.create_task(self._begin_one())
        return await asyncio.shield(self._claiming)

    async def _begin_one(self) -> bool:
        claimed = await self._claim()
        if claimed is None:
            return False
        name, work = claimed
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._has_ended)
        return True

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake.set()
        if not task.cancelled() and (exc := task.exception()) is not None:
            # The lease runs out, and it is begun again: a bounded number of times.
            logger.error("%s was left: %s", task.get_name(), where(exc))

    async def _watch(
        self,
        work: asyncio.Task[Any],
        renew: Callable[[], Awaitable[Literal["held", "lost", "late", "cancel"]]],
        *,
        deadline: float = float("inf"),
    ) -> Verdict:
        """Hold the lease as long as `work` runs and is wanted; then `work` has ended.

        Args:
            renew: holds it for another lease, and tells whether it is still wanted.
            deadline: UNIX seconds.
        """
        try:
            return await self._verdict(work, renew, deadline)
        finally:
            await end(work)

    async def _verdict(
        self,
        work: asyncio.Task[Any],
        renew: Callable[[], Awaitable[Literal["held", "lost", "late", "cancel"]]],
        deadline: float,
    ) -> Verdict:
        ends: list[asyncio.Future[Any]] = [work, self._stopping]
        while True:
            await asyncio.wait(ends, timeout=_RENEW_S, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return "done"
            if self._stopping.done():
                return "stopping"
            if time.time() > deadline:
                return "late"
            try:
                held = await renew()
            except BUS_ERRORS as exc:
                logger.warning("bus is away: %s", type(exc).__name__)
                continue
            if held != "held":
                return held


async def end(task: asyncio.Task[Any]) -> None:
    """End `task`, or leave it after a while; what it raises is for whoever asks it."""
    task.cancel()
    task.add_done_callback(_look_away)
    _, running = await asyncio.wait([task], timeout=_CLEAN_UP_S)
    if running:
        logger.error("%s does not end", task.get_name())


def _look_away(task: asyncio.Task[Any]) -> None:
    """Else asyncio logs what was raised, text and all."""
    if not task.cancelled():
        task.exception()
