"""How does a request get into the pipeline? Published by task name, importing neither stage.

For Python callers without HTTP::

    from pdtasks.pipeline import submit

    result = submit(messages=[{"role": "user", "content": "What is the capital of France?"}])
    answer = result.get(timeout=60)      # {"text": "The capital of France is Paris.", …}
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import kombu
from celery import states
from celery.exceptions import TimeoutError as NotWithinTimeout
from celery.result import AsyncResult

from pdtasks.app import app
from pdtasks.background import Background
from pdtasks.broker.declaring import ensure_declared
from pdtasks.broker.publishing import ConfirmedSender, Publish
from pdtasks.errors import BrokerUnavailable, InvalidRequest, RequestTimeout
from pdtasks.messages import DecodeJob, Message, PrefillJob, TextRequest
from pdtasks.naming import DECODE, DECODE_TASK, PREFILL, PREFILL_TASK, prefill_task_id
from pdtasks.settings import load_settings
from pdtasks.tracing import NO_TRACE, callers_headers, message_headers

#: Seconds that RabbitMQ may take to confirm a message. A memory alarm would hold it for ever.
CONFIRM_TIMEOUT_S = 5.0
#: Headers of a task that ours never have. Celery sends each as None or empty; AMQP's tables are
#: written and read in Python, entry by entry, and a worker takes what is not there for just that.
UNUSED_HEADERS = frozenset(
    {
        *("shadow", "eta", "expires", "group", "group_index", "retries", "timelimit"),
        *("replaced_task_nesting", "stamped_headers", "stamps"),
    }
)
#: Seconds beyond a deadline that a worker may take to say that it has passed.
_LATE_S = 1.0


class PendingAnswer(AsyncResult):  # type: ignore[misc]  # Celery has no types
    """A result that has failed when its deadline has passed, also if nobody says so.

    Its message may be gone, removed from a queue by hand: no worker will ever answer for it.
    """

    deadline = float("inf")  #: UNIX seconds

    def get(self, timeout: float | None = None, *args: Any, **options: Any) -> Any:
        """Celery's, not beyond the deadline. Raises RequestTimeout then."""
        left_s = max(0.0, self.deadline + _LATE_S - time.time())
        within_s = left_s if timeout is None else min(timeout, left_s)
        try:
            return super().get(within_s, *args, **options)
        except NotWithinTimeout:
            if not self.ready():
                raise
            # The deadline has passed: at once what it has come to.
            return super().get(within_s, *args, **options)

    wait = get

    def _get_task_meta(self) -> Any:
        meta = super()._get_task_meta()
        if meta["status"] not in states.READY_STATES and time.time() > self.deadline + _LATE_S:
            late = RequestTimeout("the request took too long")
            meta = self._maybe_set_cache(
                {"task_id": self.id, "status": states.FAILURE, "result": late, "traceback": None}
            )
        return meta


def submit(
    prompt: str | Sequence[int] | None = None,
    *,
    messages: Sequence[dict[str, Any]] | None = None,
    model: str | None = None,
    timeout_s: float | None = None,
    cache_salt: str | None = None,
    **sampling: Any,
) -> AsyncResult:
    """Ask for an answer; returns at once.

    Args:
        prompt: text, or token ids of the model's vocabulary.
        messages: a chat instead, `[{"role": …, "content": …}, …]`.
        model: one of `PDTASKS_MODELS`, or the default one by its name, which no worker of another
            answers; None: the default one, whatever it is called.
        timeout_s: seconds until the request is given up; default `request_timeout_s`.
        cache_salt: keeps the prompt's KV apart from everybody's with another salt.
        sampling: fields of vLLM's SamplingParams: max_tokens, temperature, seed, stop, …

    Returns:
        Celery's `AsyncResult`.  `.get(timeout=…)` gives the answer as a dict with the fields of
        `pdtasks.messages.Answer`, or raises what went wrong (`pdtasks.errors`), a RequestTimeout
        at the deadline at the latest.

    Raises:
        InvalidRequest: not exactly one of `prompt` and `messages`.
        ConfigurationError: no broker is known.
        BrokerUnavailable: RabbitMQ did not take the request.
        QueueFull: as many requests wait as the queue may have.
    """
    if (prompt is None) == (messages is None):
        raise InvalidRequest("give either a prompt or messages")
    text = TextRequest(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=None if prompt is None or isinstance(prompt, str) else tuple(prompt),
        messages=None if messages is None else tuple(messages),
        sampling=sampling,
        cache_salt=cache_salt,
    )
    settings = load_settings()
    settings.require_broker()
    settings.require_bus()
    now = time.time()
    job = PrefillJob(
        request_id=uuid.uuid4().hex,
        engine="",
        model=model,
        text=text,
        submitted_at=now,
        deadline=now + (timeout_s or settings.request_timeout_s),
    )
    _shared.publish(job, reply_to=None, trace=callers_headers())
    result = PendingAnswer(job.request_id, app=app)
    result.deadline = job.deadline
    return result


def _first_stage(
    job: PrefillJob, reply_to: str | None, trace: Mapping[str, str] = NO_TRACE
) -> Publish:
    # A plain dict, not a Celery signature: `chain()` costs five times as much and freezes
    # `reply_to` by itself.
    decode: dict[str, Any] = {
        "task": DECODE_TASK,
        "args": [],
        "kwargs": {},
        "subtask_type": None,
        "immutable": False,
        "options": {
            "task_id": job.request_id,
            "queue": load_settings().queue_of(DECODE, job.model),
            "reply_to": reply_to,
            "ignore_result": reply_to is not None,
        },
    }
    return _task_message(
        PREFILL_TASK,
        job,
        queue=load_settings().queue_of(PREFILL, job.model),
        task_id=prefill_task_id(job.request_id),
        chain=[decode],
        reply_to=reply_to,
        ignore_result=True,
        trace=trace,
    )


def _only_stage(job: DecodeJob, reply_to: str | None, trace: Mapping[str, str]) -> Publish:
    return same_stage(
        job,
        task_id=job.request_id,
        reply_to=reply_to,
        ignore_result=reply_to is not None,
        trace=trace,
    )


def next_stage(
    job: DecodeJob,
    chain: Sequence[dict[str, Any]],
    *,
    parent_id: str,
    root_id: str | None,
    trace: Mapping[str, str] = NO_TRACE,
) -> Publish:
    """The message that hands `job` to the next stage of `chain`, as Celery's chain would.

    A chain's next task is its last one (Celery's order). Celery would send it through a pool whose
    connections wait for RabbitMQ's confirm without a bound.
    """
    *rest, step = chain
    # Named there is the first of several answers to one prompt: each goes on as itself.
    options = step["options"] | {"task_id": job.request_id}
    return _task_message(
        step["task"],
        job,
        chain=rest,
        parent_id=parent_id,
        root_id=root_id,
        trace=trace,
        **options,
    )


def same_stage(job: DecodeJob, *, task_id: str, **options: Any) -> Publish:
    """The message that hands `job` to another worker of its stage; `options`: as the task's own."""
    queue = load_settings().queue_of(DECODE, job.model)
    return _task_message(DECODE_TASK, job, queue=queue, task_id=task_id, **options)


def _task_message(
    name: str,
    job: Message,
    *,
    queue: str,
    task_id: str,
    trace: Mapping[str, str] = NO_TRACE,
    **options: Any,
) -> Publish:
    # Not `send_task`: for a result it would have this process listen on the bus.
    message = app.amqp.create_task_message(
        task_id,
        name,
        args=(job.to_wire(),),
        # Celery would put the arguments, the prompt, into events and logs.
        argsrepr="-",
        kwargsrepr="-",
        **options,
    )
    for unused in UNUSED_HEADERS:
        message.headers.pop(unused, None)
    message.headers.update(message_headers(trace, time.time()))

    def publish(producer: kombu.Producer) -> None:
        ensure_declared(producer.channel, app.amqp.queues[queue])
        # Without `declare` Celery would declare the queue.
        app.amqp.send_task_message(producer, name, message, queue=queue, retry=False, declare=[])

    return publish


class Publisher:
    """Sends requests into the pipeline. For any thread."""

    def __init__(self, background: Background | None = None) -> None:
        self._sender = ConfirmedSender(app, background or Background())

    def send(
        self,
        job: PrefillJob | DecodeJob,
        reply_to: str | None,
        trace: Mapping[str, str] = NO_TRACE,
    ) -> Future[None]:
        """Have `job` sent to stage 1, stage 2 chained to it; or to stage 2 if it is for that alone.

        Args:
            reply_to: the reply stream that gets the tokens; None when the result is waited for.
            trace: headers of the span that it is part of.

        The future raises QueueFull when RabbitMQ refuses it, BrokerUnavailable when it does not
        confirm it within `CONFIRM_TIMEOUT_S`.
        """
        if isinstance(job, DecodeJob):
            publish = _only_stage(job, reply_to, trace)
        else:
            publish = _first_stage(job, reply_to, trace)
        return self._sender.send(publish, within_s=CONFIRM_TIMEOUT_S)

    def publish(
        self, job: PrefillJob, reply_to: str | None, trace: Mapping[str, str] = NO_TRACE
    ) -> None:
        """`send`, and wait."""
        sent = self.send(job, reply_to, trace)
        try:
            # The sender keeps the time; the rest is for one that hangs in a write.
            sent.result(CONFIRM_TIMEOUT_S + 1)
        except TimeoutError as exc:
            sent.cancel()
            raise BrokerUnavailable("RabbitMQ did not confirm the request in time") from exc

    def close(self) -> None:
        """End thread and connection; what is not confirmed in a moment has failed."""
        self._sender.close()


class _SharedPublisher:
    """One `Publisher` for all threads of a process; a forked process makes one of its own."""

    def __init__(self) -> None:
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._publisher: Publisher | None = None

    def publish(self, job: PrefillJob, reply_to: str | None, trace: Mapping[str, str]) -> None:
        """`Publisher.publish`."""
        with self._lock:
            publisher = self._publisher = self._publisher or Publisher()
        publisher.publish(job, reply_to, trace)

    def close(self) -> None:
        """End it; the next request begins anew."""
        with self._lock:
            publisher, self._publisher = self._publisher, None
        if publisher is not None:
            publisher.close()


_shared = _SharedPublisher()
