"""What can go wrong, with the HTTP status that a caller sees.

A lost or damaged KV block is not among them: decode recomputes it and counts it.  Messages never
quote a prompt or an answer, for they reach logs, Celery events and Flower.
"""

from __future__ import annotations

import traceback


class PdtasksError(Exception):
    """Something failed inside pdtasks."""

    http_status = 500
    #: Which attempt at a request has failed; 0: it is the request that has, whoever runs it.
    attempt = 0

    @property
    def code(self) -> str:
        """The name under which this error crosses a process."""
        return type(self).__name__


class ConfigurationError(PdtasksError):
    """A setting is missing or contradicts another."""


class InvalidRequest(PdtasksError):
    """The request itself cannot be served."""

    http_status = 400


class RequestAborted(PdtasksError):
    """The caller hung up or cancelled."""

    http_status = 499


class RequestTimeout(PdtasksError):
    """The deadline passed before the answer was finished."""

    http_status = 504


class NoWorker(PdtasksError):
    """Nobody is there to do a stage."""

    http_status = 503


class TooManyRequests(PdtasksError):
    """So many requests wait already that one more would only wait for long."""

    http_status = 429

    def __init__(self, message: str = "", *, retry_after_s: int = 10) -> None:
        """`retry_after_s`: when there will be room, as far as that can be known."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(TooManyRequests):
    """RabbitMQ refused the message: its queue is full."""


class NoRoomForJobs(TooManyRequests):
    """The bus keeps as many jobs as it may."""


class NoRoomForBatches(TooManyRequests):
    """The bus keeps as many batches as it may."""


class NoRoomForFiles(PdtasksError):
    """A file does not fit into the bus."""

    http_status = 507


class BrokerUnavailable(PdtasksError):
    """RabbitMQ did not answer."""

    http_status = 503


class WorkerLost(PdtasksError):
    """Every worker that took the request died with it."""

    http_status = 503


class RepliesLost(PdtasksError):
    """The bus was restarted in the middle of an answer."""

    http_status = 503


class EngineFailed(PdtasksError):
    """vLLM gave up on this request."""

    http_status = 503


class IncompatibleWorker(PdtasksError):
    """Sender and worker run different versions of pdtasks or vLLM."""

    http_status = 503


def from_code(code: str, message: str) -> PdtasksError:
    """Rebuild the error that another process named `code`; an unknown name is a plain failure."""
    kind = globals().get(code)
    if isinstance(kind, type) and issubclass(kind, PdtasksError):
        return kind(message)
    return PdtasksError(message)


def where(exc: BaseException) -> str:
    """What may be logged of an unforeseen error: its kind, and where it came from.

    Never its text, nor that of its causes: they may quote a prompt.
    """
    frames = "".join(traceback.format_tb(exc.__traceback__))
    cause = exc.__cause__ or exc.__context__
    because = "" if cause is None else f" because of {type(cause).__name__}"
    return f"{type(exc).__name__}{because} at\n{frames}"
