"""Who is there? Workers leave a key on the bus that expires when they fall silent.

The key is a worker's claim to its name as well: no other process's is written over, unless
whoever writes knows that process to be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple, cast

import valkey
import valkey.asyncio

from pdtasks.bus.keys import WORKER
from pdtasks.errors import IncompatibleWorker
from pdtasks.messages import WorkerStatus, read_message


def worker_key(name: str) -> str:
    """Where `name` leaves its status."""
    return WORKER + name


class Holder(NamedTuple):
    """Another process that has a name."""

    status: WorkerStatus  #: its last sign of life
    ttl_s: float  #: until that expires, unless it is given again


def leave_status(
    bus: valkey.Valkey,
    status: WorkerStatus,
    ttl_ms: int,
    is_gone: Callable[[WorkerStatus], bool],
) -> Holder | None:
    """Leave `status` under its name; if another process has that, nothing changes: who it is.

    Args:
        is_gone: does the process that said so not exist any more?

    Raises valkey.ValkeyError.
    """
    key = worker_key(status.name)
    with bus.pipeline() as pipe:
        while True:
            pipe.watch(key)
            # (After WATCH a pipeline answers at once.)
            holder = _holder(cast("bytes | None", pipe.get(key)), cast("int", pipe.pttl(key)))
            if holder and holder.status.process != status.process and not is_gone(holder.status):
                return holder
            pipe.multi()
            pipe.set(key, status.to_wire(), px=ttl_ms)
            try:
                pipe.execute()
            except valkey.WatchError:
                continue  # somebody was quicker
            return None


def remove_status(bus: valkey.Valkey, status: WorkerStatus) -> None:
    """Take away what the process of `status` has left. Raises valkey.ValkeyError."""
    key = worker_key(status.name)
    with bus.pipeline() as pipe:
        pipe.watch(key)
        holder = _holder(cast("bytes | None", pipe.get(key)), cast("int", pipe.pttl(key)))
        if holder and holder.status.process == status.process:
            pipe.multi()
            pipe.delete(key)
            with suppress(valkey.WatchError):  # another's by now
                pipe.execute()


def _holder(value: bytes | None, ttl_ms: int) -> Holder | None:
    # Without an end no worker has written it, and nobody could ever have the name.
    if value is None or ttl_ms < 0:
        return None
    try:
        return Holder(read_message(WorkerStatus, value), ttl_ms / 1000)
    except IncompatibleWorker:
        return None  # another release on the same bus


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
