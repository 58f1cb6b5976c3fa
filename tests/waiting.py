"""How does a test wait for what others do? For a condition, with a deadline; never by luck."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], within_s: float = 20.0, what: str = "") -> Any:
    """Return the first true value of `condition`; fail the test when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s} s: {what or _named(condition)}"
        time.sleep(0.005)
    return value


async def until(condition: Callable[[], Any], within_s: float = 20.0) -> None:
    """The same in an event loop."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {_named(condition)}"
        await asyncio.sleep(0.005)


def _named(condition: Callable[[], Any]) -> str:
    return getattr(condition, "__name__", repr(condition))
