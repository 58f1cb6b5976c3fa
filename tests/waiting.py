"""How does a test wait for what others do? For a condition, with a deadline; never by luck."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], within_s: float = 20.0, what: str = "") -> Any:
    """Return the first true value of `condition`; fail the test when there is none in time."""
    began = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - began
        assert waited < within_s, f"not within {within_s} s: {what or _named(condition)}"
        time.sleep(_pause(waited))
    return value


async def until(condition: Callable[[], Any], within_s: float = 20.0) -> None:
    """The same in an event loop."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < within_s, f"not within {within_s} s: {_named(condition)}"
        await asyncio.sleep(_pause(waited))


def _pause(waited: float) -> float:
    """Seconds until the next look: at most a hundredth longer; looks take cores as well."""
    return min(max(0.005, waited / 100), 0.1)


def _named(condition: Callable[[], Any]) -> str:
    return getattr(condition, "__name__", repr(condition))
