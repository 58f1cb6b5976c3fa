"""How does our worker's main loop differ from Celery's?

Celery's consumer is made of steps; these are left out or replaced (each against 5.7, and
`tests/unit/seams/test_celery.py` says when a new Celery changes what they replace):

* Events go through `EventSender`: the main loop and pool threads never wait for them.
* Control commands come through a queue of each connection's own and are answered on the main loop's
  connection, and `revoke` stores nothing here;
  those that would stop a worker or its consumer are not answered.
* No delayed-delivery queues: no task of ours has an ETA.
* No mingle and no gossip: workers need nothing of each other, and each would read all events of
  all others.
* The loop says that it turns (`Liveness`), and waits longer and longer between lost connections.
"""

from __future__ import annotations

import logging
import time
from copy import copy
from functools import partial
from typing import Any
from uuid import uuid4

import kombu
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.consumer.connection import Connection
from celery.worker.consumer.consumer import Evloop
from celery.worker.consumer.control import Control
from celery.worker.consumer.events import Events
from celery.worker.consumer.heart import Heart
from celery.worker.consumer.tasks import Tasks
from celery.worker.control import Panel
from celery.worker.state import maybe_shutdown

from pdtasks import naming
from pdtasks.backoff import Backoff
from pdtasks.worker import service
from pdtasks.worker.dead_letters import DeadLetterStep
from pdtasks.worker.events import EventSender
from pdtasks.worker.liveness import BEAT_S

logger = logging.getLogger(__name__)

#: Celery's control commands that a worker answers, `revoke` aside: those that ask and those for
#: events.  RabbitMQ cannot tell them from others, and whoever may abort may send any: `shutdown` or
#: `cancel_consumer` would take a worker from its work.
_ANSWERED = (
    *("active", "active_queues", "clock", "conf", "dump_active", "dump_conf", "dump_reserved"),
    *("dump_revoked", "dump_schedule", "dump_tasks", "hello", "ping", "query_task", "registered"),
    *("report", "reserved", "revoked", "scheduled", "stats"),
    *("disable_events", "enable_events", "heartbeat"),
)
#: Seconds of a connection's life after which its loss is the first of a row again.
_STEADY_S = 60.0
#: Between two tries to connect, as kombu names them.
_PAUSES_S = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 3.0}


class EventsStep(Events):  # type: ignore[misc]  # Celery has no types
    """Events without a connection of the main loop's."""

    requires = (Connection,)

    def start(self, c: Consumer) -> None:
        if c.event_dispatcher is None:
            c.event_dispatcher = EventSender(
                c.app,
                c.hostname,
                service.current().background,
                groups=self.groups or (),
                enabled=self.send_events,
            )

    def shutdown(self, c: Consumer) -> None:
        if c.event_dispatcher is not None:
            c.event_dispatcher.close()


class HeartStep(Heart):  # type: ignore[misc]
    """Celery's, after our events."""

    requires = (EventsStep,)


class TasksStep(Tasks):  # type: ignore[misc]
    """Celery's, without mingle before it; what runs may be handed on when it has stopped."""

    requires = (EventsStep,)

    def stop(self, c: Consumer) -> None:
        super().stop(c)
        # Not before: what is handed on would come back here.
        service.current().consumes_no_more()


class ControlStep(Control):  # type: ignore[misc]
    """Control commands: Celery's, and ours."""

    requires = (TasksStep,)

    def __init__(self, c: Consumer, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        node = self.box.node
        # Celery's registry is for all apps of a process: ours stay here.
        asking = {name: Panel.data[name] for name in _ANSWERED}
        node.handlers = {**asking, naming.ABORT: _abort, "revoke": _revoke}
        node.reply = partial(_reply, node)
        node.mailbox = copy(node.mailbox)
        node.mailbox.get_queue = partial(_own_queue, node.mailbox)


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

    def _beat(self) -> None:
        consumer = self.task_consumer
        queues = self.app.amqp.queues.consume_from
        consumes = bool(queues) and all(consumer.consuming_from(name) for name in queues)
        self._liveness.beat(consumes=consumes)

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


def _own_queue(mailbox: Any, hostname: str) -> Any:
    """A queue for control commands that no other connection has: each command reaches everybody.

    kombu's own is one for a name, and exclusive.  RabbitMQ would refuse it to a second worker of
    that name, which then connects again and again; and to the same worker as long as it holds a
    lost connection for alive.
    """
    return type(mailbox).get_queue(mailbox, f"{hostname}.{uuid4().hex}")


def _reply(node: Any, data: Any, exchange: str, routing_key: str, ticket: str, **_: Any) -> None:
    """Answer over the node's own channel, once.

    kombu's own takes a connection of a pool, and tries for ever while RabbitMQ is away.
    """
    reply_exchange = kombu.Exchange(
        exchange, type="direct", delivery_mode="transient", durable=False
    )
    kombu.Producer(node.channel, auto_declare=False).publish(
        data,
        exchange=reply_exchange,
        routing_key=routing_key,
        declare=[reply_exchange],
        headers={"ticket": ticket, "clock": node.mailbox.clock.forward()},
        serializer=node.mailbox.serializer,
        retry=False,
    )


def _abort(_state: Any, request_ids: list[str]) -> dict[str, str]:
    """Control command: drop requests whose caller has hung up."""
    service.current().abort_soon(request_ids)
    return {"ok": "aborting"}


def _revoke(
    state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **_: Any
) -> dict[str, str]:
    """Control command: Celery's `revoke`, for both stages of a request, never asking the bus here.

    A caller knows the id of its request, which is the second stage's: the first one has another.
    """
    named = {task_id} if isinstance(task_id, str) else set(task_id or ())
    requests = {naming.request_id_of(one) for one in named}
    task_ids = requests | {naming.prefill_task_id(one) for one in requests}
    worker_state.revoked.update(task_ids)
    active = [r for r in tuple(worker_state.active_requests) if r.id in task_ids]
    if terminate:
        for request in active:
            request.terminate(state.consumer.pool, signal=signal)
    here = service.current()
    for request_id in requests - {naming.request_id_of(r.id) for r in active}:
        here.results.revoke(request_id, only_waiting=True)
    return {"ok": f"tasks {sorted(requests)} flagged as revoked"}
