"""How does an API ask a worker of any host to drain? By a key that only the worker reads.

Not by a control command: whoever may send aborts may send those, clients of the broker too.  The
order names one process, so that its successor of the same name does not obey it.
"""

from __future__ import annotations

from typing import Final, cast

import valkey
import valkey.asyncio

from pdtasks.bus.keys import DRAIN
from pdtasks.errors import IncompatibleWorker
from pdtasks.messages import DrainOrder, WorkerStatus, read_message

#: Seconds for which a worker may be out of touch and still hears of it.
_TTL_S: Final = 60


async def ask_to_drain(bus: valkey.asyncio.Valkey, worker: WorkerStatus) -> None:
    """Have the process that said `worker` drain. Raises what is in `BUS_ERRORS`."""
    await bus.set(DRAIN + worker.name, DrainOrder(process=worker.process).to_wire(), ex=_TTL_S)


def is_asked_to_drain(bus: valkey.Valkey, worker: WorkerStatus) -> bool:
    """Is the process that would say `worker` to drain? Raises valkey.ValkeyError."""
    order = cast("bytes | None", bus.get(DRAIN + worker.name))
    try:
        return order is not None and read_message(DrainOrder, order).process == worker.process
    except IncompatibleWorker:
        return False
