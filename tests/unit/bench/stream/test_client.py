"""Does the client of `pdtasks bench stream` count what it has read, and notice what is missing?"""

from __future__ import annotations

import asyncio
import json

import pytest

from pdtasks.bench.stream.client import Crowd
from pdtasks.bench.stream.group import StreamsFailed

TOKENS = 4


class Server:
    """Answers as a relay would, with an engine that waits for the client's word."""

    def __init__(self, *, says: int = TOKENS, torn: bool = False, at_once: int = 1) -> None:
        """`says`: tokens of each stream, so many `at_once`; `torn`: within an event's bytes."""
        self._says, self._torn, self._at_once = says, torn, at_once
        self.words = 0  # how often the client has said "go on"
        self._streams: list[asyncio.StreamWriter] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        size, high, low = (n - 300 for n in json.loads(await reader.readexactly(length))["prompt"])
        self._streams.append(writer)
        await self._event(writer)
        if len(self._streams) == size:
            await self._engine(256 * high + low)

    async def _engine(self, port: int) -> None:
        words, engine = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(1, self._says, self._at_once):
            if not await words.read(1):
                break
            self.words += 1
            for stream in self._streams:
                await self._event(stream)
        for stream in self._streams:
            stream.write(
                b'data: {"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n' % self._says
            )
            stream.close()
        engine.close()

    async def _event(self, stream: asyncio.StreamWriter) -> None:
        event = b'data: {"text":"a"}\n\n'
        if self._torn:
            stream.write(event[:3])
            await asyncio.sleep(0.01)
            event = event[3:]
        stream.write(event)


async def all_of(server: Server) -> None:
    listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    # One stream is one group.
    async with listening, Crowd(url, "stub", streams=1, tokens=TOKENS) as crowd:
        assert await crowd.relay(TOKENS - 2) > 0
        assert server.words == TOKENS - 2


@pytest.mark.parametrize("torn", [False, True])
def test_a_step_begins_when_its_predecessor_was_read(torn: bool) -> None:
    server = Server(torn=torn)

    asyncio.run(all_of(server))

    assert server.words == TOKENS - 1


def test_a_stream_that_ends_early_is_an_error_that_quotes_its_end() -> None:
    with pytest.raises(StreamsFailed, match=r"last words.*DONE"):
        asyncio.run(all_of(Server(says=2)))


def test_tokens_that_come_together_are_no_figure() -> None:
    with pytest.raises(StreamsFailed):
        asyncio.run(all_of(Server(at_once=2)))
