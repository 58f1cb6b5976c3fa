"""Who is there? Workers leave a key on the bus that expires when they fall silent.

The key is a worker's claim to its name as well: no other process's is written over, unless
whoever writes knows that process to be gone.

Which names there are is in one sorted set: to look for keys would be to look at all that the bus
has, each second and in each process that looks (8 ms beside 20,000 jobs instead of 0.2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple, cast

import valkey
import valkey.asyncio

from pdtasks.bus.keys import WORKER, WORKERS
from pdtasks.errors import IncompatibleWorker
from pdtasks.messages import WorkerStatus, read_message

#: Seconds after which a name is forgotten that nobody has used. Clocks of two hosts differ less.
_FORGET_S = 86_400


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
            now = time.time()
            pipe.multi()
            pipe.set(key, status.to_wire(), px=ttl_ms)
            pipe.zadd(WORKERS, {status.name: now})
            pipe.zremrangebyscore(WORKERS, "-inf", now - _FORGET_S)
            pipe.expire(WORKERS, _FORGET_S)
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
            pipe.zrem(WORKERS, status.name)
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
    # Typed for the asynchronous client as well.
    names = cast("list[bytes]", bus.zrange(WORKERS, 0, -1))
    return _parse(cast("list[bytes | None]", bus.mget(_keys(names)))) if names else []


async def read_workers_async(bus: valkey.asyncio.Valkey) -> list[WorkerStatus]:
    """`read_workers` for an event loop."""
    names = await bus.zrange(WORKERS, 0, -1)
    return _parse(await bus.mget(_keys(names))) if names else []


def _keys(names: Iterable[bytes]) -> list[bytes]:
    return [WORKER.encode() + name for name in names]


def _parse(values: Iterable[bytes | None]) -> list[WorkerStatus]:
    workers = []
    for value in values:
        if value is not None:  # expired
            try:
                workers.append(read_message(WorkerStatus, value))
            except IncompatibleWorker:
                continue  # another release on the same bus: not one of ours to count
    return sorted(workers, key=lambda w: (w.role, w.name))
