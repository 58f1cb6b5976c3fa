"""What is left of jobs that were given up? A queue of them, for people.

A worker answers for a job that was delivered too often, then puts it here.  Letters are kept for a
week, the newest thousand of them.  Looking at them takes them out of the queue without
acknowledging: RabbitMQ puts them back, in their order, when the look is over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import kombu
import msgspec
from amqp.exceptions import AMQPError, MessageNacked
from kombu.exceptions import KombuError, OperationalError
from kombu.serialization import dumps, loads

from pdtasks import naming
from pdtasks.broker.frames import frame_handler
from pdtasks.bus.reply import is_reply_stream
from pdtasks.errors import BrokerUnavailable, IncompatibleWorker, InvalidRequest
from pdtasks.messages import DecodeJob, PrefillJob, TextRequest, read_message
from pdtasks.settings import Settings
from pdtasks.tls import amqp_arguments

_MOST_LETTERS = 1000
_MOST_BYTES = 256 << 20
_KEPT_MS = 7 * 24 * 3600 * 1000
#: Header of a letter: what was wrong, where and when.
_HEADER = "pdtasks-dead"
#: Celery's headers, as `pdtasks.pipeline` fills them in.  Of all others nothing is kept.
_HEADERS = (
    *("lang", "task", "id", "root_id", "parent_id", "origin", "argsrepr", "kwargsrepr"),
    *("ignore_result", "retries", "timelimit"),
)
_LONGEST_HEADER = 1000  # characters
#: What is shown of how tokens are chosen: other fields may hold what a caller has written.
_NUMBERS = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed", "n")
_CONNECT_S = 5.0
_CONFIRM_S = 10.0
_JOBS: Mapping[str, type[PrefillJob | DecodeJob]] = {
    naming.PREFILL_TASK: PrefillJob,
    naming.DECODE_TASK: DecodeJob,
}


def kept_queue(channel: Any = None) -> kombu.Queue:
    """The queue; classic, for a quorum queue counts each look as a delivery and has a limit."""
    return kombu.Queue(
        naming.KEPT_QUEUE,
        exchange=kombu.Exchange(naming.KEEP_EXCHANGE, type="fanout", durable=True),
        channel=channel,
        durable=True,
        queue_arguments={
            "x-queue-type": "classic",
            "x-max-length": _MOST_LETTERS,
            "x-max-length-bytes": _MOST_BYTES,
            "x-message-ttl": _KEPT_MS,
        },
    )


def keep(message: kombu.Message, reason: str, producer: kombu.Producer) -> None:
    """Put a dead `message` into the queue. Raises what kombu raises."""
    death = last_death(message)
    told = {"reason": reason, "queue": str(death.get("queue", "?")), "at": time.time()}
    # What somebody else has put there may be larger than RabbitMQ takes back, or nothing that
    # py-amqp can write.
    known = {name: value for name, value in message.headers.items() if name in _HEADERS}
    headers: dict[str, Any] = {n: v for n, v in known.items() if len(repr(v)) <= _LONGEST_HEADER}
    headers[_HEADER] = told
    # Not the default exchange: who may write there may write to every queue.
    _publish(message, producer, naming.KEEP_EXCHANGE, "", headers=headers)


def last_death(message: kombu.Message) -> dict[str, Any]:
    """What RabbitMQ says of why `message` is dead; anybody may have written it."""
    deaths: Any = message.headers.get("x-death")
    last: Any = deaths[0] if isinstance(deaths, list) and deaths else {}
    return last if isinstance(last, dict) else {}


@dataclass(frozen=True)
class DeadLetter:
    """One job that was given up. Shows nothing of its prompt by itself."""

    id: str  #: Celery's id of the task
    task: str
    queue: str  #: where it came from
    reason: str
    at: float  #: UNIX seconds
    num_bytes: int
    is_streamed: bool  #: its caller read along, and was told of the failure
    message: kombu.Message

    @classmethod
    def of(cls, message: kombu.Message) -> DeadLetter:
        """From the queue. Nothing in it is taken for granted."""
        headers = message.headers
        told = headers.get(_HEADER)
        told = told if isinstance(told, dict) else {}
        return cls(
            id=str(headers.get("id", "-")),
            task=str(headers.get("task", "-")),
            queue=str(told.get("queue", "?")),
            reason=str(told.get("reason", "")),
            at=at if isinstance(at := told.get("at"), float) else 0.0,
            num_bytes=len(message.body or b""),
            is_streamed=is_reply_stream(message.properties.get("reply_to")),
            message=message,
        )

    def job(self) -> PrefillJob | DecodeJob:
        """What was to be done, prompt and all. Raises InvalidRequest when it is none of ours."""
        try:
            (wire,), _, _ = self._body()
            return read_message(_JOBS[self.task], wire)
        except (KombuError, IncompatibleWorker, LookupError, TypeError, ValueError) as exc:
            raise self._unreadable(exc) from None

    def about(self) -> dict[str, Any]:
        """What it was to do, without its prompt. Raises InvalidRequest as `job` does."""
        job = self.job()
        found: dict[str, Any] = {"request": job.request_id, "model": job.model}
        if isinstance(job, PrefillJob) and job.siblings:
            found["answers"] = len(job.request_ids)
        if isinstance(job, DecodeJob):
            found["tokens of the answer"] = len(job.output_token_ids)
        prompt, sampling = self._asked(job)
        if isinstance(prompt, list):
            found["prompt tokens"] = len(prompt)
        return found | {name: sampling.get(name) for name in _NUMBERS}

    def prompt(self) -> str:
        """The prompt, or its token ids. Raises InvalidRequest as `job` does."""
        return str(self._asked(self.job())[0])

    def _asked(self, job: PrefillJob | DecodeJob) -> tuple[Any, dict[str, Any]]:
        """Prompt (a list: its token ids) and what is to be known of how tokens are chosen."""
        if job.request is None:
            text = job.text or TextRequest()
            ids = text.prompt_token_ids
            return list(ids) if ids is not None else text.prompt or text.messages, text.sampling
        from pdtasks.engine.wire import decode_request

        request = decode_request(job.request)
        sampling = {name: getattr(request.sampling_params, name, None) for name in _NUMBERS}
        return list(request.prompt_token_ids or ()), sampling

    def _unreadable(self, exc: Exception) -> InvalidRequest:
        kind = type(exc).__name__
        return InvalidRequest(f"{self.id} is no job that this release can read ({kind})")

    def _body(self) -> Any:
        if self.message.content_encoding != "binary":  # others may unpack, to whatever size
            raise ValueError("no encoding of ours")
        return loads(
            self.message.body,
            self.message.content_type,
            self.message.content_encoding,
            accept={"application/x-msgpack", "application/json"},
        )

    def _begins_anew(self, deadline: float) -> bytes:
        """The body with another deadline."""
        job = msgspec.structs.replace(self.job(), deadline=deadline)
        _, kwargs, embedded = self._body()
        _, _, body = dumps([[job.to_wire()], kwargs, embedded], serializer="msgpack")
        return bytes(body)


class DeadLetters:
    """A look at the queue. For one thread."""

    def __init__(self, channel: Any, settings: Settings) -> None:
        self._channel = channel
        self._settings = settings
        self._queue = kept_queue(channel)
        self._queue.queue_declare()
        self._letters = list(self._take())

    def _take(self) -> Iterator[DeadLetter]:
        # Not more than there are now: a look ends.
        for _ in range(self._queue.queue_declare(passive=True).message_count):
            message = self._queue.get(no_ack=False, accept=None)
            if message is None:
                return
            yield DeadLetter.of(message)

    def all(self) -> list[DeadLetter]:
        """The oldest first."""
        return list(self._letters)

    def find(self, letter_id: str) -> DeadLetter:
        """The newest of this id, of the task or of its request. Raises InvalidRequest."""
        for letter in reversed(self._letters):
            if letter_id in (letter.id, naming.request_id_of(letter.id)):
                return letter
        raise InvalidRequest(f"no dead letter {letter_id!r}: see `pdtasks deadletter list`")

    def drop(self, letter: DeadLetter) -> None:
        """Forget it."""
        letter.message.ack()
        self._letters.remove(letter)

    def replay(self, letter: DeadLetter, *, timeout_s: float) -> None:
        """Have it done from the beginning, within `timeout_s`; it is no dead letter then.

        Raises InvalidRequest for what is no job of ours, BrokerUnavailable.
        """
        job = letter.job()
        body = letter._begins_anew(time.time() + timeout_s)  # noqa: SLF001 - this module's own
        headers = {
            name: value for name, value in letter.message.headers.items() if name in _HEADERS
        }
        queue = self._settings.queue_of(naming.stage_of(letter.task), job.model)
        with kombu.Producer(self._channel) as producer:
            _publish(letter.message, producer, naming.EXCHANGE, queue, headers=headers, body=body)
        self.drop(letter)


@contextmanager
def dead_letters(settings: Settings) -> Iterator[DeadLetters]:
    """A look at the queue; what is not dropped meanwhile is there again afterwards.

    Raises ConfigurationError without a broker, BrokerUnavailable.
    """
    try:
        with kombu.Connection(
            **amqp_arguments(settings.require_broker()),
            connect_timeout=_CONNECT_S,
            transport_options={
                "confirm_publish": True,
                "frame_handler": frame_handler,
                "read_timeout": _CONFIRM_S,
                "write_timeout": _CONFIRM_S,
            },
        ) as connection:
            yield DeadLetters(connection.channel(), settings)
    except (AMQPError, MessageNacked, OperationalError, OSError) as exc:
        raise BrokerUnavailable(
            f"RabbitMQ cannot be reached ({type(exc).__name__}): is it running?"
        ) from exc


def _publish(
    message: kombu.Message,
    producer: kombu.Producer,
    exchange: str,
    routing_key: str,
    *,
    headers: dict[str, Any],
    body: bytes | None = None,
) -> None:
    """`message` again, its body as it is or another one of the same kind."""
    properties = message.properties
    kinds = {"content_type": message.content_type, "content_encoding": message.content_encoding}
    if body is not None:
        kinds = {"content_type": "application/x-msgpack", "content_encoding": "binary"}
    producer.publish(
        message.body if body is None else body,
        exchange=exchange,
        routing_key=routing_key,
        headers=headers,
        delivery_mode=2,
        correlation_id=properties.get("correlation_id"),
        reply_to=properties.get("reply_to"),
        retry=False,
        **kinds,
    )
