"""How are RabbitMQ's frames read? Many by one call of the kernel.

py-amqp asks for a frame in three pieces, a message is three frames, and around each it sets the
socket's timeout twice.  Each of these calls lets another thread have the interpreter, which is then
waited for.  Here who only looks whether anything has come takes all that is there, up to a piece,
and handles every whole frame of it before anybody waits for the socket again: it would not tell of
what was taken already.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from pdtasks.broker import frames

#: Bytes that are taken at most.
_PIECE = 1 << 16
#: Bytes of a frame before and behind its content, and the content's length among those before.
_BEFORE, _BEHIND = 7, 1
_LENGTH = struct.Struct(">xxxI")


def frame_handler(connection: Any, callback: Callable[..., Any]) -> Callable[[Any], bool]:
    """`frames.frame_handler`; py-amqp calls it when a connection's socket is there."""
    transport = connection.transport

    def read(timeout: float | None = None) -> bool:
        """Returns True if anything came that is complete; raises TimeoutError."""
        if timeout != 0:
            # Somebody waits for an answer, and has to see it before what comes behind it: a
            # consumer knows its messages only when RabbitMQ has said yes to it.
            return bool(type(connection).blocking_read(connection, timeout))
        found = False
        if not _has_frame(transport):
            _take_what_is_there(transport)
        while connection.connected and _has_frame(transport):
            found = connection.on_inbound_frame(transport.read_frame()) or found
        return found

    connection.blocking_read = read
    return frames.frame_handler(connection, callback)


def _take_what_is_there(transport: Any) -> None:
    """Raises TimeoutError when nothing is.

    (py-amqp's own would try again and again until the rest of a frame comes.)
    """
    with transport.having_timeout(0):
        piece = transport._quick_recv(_PIECE)  # noqa: SLF001
    if not piece:
        transport.connected = False
        raise ConnectionError("RabbitMQ has closed the connection")
    transport._read_buffer += piece  # noqa: SLF001


def _has_frame(transport: Any) -> bool:
    """Is a whole frame there that was read already?"""
    there: bytes = transport._read_buffer  # noqa: SLF001
    if len(there) < _BEFORE + _BEHIND:
        return False
    length: int = _LENGTH.unpack_from(there)[0]
    return len(there) >= _BEFORE + length + _BEHIND
