"""How does our worker's main loop differ from Celery's?

Celery's consumer is made of steps; these are left out or replaced (each against 5.7, and
`tests/unit/seams/test_celery.py` says when a new Celery changes what they replace):

* Events go through `EventSender`: the main loop and pool threads never wait for them.
* Control commands are `control.py`'s.
* What is no job of ours is refused before Celery looks at it (`intake.py`).
* No delayed-delivery queues: no task of ours has an ETA.
* No mingle and no gossip: workers need nothing of each other, and each would read all events of
  all others.
* The loop says that it turns (`Liveness`), and waits longer and longer between lost connections.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from celery.bootsteps import CLOSE, TERMINATE
from celery.worker.consumer import Consumer
from celery.worker.consumer.connection import Connection
from celery.worker.consumer.consumer import Evloop
from celery.worker.consumer.events import Events
from celery.worker.consumer.heart import Heart
from celery.worker.consumer.tasks import Tasks
from celery.worker.state import maybe_shutdown

from pdtasks.backoff import Backoff
from pdtasks.errors import PdtasksError, where
from pdtasks.worker import service
from pdtasks.worker.control import WaryControl
from pdtasks.worker.dead_letters import DeadLetterStep
from pdtasks.worker.events import EventSender
from pdtasks.worker.intake import why_refused
from pdtasks.worker.liveness import BEAT_S

logger = logging.getLogger(__name__)

#: Seconds of a connection's life after which its loss is the first of a row again.
_STEADY_S = 60.0
#: Between two tries to connect, as kombu names them.
_PAUSES_S = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 3.0}


#: Seconds for RabbitMQ to answer one of our commands in the main loop.
_COMMAND_S = 5.0
#: States in which Celery ends what consumes.
_STOPPED = (CLOSE, TERMINATE)
#: By name: of none named Celery says "all", and then takes `disable_events` for done already.
_ALL_EVENTS = ("task", "worker")


class EventsStep(Events):  # type: ignore[misc]  # Celery has no types
    """Events without a connection of the main loop's."""

    requires = (Connection,)

    def start(self, c: Consumer) -> None:
        if c.event_dispatcher is None:
            c.event_dispatcher = EventSender(
                c.app,
                c.hostname,
                service.current().background,
                groups=self.groups or _ALL_EVENTS,
                enabled=self.send_events,
            )

    def shutdown(self, c: Consumer) -> None:
        if c.event_dispatcher is not None:
            c.event_dispatcher.close()


class HeartStep(Heart):  # type: ignore[misc]
    """Celery's, after our events."""

    requires = (EventsStep,)

    def shutdown(self, c: Consumer) -> None:
        # Said at the stop already. Who listens takes the events of tasks that ended since for signs
        # of life.
        if c.event_dispatcher is not None and self.enabled:
            c.event_dispatcher.send("worker-offline", freq=self.heartbeat_interval or 2.0)


class TasksStep(Tasks):  # type: ignore[misc]
    """Celery's, without mingle before it; what runs may be handed on when it has stopped."""

    requires = (EventsStep,)

    def start(self, c: StageConsumer) -> None:
        c.begins_with_least_credit()
        super().start(c)

    def stop(self, c: Consumer) -> None:
        super().stop(c)
        # Not before: what is handed on would come back here.
        service.current().consumes_no_more()


class ControlStep(WaryControl):
    """After our tasks."""

    requires = (TasksStep,)


class StageConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer with our steps."""

    #: Celery's control command `election` asks for it.
    gossip = None

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        default_steps = (
            Connection,
            EventsStep,
            HeartStep,
            TasksStep,
            ControlStep,
            DeadLetterStep,
            Evloop,
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._liveness = service.current().liveness
        self._backoff = Backoff(maximum_s=10.0)
        self._connected_at = 0.0
        self._credit: dict[str, int] = {}  # that RabbitMQ knows of, by queue
        super().__init__(*args, **kwargs)

    def connect(self) -> Any:
        self._liveness.connecting("RabbitMQ cannot be reached")
        connection = super().connect()
        self._connected_at = time.monotonic()
        return connection

    def ensure_connected(self, conn: Any) -> Any:
        """Celery's, with shorter pauses: its own grow to 30 s, and all jobs wait for them."""

        def tell(exc: Exception, pause_s: float) -> None:
            logger.error("RabbitMQ cannot be reached (%s): next try in %.1f s", exc, pause_s)

        conn.ensure_connection(tell, callback=maybe_shutdown, **_PAUSES_S)
        return conn

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        hub.call_repeatedly(BEAT_S, self._beat)

    def on_ready(self) -> None:
        super().on_ready()
        self._beat()
        service.current().serving.consumed_by(self)

    def begins_with_least_credit(self) -> None:
        """One prefetch count is told for all queues; `on_ready` gives those more that may have it.

        A queue with a backlog would else fill this worker before it has said how much it takes.
        """
        here, queues = service.current(), self.app.amqp.queues.consume_from
        credit = here.credit_by_queue()
        # (0 would be without a limit.)
        least = max(1, min((credit[name] for name in queues), default=1))
        self.initial_prefetch_count = least
        self._credit = dict.fromkeys(queues, least)

    def _beat(self) -> None:
        consumer = self.task_consumer
        queues = self.app.amqp.queues.consume_from  # none while the role changes
        self._liveness.beat(consumes=all(consumer.consuming_from(name) for name in queues))

    def take_from(self, credit: Mapping[str, int]) -> Future[None]:
        """Take jobs of these stages, so many at once, and of no others. From any thread.

        Done when RabbitMQ knows.  A new connection takes them from the beginning, whatever comes of
        this one.
        """
        done: Future[None] = Future()
        queue_of = service.current().settings.queue_of
        queues = {queue_of(stage): most for stage, most in credit.items()}
        self.call_soon(self._take_from, queues, done)
        return done

    def _take_from(self, queues: Mapping[str, int], done: Future[None]) -> None:
        # Whoever has waited for long enough asks again; from here on it waits for this.
        if not done.set_running_or_notify_cancel():
            return
        if self.blueprint.state in _STOPPED:
            done.set_exception(PdtasksError("this worker takes no more jobs"))
            return
        try:
            # A RabbitMQ that does not answer is a connection that is lost, and no worker that is.
            with self.connection.connection.transport.having_timeout(_COMMAND_S):
                self._consume_from(queues)
        except BaseException as exc:
            done.set_exception(exc)
            raise
        done.set_result(None)

    def _consume_from(self, queues: Mapping[str, int]) -> None:
        for queue in tuple(self.app.amqp.queues.consume_from):
            # (A consumer's prefetch count cannot be changed: it becomes another consumer.)
            if self._credit.get(queue) != queues.get(queue):
                self.cancel_task_queue(queue)
        for queue, most in queues.items():
            if queue not in self.app.amqp.queues.consume_from:
                # Of consumers that begin on this channel from now on.
                self.task_consumer.qos(prefetch_count=most, apply_global=False)
                self.add_task_queue(queue)
        self._credit = dict(queues)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        self._liveness.connecting("RabbitMQ closed the connection")
        super().on_connection_error_after_connected(exc)
        if time.monotonic() - self._connected_at > _STEADY_S:
            self._backoff.succeed()
        # A connection that is refused right after it was made would else be made again at once.
        until = time.monotonic() + self._backoff.pause_s
        if self._backoff.pause_s:
            logger.warning("connecting again in %.1f s", self._backoff.pause_s)
        self._backoff.fail()
        while time.monotonic() < until:
            maybe_shutdown()
            time.sleep(0.1)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        take = super().create_task_handler(*args, **kwargs)
        of_the_connection = (*self.connection_errors, *self.channel_errors)

        def on_message(message: Any) -> None:
            if why := why_refused(message):
                self._refuse(message, why)
                return
            try:
                take(message)
            except of_the_connection:
                raise
            except Exception as exc:  # noqa: BLE001 - it would end one worker after the other
                logger.error("a job could not be begun: %s", where(exc))  # noqa: TRY400
                if not message.acknowledged:
                    self._refuse(message, "no worker can begin")

        return on_message

    # Celery's own would log the message, prompt and all, and ask the result backend in this loop.
    # Rejected, they are answered for like any dead job.

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._refuse(message, "is no task")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._refuse(message, "is a task that this worker does not know")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._refuse(message, "is not a message of a task")

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._refuse(message, "cannot be decoded")

    def _refuse(self, message: Any, why: str) -> None:
        logger.error("refused a message that %s", why)
        message.reject_log_error(logger, self.connection_errors)
