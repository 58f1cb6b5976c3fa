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
from contextvars import ContextVar
from typing import Final

from prometheus_client import Counter, Gauge
from starlette.types import ASGIApp, Receive, Scope, Send

from pdtasks.errors import TooManyRequests

#: Seconds over which the pace is measured.
_PACE_S: Final = 10.0
#: Seconds that a client is told at least, and at most: then is not sooner.
_SOONEST_S: Final = 1.0
LATEST_S: Final = 60.0

_WAITING = Gauge("pdtasks_api_waiting", "Requests that wait for the workers", ["model"])
_REFUSED = Counter("pdtasks_api_refused", "Requests that were refused with 429")


class _Visit:
    """One HTTP request: the places that it was given and has not taken yet."""

    def __init__(self) -> None:
        self.places = 0
        self.admission: Admission | None = None


_visit: ContextVar[_Visit | None] = ContextVar("visit", default=None)


class Visits:
    """ASGI layer: who was given a place and ends without taking it, gives it back.

    Between the two the prompt is tokenised: in a flood a hundred others ask meanwhile.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = _Visit()
        token = _visit.set(visit)  # what the routes begin inherits it
        try:
            await self._app(scope, receive, send)
        finally:
            _visit.reset(token)
            if visit.admission is not None:
                visit.admission.give_back(visit)


class Admission:
    """Which of a model's requests wait in this process, and may one more? For one event loop.

    A request waits until it has two tokens, or has ended: then both stages are at work on it.
    """

    def __init__(
        self, most_waiting: int, model: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._gauge = _WAITING.labels(model)
        self._most_waiting = most_waiting
        self._clock = clock
        self._waiting: set[str] = set()
        self._given = 0  # places of requests that have not entered yet
        self._began: deque[float] = deque()  # when, of the last `_PACE_S`
        self._next_place_at = 0.0

    def enter(self, request_id: str) -> None:
        """It waits from now on, in a place that its visit was given."""
        visit = _visit.get()
        if visit is not None and visit.places:
            visit.places -= 1
            self._given -= 1
        self._waiting.add(request_id)
        self._gauge.set(len(self._waiting))

    def begin(self, request_id: str) -> None:
        """The workers are at work on it."""
        if request_id in self._waiting:
            self._began.append(self._clock())
            self._forget_old()
            self.leave(request_id)

    def leave(self, request_id: str) -> None:
        """It has ended, one way or the other."""
        self._waiting.discard(request_id)
        self._gauge.set(len(self._waiting))

    def give_back(self, visit: _Visit) -> None:
        """The places of a visit that is over."""
        self._given -= visit.places
        visit.places = 0

    def require_room(self, n: int = 1) -> None:
        """Give this visit `n` places. Raises TooManyRequests when they would be too many.

        However many, they may come in while nobody waits.
        """
        num_waiting = len(self._waiting) + self._given
        if not num_waiting or num_waiting + n <= self._most_waiting:
            if num_waiting <= self._most_waiting / 2:
                self._next_place_at = 0.0
            if (visit := _visit.get()) is not None:
                visit.admission = self
                visit.places += n
                self._given += n
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
        self._next_place_at = min(place, now + LATEST_S)
        return math.ceil(min(max(place - now, _SOONEST_S), LATEST_S))

    def _forget_old(self) -> None:
        oldest = self._clock() - _PACE_S
        while self._began and self._began[0] < oldest:
            self._began.popleft()
