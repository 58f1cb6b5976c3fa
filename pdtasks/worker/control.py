"""Which control commands does a worker answer, and how? Without harm, whoever asks what.

Unlike Celery's: through a queue of each connection's own, on the main loop's connection; `revoke`
stores nothing here; commands that would stop a worker or its consumer are not answered; what is no
command is refused, and what a command raises is told by its kind.  Celery would close and open its
channel each time, and whatever comes meanwhile would be lost.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from copy import copy
from functools import partial
from typing import Any
from uuid import uuid4

import kombu
import msgspec
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer
from celery.worker.consumer.control import Control
from celery.worker.control import Panel
from celery.worker.pidbox import Pidbox
from kombu.exceptions import EncodeError

from pdtasks import naming
from pdtasks.errors import where
from pdtasks.messages import Count, Name
from pdtasks.worker import service

logger = logging.getLogger(__name__)

#: Celery's control commands that a worker answers, `revoke` aside: those that ask and those for
#: events.  RabbitMQ cannot tell them from others, and whoever may abort may send any: `shutdown` or
#: `cancel_consumer` would take a worker from its work, and `hello` takes in whatever it is told.
_ANSWERED = (
    *("active", "active_queues", "clock", "conf", "dump_active", "dump_conf", "dump_reserved"),
    *("dump_revoked", "dump_schedule", "dump_tasks", "ping", "query_task", "registered"),
    *("report", "reserved", "revoked", "scheduled", "stats"),
    *("disable_events", "enable_events", "heartbeat"),
)
#: Others may unpack, and become as large as they like.
_ENCODINGS = ("utf-8", "binary")


class _ReplyTo(msgspec.Struct, frozen=True):
    exchange: str
    routing_key: Name


class _Command(msgspec.Struct, frozen=True):
    """A control message. Patterns are Celery's way to name workers, and nobody's here."""

    method: Name
    arguments: dict[str, Any] | None = None
    destination: tuple[str, ...] | None = None
    pattern: None = None
    matcher: None = None
    reply_to: _ReplyTo | None = None
    ticket: Name | None = None


class _Mailbox(Pidbox):  # type: ignore[misc]  # Celery has no types
    """Celery's, with commands that are looked at before they are believed."""

    def __init__(self, c: Consumer) -> None:
        super().__init__(c)
        # Celery's registry is for all apps of a process: ours stay here.
        asking = {name: Panel.data[name] for name in _ANSWERED}
        own = {naming.ABORT: _abort, "revoke": _revoke, "stats": _stats}
        self.node.handlers = {**asking, **own}
        self.node.mailbox = copy(self.node.mailbox)
        self.node.mailbox.get_queue = partial(_own_queue, self.node.mailbox)

    def start(self, c: Consumer) -> None:
        # Before any command can come: whoever waited for RabbitMQ in the middle of one would take
        # the next one meanwhile, which would wait for the same word and take it from the first.
        self._answers = kombu.Exchange(
            self.node.mailbox.reply_exchange.name,
            type="direct",
            delivery_mode="transient",
            durable=False,
        )
        self._answers(c.connection.default_channel).declare()
        super().start(c)
        self.consumer.on_message = self._take  # undecoded

    def _take(self, message: kombu.Message) -> None:
        self.c.app.clock.forward()
        try:
            if message.content_encoding not in _ENCODINGS:
                raise ValueError  # noqa: TRY301
            command = msgspec.convert(message.decode(), _Command)
        except Exception:  # noqa: BLE001 - of kombu, a codec or msgspec, with its words
            logger.error("refused a control message that is no command")  # noqa: TRY400
            return
        self._set_clock(message.headers.get("clock"))
        if command.destination and self.hostname not in command.destination:
            return
        answer = self._answer(command)
        if command.reply_to is not None:
            # Elsewhere the worker may not write, and would lose its connection for trying.
            if command.reply_to.exchange == self.node.mailbox.reply_exchange.name:
                try:
                    self._reply(answer, command.reply_to.routing_key, command.ticket)
                except EncodeError as exc:  # it would end the main loop
                    logger.error("answer to %s: %s", command.method, where(exc))  # noqa: TRY400
                    error = {"error": "the answer cannot be sent"}
                    self._reply(error, command.reply_to.routing_key, command.ticket)
            else:
                logger.error("refused to answer a control command elsewhere")

    def _set_clock(self, clock: Any) -> None:
        # Not to one that no message could carry any more.
        with suppress(msgspec.ValidationError):
            self.node.adjust_clock(msgspec.convert(clock, Count))

    def _answer(self, command: _Command) -> Any:
        handle = self.node.handlers.get(command.method)
        if handle is None:
            logger.error("refused a control command that workers do not answer")
            return {"error": "not answered here"}
        try:
            return handle(self.node.state, **(command.arguments or {}))
        except Exception as exc:  # noqa: BLE001 - its text may quote what it was told
            logger.error("control command %s failed: %s", command.method, where(exc))  # noqa: TRY400
            return {"error": type(exc).__name__}

    def _reply(self, answer: Any, routing_key: str, ticket: str | None) -> None:
        """Over the node's own channel, once.

        kombu's own takes a connection of a pool, and tries for ever while RabbitMQ is away.
        Raises EncodeError.
        """
        mailbox = self.node.mailbox
        kombu.Producer(self.node.channel, auto_declare=False).publish(
            {self.hostname: answer},
            exchange=self._answers.name,
            routing_key=routing_key,
            delivery_mode=self._answers.delivery_mode,
            headers={"ticket": ticket, "clock": mailbox.clock.forward()},
            serializer=mailbox.serializer,
            retry=False,
        )


class WaryControl(Control):  # type: ignore[misc]
    """Celery's step, with our mailbox."""

    def __init__(self, c: Consumer, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        self.box = _Mailbox(c)
        self.start, self.stop, self.shutdown = self.box.start, self.box.stop, self.box.shutdown


def _own_queue(mailbox: Any, hostname: str) -> Any:
    """A queue for control commands that no other connection has: each command reaches everybody.

    kombu's own is one for a name, and exclusive.  RabbitMQ would refuse it to a second worker of
    that name, which then connects again and again; and to the same worker as long as it holds a
    lost connection for alive.
    """
    return type(mailbox).get_queue(mailbox, f"{hostname}.{uuid4().hex}")


def _stats(state: Any, **_: Any) -> dict[str, Any]:
    """Control command: Celery's `stats`, and what this worker is; Flower shows both."""
    own = service.current().presence.status()
    stats: dict[str, Any] = Panel.data["stats"](state)
    stats["broker"].pop("transport_options")  # a function is in them, which no message can carry
    return stats | {name: getattr(own, name) for name in ("role", "device", "model", "engine")}


def _abort(_state: Any, request_ids: Any) -> dict[str, str]:
    """Control command: drop requests whose caller has hung up."""
    service.current().abort_soon(msgspec.convert(request_ids, tuple[Name, ...]))
    return {"ok": "aborting"}


def _revoke(
    state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **_: Any
) -> dict[str, str]:
    """Control command: Celery's `revoke`, for both stages of a request, never asking the bus here.

    A caller knows the id of its request, which is the second stage's: the first one has another.
    """
    named = [task_id] if isinstance(task_id, str) else task_id or ()
    named = msgspec.convert(named, tuple[Name, ...])
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
