"""How do workers hear that nobody wants a request any more? By a broadcast, from a thread."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import kombu
from amqp.exceptions import AMQPError
from kombu.exceptions import OperationalError
from prometheus_client import Counter

from pdtasks.app import app
from pdtasks.background import Background
from pdtasks.backlog import Backlog
from pdtasks.backoff import Backoff
from pdtasks.broker.declaring import ensure_declared
from pdtasks.errors import BrokerUnavailable
from pdtasks.naming import ABORT

logger = logging.getLogger(__name__)

#: Seconds between two messages.
ABORT_PAUSE_S = 0.1
#: Requests that may wait to be said; beyond that the oldest are never said.
MOST_PENDING = 100_000
#: Requests in one message: RabbitMQ bounds its size, and a worker's main loop has to read it.
MOST_AT_ONCE = 1_000
#: Seconds that a connection may take to come about.
_CONNECT_S = 5.0
#: Seconds that a close waits for what is left.
_CLOSE_S = 5.0

_UNSAID = Counter("pdtasks_aborts_unsaid", "Requests whose end no worker was told of")


class Aborter:
    """Tells all workers to drop requests, from a thread and a connection of its own.

    Whoever asks never waits.  A worker that does not hear of it works for nothing, but for nobody.
    """

    def __init__(self, background: Background | None = None) -> None:
        self._connection: Any = None
        self._unsaid = Backlog(MOST_PENDING, _UNSAID)
        self._backoff = Backoff(maximum_s=5.0)
        self._thread = (background or Background()).thread("aborter", self._run)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Have `request_ids` dropped, soon. Those that wait already are said once."""
        self._unsaid.add(request_ids)

    def close(self) -> None:
        """Say what is left, for a moment at most, then stop; the rest is counted."""
        self._unsaid.close()
        self._thread.join(_CLOSE_S)
        self._unsaid.abandon()

    def _run(self) -> None:
        while True:
            request_ids = self._unsaid.take(MOST_AT_ONCE)
            said = False
            try:
                said = not request_ids or self._send(sorted(request_ids))
            finally:
                # Also after a surprise: what was not said is said later, on a connection that is
                # not the one it may have come from.
                if said:
                    self._unsaid.settle()
                else:
                    self._disconnect()
                    self._unsaid.put_back(request_ids)
            if self._unsaid.is_closed and (not said or not self._unsaid):
                self._disconnect()
                return
            # Every step of a worker that has not heard yet asks again: gather those.
            if not said:
                self._unsaid.pause(self._backoff.pause_s)
            elif len(request_ids) < MOST_AT_ONCE:
                self._unsaid.pause(ABORT_PAUSE_S)

    def _send(self, request_ids: list[str]) -> bool:
        try:
            self._broadcast(request_ids)
        except (AMQPError, OperationalError, OSError, BrokerUnavailable) as exc:
            is_stale = self._connection is not None and not self._backoff.pause_s
            self._disconnect()
            self._backoff.fail()
            if is_stale and not self._unsaid.is_closed:
                # It broke while nobody looked: a fresh one will do, at once.
                return self._send(request_ids)
            logger.warning(
                "%d aborts wait: %s, trying again in %.1f s",
                len(request_ids),
                type(exc).__name__,
                self._backoff.pause_s,
            )
            return False
        self._backoff.succeed()
        return True

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # Without a handshake that a hung broker would never answer.
            connection.collect()

    def _broadcast(self, request_ids: list[str]) -> None:
        if self._connection is None:
            connection = app.connection_for_write(heartbeat=0)
            # `default_channel` alone would sleep between tries of its own, and say nothing.
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=_CONNECT_S)
            self._connection = connection
        # Celery's own `control.broadcast` takes a connection of its pool, and tries for ever.
        exchange = app.control.mailbox.exchange
        ensure_declared(self._connection.default_channel, exchange)
        kombu.Producer(self._connection.default_channel, auto_declare=False).publish(
            {
                "method": ABORT,
                "arguments": {"request_ids": request_ids},
                "destination": None,
                "pattern": None,
                "matcher": None,
            },
            exchange=exchange.name,
            serializer="json",
            headers={"clock": app.clock.forward(), "expires": 0},
            retry=False,
        )
