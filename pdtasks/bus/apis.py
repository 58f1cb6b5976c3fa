"""What do API processes tell each other of themselves? Who is there, and what goes on in each.

Each leaves a share on the bus that expires within seconds.  Whoever is asked what goes on puts
together what all have left: no process has to be reached by another.
"""

from __future__ import annotations

import time
from typing import Final

import msgspec
import valkey.asyncio

from pdtasks.bus.keys import API, APIS
from pdtasks.overview import Api, InFlight, RequestView

#: Seconds between two shares of a process, and until one counts no more.
TELL_S: Final = 2.0
_TTL_S: Final = 10


class SlotCounts(msgspec.Struct, omit_defaults=True):
    """What happened in a few seconds. Durations: how many, by class (`api/window.py`)."""

    number: int  #: its beginning in UNIX time, in lengths of a slot
    tokens: int = 0
    ended: int = 0
    failed: int = 0
    ttft: dict[int, int] = {}
    gap: dict[int, int] = {}
    itl: dict[int, int] = {}
    end_to_end: dict[int, int] = {}
    kv: dict[str, int] = {}  #: by the fields of `pdtasks.overview.KvFlow`


class WindowCounts(msgspec.Struct):
    """The last minutes of one process."""

    seconds: float  #: less while it is young
    slots: list[SlotCounts]


class Share(msgspec.Struct, kw_only=True):
    """What one process knows by itself."""

    id: str  #: of the process
    api: Api
    metrics: str  #: where Prometheus finds them, `host:port`
    in_flight: InFlight
    oldest_s: dict[str, float]  #: by queue, the longest wait of its requests for that stage
    counts: WindowCounts
    requests: tuple[RequestView, ...] = ()  #: the newest, of all keys
    problems: tuple[str, ...] = ()


async def sign_in(bus: valkey.asyncio.Valkey, process: str) -> bool:
    """Be counted among the processes; is there another? Raises valkey.ValkeyError."""
    now = time.time()
    async with bus.pipeline(transaction=False) as pipe:
        pipe.zadd(APIS, {process: now})
        pipe.zremrangebyscore(APIS, "-inf", now - _TTL_S)
        pipe.expire(APIS, _TTL_S)
        pipe.zcard(APIS)
        return int((await pipe.execute())[-1]) > 1


async def leave_share(bus: valkey.asyncio.Valkey, share: Share) -> None:
    """Have others know it for some seconds. Raises valkey.ValkeyError."""
    await bus.set(API + share.id, msgspec.msgpack.encode(share), ex=_TTL_S)


async def sign_out(bus: valkey.asyncio.Valkey, process: str) -> None:
    """Be no more. Raises valkey.ValkeyError."""
    await bus.zrem(APIS, process)
    await bus.delete(API + process)


async def read_shares(bus: valkey.asyncio.Valkey) -> list[Share]:
    """Those of all processes. Raises valkey.ValkeyError."""
    names = await bus.zrange(APIS, 0, -1)
    values = await bus.mget([API.encode() + name for name in names]) if names else []
    shares = []
    for value in values:
        if value is not None:  # expired
            try:
                shares.append(msgspec.msgpack.decode(value, type=Share))
            except msgspec.DecodeError:
                continue  # of another release on the same bus
    return sorted(shares, key=lambda share: (share.api.host, share.api.pid))
