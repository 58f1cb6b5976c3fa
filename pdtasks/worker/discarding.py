"""How is KV that belongs to one request alone deleted, without anybody waiting for the store?

Names gather, and one call deletes many.  A store that is away or slow costs nobody but itself: what
is not deleted expires.  A block may still be on its way to the store when the answer that needed it
is finished: what was not there is looked for again, soon and late.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable

from prometheus_client import Counter

from pdtasks.background import Background
from pdtasks.backlog import Backlog
from pdtasks.backoff import Backoff
from pdtasks.kv.store import BlockStore, StoreError

logger = logging.getLogger(__name__)

#: Names that may wait; beyond that the oldest are left to their TTL.
MOST_WAITING = 10_000
#: Seconds in which names gather for one call.
_GATHER_S = 0.05
#: Names in one call.
_BATCH = 500
#: Seconds between two looks: soon, and after longer than a block may take (`kv_timeout_s`).
AGAIN_S = (1.0, 12.0)
#: Seconds that a close waits for what is left.
_CLOSE_S = 1.0

_LEFT = Counter("pdtasks_kv_left_to_ttl", "KV blocks of finished requests that were not deleted")


class Discarder:
    """Deletes blocks by name, soon. For any thread."""

    def __init__(self, store: BlockStore, background: Background) -> None:
        """`store`: used by this object's thread alone; its `timeout_s` bounds each call."""
        self._store = store
        self._names = Backlog(MOST_WAITING, _LEFT)
        # Further looks: when (monotonic), at what. Each pause has a queue of its own, in order.
        self._further: list[deque[tuple[float, list[str]]]] = [deque() for _ in AGAIN_S]
        self._backoff = Backoff(maximum_s=10.0)
        self._thread = background.thread("discard", self._run)

    def discard(self, names: Iterable[str]) -> None:
        """Have `names` deleted."""
        self._names.add(names)

    def close(self) -> None:
        """Delete what is left, for a moment at most."""
        self._names.close()
        self._thread.join(_CLOSE_S)
        self._names.abandon()
        if not self._thread.is_alive():
            self._store.close()

    def _run(self) -> None:
        while True:
            names = self._names.take(_BATCH, self._until_further_look())
            self._names.settle()  # counted below, if they are not deleted
            if names:
                self._look_again(0, self._delete(names))
            elif self._names.is_closed:
                return
            for number, looks in enumerate(self._further):
                while looks and time.monotonic() >= looks[0][0]:
                    self._look_again(number + 1, self._delete(looks.popleft()[1]))
            if self._names.is_closed and self._backoff.pause_s:
                return
            self._names.pause(self._backoff.pause_s)
            if names:
                # (Not `pause`: each name that comes would wake this thread.)
                time.sleep(_GATHER_S)

    def _look_again(self, number: int, names: list[str]) -> None:
        """At `names`, if there is another look."""
        if names and number < len(AGAIN_S):
            self._further[number].append((time.monotonic() + AGAIN_S[number], names))

    def _until_further_look(self) -> float | None:
        times = [looks[0][0] for looks in self._further if looks]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _delete(self, names: list[str]) -> list[str]:
        """Returns those that were not there."""
        try:
            unknown = self._store.delete(names)
        except Exception as exc:
            _LEFT.inc(len(names))
            if not isinstance(exc, StoreError):
                raise  # `Background` says where from, and begins again
            self._backoff.fail()
            kind = type(exc).__name__
            logger.warning("%d KV blocks are left to their TTL: %s", len(names), kind)
            return []
        self._backoff.succeed()
        return unknown
