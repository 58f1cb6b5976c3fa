"""How much of an answer has its asker got? Asked by a worker that runs a request again.

A job that RabbitMQ delivers a second time may have been answered in part.  The asker keeps every
token that it has passed on, so it is the log: nothing is written for requests that nothing happens
to.  The worker's question goes the way of the answers, on the reply stream, and so lies behind all
that earlier attempts have published; what the asker has when it reads the question is all that its
client can ever have seen.  The answer comes back under a key of the attempt's own.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import valkey.asyncio

from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.keys import PROGRESS
from pdtasks.errors import IncompatibleWorker
from pdtasks.messages import Count, Message, read_message

logger = logging.getLogger(__name__)

#: Seconds that a worker waits for the answer; then it begins after the first token, as it would
#: without an asker, and the asker drops what it has.
WAIT_S = 2.0
#: Seconds that an answer is kept for whoever asked.
_TTL_S = 30


class Progress(Message, frozen=True, kw_only=True):
    """What an asker says of one request."""

    #: `gone`: nobody waits for its answer; `elsewhere`: a later attempt goes on with it.
    state: Literal["wanted", "gone", "elsewhere"]
    token_ids: tuple[Count, ...] = ()  #: of the answer, all that there are


async def tell_progress(
    bus: valkey.asyncio.Valkey, request_id: str, attempt: int, progress: Progress
) -> None:
    """Answer the question of `attempt`. Raises what is in `pdtasks.bus.connection.BUS_ERRORS`."""
    key = _key(request_id, attempt)
    async with bus.pipeline(transaction=False) as both:
        both.rpush(key, progress.to_wire())
        both.expire(key, _TTL_S)
        await both.execute()


async def read_progress(
    bus: valkey.asyncio.Valkey, request_id: str, attempt: int, within_s: float = WAIT_S
) -> Progress | None:
    """The answer to the question of `attempt`; None when none comes within `within_s`."""
    try:
        # valkey-py's types know whole seconds only, and not that this is the asynchronous client.
        asked: Any = bus.blpop([_key(request_id, attempt)], timeout=within_s)  # type: ignore[arg-type]
        found = await asked
        return None if found is None else read_message(Progress, found[1])
    except BUS_ERRORS as exc:
        logger.warning("bus is away: %s", type(exc).__name__)
    except IncompatibleWorker as exc:
        logger.error("of %s no progress is known: %s", request_id, exc)  # noqa: TRY400
    return None


def _key(request_id: str, attempt: int) -> str:
    return f"{PROGRESS}{request_id}:{attempt:x}"
