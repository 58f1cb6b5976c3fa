"""How do tokens get back to the process that asked?

Each asking process owns one reply stream on the bus, a Valkey stream named in Celery's `reply_to`.
Workers append one `StepReply` for each engine step, however many requests are in the step.

The stream exists only while its owner renews it.  Workers append with NOMKSTREAM, so a reply to an
owner that is gone is refused instead of piling up, and the worker learns that nobody listens.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

import valkey.asyncio
from valkey.exceptions import (
    BusyLoadingError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)

from pdtasks.backoff import Backoff
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.keys import REPLY
from pdtasks.errors import IncompatibleWorker
from pdtasks.messages import StepReply, read_message

logger = logging.getLogger(__name__)

_FIELD = b"m"
#: Seconds a stream outlives its owner's last renewal.
STREAM_TTL_S = 30
_RENEW_S = 5.0
#: Seconds that a read waits in the server; also the pace at which a reader notices being closed.
_BLOCK_S = 1.0
#: Messages taken at once.
_BATCH = 256
#: Seconds between two tries; the second is the longest.
_RETRY_S = 0.2
_RETRY_MAX_S = 2.0
#: Answers of a bus that will take the same message later.
_REFUSED_FOR_NOW = (OutOfMemoryError, BusyLoadingError, ReadOnlyError, TryAgainError)

_Entry = tuple[str, bytes]


def new_stream() -> str:
    """A name for a reply stream that no other has."""
    return f"{REPLY}{uuid.uuid4().hex}"


def is_reply_stream(reply_to: str | None) -> bool:
    """True when `reply_to` names one of our streams; Celery else fills in a name of its own."""
    return reply_to is not None and reply_to.startswith(REPLY)


class ReplyWriter:
    """The workers' end. Lives in one event loop."""

    def __init__(
        self, bus: valkey.asyncio.Valkey, on_gone: Callable[[str], None], name: str = "bus"
    ) -> None:
        """Args:
        on_gone: `on_gone(stream)` is called when the owner of a stream is found to be gone.
        name: of the bus, for the log.
        """
        self._bus = bus
        self._name = name
        self._on_gone = on_gone
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._num_put = 0
        self._num_sent = 0
        self._sent = asyncio.Condition()

    @property
    def num_unsent(self) -> int:
        """Messages that the bus has not taken yet."""
        return self._num_put - self._num_sent

    def put(self, stream: str, reply: StepReply) -> None:
        """Queue `reply`; never blocks the engine's loop."""
        self._queue.put_nowait((stream, reply.to_wire()))
        self._num_put += 1

    async def run(self) -> None:
        """Send what is queued, in order, until cancelled. A bus that is away is tried again."""
        while True:
            batch = [await self._queue.get()]
            while not self._queue.empty() and len(batch) < _BATCH:
                batch.append(self._queue.get_nowait())
            await self._deliver(batch)
            async with self._sent:
                self._num_sent += len(batch)
                self._sent.notify_all()

    async def flush(self) -> None:
        """Return when the bus has all that was put before this call, or has lost its reader.

        May take as long as the bus is away or out of memory: bound it.
        """
        until = self._num_put
        async with self._sent:
            await self._sent.wait_for(lambda: self._num_sent >= until)

    async def _deliver(self, batch: list[_Entry]) -> None:
        backoff = Backoff(first_s=_RETRY_S, maximum_s=_RETRY_MAX_S)
        left = batch
        while left:
            try:
                left = self._look_at(left, await self._send(left))
            except BUS_ERRORS as exc:
                # A message may arrive twice after this; readers drop tokens they have.
                logger.warning("%s is away, replies wait: %s", self._name, type(exc).__name__)
            if left:
                backoff.fail()
                await asyncio.sleep(backoff.pause_s)

    async def _send(self, batch: list[_Entry]) -> list[Any]:
        pipeline = self._bus.pipeline(transaction=False)
        for stream, wire in batch:
            pipeline.xadd(stream, {_FIELD: wire}, nomkstream=True)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    def _look_at(self, batch: list[_Entry], answers: list[Any]) -> list[_Entry]:
        """Returns what has to be sent again, in order."""
        again, gone = [], set()
        for entry, answer in zip(batch, answers, strict=True):
            if isinstance(answer, _REFUSED_FOR_NOW):
                again.append(entry)
            elif isinstance(answer, Exception):
                # Under the stream's name lies something else: its owner notices as well.
                logger.error("a reply stream takes no replies: %s", type(answer).__name__)
                gone.add(entry[0])
            elif answer is None:
                gone.add(entry[0])
        if again:
            logger.error(
                "the %s refused %d replies, which wait: is its memory full?", self._name, len(again)
            )
        for stream in gone:
            self._on_gone(stream)
        return again


class ReplyStream:
    """The asking process's end: its own stream."""

    def __init__(
        self,
        bus: valkey.asyncio.Valkey,
        on_lost: Callable[[], Awaitable[None]],
        name: str | None = None,
    ) -> None:
        """Args:
        on_lost: `on_lost()` is awaited when the bus has lost the stream, and replies with it.
        name: what `new_stream` has made, where that has chosen the bus.
        """
        self._bus = bus
        self._on_lost = on_lost
        self.name = name or new_stream()
        self._last_id = b"0"
        self._away_since: float | None = None  # monotonic seconds

    @property
    def away_s(self) -> float:
        """Seconds for which the bus has not answered the reader; 0: it does."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    async def open(self) -> None:
        """Create the stream, empty. Raises ValkeyError when the bus cannot be reached."""
        try:
            await self._bus.xgroup_create(self.name, "owner", id="$", mkstream=True)
        except ResponseError as exc:
            if "BUSYGROUP" not in str(exc):
                raise
        await self._bus.expire(self.name, STREAM_TTL_S)

    async def keep(self) -> None:
        """Renew the stream until cancelled."""
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                await self._renew()
            except BUS_ERRORS as exc:
                logger.warning("bus is away: %s", type(exc).__name__)

    async def _renew(self) -> None:
        if not await self._bus.expire(self.name, STREAM_TTL_S):
            self._last_id = b"0"
            await self.open()
            await self._on_lost()

    async def _begin_again(self) -> None:
        self._last_id = b"0"
        with suppress(*BUS_ERRORS):
            await self._bus.delete(self.name)
            await self.open()
        await self._on_lost()

    async def read(self) -> AsyncIterator[StepReply]:
        """Yield replies as they come, until cancelled.

        Those that were taken are removed from the bus on the way of the next read.
        """
        taken: list[bytes] = []
        while True:
            try:
                if self._away_since is not None:
                    await self._renew()
                    self._away_since = None
                found = await self._next(taken)
            except ResponseError as exc:
                # The bus is there and refuses: what lies under our name is not our stream.
                logger.error("the reply stream cannot be read: %s", type(exc).__name__)  # noqa: TRY400
                taken = []
                await self._begin_again()
                await asyncio.sleep(_RETRY_S)
                continue
            except BUS_ERRORS as exc:
                logger.warning("bus is away: %s", type(exc).__name__)
                if self._away_since is None:
                    self._away_since = time.monotonic()
                await asyncio.sleep(_RETRY_S)
                continue
            taken = [entry_id for _, entries in found or () for entry_id, _ in entries]
            for _, entries in found or ():
                self._last_id = entries[-1][0]
                for reply in _readable(fields.get(_FIELD, b"") for _, fields in entries):
                    yield reply

    async def _next(self, taken: list[bytes]) -> Any:
        """Remove what was `taken`, and wait for more: one way to the bus and back for both."""
        commands = self._bus.pipeline(transaction=False)
        if taken:
            commands.xdel(self.name, *taken)
        commands.xread({self.name: self._last_id}, count=_BATCH, block=int(_BLOCK_S * 1000))
        *_, found = await commands.execute(raise_on_error=False)
        if isinstance(found, Exception):
            raise found
        return found

    async def close(self) -> None:
        """Remove the stream; workers stop what they do for it."""
        with suppress(*BUS_ERRORS):  # else it expires
            await self._bus.delete(self.name)


def _readable(wires: Iterable[bytes]) -> Iterable[StepReply]:
    for wire in wires:
        try:
            yield read_message(StepReply, wire)
        except IncompatibleWorker as exc:
            logger.error("dropped a reply: %s", exc)  # noqa: TRY400 - the sentence says it all
