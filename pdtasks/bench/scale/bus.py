"""How many messages a second does one bus take? Its real writers and readers, as fast as they can.

Many worker processes have a connection each, and put a message for each API process when a step has
ended; here they are tasks of one event loop, which keeps one core busy, while the bus has another.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import valkey
import valkey.asyncio

from pdtasks.bench.control.stack import cpu_s
from pdtasks.bus.reply import ReplyStream, ReplyWriter
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.messages import StepReply

#: Bytes of vLLM's outputs for one token, about.
_TOKEN_BYTES: Final = 60
#: Readers of API processes, and workers that write: so many that each write has few messages.
_STREAMS: Final = 4
_PATIENCE_S: Final = 30.0


def run_bus(
    writers: Sequence[int] = (1, 4, 16, 64), tokens: Sequence[int] = (1, 32), seconds: float = 3.0
) -> list[dict[str, Any]]:
    """A row for each number of writers and of tokens in a message, on a bus of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="pdtasks-bus-") as home,
        ValkeyServer(Path(home), "bus", durable=True) as bus,
    ):
        return [
            asyncio.run(_measure(bus, number, size, seconds))
            for size in tokens
            for number in writers
        ]


def format_bus(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row."""
    return "\n".join(
        f"{row['writers']:>3} writers, {row['tokens']:>3} tokens in a message: "
        f"{row['messages_per_s']:>9,.0f} messages/s, bus {row['bus_cores']:.2f} cores, "
        f"{row['cpu_us_per_message']:.1f} us each, of it {row['commands_us_per_message']:.1f} at "
        f"commands; client {row['client_cores']:.2f} cores"
        for row in rows
    )


async def _measure(
    server: ValkeyServer, writers: int, tokens: int, seconds: float
) -> dict[str, Any]:
    reply = StepReply(
        worker="decode1@host",
        stage="decode",
        engine="of a bench",
        outputs=b"x" * (_TOKEN_BYTES * tokens),
        positions=tuple(range(tokens)),
        attempts=(0,) * tokens,
    )
    pids = [process.pid for process in server.processes]
    async with AsyncExitStack() as ends:

        async def connection() -> valkey.asyncio.Valkey:
            return await ends.enter_async_context(valkey.asyncio.from_url(server.url))

        streams = [ReplyStream(await connection(), _lost) for _ in range(_STREAMS)]
        for stream in streams:
            await stream.open()
            ends.push_async_callback(stream.close)
        count = _Count()
        reading = [asyncio.create_task(count.read(stream)) for stream in streams]
        ends.push_async_callback(_cancel, reading)
        writing = [ReplyWriter(await connection(), _gone) for _ in range(writers)]
        running = [asyncio.create_task(writer.run()) for writer in writing]
        ends.push_async_callback(_cancel, running)
        commands, cpu, own = _commands(server), cpu_s(pids), time.process_time()
        began = time.monotonic()

        async def write(writer: ReplyWriter) -> int:
            rounds = 0
            while time.monotonic() < began + seconds:
                rounds += 1
                for stream in streams:
                    writer.put(stream.name, reply)
                await writer.flush()
            return rounds

        rounds = sum(await asyncio.gather(*map(write, writing)))
        async with asyncio.timeout(_PATIENCE_S):
            await count.wait(rounds * len(streams))
        took = time.monotonic() - began
        messages = count.num
        used = cpu_s(pids) - cpu
        at_commands = sum(s for _, s in _commands(server).values()) - sum(
            s for _, s in commands.values()
        )
        return {
            "writers": writers,
            "tokens": tokens,
            "messages_per_s": round(messages / took, 1),
            "bus_cores": round(used / took, 3),
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


def _commands(server: ValkeyServer) -> dict[str, tuple[int, float]]:
    """Calls of each command so far, and seconds that the bus was at them."""
    with valkey.Valkey.from_url(server.operator_url) as bus:
        found = bus.info("commandstats")
    return {name: (s["calls"], s["usec"] / 1e6) for name, s in found.items()}


async def _lost() -> None:
    raise RuntimeError("the bus has lost a stream")


def _gone(stream: str) -> None:
    raise RuntimeError(f"{stream} has no reader")


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
