"""How is KV that belongs to one request alone deleted, without anybody waiting for the store?

Names gather, and one call deletes many.  A store that is away or slow costs nobody but itself: what
is not deleted expires.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable

from prometheus_client import Counter

from pdtasks.background import Background
from pdtasks.backoff import Backoff
from pdtasks.kv.store import BlockStore, StoreError

logger = logging.getLogger(__name__)

#: Names that may wait; beyond that the oldest are left to their TTL.
MOST_WAITING = 10_000
#: Names in one call.
_BATCH = 500
#: Seconds that a close waits for what is left.
_CLOSE_S = 1.0

_LEFT = Counter("pdtasks_kv_left_to_ttl", "KV blocks of finished requests that were not deleted")


class Discarder:
    """Deletes blocks by name, soon. For any thread."""

    def __init__(self, store: BlockStore, background: Background) -> None:
        """`store`: used by this object's thread alone; its `timeout_s` bounds each call."""
        self._store = store
        self._names: OrderedDict[str, None] = OrderedDict()
        self._wake = threading.Condition()
        self._closed = False
        self._backoff = Backoff(maximum_s=10.0)
        self._thread = background.thread("discard", self._run)

    def discard(self, names: Iterable[str]) -> None:
        """Have `names` deleted."""
        with self._wake:
            if self._closed:
                return
            self._names.update(dict.fromkeys(names))
            self._drop_oldest()
            self._wake.notify()

    def close(self) -> None:
        """Delete what is left, for a moment at most."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(_CLOSE_S)
        with self._wake:
            _LEFT.inc(len(self._names))
            self._names.clear()
        if not self._thread.is_alive():
            self._store.close()

    def _drop_oldest(self) -> None:
        while len(self._names) > MOST_WAITING:
            self._names.popitem(last=False)
            _LEFT.inc()

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._backoff.pause_s:
                    self._wake.wait_for(lambda: self._closed, self._backoff.pause_s)
                self._wake.wait_for(lambda: self._names or self._closed)
                names = [self._names.popitem(last=False)[0] for _ in range(self._num_next())]
            if not names:
                return
            try:
                self._store.delete(names)
            except Exception as exc:
                _LEFT.inc(len(names))
                if not isinstance(exc, StoreError):
                    raise  # `Background` says where from, and begins again
                self._backoff.fail()
                kind = type(exc).__name__
                logger.warning("%d KV blocks are left to their TTL: %s", len(names), kind)
                if self._closed:
                    return
            else:
                self._backoff.succeed()

    def _num_next(self) -> int:
        return min(len(self._names), _BATCH)
