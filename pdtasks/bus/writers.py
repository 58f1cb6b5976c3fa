"""How do a worker's replies reach several buses? By a `ReplyWriter` for each.

So one that is away delays no reply that goes elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pdtasks.bus.buses import Buses, place_of
from pdtasks.bus.reply import ReplyWriter
from pdtasks.messages import StepReply


class ReplyWriters:
    """The workers' end of all reply streams. Lives in one event loop."""

    def __init__(self, buses: Buses, on_gone: Callable[[str], None]) -> None:
        """`on_gone(stream)` is called when the owner of a stream is found to be gone."""
        self._all = tuple(
            ReplyWriter(bus, on_gone, name=name)
            for bus, name in zip(buses.all, buses.names, strict=True)
        )

    @property
    def num_unsent(self) -> int:
        """Messages that their bus has not taken yet."""
        return sum(writer.num_unsent for writer in self._all)

    def put(self, stream: str, reply: StepReply) -> None:
        """Queue `reply`; never blocks the engine's loop."""
        self._of(stream).put(stream, reply)

    async def run(self) -> None:
        """Send what is queued until cancelled; what one of the writers raises ends all."""
        async with asyncio.TaskGroup() as running:
            for writer in self._all:
                running.create_task(writer.run())

    async def flush(self, stream: str) -> None:
        """Return when the bus of `stream` has all that was put for it before this call.

        See `ReplyWriter.flush`: bound it.
        """
        await self._of(stream).flush()

    async def flush_all(self) -> None:
        """Return when each bus has what was put for it before this call: bound it."""
        await asyncio.gather(*(writer.flush() for writer in self._all))

    def _of(self, stream: str) -> ReplyWriter:
        return self._all[place_of(stream, len(self._all))]
