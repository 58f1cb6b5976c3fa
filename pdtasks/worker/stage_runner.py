"""How does a task's thread run a stage on the engine's loop? Once, within the deadline."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from pdtasks.errors import EngineFailed, PdtasksError, RequestTimeout, where

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds beyond its deadline in which a stage is expected to have cleaned up.
OVERDUE_AFTER_S = 30.0


class RunsCoroutines(Protocol):
    """`pdtasks.engine.core.Engine`, as far as this module needs it."""

    def call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]: ...


class StageRunner:
    """Runs stages, each job once. For any thread."""

    def __init__(self, engine: RunsCoroutines) -> None:
        self._engine = engine
        # With its attempt and its deadline.
        self._running: dict[str, tuple[Future[Any], int, float]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Stages under way."""
        return len(self._running)

    @property
    def num_overdue(self) -> int:
        """Stages that go on although their deadline has passed for long: places that are lost."""
        latest = time.time() - OVERDUE_AFTER_S
        with self._lock:
            return sum(deadline < latest for _, _, deadline in self._running.values())

    def run(
        self,
        task_id: str,
        stage: Callable[[], Coroutine[Any, Any, T]],
        deadline: float,
        attempt: int = 0,
    ) -> T:
        """Run a stage and wait for it.

        A job that RabbitMQ delivers again while it runs here (the connection was lost, the work
        was not) joins the stage under way; `stage` is not called then.

        Raises RequestTimeout when `deadline` (UNIX seconds) passes; the stage is cancelled then.
        An error that is none of ours becomes EngineFailed without its text, which Celery would
        put into results, logs and events: it may quote a prompt.  What is raised names `attempt`,
        the one that has failed.
        """
        with self._lock:
            running = self._running.get(task_id)
            if running is None:
                running = self._engine.call(_within(stage, deadline)), attempt, deadline
                self._running[task_id] = running
            else:
                logger.info("%s was delivered again and joins its run", task_id)
        future, attempt, _ = running
        try:
            found: T = future.result()
        except PdtasksError as exc:
            exc.attempt = attempt
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it is, its text stays here
            logger.error("%s failed: %s", task_id, where(exc))  # noqa: TRY400
            error = EngineFailed(f"the stage failed: {type(exc).__name__}")
            error.attempt = attempt
            raise error from None
        finally:
            with self._lock:
                if self._running.get(task_id) is running:
                    del self._running[task_id]
        return found


async def _within(stage: Callable[[], Coroutine[Any, Any, T]], deadline: float) -> T:
    try:
        # Also when the deadline has passed: the stage begins, and cleans up when it is cancelled.
        async with asyncio.timeout(deadline - time.time()):
            return await stage()
    except TimeoutError as exc:
        raise RequestTimeout("the deadline passed before the answer was finished") from exc
