"""How is a record read from the bus? Whole, or as what nobody of ours has written."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import msgspec
import valkey.asyncio
from valkey.exceptions import ResponseError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Unreadable(Exception):
    """Under a name of ours lies what nobody of ours has written."""


@contextmanager
def of_a_kind(error: type[Unreadable] = Unreadable) -> Iterator[None]:
    """Raises `error` where the bus finds something else than the command is for."""
    try:
        yield
    except ResponseError as exc:
        if not str(exc).startswith("WRONGTYPE"):
            raise
        raise error("it is of another type") from None


async def read_record(
    bus: valkey.asyncio.Valkey,
    key: str,
    kind: type[_T],
    *,
    json_fields: Collection[str],
    error: type[Unreadable] = Unreadable,
    more: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> _T | None:
    """The record under `key`, or None when there is none (any more). Raises `error`.

    Args:
        json_fields: those that are no words.
        more: from the fields, what `kind` has beside them.
    """
    with of_a_kind(error):
        fields = await cast("Awaitable[dict[bytes, bytes]]", bus.hgetall(key))
    if not fields:
        return None
    try:
        found: dict[str, Any] = {name.decode(): value.decode() for name, value in fields.items()}
        for name in json_fields & found.keys():
            found[name] = json.loads(found[name])
        return msgspec.convert(found | more(found), kind)
    except (RecursionError, ValueError) as exc:  # msgspec's, too, is a ValueError
        raise error(f"its record: {type(exc).__name__}") from None


class _Owned(Protocol):
    @property
    def owner(self) -> str: ...


_O = TypeVar("_O", bound=_Owned)


async def page_of(
    bus: valkey.asyncio.Valkey,
    index: str,
    get: Callable[[str], Awaitable[_O | None]],
    *,
    limit: int,
    after: str | None,
    owner: str,
    oldest_first: bool = False,
    wanted: Callable[[_O], bool] = lambda _: True,
) -> tuple[list[_O], bool] | None:
    """Records of an index by time, newest first, and whether there are more.

    Args:
        get: reads the record of an id; None: it is gone, and forgotten.
        after: begin behind this id.
        owner: leave out what is others'; empty: all.
        wanted: leave out the others.

    Returns None when there is no record `after` (any more).
    """
    rank_of, ids_at = (bus.zrank, bus.zrange) if oldest_first else (bus.zrevrank, bus.zrevrange)
    start = 0
    if after is not None:
        rank = await rank_of(index, after)
        if rank is None:
            return None
        start = rank + 1
    found: list[_O] = []
    while len(found) <= limit:
        page = await ids_at(index, start, start + limit)
        if not page:
            break
        gone = []
        for name in page:
            record_id = name.decode(errors="replace")
            try:
                record = await get(record_id)
            except Unreadable as exc:
                # One record that cannot be read does not hide the others.
                logger.error("%s cannot be listed: %s", record_id, exc)  # noqa: TRY400
                continue
            if record is None:
                gone.append(name)
            elif (not owner or record.owner == owner) and wanted(record):
                found.append(record)
        if gone:
            await bus.zrem(index, *gone)
        start += len(page) - len(gone)
    return found[:limit], len(found) > limit
