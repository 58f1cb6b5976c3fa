"""Who is there? Workers leave a key on the bus that expires when they fall silent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import valkey
import valkey.asyncio

from pdtasks.bus.keys import WORKER
from pdtasks.errors import IncompatibleWorker
from pdtasks.messages import WorkerStatus, read_message


def worker_key(name: str) -> str:
    """Where `name` leaves its status."""
    return WORKER + name


def read_workers(bus: valkey.Valkey) -> list[WorkerStatus]:
    """All workers with a sign of life, by role and name. Raises valkey.ValkeyError."""
    keys = list(bus.scan_iter(match=WORKER + "*", count=1000))
    # Typed for the asynchronous client as well.
    return _parse(cast("list[bytes | None]", bus.mget(keys))) if keys else []


async def read_workers_async(bus: valkey.asyncio.Valkey) -> list[WorkerStatus]:
    """`read_workers` for an event loop."""
    keys = [key async for key in bus.scan_iter(match=WORKER + "*", count=1000)]
    return _parse(await bus.mget(keys)) if keys else []


def _parse(values: Iterable[bytes | None]) -> list[WorkerStatus]:
    workers = []
    for value in values:
        if value is not None:  # expired between the two commands
            try:
                workers.append(read_message(WorkerStatus, value))
            except IncompatibleWorker:
                continue  # another release on the same bus: not one of ours to count
    return sorted(workers, key=lambda w: (w.role, w.name))
