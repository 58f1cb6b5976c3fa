"""Which requests does nobody want any more? Also those whose job is still on its way here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from pdtasks.errors import RequestAborted

#: The oldest are forgotten.
_REMEMBERED = 10_000


class AbortMemory:
    """Requests that were dropped lately. For one thread, the engine's loop."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def remember(self, request_ids: Iterable[str]) -> None:
        """Nobody wants `request_ids` any more."""
        self._ids.update(dict.fromkeys(request_ids))
        while len(self._ids) > _REMEMBERED:
            self._ids.popitem(last=False)

    def has_all(self, request_ids: Iterable[str]) -> bool:
        """Does nobody want any of them?"""
        return all(request_id in self._ids for request_id in request_ids)

    def require_wanted(self, request_id: str) -> None:
        """Raises RequestAborted when the caller of `request_id` has hung up."""
        if request_id in self._ids:
            raise RequestAborted("the caller hung up")
