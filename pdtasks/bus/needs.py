"""Which part of the workers' places could each API process use? Each says so every second.

One that has nothing to do says nothing; one that is gone counts no more after some seconds.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Final, cast

import msgspec
import valkey.asyncio

from pdtasks.bus.keys import APIS_NEEDS

#: Seconds after which one that has said nothing more does not count.
_TTL_S: Final = 5.0


class _Need(msgspec.Struct, array_like=True):
    at: float  # UNIX seconds
    model: str
    part: float


async def tell_need(
    bus: valkey.asyncio.Valkey, process: str, model: str, part: float
) -> list[float]:
    """Say that `process` could use `part` of the places of `model`, 0 to 1.

    Returns the parts of the others that need any. Raises valkey.ValkeyError.
    """
    now = time.time()
    async with bus.pipeline(transaction=False) as pipe:
        if part:
            pipe.hset(APIS_NEEDS, process, msgspec.json.encode(_Need(now, model, part)).decode())
            pipe.expire(APIS_NEEDS, int(_TTL_S))
        else:
            pipe.hdel(APIS_NEEDS, process)
        pipe.hgetall(APIS_NEEDS)
        found = (await pipe.execute())[-1]
    needs: list[float] = []
    gone: list[str] = []
    for name, value in found.items():
        try:
            need = msgspec.json.decode(value, type=_Need)
        except ValueError:  # msgspec's as well
            gone.append(name.decode(errors="replace"))
            continue
        if now - need.at > _TTL_S:
            gone.append(name.decode(errors="replace"))
        elif need.model == model and name != process.encode():
            needs.append(min(1.0, max(0.0, need.part)))
    if gone:
        await cast("Awaitable[int]", bus.hdel(APIS_NEEDS, *gone))
    return needs


def fair_part(needs: list[float]) -> float:
    """What is left for one more by turns that are fair: who needs less than the rest has it all."""
    left, count = 1.0, len(needs) + 1
    for need in sorted(needs):
        if need >= left / count:
            break
        left, count = left - need, count - 1
    return left / count
