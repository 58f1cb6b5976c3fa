"""Whose connection is closed? Of who is too slow to ask, or does not read what he asked for.

uvicorn waits for ever: for a first byte, for the end of headers (which it keeps, however many), and
for a reader.  Each costs a connection and its memory only, but there is no end of them.
"""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

logger = logging.getLogger(__name__)

#: Seconds between two looks at a connection.
_LOOK_S = 10.0
#: Looks in a row that see nothing happen.
_LOOKS_WITHOUT_REQUEST = 2
_LOOKS_WITHOUT_READER = 7
#: Of a request line and headers.
_MAX_HEAD_BYTES = 64 << 10


class WatchedConnection(HttpToolsProtocol):
    """uvicorn's connection, with an end.

    A request that is at work is nobody's business here, however long it takes: its body has its own
    bound (`api.guard`), its answer the request's deadline.
    """

    _in_head = False
    _head_bytes = 0
    _seen: tuple[object, int] | None = None
    _looks = 0
    _watch: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._watch = self.loop.call_later(_LOOK_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > _MAX_HEAD_BYTES:
            logger.warning("closed a connection: its headers have no end")
            self.transport.abort()

    def _look(self) -> None:
        if self.transport.get_protocol() is not self:  # a websocket has taken over
            return
        unread = self.transport.get_write_buffer_size()
        seen = (self.cycle, unread)
        self._looks = self._looks + 1 if seen == self._seen else 1
        self._seen = seen
        if unread:
            # While the buffer is full whoever answers waits: it only becomes less, by reading.
            if self._looks >= _LOOKS_WITHOUT_READER:
                logger.warning("closed a connection: nobody reads the answer")
                self.transport.abort()
                return
        elif self._waits_for_a_request() and self._looks >= _LOOKS_WITHOUT_REQUEST:
            logger.warning("closed a connection: no whole request has come")
            self.transport.abort()
            return
        self._watch = self.loop.call_later(_LOOK_S, self._look)

    def _waits_for_a_request(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # (uvicorn's types know no beginning)
        return cycle is None or cycle.response_complete
