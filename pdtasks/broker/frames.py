"""What of a message may stop its reader before anybody can refuse it? Nothing.

py-amqp reads a message's properties while it reads from the connection: a text that is no UTF-8, or
a time in the year 50000, and the exception ends the worker, then the next one that gets it.  kombu
unpacks a body that says that it is packed, however large it becomes; nobody of ours packs any.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from amqp import method_framing

logger = logging.getLogger(__name__)

#: A frame: its kind, its channel and what is in it.
_Frame = tuple[int, int, Any]
_HEADER = 2
#: Class, weight and size of the body; properties follow, here none.
_BEFORE_PROPERTIES, _NO_PROPERTIES = 12, b"\x00\x00"


def frame_handler(connection: Any, callback: Callable[..., Any]) -> Callable[[_Frame], bool]:
    """py-amqp's, for its connection's parameter of that name."""
    is_handed_over = False

    def hand_over(channel: int, method: Any, arguments: Any, content: Any) -> None:
        nonlocal is_handed_over
        is_handed_over = True
        if content is not None:
            headers = content.properties.get("application_headers")
            if headers:
                headers.pop("compression", None)
        callback(channel, method, arguments, content)

    handle: Callable[[_Frame], bool] = method_framing.frame_handler(connection, hand_over)

    def on_frame(frame: _Frame) -> bool:
        nonlocal is_handed_over
        is_handed_over = False
        try:
            return handle(frame)
        except Exception as exc:
            kind, channel, content = frame
            if kind != _HEADER or is_handed_over:
                raise
            error = type(exc).__name__
            logger.error("a message has properties that cannot be read: %s", error)  # noqa: TRY400
            without = bytes(content[:_BEFORE_PROPERTIES]) + _NO_PROPERTIES
            return handle((kind, channel, without))

    return on_frame
