"""Many streams at once over plain sockets: what they cost the client is nobody's figure."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pdtasks.bench.stream.stub import prompt_of

_EVENT: Final = b"data: "
_READ_BYTES: Final = 1 << 16


@dataclass(frozen=True)
class Order:
    """`streams` at once, of so many tokens each, the engine's steps `step_ms` apart at least."""

    streams: int
    tokens: int
    step_ms: int


@dataclass(frozen=True)
class Relayed:
    """What came of an order, from when all streams had begun."""

    seconds: float  #: until the last stream's end
    tokens: int
    events: int  #: that carried them; a side that is late puts several tokens into one
    cpu_s: float  #: of what was watched meanwhile


async def relay(url: str, model: str, order: Order, cpu_s: Callable[[], float]) -> Relayed:
    """Have `order` done by the server at `url`, whose processes have used `cpu_s()`.

    Raises RuntimeError when a stream does not bring all its tokens.
    """
    begun: asyncio.Queue[float] = asyncio.Queue()
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt_of(order.streams, order.step_ms),
            "max_tokens": order.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()

    async def one() -> tuple[int, float]:
        reader, writer = await asyncio.open_connection(host, int(port), limit=_READ_BYTES)
        writer.write(head + body)
        events, last, is_new = 0, b"", True
        try:
            while got := await reader.read(_READ_BYTES):
                # (An event's beginning may be torn in two: the part before is looked at as well.)
                events += (last[-len(_EVENT) + 1 :] + got).count(_EVENT)
                last = (last + got)[-_READ_BYTES:]
                if is_new and events:
                    is_new = False
                    begun.put_nowait(time.monotonic())
        finally:
            writer.close()
        ended = time.monotonic()
        if f'"completion_tokens":{order.tokens}'.encode() not in last.replace(b": ", b":"):
            raise RuntimeError(f"a stream has ended early: {last[-300:].decode(errors='replace')}")
        return events, ended

    async with asyncio.TaskGroup() as group:
        streams = [group.create_task(one()) for _ in range(order.streams)]
        start = [await begun.get() for _ in streams][-1]
        before = cpu_s()
    after = cpu_s()
    done = [stream.result() for stream in streams]
    return Relayed(
        seconds=max(ended for _, ended in done) - start,
        tokens=order.streams * (order.tokens - 1),
        # But for the first one, the usage and the end.
        events=sum(events - 3 for events, _ in done),
        cpu_s=after - before,
    )
