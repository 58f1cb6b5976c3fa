"""How full is the bus, and how many jobs and batches are there? Counted in two round trips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import valkey.asyncio

from pdtasks.bus import keys

#: Open batches whose lines are counted.
MOST_BATCHES: Final = 100


@dataclass(frozen=True)
class BusFigures:
    """What there is."""

    memory_bytes: int
    memory_max_bytes: int  #: 0: no limit
    jobs_queued: int
    jobs_running: int
    jobs_ended: int  #: whose result is kept
    batches_open: int
    lines: int  #: of the oldest open batches, `MOST_BATCHES` at most
    lines_completed: int
    lines_failed: int


async def read_figures(bus: valkey.asyncio.Valkey) -> BusFigures:
    """Ask the bus. Raises what is in `pdtasks.bus.connection.BUS_ERRORS`."""
    async with bus.pipeline(transaction=False) as pipe:
        pipe.info("memory")
        for key in (keys.JOBS, keys.JOBS_WAITING, keys.JOBS_RUNNING, keys.BATCHES_OPEN):
            pipe.zcard(key)
        pipe.zrange(keys.BATCHES_OPEN, 0, MOST_BATCHES - 1)
        memory, jobs, queued, running, num_open, names = await pipe.execute()
    counts: list[list[bytes | None]] = []
    if names:
        async with bus.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hmget(keys.BATCH + name.decode(), ["total", "completed", "failed"])
            found = await pipe.execute(raise_on_error=False)
        counts = [one for one in found if not isinstance(one, Exception)]
    total, completed, failed = (sum(_number(one[n]) for one in counts) for n in range(3))
    return BusFigures(
        memory_bytes=memory["used_memory"],
        memory_max_bytes=memory["maxmemory"],
        jobs_queued=queued,
        jobs_running=running,
        jobs_ended=max(0, jobs - queued - running),
        batches_open=num_open,
        lines=total,
        lines_completed=completed,
        lines_failed=failed,
    )


def _number(value: Any) -> int:
    """Whatever somebody has written there."""
    return int(value) if value is not None and bytes(value).isdigit() else 0
