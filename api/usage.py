"""How much has each key asked for in this minute? Counted on the bus, for all API processes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Any, Final

from prometheus_client import Counter as Counted

from pdtasks.bus import keys
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.errors import TooManyRequests
from pdtasks.keys import Key

logger = logging.getLogger(__name__)

_MINUTE_S: Final = 60
#: Seconds between two reports of tokens.
_TELL_S: Final = 0.5

_LIMITS_HIT = Counted(
    "pdtasks_limits_hit",
    "Requests refused because of their key's limits; `key`: how the key's digest begins",
    ["key", "limit"],
)


def limit_hit(key: Key, limit: str) -> None:
    """`key` has had its share; never by its name, which tells who that is."""
    _LIMITS_HIT.labels(key.digest.hex()[:12], limit).inc()


class Usage:
    """For one event loop."""

    def __init__(self, bus: Any) -> None:
        """`bus`: an asynchronous client of Valkey."""
        self._bus = bus
        self._tokens: Counter[str] = Counter()  # by key, not told yet

    async def begin(self, key: Key) -> None:
        """Count a request. Raises TooManyRequests when `key` has had its share of this minute.

        A bus that is away counts nothing and refuses nobody: the request will tell.
        """
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            return
        name = _name(key.name)
        try:
            async with self._bus.pipeline(transaction=True) as pipe:
                pipe.hincrby(name, "requests", 1)
                pipe.hget(name, "tokens")
                pipe.expire(name, 2 * _MINUTE_S)
                requests, tokens, _ = await pipe.execute()
        except BUS_ERRORS as exc:
            logger.warning("bus is away, usage is not counted: %s", type(exc).__name__)
            return
        tokens = int(tokens or 0) + self._tokens[key.name]
        if key.requests_per_minute is not None and requests > key.requests_per_minute:
            limit_hit(key, "requests_per_minute")
            raise _too_many(f"{key.requests_per_minute} requests")
        if key.tokens_per_minute is not None and tokens >= key.tokens_per_minute:
            limit_hit(key, "tokens_per_minute")
            raise _too_many(f"{key.tokens_per_minute} tokens")

    def charge(self, name: str, tokens: int) -> None:
        """The key `name` has had `tokens`, of prompt and answer."""
        if name:
            self._tokens[name] += tokens

    @property
    def has_to_tell(self) -> bool:
        """Is there something that the bus does not know yet?"""
        return bool(self._tokens)

    async def tell(self) -> None:
        """Tell the bus, again and again."""
        while True:
            await asyncio.sleep(_TELL_S)
            for name, tokens in list(self._tokens.items()):
                try:
                    async with self._bus.pipeline(transaction=True) as pipe:
                        pipe.hincrby(_name(name), "tokens", tokens)
                        pipe.expire(_name(name), 2 * _MINUTE_S)
                        await pipe.execute()
                except BUS_ERRORS as exc:
                    logger.warning("bus is away, usage waits: %s", type(exc).__name__)
                    break
                self._tokens[name] -= tokens
                if not self._tokens[name]:
                    del self._tokens[name]


def _name(key_name: str) -> str:
    return f"{keys.USAGE}{key_name}:{int(time.time()) // _MINUTE_S}"


def _too_many(what: str) -> TooManyRequests:
    left_s = _MINUTE_S - int(time.time()) % _MINUTE_S
    return TooManyRequests(f"this API key may have {what} a minute", retry_after_s=left_s)
