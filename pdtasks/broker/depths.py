"""How long are the queues? Asked of RabbitMQ now and then, over a connection of its own.

By a passive declaration, which any user may send: lengths alone need no right.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from amqp.exceptions import AMQPError, NotFound
from kombu.exceptions import OperationalError

from pdtasks.app import app
from pdtasks.errors import BrokerUnavailable

#: Seconds for which an answer is good.
_FRESH_S: Final = 1.0
#: Seconds for an answer, and for a connection to come about.
_ANSWER_S: Final = 2.0
_AWAY: Final = (AMQPError, OperationalError, OSError)


@dataclass(frozen=True)
class Depth:
    """Of one queue."""

    ready: int  #: messages that nobody has taken
    consumers: int


class Depths:
    """For one event loop."""

    def __init__(self, queues: Sequence[str]) -> None:
        self._queues = queues
        self._connection: Any = None
        self._executor = ThreadPoolExecutor(1, "queue-depths")
        self._asking: Future[dict[str, Depth]] | None = None
        self._asked_at = 0.0  # monotonic

    async def read(self) -> Mapping[str, Depth]:
        """By name; without queues that there are not. Raises BrokerUnavailable."""
        now = time.monotonic()
        is_old = now - self._asked_at > _FRESH_S
        # One that hangs is not asked again before it has ended.
        if self._asking is None or (self._asking.done() and is_old):
            self._asked_at = now
            self._asking = self._executor.submit(self._ask)
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await asyncio.shield(asyncio.wrap_future(self._asking))
        except (*_AWAY, TimeoutError) as exc:
            raise BrokerUnavailable(
                f"RabbitMQ does not tell its queues: {type(exc).__name__}"
            ) from exc

    def close(self) -> None:
        """End the connection; an answer that hangs is not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._disconnect()

    # -- in the thread -------------------------------------------------------------------------

    def _ask(self) -> dict[str, Depth]:
        was_connected = self._connection is not None
        try:
            return self._ask_once()
        except _AWAY:
            self._disconnect()
            if not was_connected:
                raise
            return self._ask_once()  # it broke while nobody looked

    def _ask_once(self) -> dict[str, Depth]:
        if self._connection is None:
            connection = app.connection_for_write(heartbeat=0)
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=_ANSWER_S)
            self._connection = connection
        found = {}
        channel = self._connection.channel()
        for queue in self._queues:
            try:
                told = channel.queue_declare(queue, passive=True)
            except NotFound:
                channel = self._connection.channel()  # the refusal has closed that one
            else:
                found[queue] = Depth(ready=told.message_count, consumers=told.consumer_count)
        channel.close()
        return found

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # Without a handshake that a hung broker would never answer.
            connection.collect()
