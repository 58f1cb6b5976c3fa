"""How does a result get into Celery's result backend without anybody waiting for the bus?

Tasks store theirs in their own thread.  What is said for a task by somebody else, in the worker's
main loop or the engine's, is stored here: by one thread, in order, and a failure is told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from celery import Celery, states

from pdtasks.errors import PdtasksError, where

logger = logging.getLogger(__name__)

#: Results that may wait; beyond that their askers run into their deadlines.
_MOST_WAITING = 1000
#: States of a task that nobody has begun.
_WAITING = (states.PENDING, states.RECEIVED, states.RETRY, states.REJECTED)


class ResultStore:
    """Stores results in the background."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="results")
        self._waiting = 0

    def fail(
        self, request_id: str, error: PdtasksError, done: Callable[[bool], None] | None = None
    ) -> None:
        """Store that `request_id` ended with `error`; `done(stored)` is called in the end."""
        self._submit(
            request_id,
            lambda: self._app.backend.store_result(request_id, error, states.FAILURE),
            done,
        )

    def revoke(self, request_id: str, *, only_waiting: bool = False) -> None:
        """Store that `request_id` was revoked, unless it has ended.

        Args:
            only_waiting: leave one that somebody has begun to whoever has.
        """

        def mark() -> None:
            backend = self._app.backend
            state = backend.get_state(request_id)
            if state in states.READY_STATES or (only_waiting and state not in _WAITING):
                return
            backend.mark_as_revoked(request_id, reason="revoked", store_result=True)

        self._submit(request_id, mark, None)

    def close(self) -> None:
        """Drop what waits."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(
        self, request_id: str, work: Callable[[], Any], done: Callable[[bool], None] | None
    ) -> None:
        if self._waiting >= _MOST_WAITING:
            logger.error("no result was stored for %s: too many wait for the bus", request_id)
            if done is not None:
                done(False)
            return
        self._waiting += 1

        def finish(future: Future[Any]) -> None:
            self._waiting -= 1
            exc = None if future.cancelled() else future.exception()
            if exc is not None:
                logger.error("no result was stored for %s: %s", request_id, where(exc))
            if done is not None:
                done(exc is None and not future.cancelled())

        self._thread.submit(work).add_done_callback(finish)
