"""Streams that share the engine's steps: the next one is made when all have read their token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Final

from pdtasks.bench.stream.stub import prompt_of
from pdtasks.errors import PdtasksError

#: Begins each event: one for each token, then the usage and the end.
_EVENT: Final = b"data: "
_GO_ON: Final = b"."
#: Bytes of a stream's end that are looked at.
_END_BYTES: Final = 1000


class StreamsFailed(PdtasksError):
    """A stream has ended early, or stands."""


class Group:
    """Streams, and the word that the stub waits for before it makes their next tokens."""

    def __init__(self, url: str, model: str, size: int, tokens: int) -> None:
        """`size`: streams, of so many `tokens` each."""
        host, port = url.removeprefix("http://").split(":")
        self._server = host, int(port)
        self._model = model
        self._size = size
        self._tokens = tokens
        self._streams: list[_Stream] = []
        self._to_read = 0  # tokens of the step under way
        self._steps_left = 0
        self._all_read: asyncio.Future[None]
        self._lost: StreamsFailed | None = None
        self._listening: asyncio.Server | None = None
        self._engine: asyncio.StreamWriter | None = None

    async def begin(self) -> None:
        """Return when all have a token, and the stub waits for our word."""
        loop = asyncio.get_running_loop()
        engine: asyncio.Future[asyncio.StreamWriter] = loop.create_future()
        self._listening = await asyncio.start_server(
            lambda _, writer: engine.set_result(writer), "127.0.0.1", 0
        )
        order = self._order(self._listening.sockets[0].getsockname()[1])
        self._expect(1)
        for _ in range(self._size):
            stream = _Stream(order, self._tokens, self._took, self._failed)
            self._streams.append(stream)
            await loop.create_connection(partial(_same, stream), *self._server)
        await self._all_read
        self._engine = await engine

    async def go_on(self, steps: int) -> None:
        """Return when all have read their token of each of so many steps."""
        self._expect(steps)
        if self._lost is not None:
            raise self._lost
        self._say_go_on()
        await self._all_read

    async def end(self) -> None:
        """Have each get its last token; return when all have ended."""
        await self.go_on(1)
        for stream in self._streams:
            await stream.ended
        if self._lost is not None:
            raise self._lost

    def close(self) -> None:
        """Hang up, whatever is under way."""
        for stream in self._streams:
            stream.close()
        if self._engine is not None:
            self._engine.close()
        if self._listening is not None:
            self._listening.close()

    def _order(self, port: int) -> bytes:
        body = json.dumps(
            {
                "model": self._model,
                "prompt": prompt_of(self._size, port),
                "max_tokens": self._tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def _expect(self, steps: int) -> None:
        self._steps_left, self._to_read = steps, self._size
        self._all_read = asyncio.get_running_loop().create_future()

    def _say_go_on(self) -> None:
        assert self._engine is not None
        self._engine.write(_GO_ON)

    def _took(self, tokens: int) -> None:
        self._to_read -= tokens
        if self._to_read > 0 or self._all_read.done():
            return
        self._steps_left -= 1
        if self._steps_left:
            self._to_read = self._size
            self._say_go_on()
        else:
            self._all_read.set_result(None)

    def _failed(self, end: str) -> None:
        self._lost = StreamsFailed(
            "a stream has ended without each of its tokens told by itself (its server's log may say"
            f" why); its last words: {' '.join(end.split()) or 'none'}"
        )
        if not self._all_read.done():
            self._all_read.set_exception(self._lost)


class _Stream(asyncio.Protocol):
    """One answer."""

    def __init__(
        self,
        order: bytes,
        tokens: int,
        took: Callable[[int], None],
        failed: Callable[[str], None],
    ) -> None:
        self._order = order
        self._took = took
        self._failed = failed
        self._tokens = tokens
        self._events = 0
        self._last = b""
        self._transport: asyncio.Transport | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_whole(self) -> bool:
        """Were all its tokens read, one by one, and does its usage say the same?"""
        told = f'"completion_tokens":{self._tokens}'.encode()
        return self._events == self._tokens + 2 and told in self._last

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._order)

    def data_received(self, data: bytes) -> None:
        # (An event's beginning may be torn in two: the part before is looked at as well.)
        events = (self._last[-len(_EVENT) + 1 :] + data).count(_EVENT)
        self._last = (self._last + data)[-_END_BYTES:]
        before, self._events = self._events, self._events + events
        if tokens := min(self._events, self._tokens) - min(before, self._tokens):
            self._took(tokens)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.is_whole:
            self._failed(self._last[-300:].decode(errors="replace"))
        self.ended.set_result(None)


def _same(stream: _Stream) -> _Stream:
    return stream
