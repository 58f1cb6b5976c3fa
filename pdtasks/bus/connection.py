"""How is the bus reached? The Valkey server for replies, presence and results.

A bus that is frozen or behind a dead network must look like one that is away: every answer has a
deadline, and idle connections are checked.

In event loops the deadline is ours: valkey-py's own (`socket_timeout`) sends every command through
`asyncio.wait_for`, which on Python 3.11 drops a cancellation that arrives in the same turn of the
loop as its result (CPython issue 86296, mended in 3.12), and the task runs on for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import valkey
import valkey.asyncio
from valkey.asyncio.client import Pipeline

from pdtasks.settings import Settings
from pdtasks.tls import valkey_url

#: What is raised when the bus does not answer.
BUS_ERRORS = (valkey.ValkeyError, OSError)

#: Seconds for one command, or for one pipeline whatever is in it.
_ANSWER_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 2.0

_OPTIONS: dict[str, Any] = {
    "socket_connect_timeout": _CONNECT_TIMEOUT_S,
    "health_check_interval": 10,
}


def connect(settings: Settings) -> valkey.Valkey:
    """A client for threads. Connects on first use. Raises ConfigurationError without a URL."""
    client: valkey.Valkey = valkey.Valkey.from_url(
        valkey_url(settings.require_bus()), socket_timeout=_ANSWER_TIMEOUT_S, **_OPTIONS
    )
    return client


def connect_async(settings: Settings) -> valkey.asyncio.Valkey:
    """A client for one event loop. Connects on first use.

    Each command raises `valkey.TimeoutError` when it has no answer in time; a cancellation ends
    the task that waits for one.
    """
    return connect_async_to(settings.require_bus())


def connect_async_to(url: str) -> valkey.asyncio.Valkey:
    """The same for the bus at `url`, one of several."""
    client: valkey.asyncio.Valkey = _BoundedClient.from_url(valkey_url(url), **_OPTIONS)
    # Here, for what the URL says wins over options.
    client.connection_pool.connection_kwargs["socket_timeout"] = None
    return client


class _BoundedClient(valkey.asyncio.Valkey):
    """Bounds commands from outside.

    valkey-py closes a connection on which a command was interrupted, so that the next one does not
    read the late answer (`AbstractConnection.read_response`).
    """

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        async with _answer_within(_ANSWER_TIMEOUT_S + _blocks_s(args)):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _BoundedPipeline(
            self.connection_pool, self.response_callbacks, transaction, shard_hint
        )


class _BoundedPipeline(Pipeline):
    async def execute(self, raise_on_error: bool = True) -> Any:
        blocks_s = sum(_blocks_s(command) for command, _ in self.command_stack)
        async with _answer_within(_ANSWER_TIMEOUT_S + blocks_s):
            return await super().execute(raise_on_error)


@asynccontextmanager
async def _answer_within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as exc:
        raise valkey.TimeoutError(f"the bus did not answer within {seconds:g} s") from exc


def _blocks_s(command: tuple[Any, ...]) -> float:
    """Seconds that `command` waits in the server. Of those that can, we use two."""
    if command[0] == "BLPOP":
        return float(command[-1])
    if command[0] != "XREAD" or b"BLOCK" not in command:
        return 0.0
    return float(command[command.index(b"BLOCK") + 1]) / 1000
