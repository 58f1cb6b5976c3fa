"""What do this bus's other API processes do? Each tells the others every two seconds.

A process that is alone tells no more than that it is there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import valkey.asyncio

from pdtasks.bus.apis import TELL_S, Share, leave_share, read_shares, sign_in, sign_out
from pdtasks.bus.connection import BUS_ERRORS

logger = logging.getLogger(__name__)

#: Requests of one process that the others can show.
_MOST_REQUESTS = 100


class Neighbours:
    """For one event loop."""

    def __init__(
        self, bus: valkey.asyncio.Valkey, process: str, share: Callable[[int], Share]
    ) -> None:
        """Args:
        process: what this process is called among them.
        share: what it tells, with so many of its newest requests.
        """
        self._bus = bus
        self._process = process
        self._share = share

    async def keep_telling(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                try:
                    is_alone = not await sign_in(self._bus, self._process)
                    share = self._share(0 if is_alone else _MOST_REQUESTS)
                    await leave_share(self._bus, share)
                except BUS_ERRORS as exc:
                    logger.warning("other API processes are told nothing: %s", type(exc).__name__)
                await asyncio.sleep(TELL_S)
        finally:
            with suppress(*BUS_ERRORS):
                async with asyncio.timeout(1.0):
                    await sign_out(self._bus, self._process)

    async def others(self) -> list[Share]:
        """Those of the others. Raises what is in `pdtasks.bus.connection.BUS_ERRORS`."""
        return [share for share in await read_shares(self._bus) if share.id != self._process]
