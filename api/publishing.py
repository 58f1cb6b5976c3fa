"""Has RabbitMQ got a job? Published by a thread of its own, waited for in the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Final, Protocol

from pdtasks.errors import BrokerUnavailable
from pdtasks.messages import DecodeJob, PrefillJob
from pdtasks.pipeline import CONFIRM_TIMEOUT_S

#: Seconds without a further try after RabbitMQ could not be reached.
_BROKER_PAUSE_S: Final = 2.0
#: Seconds that the publisher's thread may be late with its answer: it may hang in a write.
_LATE_S: Final = 1.0


class SendsJobs(Protocol):
    """`pdtasks.pipeline.Publisher`, as far as this module needs it."""

    def send(
        self, job: PrefillJob | DecodeJob, reply_to: str | None, trace: Mapping[str, str]
    ) -> Future[None]: ...

    def close(self) -> None: ...


class Publishing:
    """Jobs on their way to RabbitMQ. For one event loop."""

    def __init__(self, publisher: SendsJobs) -> None:
        self._publisher = publisher
        self._unconfirmed: dict[str, Future[None]] = {}
        self._away_until = 0.0  # monotonic

    async def publish(
        self, job: PrefillJob | DecodeJob, reply_to: str, trace: Mapping[str, str]
    ) -> bool:
        """Return when RabbitMQ has it; False when it was withdrawn before.

        Raises BrokerUnavailable when RabbitMQ does not take it in time, and what the publisher
        raises: PdtasksError, for a job that cannot be published.
        """
        if time.monotonic() < self._away_until:
            # At once, not each after its own wait.
            raise BrokerUnavailable("RabbitMQ cannot be reached: is it running?")
        sent = self._unconfirmed[job.request_id] = self._publisher.send(job, reply_to, trace)
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT_S + _LATE_S):
                await asyncio.wrap_future(sent)
        except asyncio.CancelledError:
            if job.request_id in self._unconfirmed:
                raise
            return False
        except BrokerUnavailable:
            self._away_until = time.monotonic() + _BROKER_PAUSE_S
            raise
        except TimeoutError:
            self._away_until = time.monotonic() + _BROKER_PAUSE_S
            raise BrokerUnavailable("RabbitMQ did not confirm the request in time") from None
        finally:
            self._unconfirmed.pop(job.request_id, None)
        return True

    def withdraw(self, request_id: str) -> None:
        """Nobody wants it any more: what has not left yet need not."""
        sent = self._unconfirmed.pop(request_id, None)
        if sent is not None:
            sent.cancel()

    def close(self) -> None:
        """End the publisher's thread. May take some seconds."""
        self._publisher.close()
