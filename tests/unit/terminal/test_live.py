"""`pdtasks top` in a terminal of its own: it goes on, takes another size, and leaves no trace."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from tests.unit.terminal.views import an_overview

_ANSWER = msgspec.json.encode(an_overview())


class Handler(BaseHTTPRequestHandler):
    """An API that is away as long as a test wants."""

    away = False

    def do_GET(self) -> None:
        self.send_response(503 if Handler.away else 200)
        self.end_headers()
        self.wfile.write(_ANSWER)

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def url() -> Iterator[str]:
    Handler.away = False
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Terminal:
    """A program in a terminal."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.resize(60, 24)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pdtasks.cli", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
        )
        os.close(slave)

    def resize(self, columns: int, lines: int) -> None:
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def until(self, pattern: str, within_s: float = 30) -> str:
        """What it has written when `pattern` has come."""
        text, deadline = "", time.monotonic() + within_s
        while not re.search(pattern, text):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {text[-2000:]!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                text += os.read(self._master, 65536).decode(errors="replace")
        return text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_it_goes_on_through_another_size_and_an_api_that_is_away(url: str) -> None:
    terminal = Terminal("top", "--url", url, "--every", "0.2")
    try:
        narrow = terminal.until("decode1@h")
        assert "way" not in narrow

        terminal.resize(140, 50)
        terminal.until(r"way\b")

        Handler.away = True
        terminal.until("the API answers 503")
        Handler.away = False
        terminal.until(r"decode1@h")

        terminal.process.send_signal(signal.SIGINT)
        terminal.until(r"\x1b\[\?1049l")  # the terminal is as it was
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()
