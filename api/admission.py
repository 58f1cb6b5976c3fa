"""May one more request come in? As long as few wait for the workers.

Whatever waits lies in RabbitMQ and in this process, and behind all others: beyond a bound a client
is better told when to come again.  That is when those before it have begun, at the pace at which
requests did lately; who is refused after it is told a later time, for else all would come at once.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from prometheus_client import Counter, Gauge

from pdtasks.errors import TooManyRequests

#: Seconds over which the pace is measured.
_PACE_S: Final = 10.0
#: Seconds: bounds of what a client is told.
_SOONEST_S, _LATEST_S = 1.0, 60.0

_WAITING = Gauge("pdtasks_api_waiting", "Requests that wait for the workers")
_REFUSED = Counter("pdtasks_api_refused", "Requests that were refused with 429")


class Admission:
    """Which of this process's requests wait, and whether one more may. For one event loop.

    A request waits until it has two tokens, or has ended: then both stages are at work on it.
    """

    def __init__(self, most_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_waiting = most_waiting
        self._clock = clock
        self._waiting: set[str] = set()
        self._began: deque[float] = deque()  # when, of the last `_PACE_S`
        self._next_place_at = 0.0

    def enter(self, request_id: str) -> None:
        """It waits from now on."""
        self._waiting.add(request_id)
        _WAITING.set(len(self._waiting))

    def begin(self, request_id: str) -> None:
        """The workers are at work on it."""
        if request_id in self._waiting:
            self._began.append(self._clock())
            self._forget_old()
            self.leave(request_id)

    def leave(self, request_id: str) -> None:
        """It has ended, one way or the other."""
        self._waiting.discard(request_id)
        _WAITING.set(len(self._waiting))

    def require_room(self, n: int = 1) -> None:
        """Raises TooManyRequests when `n` more would be too many.

        However many, they may come in while nobody waits.
        """
        num_waiting = len(self._waiting)
        if not num_waiting or num_waiting + n <= self._most_waiting:
            if num_waiting <= self._most_waiting / 2:
                self._next_place_at = 0.0
            return
        _REFUSED.inc()
        raise TooManyRequests(
            f"{num_waiting} requests wait for the workers already: come again later, or have "
            "PDTASKS_MAX_WAITING raised",
            retry_after_s=self._promise(n),
        )

    def _promise(self, n: int) -> int:
        """Whole seconds until there is room for `n`, behind those that were promised some."""
        now = self._clock()
        self._forget_old()
        # Nothing has begun lately: that one does in the next window is as good a guess as any.
        pace = max(len(self._began), 1) / _PACE_S
        place = max(now, self._next_place_at) + n / pace
        self._next_place_at = min(place, now + _LATEST_S)
        return math.ceil(min(max(place - now, _SOONEST_S), _LATEST_S))

    def _forget_old(self) -> None:
        oldest = self._clock() - _PACE_S
        while self._began and self._began[0] < oldest:
            self._began.popleft()
