"""How do a worker's events get to Flower without holding anybody up?

Celery's own dispatcher publishes from whichever thread ends a task, over a connection that the
main loop reads as well: with the threads pool one of them waits for ever for a frame that the other
has taken (Celery 5.7, `celery.worker.consumer.events`).  Events are telling, not work: here they go
into a bounded buffer, and one thread with a connection of its own sends them, without confirms.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import kombu
import msgspec
from amqp.exceptions import AMQPError
from celery import Celery
from celery.events.event import Event, get_exchange, group_from
from celery.utils.time import utcoffset
from kombu.exceptions import OperationalError
from prometheus_client import Counter

from pdtasks.background import Background
from pdtasks.backoff import Backoff

logger = logging.getLogger(__name__)

#: Events kept while RabbitMQ is away or slow; then the oldest are dropped.
BUFFER_SIZE = 10_000
#: Seconds in which events gather for one message.
_GATHER_S = 0.2
#: Events in one message.
_BATCH = 500
#: Seconds that a stop waits for the last events.
_CLOSE_S = 1.0

_DROPPED = Counter("pdtasks_events_dropped", "Task events that nobody will see")

_Routed = tuple[str, dict[str, Any]]


class EventSender:
    """What Celery's worker needs of an `EventDispatcher`, from any thread, never waiting."""

    #: Celery's loop keeps heartbeats on a dispatcher's connection; ours has none for it.
    connection: Any = None

    def __init__(
        self,
        app: Celery,
        hostname: str,
        background: Background,
        *,
        groups: Iterable[str] = (),
        enabled: bool = True,
    ) -> None:
        """Args:
        groups: kinds of events that are sent, "task" and "worker"; empty: all.
        """
        self.hostname = hostname
        self.groups = set(groups)
        self.enabled = enabled
        self.on_enabled: set[Callable[[], object]] = set()
        self.on_disabled: set[Callable[[], object]] = set()
        self.dropped = 0  #: events that nobody will see
        self._app = app
        self._pid = os.getpid()
        self._buffer: deque[_Routed] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._backoff = Backoff(maximum_s=10.0)
        self._own: kombu.Connection | None = None
        self._thread = background.thread("events", self._run)

    # -- from any thread ---------------------------------------------------------------------------

    def send(self, type: str, blind: bool = False, **fields: Any) -> None:  # noqa: A002 - Celery's name
        """Have an event sent, soon or not at all."""
        for option in ("retry", "retry_policy", "utcoffset", "Event"):
            fields.pop(
                option, None
            )  # of Celery's dispatcher; nothing is tried while somebody waits
        group = group_from(type)
        if not self.enabled or (self.groups and group not in self.groups):
            return
        clock = None if blind else self._app.clock.forward()
        event = Event(
            type,
            hostname=self.hostname,
            utcoffset=utcoffset(),
            pid=self._pid,
            clock=clock,
            **fields,
        )
        # Of tasks several travel in one message, as Celery's own do.
        key = "task.multi" if group == "task" else type.replace("-", ".")
        with self._lock:
            self._buffer.append((key, event))
            self._drop_oldest()
        self._wake.set()

    def enable(self) -> None:
        """Send from now on."""
        self.enabled = True
        for callback in list(self.on_enabled):
            callback()

    def disable(self) -> None:
        """Send nothing from now on."""
        if self.enabled:
            for callback in list(self.on_disabled):
                callback()
            self.enabled = False

    def flush(self, errors: bool = True, groups: bool = True) -> None:
        """Nothing to do: the sender's thread does it."""

    def close(self) -> None:
        """Send what is left, for a moment at most, and end."""
        self._closed = True
        self._wake.set()
        self._thread.join(_CLOSE_S)

    # -- the sender's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if not self._closed:
                time.sleep(_GATHER_S)
            while batch := self._take():
                try:
                    sent = self._send(batch)
                except Exception:
                    # What cannot be sent at all must not keep what comes after it.
                    self.dropped += len(batch)
                    _DROPPED.inc(len(batch))
                    self._wake.set()
                    raise
                if not sent:
                    self._put_back(batch)
                    if self._closed:
                        break
                    time.sleep(self._backoff.pause_s)
            if self._closed:
                self._disconnect()
                return

    def _take(self) -> list[_Routed]:
        """Events for one message."""
        with self._lock:
            batch: list[_Routed] = []
            while self._buffer and len(batch) < _BATCH:
                key = self._buffer[0][0]
                if batch and not (key == batch[0][0] == "task.multi"):
                    break
                batch.append(self._buffer.popleft())
            return batch

    def _put_back(self, batch: list[_Routed]) -> None:
        with self._lock:
            self._buffer.extendleft(reversed(batch))
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        while len(self._buffer) > BUFFER_SIZE:
            self._buffer.popleft()
            self.dropped += 1
            _DROPPED.inc()

    def _send(self, batch: list[_Routed]) -> bool:
        key = batch[0][0]
        events = [event for _, event in batch]
        try:
            if self._own is None:
                # Nobody would send heartbeats on it, or wait for confirms.
                self._own = self._app.connection_for_write(heartbeat=0)
                self._own.ensure_connection(max_retries=1, interval_start=0, timeout=5)
            exchange = get_exchange(self._own, name=self._app.conf.event_exchange)
            kombu.Producer(self._own.default_channel, auto_declare=False).publish(
                msgspec.json.encode(events if key == "task.multi" else events[0]),
                routing_key=key,
                exchange=exchange.name,
                declare=[exchange],
                content_type="application/json",
                content_encoding="utf-8",
                headers={"hostname": self.hostname},
                delivery_mode=1,
                retry=False,
            )
        except (AMQPError, OperationalError, OSError) as exc:
            self._disconnect()
            self._backoff.fail()
            logger.warning(
                "events wait: %s, trying again in %.1f s (%d dropped so far)",
                type(exc).__name__,
                self._backoff.pause_s,
                self.dropped,
            )
            return False
        self._backoff.succeed()
        return True

    def _disconnect(self) -> None:
        connection, self._own = self._own, None
        if connection is not None:
            # Without a handshake that a hung broker would never answer.
            connection.collect()
