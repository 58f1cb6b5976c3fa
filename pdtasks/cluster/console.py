"""How does `pdtasks up` speak? Plain lines; a little colour and one moving line on a terminal."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from typing import TextIO

_GREEN, _YELLOW, _RED, _DIM = "32", "33", "31", "2"
_PLAIN_PROGRESS_S = 5.0  # in a log file, one line of progress each so many seconds


class Console:
    """Lines for a person, whole and at once, wherever they go."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._terminal = self._out.isatty()
        self._colour = self._terminal and "NO_COLOR" not in os.environ
        self._moving = False
        self._last_progress = time.monotonic()

    def line(self, text: str = "") -> None:
        """Something to know."""
        self._write(text + "\n")

    def good(self, text: str) -> None:
        """Something is as it should be."""
        self.line(f"{self._paint('✓', _GREEN)} {text}")

    def warn(self, text: str) -> None:
        """Something needs attention but goes on."""
        self.line(f"{self._paint('!', _YELLOW)} {text}")

    def bad(self, text: str) -> None:
        """Something failed."""
        self.line(f"{self._paint('✗', _RED)} {text}")

    def piece(self, text: str) -> None:
        """A part of a line, as it comes."""
        self._write(text)

    def progress(self, text: str) -> None:
        """What is waited for. On a terminal the next line replaces it."""
        now = time.monotonic()
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._write(self._paint(text[:width], _DIM))
            self._moving = True
        elif now - self._last_progress >= _PLAIN_PROGRESS_S:
            self.line(text)
            self._last_progress = now

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def _write(self, text: str) -> None:
        if self._moving:
            text = "\r\x1b[K" + text
            self._moving = False
        with contextlib.suppress(OSError, ValueError):  # a terminal that went away stops nobody
            self._out.write(text)
            self._out.flush()
