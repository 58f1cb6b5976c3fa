"""How is a worker of any host told to drain, or to take another role? By keys that it alone reads.

Not by a control command: whoever may send aborts may send those, clients of the broker too.  An
order names one process, so that its successor of the same name does not obey it.
"""

from __future__ import annotations

from typing import Final, cast

import valkey
import valkey.asyncio

from pdtasks.bus.keys import ORDER
from pdtasks.errors import IncompatibleWorker
from pdtasks.messages import DrainOrder, RoleOrder, WorkerStatus, read_message

#: Seconds for which a worker may be out of touch and still hears of it.
_TTL_S: Final = 60
_DRAIN: Final = ORDER + "drain:"
_ROLE: Final = ORDER + "role:"


async def ask_to_drain(bus: valkey.asyncio.Valkey, worker: WorkerStatus) -> None:
    """Have the process that said `worker` drain. Raises what is in `BUS_ERRORS`."""
    await bus.set(_DRAIN + worker.name, DrainOrder(process=worker.process).to_wire(), ex=_TTL_S)


def is_asked_to_drain(bus: valkey.Valkey, worker: WorkerStatus) -> bool:
    """Is the process that would say `worker` to drain? Raises valkey.ValkeyError."""
    order = cast("bytes | None", bus.get(_DRAIN + worker.name))
    try:
        return order is not None and read_message(DrainOrder, order).process == worker.process
    except IncompatibleWorker:
        return False


async def ask_for_role(bus: valkey.asyncio.Valkey, worker: WorkerStatus, role: str) -> None:
    """Have the process that said `worker` take `role`. Raises what is in `BUS_ERRORS`."""
    await bus.set(_ROLE + worker.name, _role_order(worker, role), ex=_TTL_S)


def order_role(bus: valkey.Valkey, worker: WorkerStatus, role: str, number: int = 0) -> None:
    """The same at once. Raises valkey.ValkeyError.

    Args:
        number: of the lease that whoever orders it holds; 0: a person, who needs none.
    """
    bus.set(_ROLE + worker.name, _role_order(worker, role, number), ex=_TTL_S)


def _role_order(worker: WorkerStatus, role: str, number: int = 0) -> bytes:
    return RoleOrder(process=worker.process, role=role, number=number).to_wire()


def asked_role(bus: valkey.Valkey, worker: WorkerStatus) -> RoleOrder | None:
    """The last order for the process that would say `worker`, for a minute; None: there is none.

    Raises valkey.ValkeyError.
    """
    order = cast("bytes | None", bus.get(_ROLE + worker.name))
    try:
        found = None if order is None else read_message(RoleOrder, order)
    except IncompatibleWorker:
        return None
    return found if found is not None and found.process == worker.process else None
