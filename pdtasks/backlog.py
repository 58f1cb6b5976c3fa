"""Names that gather from any thread until one thread deals with them, many at once.

Bounded: whoever adds never waits, and what does not fit is counted.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

from prometheus_client import Counter


class Backlog:
    """Each name once, the oldest first. `add` and `close` for any thread, the rest for one."""

    def __init__(self, most: int, dropped: Counter) -> None:
        """`dropped` counts the oldest of more than `most` names, and what `abandon` finds."""
        self._most = most
        self._dropped = dropped
        self._names: OrderedDict[str, None] = OrderedDict()
        self._num_taken = 0  # by `take`, and not dealt with yet
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        """Names that wait."""
        return len(self._names)

    @property
    def is_closed(self) -> bool:
        """Will nothing more come?"""
        return self._closed

    def add(self, names: Iterable[str]) -> None:
        """Have `names` dealt with, soon."""
        with self._changed:
            self._names.update(dict.fromkeys(names))
            self._drop_oldest()
            self._changed.notify()

    def close(self) -> None:
        """Wake who waits here: nothing waits any more, but what is there can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, most: int, within_s: float | None = None) -> list[str]:
        """The oldest, `most` at most; waits for the first.

        Empty: closed, and nothing is left; or nothing has come `within_s` seconds.  Ends what was
        taken before, `put_back` aside.
        """
        with self._changed:
            self._num_taken = 0
            self._changed.wait_for(lambda: self._names or self._closed, within_s)
            names = list(islice(self._names, most))
            for name in names:
                del self._names[name]
            self._num_taken = len(names)
            return names

    def settle(self) -> None:
        """What was taken is dealt with."""
        with self._changed:
            self._num_taken = 0

    def put_back(self, names: Iterable[str]) -> None:
        """What was taken is not dealt with: it is the oldest again."""
        with self._changed:
            self._num_taken = 0
            later, self._names = self._names, OrderedDict.fromkeys(names)
            self._names.update(later)
            self._drop_oldest()

    def pause(self, seconds: float) -> None:
        """Let `seconds` pass, or the close come."""
        until = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(lambda: self._closed or time.monotonic() >= until, seconds)

    def abandon(self) -> None:
        """Count what is left as dropped."""
        with self._changed:
            self._dropped.inc(len(self._names) + self._num_taken)
            self._names.clear()

    def _drop_oldest(self) -> None:
        while len(self._names) > self._most:
            self._names.popitem(last=False)
            self._dropped.inc()
