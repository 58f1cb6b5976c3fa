"""Who answers for a job that no worker survived? Any worker, from the dead-letter queue.

What was answered for goes on to the queue of `pdtasks.broker.dead_letters`, for people.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from functools import partial
from typing import Any

import kombu
from celery import bootsteps
from celery.worker.consumer import Consumer

from pdtasks import naming
from pdtasks.broker.dead_letters import keep, kept_queue, last_death
from pdtasks.errors import WorkerLost, where
from pdtasks.messages import asked_in
from pdtasks.settings import load_settings
from pdtasks.worker import counting, service
from pdtasks.worker.intake import TASKS, read_address, why_refused
from pdtasks.worker.task import wants_result

logger = logging.getLogger(__name__)

#: Seconds before a dead job is tried again whose asker could not be told.
_RETRY_S = 5.0
#: Dead jobs that are answered while others wait for RabbitMQ to keep them.
_AT_ONCE = 50
#: Seconds for RabbitMQ to take a dead job that is kept.
_KEEP_S = 30.0


class DeadLetterStep(bootsteps.ConsumerStep):  # type: ignore[misc]  # Celery has no types
    """Tells the askers of jobs that were delivered too often that there will be no answer."""

    def __init__(self, parent: Consumer, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._consumer = parent

    def get_consumers(self, channel: Any) -> list[kombu.Consumer]:
        queue = kombu.Queue(
            naming.DEAD_QUEUE,
            exchange=kombu.Exchange(naming.DEAD_EXCHANGE, type="fanout", durable=True),
            durable=True,
            queue_arguments={"x-queue-type": "quorum"},
        )
        kept_queue(channel).declare()
        # Whole messages, undecoded: what kills workers may be unreadable as well.
        return [
            kombu.Consumer(
                channel, queues=[queue], on_message=self.give_up, prefetch_count=_AT_ONCE
            )
        ]

    def give_up(self, message: kombu.Message) -> None:
        """Answer for one dead job. In the main loop: nothing here waits for the bus."""
        try:
            waits_for_result = self._answer(message)
        except Exception as exc:  # noqa: BLE001 - what kills workers must not stop this one
            logger.error("a dead job could not be answered for: %s", where(exc))  # noqa: TRY400
            waits_for_result = None
        if waits_for_result is None:
            self._keep(message)
            return
        request_id, error = waits_for_result

        def stored(well: bool) -> None:
            # From the thread that stored: back into the main loop, which owns the channel.
            self._consumer.call_soon(partial(self._keep if well else self._later, message))

        service.current().results.fail(request_id, error, stored)

    def _keep(self, message: kombu.Message) -> None:
        """Put it where people find it; acknowledged here when it is there."""
        sent = service.current().sender.send(
            partial(keep, message, _why_dead(message)), within_s=_KEEP_S, insist=True
        )

        def kept(future: Future[None]) -> None:
            well = not future.cancelled() and future.exception() is None
            self._consumer.call_soon(partial(self._done if well else self._keep_later, message))

        sent.add_done_callback(kept)

    def _keep_later(self, message: kombu.Message) -> None:
        # Not back into the queue: its caller has its answer.
        self._consumer.timer.call_after(_RETRY_S, partial(self._keep, message))

    def _done(self, message: kombu.Message) -> None:
        message.ack_log_error(logger, self._consumer.connection_errors)

    def _later(self, message: kombu.Message) -> None:
        requeue = partial(
            message.reject_log_error, logger, self._consumer.connection_errors, requeue=True
        )
        self._consumer.timer.call_after(_RETRY_S, requeue)

    def _answer(self, message: kombu.Message) -> tuple[str, WorkerLost] | None:
        """Tell whoever reads along; returns what a waiting Celery client is to get."""
        address = read_address(message)
        if address is None:
            logger.error("gave up a message that is no task of ours")
            return None
        request_id = naming.request_id_of(address.id)
        is_ours = address.task in TASKS
        what = address.task if is_ours else "the job"
        # (Of something else somebody may read along all the same.)
        stage = naming.stage_of(address.task) if is_ours else naming.PREFILL
        error = WorkerLost(f"{what} {_why_dead(message)}")
        counting.dead_letter()
        logger.error("gave up %s: %s", request_id, error)
        here = service.current()
        is_readable = why_refused(message) is None
        asked = asked_in(_job_in(message)) if is_readable else ()
        for one in asked or (request_id,):
            here.fail(message.properties.get("reply_to"), stage, one, error)
            here.discard(one)
        is_last = address.id == request_id and not address.ignore_result
        if is_last or (is_readable and wants_result(_rest_of_chain(message))):
            return request_id, error
        return None


def _why_dead(message: kombu.Message) -> str:
    if last_death(message).get("reason") == "rejected":
        return "was refused by a worker that cannot read it"
    limit = load_settings().delivery_limit
    return f"was given up: {limit + 1} deliveries ended with the loss of the worker"


def _job_in(message: kombu.Message) -> object:
    (wire,), _, _ = message.payload
    return wire


def _rest_of_chain(message: kombu.Message) -> list[dict[str, Any]] | None:
    """The tasks after the one in `message`; Celery keeps them in the body's third part."""
    _, _, embedded = message.payload
    chain: list[dict[str, Any]] | None = embedded.get("chain")
    return chain
