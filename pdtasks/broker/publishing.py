"""How does a message get to RabbitMQ for certain, without anybody waiting longer than he wants to?

One thread owns one connection.  It sends what others hand it, in order, and takes the confirms as
they come: a hundred messages cost one round trip, and one that RabbitMQ holds back (a memory alarm)
holds up nobody but who waits for it.  What a lost connection leaves unconfirmed is sent again:
a message may arrive twice, and never not at all without an error.  RabbitMQ confirms also what it
has no queue for: so each is `mandatory`, and comes back then.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import kombu
from amqp.exceptions import AMQPError
from celery import Celery
from kombu.exceptions import OperationalError
from prometheus_client import Counter

from pdtasks.background import Background
from pdtasks.backoff import Backoff
from pdtasks.errors import BrokerUnavailable, PdtasksError, QueueFull, where

logger = logging.getLogger(__name__)

#: Seconds that a connection may take to come about.
_CONNECT_S = 5.0
#: Seconds without any confirm after which a connection is replaced, unless RabbitMQ has said that
#: it takes nothing now.
_SUSPECT_S = 30.0
#: Seconds between two looks at deadlines.
_LOOK_S = 0.2
#: Seconds that a close waits for confirms that are on their way.
_CLOSE_S = 1.0

_ERRORS = (AMQPError, OperationalError, OSError)

_RETRIES = Counter(
    "pdtasks_publish_retries", "Messages that wait for another try after RabbitMQ was lost"
)

#: Publishes one message, once.
Publish = Callable[[kombu.Producer], None]


class _Producer(kombu.Producer):
    """Numbers its messages as RabbitMQ does, so that one that comes back is known."""

    number = 0

    def publish(self, body: Any, *args: Any, **options: Any) -> None:
        options |= {"mandatory": True, "message_id": str(self.number + 1)}
        super().publish(body, *args, **options)  # type: ignore[no-untyped-call]
        self.number += 1  # of those that RabbitMQ has seen


@dataclass(eq=False)
class _Message:
    publish: Publish
    until: float  # monotonic
    insist: bool
    done: Future[None]
    losses: int = 0  # connections that were lost with it

    def settle(self, error: PdtasksError | None = None) -> None:
        with contextlib.suppress(InvalidStateError):  # nobody waits any more
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)


class ConfirmedSender:
    """Sends messages, each confirmed. For any thread."""

    def __init__(self, app: Celery, background: Background, name: str = "publisher") -> None:
        """Args:
        name: of its thread, which starts with the first message.
        """
        self._app = app
        self._background = background
        self._name = name
        self._lock = threading.Lock()
        self._inbox: deque[_Message] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._is_told = False  # that there is something in the inbox
        self._wake_up: socket.socket
        self._woken: socket.socket
        # Below: the sender's thread alone.
        self._waiting: deque[_Message] = deque()
        self._unconfirmed: dict[int, _Message] = {}
        self._confirmed_at = 0.0
        self._connection: Any = None
        self._producer: _Producer | None = None
        self._returned: list[_Message] = []
        self._blocked = ""
        self._backoff = Backoff(maximum_s=5.0)
        self._connect_at = 0.0
        self._expire_at = 0.0

    def send(self, publish: Publish, *, within_s: float, insist: bool = False) -> Future[None]:
        """Have a message sent; the result comes when RabbitMQ has confirmed it.

        Args:
            publish: called in the sender's thread, again after a lost connection.
            within_s: seconds after which nobody waits any more.
            insist: try for so long when RabbitMQ cannot be reached; else that is an error at once.

        The future raises BrokerUnavailable, or QueueFull when RabbitMQ refuses the message.
        Cancelled before it was sent, it is not sent.
        """
        message = _Message(publish, time.monotonic() + within_s, insist, Future())
        with self._lock:
            if self._closed:
                message.settle(BrokerUnavailable("this process stops"))
                return message.done
            self._inbox.append(message)
            if self._thread is None:
                self._wake_up, self._woken = socket.socketpair()
                self._wake_up.setblocking(False)
                self._woken.setblocking(False)
                self._thread = self._background.thread(self._name, self._run)
            was_told, self._is_told = self._is_told, True
        if not was_told:
            self._wake()
        return message.done

    def close(self) -> None:
        """Wait a moment for confirms that are on their way, then end. What waits has failed."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is None:
            return
        self._wake()
        thread.join(_CLOSE_S + 1)
        if not thread.is_alive():
            self._wake_up.close()
            self._woken.close()

    def _wake(self) -> None:
        # Full: it will wake anyhow. Closed: nobody is there any more.
        with contextlib.suppress(OSError):
            self._wake_up.send(b"!")

    # -- the sender's thread -------------------------------------------------------------------

    def _run(self) -> None:
        closes_at = None
        try:
            while closes_at is None or (self._unconfirmed and time.monotonic() < closes_at):
                self._take()
                self._expire()
                self._send_waiting()
                if closes_at is None and self._closed:
                    closes_at = time.monotonic() + _CLOSE_S
                    continue
                self._wait()
        finally:
            # Also after a surprise: who waits is told, and the next message finds a new connection.
            self._disconnect()
            error = BrokerUnavailable("RabbitMQ has not confirmed the message")
            while self._waiting:
                self._waiting.popleft().settle(error)

    def _take(self) -> None:
        with self._lock:
            self._waiting.extend(self._inbox)
            self._inbox.clear()
            self._is_told = False

    def _expire(self) -> None:
        now = time.monotonic()
        if now < self._expire_at:
            return
        self._expire_at = now + _LOOK_S
        for tag, message in list(self._unconfirmed.items()):
            if message.done.cancelled() or now > message.until:
                # RabbitMQ may have it all the same.
                del self._unconfirmed[tag]
                message.settle(self._late())
        if any(m.done.cancelled() or now > m.until for m in self._waiting):
            kept: deque[_Message] = deque()
            for message in self._waiting:
                if message.done.cancelled() or now > message.until:
                    message.settle(self._late())
                else:
                    kept.append(message)
            self._waiting = kept
        if self._unconfirmed and not self._blocked and now - self._confirmed_at > _SUSPECT_S:
            logger.warning("RabbitMQ confirms nothing: connecting again")
            self._disconnect()

    def _late(self) -> BrokerUnavailable:
        why = self._blocked or "is it running?"
        return BrokerUnavailable(f"RabbitMQ did not confirm the message in time: {why}")

    def _send_waiting(self) -> None:
        # What RabbitMQ does not read would only fill the socket, until nobody can write.
        while self._waiting and self._is_connected() and not self._blocked:
            assert self._producer is not None
            message = self._waiting[0]
            if message.done.cancelled():
                self._waiting.popleft()
                continue
            if not self._unconfirmed:
                self._confirmed_at = time.monotonic()
            try:
                message.publish(self._producer)
            except _ERRORS as exc:
                # A broken connection, or a refusal of this very message (its queue is another than
                # we say): the second time tells.
                self._lose_connection(exc, times=2)
                continue
            except PdtasksError as exc:  # says what is wrong with this one
                message.settle(exc)
                self._waiting.popleft()
                continue
            except Exception as exc:  # noqa: BLE001 - one odd message must not take others along
                logger.error("a message could not be sent: %s", where(exc))  # noqa: TRY400
                message.settle(PdtasksError(f"the message was not sent: {type(exc).__name__}"))
                self._waiting.popleft()
                continue
            self._waiting.popleft()
            self._unconfirmed[self._producer.number] = message

    def _is_connected(self) -> bool:
        if self._producer is not None:
            return True
        if time.monotonic() < self._connect_at:
            return False
        try:
            # Nobody would send heartbeats on it.
            self._connection = self._app.connection_for_write(heartbeat=0)
            self._connection.ensure_connection(max_retries=1, interval_start=0, timeout=_CONNECT_S)
            amqp = self._connection.connection
            amqp.on_blocked, amqp.on_unblocked = self._on_blocked, self._on_unblocked
            channel = self._connection.default_channel
            channel.confirm_select()
            channel.events["basic_ack"].add(self._on_ack)
            channel.events["basic_nack"].add(self._on_nack)
            self._producer = _Producer(  # type: ignore[no-untyped-call]
                channel, auto_declare=False, on_return=self._on_return
            )
        except _ERRORS as exc:
            self._lose_connection(exc, times=1)
            return False
        return True

    def _wait(self) -> None:
        """Until there is something to do; takes confirms as they come."""
        readers: list[Any] = [self._woken]
        if self._producer is not None:
            readers.append(self._connection.connection.sock)
        idle = not self._waiting and not self._unconfirmed
        ready, _, _ = select.select(readers, [], [], None if idle else _LOOK_S)
        if self._woken in ready:
            self._woken.recv(4096)
        if len(ready) > 1 or (ready and self._woken not in ready):
            try:
                amqp = self._connection.connection
                with amqp.transport.having_timeout(0):  # once for all, not for each
                    while True:
                        amqp.drain_events(timeout=0)
            except TimeoutError:
                pass  # nothing more
            except _ERRORS as exc:
                self._lose_connection(exc, times=2)
        if self._returned:
            self._try_returned_again()

    def _try_returned_again(self) -> None:
        """What RabbitMQ had no queue for: perhaps it was removed since somebody has looked."""
        returned, self._returned = self._returned, []
        for message in reversed(returned):
            message.losses += 1
            if message.losses < 2 or message.insist:
                self._waiting.appendleft(message)
            else:
                message.settle(
                    BrokerUnavailable("RabbitMQ has no queue for the message: start a worker")
                )
        if any(message.insist and message.losses >= 2 for message in returned):
            self._lose_connection(BrokerUnavailable(), times=3)  # and wait a while
        elif self._connection is not None:
            self._connection.declared_entities.clear()

    def _lose_connection(self, exc: BaseException, times: int) -> None:
        """`times`: losses after which a message that does not insist has failed."""
        self._disconnect()
        pause_s = self._backoff.pause_s
        self._backoff.fail()
        self._connect_at = time.monotonic() + pause_s
        error = BrokerUnavailable(f"RabbitMQ did not take the message {_why(exc)}")
        kept: deque[_Message] = deque()
        for message in self._waiting:
            message.losses += 1
            if message.insist or message.losses < times:
                kept.append(message)
            else:
                message.settle(error)
        self._waiting = kept
        if kept:
            _RETRIES.inc(len(kept))
            kind = type(exc).__name__
            logger.warning("%d messages wait: %s, next try in %.1f s", len(kept), kind, pause_s)

    def _disconnect(self) -> None:
        """Without a handshake that a hung broker would never answer."""
        connection, self._connection, self._producer = self._connection, None, None
        # Before anything that came later.
        self._waiting.extendleft(reversed(self._unconfirmed.values()))
        self._unconfirmed.clear()
        self._blocked = ""
        if connection is not None:
            connection.collect()

    # -- called by amqp while it reads, in the same thread -----------------------------------------

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._confirm(tag, multiple, None)

    def _on_return(self, _error: Exception, _exchange: str, _key: str, returned: Any) -> None:
        message = self._unconfirmed.pop(int(returned.properties["message_id"]), None)
        if message is not None:
            self._returned.append(message)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._confirm(tag, multiple, QueueFull("the queue is full: try again later"))

    def _confirm(self, tag: int, multiple: bool, error: PdtasksError | None) -> None:
        self._confirmed_at = time.monotonic()
        self._backoff.succeed()
        tags = [t for t in self._unconfirmed if t <= tag] if multiple else [tag]
        for one in tags:
            message = self._unconfirmed.pop(one, None)
            if message is not None:
                message.settle(error)

    def _on_blocked(self, _reason: str) -> None:
        self._blocked = "it takes none now, as it does when memory or disk run low"
        logger.warning("RabbitMQ confirms nothing: %s", self._blocked)

    def _on_unblocked(self) -> None:
        logger.warning("RabbitMQ takes messages again")
        self._blocked = ""
        self._confirmed_at = time.monotonic()


def _why(exc: BaseException) -> str:
    cause = exc.__cause__ or exc
    if isinstance(cause, ssl.SSLError):
        return "(its certificate is not trusted): `pdtasks doctor` says why"
    return f"({type(exc).__name__}): is it running?"
