"""How many messages a second does a bus take? Its real writers and readers, as fast as they can.

Many worker processes have a connection each, and put a message for each API process when a step has
ended; here they are tasks of one event loop, which keeps one core busy, while the bus has another.
With several buses the streams are spread over them, as those of API processes are.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, Final

import valkey

from pdtasks.bench.control.stack import cpu_s
from pdtasks.bus.buses import Buses, place_of
from pdtasks.bus.reply import ReplyStream, new_stream
from pdtasks.bus.writers import ReplyWriters
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.messages import StepReply
from pdtasks.settings import Settings

#: Bytes of vLLM's outputs for one token, about.
_TOKEN_BYTES: Final = 60
#: Readers of API processes, and workers that write: so many that each write has few messages.
_STREAMS: Final = 4
_PATIENCE_S: Final = 30.0


def run_bus(
    writers: Sequence[int] = (1, 4, 16, 64),
    tokens: Sequence[int] = (1, 32),
    seconds: float = 3.0,
    buses: int = 1,
) -> list[dict[str, Any]]:
    """A row for each number of writers and of tokens in a message, on buses of its own."""
    with ExitStack() as ends:
        home = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="pdtasks-bus-")))
        servers = [
            ends.enter_context(ValkeyServer(home / str(number), "bus", durable=True))
            for number in range(buses)
        ]
        return [
            asyncio.run(_measure(servers, number, size, seconds))
            for size in tokens
            for number in writers
        ]


def format_bus(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row."""
    return "\n".join(
        f"{row['writers']:>3} writers, {row['tokens']:>3} tokens in a message: "
        f"{row['messages_per_s']:>9,.0f} messages/s, {_shown(row['each_bus_cores'])} cores, "
        f"{row['cpu_us_per_message']:.1f} us each, of it {row['commands_us_per_message']:.1f} at "
        f"commands; client {row['client_cores']:.2f} cores"
        for row in rows
    )


def _shown(each: Sequence[float]) -> str:
    return f"{'bus' if len(each) == 1 else 'buses'} {' + '.join(f'{cores:.2f}' for cores in each)}"


def _streams(buses: Buses) -> list[ReplyStream]:
    """Each bus has about as many as the others."""
    streams = []
    for number in range(max(_STREAMS, len(buses.all))):
        place = number % len(buses.all)
        while place_of(name := new_stream(), len(buses.all)) != place:
            pass
        streams.append(ReplyStream(buses.of(name), _lost, name))
    return streams


async def _measure(
    servers: Sequence[ValkeyServer], writers: int, tokens: int, seconds: float
) -> dict[str, Any]:
    reply = StepReply(
        worker="decode1@host",
        stage="decode",
        engine="of a bench",
        outputs=b"x" * (_TOKEN_BYTES * tokens),
        positions=tuple(range(tokens)),
        attempts=(0,) * tokens,
    )
    pids = [[process.pid for process in server.processes] for server in servers]
    first, *further = (server.url for server in servers)
    settings = Settings(bus_url=first, bus_urls=tuple(further))
    async with AsyncExitStack() as ends:

        def connect() -> Buses:
            buses = Buses(settings)
            ends.push_async_callback(buses.aclose)
            return buses

        streams = _streams(connect())
        for stream in streams:
            await stream.open()
            ends.push_async_callback(stream.close)
        count = _Count()
        reading = [asyncio.create_task(count.read(stream)) for stream in streams]
        ends.push_async_callback(_cancel, reading)
        writing = [ReplyWriters(connect(), _gone) for _ in range(writers)]
        running = [asyncio.create_task(writer.run()) for writer in writing]
        ends.push_async_callback(_cancel, running)
        commands, cpu, own = _commands_s(servers), [*map(cpu_s, pids)], time.process_time()
        began = time.monotonic()

        async def write(writer: ReplyWriters) -> int:
            rounds = 0
            while time.monotonic() < began + seconds:
                rounds += 1
                for stream in streams:
                    writer.put(stream.name, reply)
                await writer.flush_all()
            return rounds

        rounds = sum(await asyncio.gather(*map(write, writing)))
        async with asyncio.timeout(_PATIENCE_S):
            await count.wait(rounds * len(streams))
        took = time.monotonic() - began
        messages = count.num
        each = [now - before for now, before in zip(map(cpu_s, pids), cpu, strict=True)]
        used = sum(each)
        at_commands = _commands_s(servers) - commands
        return {
            "buses": len(servers),
            "writers": writers,
            "tokens": tokens,
            "messages_per_s": round(messages / took, 1),
            "bus_cores": round(used / took, 3),
            "each_bus_cores": [round(one / took, 3) for one in each],
            "client_cores": round((time.process_time() - own) / took, 3),
            "cpu_us_per_message": round(1e6 * used / messages, 2),
            "commands_us_per_message": round(1e6 * at_commands / messages, 2),
        }


class _Count:
    """What all readers have read."""

    def __init__(self) -> None:
        self.num = 0
        self._wanted = 0
        self._is_there = asyncio.Event()

    async def read(self, stream: ReplyStream) -> None:
        """What an API process does with its stream, but for the tokens."""
        async for _ in stream.read():
            self.num += 1
            if self._wanted and self.num >= self._wanted:
                self._is_there.set()

    async def wait(self, wanted: int) -> None:
        """Return when so many are read."""
        self._wanted = wanted
        if self.num < wanted:
            await self._is_there.wait()


def _commands_s(servers: Sequence[ValkeyServer]) -> float:
    """Seconds that the buses were at commands so far."""
    total = 0.0
    for server in servers:
        with valkey.Valkey.from_url(server.operator_url) as bus:
            total += sum(s["usec"] / 1e6 for s in bus.info("commandstats").values())
    return total


async def _lost() -> None:
    raise RuntimeError("the bus has lost a stream")


def _gone(stream: str) -> None:
    raise RuntimeError(f"{stream} has no reader")


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
