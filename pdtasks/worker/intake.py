"""Which messages are jobs of ours? What is none is refused before Celery looks at it.

Celery believes what it finds in a message: an id that is a list, an ETA in a thousand years or a
body that is a number stop the worker's main loop, or keep one of its places for ever.  So a message
has to be what `pdtasks.pipeline` makes, field by field.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import kombu
import msgspec
from msgspec import Meta

from pdtasks.messages import Name
from pdtasks.naming import DECODE, DECODE_TASK, MODEL_NAME, PREFILL_TASK


def _one_of(*words: str) -> Meta:
    return Meta(pattern=rf"\A({'|'.join(map(re.escape, words))})\Z")


TASKS = (PREFILL_TASK, DECODE_TASK)
#: Content type and encoding of jobs.  Others may unpack, and become as large as they like.
KINDS = ("application/x-msgpack", "binary")


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Whose message is it? Also of a task that is none of ours."""

    id: Name
    task: str
    ignore_result: bool | None = None


class _Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """The headers that Celery reads; those of values that we never send are here to be none."""

    id: Name
    task: Annotated[str, _one_of(*TASKS)]
    root_id: Name | None = None
    parent_id: Name | None = None
    ignore_result: bool | None = None
    argsrepr: Literal["-"] = "-"  # Celery and Flower show them
    kwargsrepr: Literal["-"] = "-"
    origin: Name | None = None
    retries: Literal[0] = 0
    timelimit: tuple[None, None] = (None, None)
    replaced_task_nesting: Literal[0] = 0
    shadow: None = None
    eta: None = None
    expires: None = None
    group: None = None
    group_index: None = None
    stamped_headers: tuple[()] | None = None
    stamps: dict[str, None] | None = None
    delivery_info: None = None
    hostname: None = None


class _StepOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    task_id: Name
    queue: Annotated[str, Meta(pattern=rf"\A{DECODE}(\.{MODEL_NAME})?\Z")]
    reply_to: Name | None = None
    ignore_result: bool = False


class _Step(msgspec.Struct, frozen=True):
    """The task that is chained to another."""

    task: Annotated[str, _one_of(DECODE_TASK)]
    options: _StepOptions


class _Embedded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    callbacks: None = None
    errbacks: None = None
    chain: Annotated[tuple[_Step, ...], Meta(max_length=1)] | None = None
    chord: None = None


_Body = tuple[tuple[bytes], dict[str, None], _Embedded]


def read_address(message: kombu.Message) -> Address | None:
    """None: nobody can be told anything of `message`."""
    try:
        address = msgspec.convert(message.headers, Address)
    except (msgspec.ValidationError, RecursionError):
        return None
    return address if address.id else None


def why_refused(message: kombu.Message) -> str | None:
    """In words for the log, without anything of the message; None for a job of ours."""
    try:
        envelope = msgspec.convert(message.headers, _Envelope)
    except (msgspec.ValidationError, RecursionError):
        return "is no task of ours"
    if (message.content_type, message.content_encoding) != KINDS:
        return "is not written in MessagePack"
    message.accept = {KINDS[0]}
    try:
        # Kept in the message, for Celery asks for it next.
        payload: Any = message.payload
    except Exception:  # noqa: BLE001 - kombu's, or whatever it did not foresee
        return "cannot be decoded"
    try:
        _, kwargs, embedded = msgspec.convert(payload, _Body, builtin_types=(bytes,))
    except (msgspec.ValidationError, RecursionError):
        return "has another body than tasks of ours"
    if kwargs or (embedded.chain and envelope.task != PREFILL_TASK):
        return "has another body than tasks of ours"
    return None
