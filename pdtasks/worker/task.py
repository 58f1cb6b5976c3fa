"""What prefill and decode have in common as tasks: how each of them ends.

A failure of a stage is told to the asker once, whatever the stage was doing, and reaches the
result that a Celery client waits for although prefill itself stores none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from celery import Task, states
from celery.exceptions import Ignore
from celery.worker import state

from pdtasks.bus.reply import is_reply_stream
from pdtasks.errors import (
    EngineFailed,
    InvalidRequest,
    PdtasksError,
    RequestAborted,
    RequestTimeout,
)
from pdtasks.messages import Answer, asked_in
from pdtasks.naming import request_id_of, stage_of
from pdtasks.tracing import Carried, carried_by
from pdtasks.worker import service


def wants_result(chain: list[dict[str, Any]] | None) -> bool:
    """Does a Celery client wait for the last task of `chain`?"""
    return chain is not None and any(
        not step["options"].get("ignore_result", False) for step in chain
    )


class StageTask(Task):  # type: ignore[misc]  # Celery has no types
    """Base of prefill and decode."""

    abstract = True
    Request = "pdtasks.worker.celery_request:StageRequest"
    #: Nothing of a result in events and logs: it holds prompt or answer.
    resultrepr_maxsize = 0
    #: Expected ends: one line in the log, no traceback.
    throws = (InvalidRequest, RequestAborted, RequestTimeout)

    @property
    def reply_stream(self) -> str | None:
        """Where the asker reads along, if it does."""
        reply_to: str | None = self.request.reply_to
        return reply_to if is_reply_stream(reply_to) else None

    @property
    def is_again(self) -> bool:
        """Was this job delivered before, perhaps to a worker that was lost?"""
        return bool((self.request.delivery_info or {}).get("redelivered"))

    @property
    def carried(self) -> Carried:
        """The trace that this job is part of."""
        return carried_by(self.request.headers)

    def end_aborted(self) -> None:
        """The request was dropped: raises what tells Celery how the task ended, if anything does.

        Called while RequestAborted is handled.
        """
        if self.request.id in state.revoked:
            # Whoever waits was told so by `StageRequest`; a failure would take that back.
            raise Ignore
        if self.reply_stream is None:
            raise  # noqa: PLE0704 - somebody may wait for the result

    def end_chain(self, answer: Answer | None) -> None:
        """End the request in this stage; a waiting Celery client gets `answer` as the result."""
        # Without a chain Celery has nothing to send on: a stage sends the next one's job itself.
        rest, self.request.chain = self.request.chain, None
        if answer is not None and wants_result(rest):
            self.backend.store_result(
                answer.request_id, msgspec.to_builtins(answer), states.SUCCESS
            )

    def refuse(self, request_ids: Sequence[str], error: PdtasksError) -> None:
        """Tell whoever asked that there will be no answer; the chain ends with this task."""
        here = service.current()
        stream = self.reply_stream
        for request_id in request_ids:
            here.fail(stream, stage_of(self.name), request_id, error)
        here.wait_for_replies(stream)
        if wants_result(self.request.chain):
            self.backend.store_result(request_ids[0], error, states.FAILURE)
        self.request.chain = None

    def on_failure(
        self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        """Tell whoever asked. Called by Celery in the task's thread, after the task failed."""
        error = exc if isinstance(exc, PdtasksError) else EngineFailed(type(exc).__name__)
        self.refuse(asked_in(args[0]) or (request_id_of(task_id),), error)
