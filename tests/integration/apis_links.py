"""What the API's process does on broker and bus, with its classes: asks once, prints the tokens."""

from __future__ import annotations

import asyncio
import sys

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackDecoder

from pdtasks.broker.aborting import Aborter
from pdtasks.bus.connection import connect_async
from pdtasks.bus.reply import ReplyStream
from pdtasks.pipeline import Publisher
from pdtasks.settings import load_settings
from tests.integration.asker import Asker


async def lost() -> None:
    raise SystemExit("lost")


async def main() -> None:
    publisher, aborter = Publisher(), Aborter()
    async with asyncio.timeout(30), connect_async(load_settings()) as bus:
        stream = ReplyStream(bus, lost)
        await stream.open()
        publisher.publish(Asker._job("r", 30.0, {}), stream.name)
        found: list[int] = []
        async for reply in stream.read():
            if reply.outputs:
                outputs = MsgpackDecoder(EngineCoreOutputs).decode(reply.outputs).outputs
                found += [t for output in outputs for t in output.new_token_ids]
            if len(found) == 4:
                break
        sys.stdout.write(f"{found}\n")
        aborter.abort(["nobody"])
        await stream.close()
    aborter.close()
    publisher.close()


if __name__ == "__main__":
    asyncio.run(main())
