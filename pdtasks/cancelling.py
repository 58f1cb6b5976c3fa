"""How does an asyncio task end for certain?

One `cancel()` is not enough on Python 3.11: `asyncio.wait_for` there drops a cancellation that
arrives in the same turn of the loop as its result (CPython issue 86296, mended in 3.12), and
valkey-py sends every command through it.  A task that runs for ever then runs on for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

#: Seconds until the next try; a task that heard the first one may clean up meanwhile.
_AGAIN_S = 0.3


async def end(tasks: Iterable[asyncio.Task[Any]], within_s: float = float("inf")) -> None:
    """Cancel `tasks` until they have ended, or for `within_s` seconds; their results are dropped.

    Never raises what the tasks raised.
    """
    clock = asyncio.get_running_loop().time
    limit = clock() + within_s
    left = set(tasks)
    while left and clock() < limit:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=_AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # else asyncio logs that nobody looked at it
