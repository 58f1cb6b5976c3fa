"""Many streams at once over plain sockets: what they cost the client is nobody's figure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Self

from pdtasks.bench.stream.group import Group, StreamsFailed

#: Groups of streams, each a step of the engine: one is computed while the other is relayed.
_GROUPS: Final = 2
#: Seconds in which all streams begin, get the tokens of a round, or end.
_PATIENCE_S: Final = 60.0


class Crowd:
    """Streams that a server has open, and that go on when they are told to.

    As a context: all have their first token when it begins, and have to have all when it ends.
    """

    def __init__(self, url: str, model: str, *, streams: int, tokens: int) -> None:
        """`tokens`: of each stream."""
        sizes = [len(range(number, streams, _GROUPS)) for number in range(_GROUPS)]
        self._groups = [Group(url, model, size, tokens) for size in sizes if size]

    async def __aenter__(self) -> Self:
        try:
            await _all("begun", *(group.begin() for group in self._groups))
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                await _all("ended", *(group.end() for group in self._groups))
        finally:
            self._close()

    async def relay(self, tokens: int) -> float:
        """Have each stream get so many more; the seconds until the last of them was read.

        Raises StreamsFailed.
        """
        start = time.monotonic()
        await _all("got their tokens", *(group.go_on(tokens) for group in self._groups))
        return time.monotonic() - start

    def _close(self) -> None:
        for group in self._groups:
            group.close()


async def _all(what: str, *work: Coroutine[Any, Any, None]) -> None:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await asyncio.gather(*work)
    except TimeoutError:
        raise StreamsFailed(
            f"not all streams have {what} within {_PATIENCE_S:.0f} s: ask for fewer with --streams"
        ) from None
