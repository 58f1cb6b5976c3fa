"""How is the bus reached? The Valkey server for replies, presence and results.

A bus that is frozen or behind a dead network must look like one that is away: every answer has a
deadline, and idle connections are checked.
"""

from __future__ import annotations

from typing import Any

import valkey
import valkey.asyncio

from pdtasks.settings import Settings

#: What is raised when the bus does not answer.
BUS_ERRORS = (valkey.ValkeyError, OSError)

#: Seconds; more than the longest blocking read (`pdtasks.reply`).
_ANSWER_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 2.0

_OPTIONS: dict[str, Any] = {
    "socket_timeout": _ANSWER_TIMEOUT_S,
    "socket_connect_timeout": _CONNECT_TIMEOUT_S,
    "health_check_interval": 10,
}


def connect(settings: Settings) -> valkey.Valkey:
    """A client for threads. Connects on first use. Raises ConfigurationError without a URL."""
    client: valkey.Valkey = valkey.Valkey.from_url(settings.require_bus(), **_OPTIONS)
    return client


def connect_async(settings: Settings) -> valkey.asyncio.Valkey:
    """A client for one event loop. Connects on first use."""
    url = settings.require_bus()
    client: valkey.asyncio.Valkey = valkey.asyncio.Valkey.from_url(url, **_OPTIONS)
    return client
