"""How are records read from the bus? Whole, or as what nobody of ours has written."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec
import valkey.asyncio
from valkey.exceptions import ResponseError

logger = logging.getLogger(__name__)

#: Records whose owner is looked at in one round trip: the bus answers nobody else meanwhile.
_AT_ONCE = 500


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


class _Owned(Protocol):
    @property
    def owner(self) -> str: ...


T = TypeVar("T", bound=_Owned)


class Records(Generic[T]):
    """All records of one kind."""

    def __init__(
        self,
        bus: valkey.asyncio.Valkey,
        kind: type[T],
        *,
        key: Callable[[str], str],
        is_id: Callable[[str], bool],
        json_fields: Collection[str],
        more: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {},
        error: type[Unreadable] = Unreadable,
        listed: Sequence[str] | None = None,
        unlisted: Mapping[str, Any] | None = None,
    ) -> None:
        """Args:
        key: of a record, by its id.
        json_fields: those that are no words.
        more: from the fields, what `kind` has beside them and the id.
        error: raised for what cannot be read.
        listed: the fields that are read for a list; None: all of `kind`.
        unlisted: what a record in a list has instead of others.
        """
        self._bus = bus
        self._kind = kind
        self._key = key
        self._is_id = is_id
        self._json_fields = json_fields
        self._more = more
        self._error = error
        named = dataclasses.fields(cast("Any", kind))
        self._listed = listed or [one.name for one in named if one.name != "id"]
        self._unlisted = unlisted or {}

    async def get(self, record_id: str) -> T | None:
        """The record, or None when there is none (any more). Raises the error for its kind."""
        if not self._is_id(record_id):
            return None
        with of_a_kind(self._error):
            fields = await cast(
                "Awaitable[dict[bytes, bytes]]", self._bus.hgetall(self._key(record_id))
            )
        return self._read(record_id, fields) if fields else None

    async def page(
        self,
        index: str,
        *,
        limit: int,
        after: str | None,
        owner: str,
        oldest_first: bool = False,
        wanted: Callable[[T], bool] = lambda _: True,
    ) -> tuple[list[T], bool] | None:
        """Records of an index by time, newest first, and whether there are more.

        However many there are, few round trips: not one for each.

        Args:
            after: begin behind this id.
            owner: leave out what is others'; empty: all.
            wanted: leave out the others.

        Returns None when there is no record `after` (any more).
        """
        rank_of, ids_at = (
            (self._bus.zrank, self._bus.zrange)
            if oldest_first
            else (self._bus.zrevrank, self._bus.zrevrange)
        )
        start = 0
        if after is not None:
            rank = await rank_of(index, after)
            if rank is None:
                return None
            start = rank + 1
        size = max(_AT_ONCE, limit + 1) if owner else limit + 1
        found: list[T] = []
        while len(found) <= limit:
            names: list[bytes] = await ids_at(index, start, start + size - 1)
            if not names:
                break
            own = await self._of_owner(names, owner) if owner else names
            gone: list[bytes] = []
            # No more than the caller can take: records are larger than their owners' names.
            while own and len(found) <= limit:
                some, own = own[: limit + 1], own[limit + 1 :]
                records, not_there = await self._read_all(some)
                gone += not_there
                found += [r for r in records if (not owner or r.owner == owner) and wanted(r)]
            if gone:
                await self._bus.zrem(index, *gone)
            start += len(names) - len(gone)
        return found[:limit], len(found) > limit

    async def _of_owner(self, names: Sequence[bytes], owner: str) -> list[bytes]:
        """Those that are `owner`'s, and those that cannot be told."""
        owners = await self._ask(names, ["owner"])
        theirs = [None if isinstance(one, ResponseError) else one[0] for one in owners]
        mine = (None, owner.encode())
        return [name for name, whose in zip(names, theirs, strict=True) if whose in mine]

    async def _read_all(self, names: Sequence[bytes]) -> tuple[list[T], list[bytes]]:
        """Records, and the names of those that are gone."""
        found, gone = [], []
        for name, answer in zip(names, await self._ask(names, self._listed), strict=True):
            record_id = name.decode(errors="replace")
            try:
                with of_a_kind(self._error):
                    if isinstance(answer, ResponseError):
                        raise answer
                fields = {
                    n.encode(): v
                    for n, v in zip(self._listed, answer, strict=True)
                    if v is not None
                }
                if fields and self._is_id(record_id):
                    found.append(self._read(record_id, fields))
                else:
                    gone.append(name)
            except Unreadable as exc:
                # One record that cannot be read does not hide the others.
                logger.error("%s cannot be listed: %s", record_id, exc)  # noqa: TRY400
        return found, gone

    async def _ask(
        self, names: Sequence[bytes], fields: Sequence[str]
    ) -> list[list[bytes | None] | ResponseError]:
        pipe = self._bus.pipeline(transaction=False)
        for name in names:
            pipe.hmget(self._key(name.decode(errors="replace")), list(fields))
        answers: list[Any] = await pipe.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
                raise answer
        return answers

    def _read(self, record_id: str, fields: Mapping[bytes, bytes]) -> T:
        try:
            found: dict[str, Any] = {n.decode(): value.decode() for n, value in fields.items()}
            for name in self._json_fields & found.keys():
                found[name] = json.loads(found[name])
            return msgspec.convert(
                {**self._unlisted, **found, **self._more(found), "id": record_id}, self._kind
            )
        except (RecursionError, ValueError) as exc:  # msgspec's, too, is a ValueError
            raise self._error(f"its record: {type(exc).__name__}") from None
