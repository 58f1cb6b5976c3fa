"""What do routes share that show what lies on the bus? Whose it is, lists, a bus that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from fastapi import HTTPException

from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.records import Unreadable
from pdtasks.keys import asker_name


class _Owned(Protocol):
    @property
    def owner(self) -> str: ...


_T = TypeVar("_T", bound=_Owned)


@contextmanager
def from_bus(what: str) -> Iterator[None]:
    """Raises HTTPException in place of what the bus raises: 503, and 500 for what nobody wrote.

    Args:
        what: lies there, in a word.
    """
    try:
        yield
    except BUS_ERRORS as exc:
        raise HTTPException(503, f"the bus does not answer: {type(exc).__name__}") from exc
    except Unreadable as exc:
        why = f"the bus has something else under this {what}'s name: {exc}"
        raise HTTPException(500, why) from exc


def own(record: _T | None, what: str, name: str) -> _T:
    """`record`, if it is the asker's. Raises HTTPException: others' is as if it were not there."""
    if record is None or asker_name() not in ("", record.owner):
        raise HTTPException(404, f"there is no {what} {name!r} (any more)")
    return record


def page(
    what: str, after: str | None, found: tuple[list[dict[str, Any]], bool] | None
) -> dict[str, Any]:
    """A list as OpenAI has it. Raises HTTPException when there is nothing `after`."""
    if found is None:
        raise HTTPException(404, f"there is no {what} {after!r} to begin behind (any more)")
    data, has_more = found
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
