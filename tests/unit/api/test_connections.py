"""Does a caller who is slow to ask, or does not read, cost more than his own connection?"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from api import connections
from api.connections import WatchedConnection
from tests.waiting import wait_until

LOOK_S = 0.1
PIECE = b"x" * (1 << 16)


class Served:
    """An app behind uvicorn, with our connections."""

    def __init__(self) -> None:
        self.pieces = 0
        self.ended = threading.Event()
        app = FastAPI()
        app.get("/endless")(self._endless)
        app.get("/patient")(self._patient)
        app.get("/hello")(self._hello)
        config = uvicorn.Config(
            app, http=WatchedConnection, log_config=None, lifespan="off", timeout_keep_alive=60
        )
        self._server = uvicorn.Server(config)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(listener.getsockname()[1])
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        wait_until(lambda: self._server.started)

    async def _endless(self) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield PIECE
                    self.pieces += 1
                    await asyncio.sleep(0)  # as who waits for an engine
            finally:
                self.ended.set()

        return StreamingResponse(pieces())

    async def _patient(self) -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "one"
            await asyncio.sleep(12 * LOOK_S)
            yield "two"

        return StreamingResponse(pieces())

    async def _hello(self) -> str:
        return "hello"

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(self, path: str, connection: socket.socket | None = None) -> bytes:
        """All that comes within the connection's life; on a given one, the first piece."""
        head = f"GET {path} HTTP/1.1\r\nHost: h\r\n"
        if connection is not None:
            connection.sendall(f"{head}\r\n".encode())
            return connection.recv(65536)
        with self.connect() as own:
            own.sendall(f"{head}Connection: close\r\n\r\n".encode())
            return b"".join(iter(lambda: own.recv(65536), b""))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(connections, "_LOOK_S", LOOK_S)
    made = Served()
    yield made
    made.close()


def is_closed(connection: socket.socket) -> bool:
    """Read on to the end."""
    with suppress(ConnectionError):
        while connection.recv(65536):
            pass
    return True


def trickle(connection: socket.socket, piece: bytes) -> int:
    """Send `piece` every now and then, until nobody is there to take it; returns how often."""
    for number in range(2000):
        try:
            connection.sendall(piece)
        except ConnectionError:
            return number
        connection.settimeout(0.01)
        with suppress(TimeoutError, ConnectionError):
            if not connection.recv(65536):
                return number
        connection.settimeout(20)
    raise AssertionError("nobody has closed the connection")


def test_who_asks_nothing_is_not_waited_for(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with served.connect() as silent, served.connect() as idle:
        assert b"hello" in served.ask("/hello", idle)

        assert is_closed(silent)
        assert is_closed(idle)
    assert "no whole request has come" in caplog.text


@pytest.mark.parametrize("begin", [b"", b"GET /hello HTTP/1.1\r\nX-Slow: "])
def test_who_asks_letter_by_letter_is_not_waited_for(served: Served, begin: bytes) -> None:
    with served.connect() as slow:
        slow.sendall(begin)

        assert trickle(slow, b"G" if not begin else b"x") > 0

    assert b"hello" in served.ask("/hello")


def test_headers_without_an_end_are_not_kept(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with served.connect() as endless:
        endless.sendall(b"GET /hello HTTP/1.1\r\n")

        assert trickle(endless, b"X-More: " + b"x" * 4000 + b"\r\n") < 100

    assert "its headers have no end" in caplog.text
    assert "xxx" not in caplog.text


def test_who_does_not_read_holds_up_nobody_and_is_left(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with served.connect() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        deaf.sendall(b"GET /endless HTTP/1.1\r\nHost: h\r\n\r\n")
        wait_until(lambda: served.pieces > 0)

        # Others are answered meanwhile, and what he does not read is not made
        for _ in range(5):
            assert b"hello" in served.ask("/hello")
        assert served.ended.wait(20)
        assert served.pieces * len(PIECE) < 64 << 20, "what the kernel takes, and one buffer"
    wait_until(lambda: "nobody reads the answer" in caplog.text)


def test_an_answer_may_take_its_time(served: Served) -> None:
    answer = served.ask("/patient")

    assert b"one" in answer
    assert b"two" in answer


def test_who_reads_slowly_gets_all(served: Served) -> None:
    with served.connect() as slow:
        slow.sendall(b"GET /endless HTTP/1.1\r\nHost: h\r\n\r\n")
        for _ in range(20):
            threading.Event().wait(LOOK_S)
            # More than a buffer, so that the server sees it go
            assert slow.recv(1 << 20, socket.MSG_WAITALL)
    assert served.ended.wait(20)
