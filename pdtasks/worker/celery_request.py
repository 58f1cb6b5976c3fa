"""How does a job in a worker differ from Celery's? It can be cancelled, and shows no arguments."""

from __future__ import annotations

import os
import threading
from typing import Any

from celery.exceptions import InvalidTaskError
from celery.signals import task_revoked
from celery.worker.request import Request
from celery.worker.state import task_ready

from pdtasks import naming
from pdtasks.errors import RequestAborted
from pdtasks.messages import asked_in
from pdtasks.worker import service
from pdtasks.worker.task import wants_result

#: Seconds that Celery gets to leave its signal handler before a cold stop ends the process.
_COLD_STOP_S = 0.5


class StageRequest(Request):  # type: ignore[misc]  # Celery has no types
    """A job in a worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except (AttributeError, TypeError, ValueError) as exc:
            # Celery rejects what raises this; anything else would stop the worker.
            raise InvalidTaskError("not a message of a task") from exc

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `celery inspect` and Flower may know: never the arguments."""
        return super().info(safe=True)  # type: ignore[no-any-return]

    @property
    def _asked(self) -> tuple[str, ...]:
        """The requests that it is for."""
        return asked_in(self.args[0]) or (naming.request_id_of(self.id),)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """`revoke(terminate=True)`; the stock one cannot on the threads pool."""
        here = service.current()
        here.abort_soon(self._asked)
        self._announce_revoked("terminated", True, "abort", False)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Also of a job that was still queued: tell the asker, and free what it owns.

        In the main loop, hence nothing here waits: Celery's own stores the result at once, and
        tries for 20 s when the bus is away.
        """
        task_ready(self)
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        self.acknowledge()
        self._already_revoked = True
        task_revoked.send(
            sender=self.task,
            request=self._context,
            terminated=terminated,
            signum=signum,
            expired=expired,
        )
        here = service.current()
        if self.store_errors or wants_result(self._context.chain):
            here.results.revoke(naming.request_id_of(self.id))
        error = RequestAborted("the request was revoked")
        for request_id in self._asked:
            here.fail(self.reply_to, naming.stage_of(self.name), request_id, error)
            here.discard(request_id)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Cold shutdown: the process ends, RabbitMQ gives the job to another worker.

        Celery would wait for the pool's threads, and they for their answers.
        """
        # Once for each request under way: the first to come ends the process and the others with
        # it; the engine core follows.
        threading.Timer(_COLD_STOP_S, os._exit, (1,)).start()
        self._already_cancelled = True
