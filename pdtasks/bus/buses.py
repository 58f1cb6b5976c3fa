"""On which of several buses is a reply stream?

API processes and workers must say the same of it without asking each other: a stream's name, which
workers have in `reply_to`, and the number of buses decide.  Each bus has a number of points for the
name, and the bus with most has the stream (rendezvous hashing): one bus more, at the end of the
list, takes its share of the streams, and no other stream moves.  A bus counts by its place in the
list and not by its URL, for users and ways to it differ between processes.

All but replies, and questions about them, is on the first bus.
"""

from __future__ import annotations

import asyncio
import hashlib
from functools import cache, lru_cache

import valkey.asyncio

from pdtasks.bus.connection import connect_async, connect_async_to
from pdtasks.settings import Settings

#: Streams whose place is remembered: about all API processes that there are.
_REMEMBERED = 4096


def place_of(stream: str, buses: int) -> int:
    """Which of `buses` has `stream`; 0 is the first."""
    return 0 if buses == 1 else _place_of(stream, buses)


@lru_cache(_REMEMBERED)
def _place_of(stream: str, buses: int) -> int:
    # (Whoever sends a message names the stream as he likes: nothing may be raised for a name.)
    name = stream.encode(errors="surrogatepass")
    return max(range(buses), key=lambda place: _points(place, name))


def _points(place: int, name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=8, key=_key(place)).digest()


@cache
def _key(place: int) -> bytes:
    return f"bus {place}".encode()


class Buses:
    """A client for each bus, for one event loop. They connect on first use."""

    def __init__(self, settings: Settings) -> None:
        self.first = connect_async(settings)
        self.all = (self.first, *map(connect_async_to, settings.bus_urls))
        self.names = ("bus", *settings.further_buses)

    def of(self, stream: str) -> valkey.asyncio.Valkey:
        """The client for the bus that has `stream`."""
        return self.all[place_of(stream, len(self.all))]

    async def aclose(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(bus.aclose() for bus in self.all))
