"""Whose turn is it? Requests wait here, not in RabbitMQ, until the workers have room for them.

A queue of RabbitMQ is first come, first served, and knows two priorities: ten thousand requests of
one tenant would lie before the next one's first.  So no more is published than keeps the workers
busy, and who goes next is decided by start-time fair queueing (Goyal, Vin and Cheng, 1996): each
flow, the requests of one key and kind, gets its weight's part of the prompts' tokens while it has
any, and a flow that had nothing to ask for goes before those that had their part.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from prometheus_client import Gauge

from api.route import Route, Wish
from api.service_class import ServiceClass

#: Parts that the kinds get of what there is, while all of them ask.
_WEIGHTS: Final = {ServiceClass.INTERACTIVE: 100, ServiceClass.JOB: 10, ServiceClass.BATCH: 1}
#: What a request costs beside its prompt, in tokens: a place in the decode workers for a while.
_ANSWER_COST: Final = 100
#: Steps of a prefill engine that are full: the one that it computes, and the next.
_STEPS: Final = 2
#: Tokens of such a step, where no worker has said.
_STEP_TOKENS: Final = 2048
#: Requests that a prefill worker has at least, however long their prompts.
_LEAST_PROMPTS: Final = 2
#: Answers to one prompt that a message carries at most, and as a part of a prefill worker's places:
#: they take one each, all at once, and whoever comes next waits for them.
_MOST_TOGETHER: Final = 64
_TOGETHER: Final = 0.25
#: Prompts beyond the prefill workers' places, as a part of those: a place is taken again when the
#: next prompt has come through API and RabbitMQ, about 10 ms and thus a fraction of a step.
_BEYOND_PLACES: Final = 0.25
#: Short prompts that each decode worker computes at once, in longest ones: their steps stay short
#: for the answers that it writes meanwhile. Further ones take the way through both stages.
_SHORT_PROMPTS: Final = 2
#: The longest prompt for decode workers that have nothing to do, in longest short ones: the first
#: answer that is handed to them meanwhile waits for it.
_LONGEST_FOR_IDLE: Final = 8
#: Seconds that what workers say of themselves may be old.
_SAID_S: Final = 4.0
#: Part of the decode workers' places whose requests may be on their way to them; at least so many.
_ON_THEIR_WAY: Final = 0.25
_LEAST_ON_THEIR_WAY: Final = 8
#: Part of those places that what nobody waits for may have, of this process.
_NOT_INTERACTIVE: Final = 0.75

_IN_LINE = Gauge("pdtasks_api_in_line", "Requests that are not published yet", ["model", "kind"])


class Flow(NamedTuple):
    """What is treated as one when turns are given."""

    kind: ServiceClass
    owner: str  #: whose API key asked; empty: without one


class Places(NamedTuple):
    """What some workers take before they have enough to do."""

    slots: float  #: requests
    prompts: float  #: that they have at least, however long
    tokens: float  #: of prompts

    def used_by(self, under_way: dict[str, int]) -> float:
        """The part of them that prompts of so many tokens take."""
        prompts = sum(1 for tokens in under_way.values() if tokens)
        of_work = min(prompts / self.prompts, sum(under_way.values()) / self.tokens)
        return max(len(under_way) / self.slots, of_work)

    def take(self, one: _Waiting, under_way: dict[str, int]) -> bool:
        """Would `one` be begun soon, with the prompts that are computed already?"""
        if not under_way:
            return True
        # Each answer takes a place, also where its prompt is computed for another one.  What finds
        # none waits in RabbitMQ, where nobody gives turns, however short it is.
        if len(under_way) >= self.slots:
            return False
        prompts = sum(1 for tokens in under_way.values() if tokens)
        return prompts < self.prompts or sum(under_way.values()) + one.tokens <= self.tokens


@dataclass(frozen=True)
class Room:
    """What there is of workers that take jobs."""

    prefill_workers: int = 1
    prefill_slots: int = 0  #: prompts that the prefill workers take at once; 0: not known
    step_tokens: int = 0  #: tokens that a prefill engine computes at once; 0: not known
    decode_workers: int = 1
    decode_slots: int = 0  #: requests that the decode workers run at once; 0: not known
    decode_active: int = 0  #: requests that they run, of all API processes
    #: Tokens of prompts that are best computed by decode workers; 0: they compute none.
    short_tokens: int = 0
    part: float = 1.0  #: of all that, for this API process

    @property
    def arrivals(self) -> int:
        """Requests that may be on their way to the decode workers, or be computed there."""
        most = max(_LEAST_ON_THEIR_WAY, int(_ON_THEIR_WAY * self.decode_slots))
        return max(1, int(self.part * most))

    @property
    def together(self) -> int:
        """Answers to one prompt that one message may carry."""
        if not self.prefill_slots:
            return _MOST_TOGETHER
        part = int(self.part * _TOGETHER * self.prefill_slots / max(1, self.prefill_workers))
        return min(_MOST_TOGETHER, max(1, part))

    @property
    def prefill(self) -> Places:
        """What the prefill workers take."""
        return self._places(self.prefill_workers, self.prefill_slots)

    @property
    def decode(self) -> Places:
        """The same of decode workers, for prompts that they compute."""
        return self._places(self.decode_workers, self.decode_slots)

    def _places(self, workers: int, slots: int) -> Places:
        workers = max(1, workers)
        return Places(
            slots=self.part * (1 + _BEYOND_PLACES) * slots if slots else math.inf,
            prompts=self.part * _LEAST_PROMPTS * workers,
            tokens=self.part * _STEPS * (self.step_tokens or _STEP_TOKENS) * workers,
        )

    @property
    def places_of_others(self) -> float:
        """How many of those that nobody waits for may run."""
        most = _NOT_INTERACTIVE * self.decode_slots
        return max(1.0, self.part * most) if self.decode_slots else math.inf


@dataclass(eq=False)
class _Waiting:
    """Requests that one message carries, and their turn."""

    flow: Flow
    request_ids: Sequence[str]
    tokens: int  #: of the prompt that they share
    go: Callable[[Route], None]
    wish: Wish
    start: float  #: the turn: who has the least goes first
    number: int  #: among those with the same


@dataclass
class _FlowState:
    waiting: deque[_Waiting] = field(default_factory=deque)
    finish: float = 0.0  #: the turn behind its last request


class _Lately:
    """The most of something in the last seconds: at least `_SAID_S`, at most twice as many."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self._before = self._most = 0

    def most(self, now: int) -> int:
        """With what there is `now`."""
        age_s = self._clock() - self._since
        if age_s >= _SAID_S:
            # Of the time before, if anything was told then.
            self._before = self._most if age_s < 2 * _SAID_S else 0
            self._most, self._since = 0, self._clock()
        self._most = max(self._most, now)
        return max(self._before, self._most)


class Line:
    """Requests that wait for their turn, and those that had it and have not ended. For one loop."""

    def __init__(
        self, room: Callable[[], Room], model: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`room()`: what there is now for `model`. When there is more, call `move`."""
        self._model = model
        self._lately = _Lately(clock)
        self._room = room
        self._flows: dict[Flow, _FlowState] = {}
        self._items: dict[str, _Waiting] = {}  # of those that wait
        self._now = 0.0  # the turn of who went last
        self._numbers = itertools.count()
        # With the tokens of their prompts; none for those that find theirs computed.
        self._prefilling: dict[str, int] = {}
        self._whole: dict[str, int] = {}  # the same of those at decode workers
        self._on_their_way: set[str] = set()  # between first token and second
        self._answered: set[str] = set()  # of which decode workers write the answer
        self._not_interactive: set[str] = set()  # that went and have not ended

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._items)

    def enter(
        self,
        flow: Flow,
        request_ids: Sequence[str],
        tokens: int,
        go: Callable[[Route], None],
        wish: Wish = Wish.NONE,
    ) -> None:
        """Call `go` with their way when it is the turn of these requests: perhaps at once.

        Args:
            tokens: of the prompt that they share.
            wish: their caller's, for their way.
        """
        state = self._flows.setdefault(flow, _FlowState())
        start = max(self._now, state.finish)
        cost = tokens + _ANSWER_COST * len(request_ids)
        state.finish = start + cost / _WEIGHTS[flow.kind]
        one = _Waiting(flow, request_ids, tokens, go, wish, start, next(self._numbers))
        state.waiting.append(one)
        for request_id in request_ids:
            self._items[request_id] = one
        _IN_LINE.labels(self._model, flow.kind).inc(len(request_ids))
        self.move()

    def has_first_token(self, request_id: str) -> None:
        """Its prompt is computed."""
        if self._prefilling.pop(request_id, None) is not None:
            self._on_their_way.add(request_id)
            self.move()
        elif self._whole.pop(request_id, None) is not None:
            self._answered.add(request_id)
            self._lately.most(len(self._answered))
            self.move()

    def has_second_token(self, request_id: str) -> None:
        """A decode worker runs it."""
        if request_id in self._on_their_way:
            self._on_their_way.discard(request_id)
            self._answered.add(request_id)
            self._lately.most(len(self._answered))
            self.move()

    def leave(self, request_id: str) -> None:
        """It has ended, or nobody wants it any more."""
        one = self._items.pop(request_id, None)
        if one is not None:
            _IN_LINE.labels(self._model, one.flow.kind).dec()
            if not any(other in self._items for other in one.request_ids):
                self._flows[one.flow].waiting.remove(one)
        self._prefilling.pop(request_id, None)
        self._whole.pop(request_id, None)
        self._on_their_way.discard(request_id)
        self._answered.discard(request_id)
        self._not_interactive.discard(request_id)
        self.move()

    def need(self) -> float:
        """The part of all places that these requests could use, 0 to 1."""
        if self._items:
            return 1.0  # more than they have
        room = replace(self._room(), part=1.0)
        return min(
            1.0,
            max(
                room.prefill.used_by(self._prefilling),
                room.decode.used_by(self._whole),
                len(self._on_their_way) / room.arrivals,
                len(self._not_interactive) / room.places_of_others,
            ),
        )

    def move(self) -> None:
        """Let go whoever's turn it is and for whom there is room."""
        room = self._room() if self._items else Room()
        while (one := self._next(room)) is not None and (route := self._route(one, room)):
            self._flows[one.flow].waiting.popleft()
            self._now = one.start
            ids = [request_id for request_id in one.request_ids if request_id in self._items]
            for request_id in ids:
                del self._items[request_id]
                # The prompt is computed once for all of them.
                tokens = one.tokens if request_id == ids[0] else 0
                (self._prefilling if route.is_split else self._whole)[request_id] = tokens
            if one.flow.kind is not ServiceClass.INTERACTIVE:
                self._not_interactive.update(ids)
            _IN_LINE.labels(self._model, one.flow.kind).dec(len(ids))
            one.go(route)
        self._forget_flows()

    def _next(self, room: Room) -> _Waiting | None:
        """The first of the flow whose turn it is, among those that may go at all."""
        heads = [state.waiting[0] for state in self._flows.values() if state.waiting]
        if len(self._not_interactive) >= room.places_of_others:
            heads = [one for one in heads if one.flow.kind is ServiceClass.INTERACTIVE]
        return min(heads, key=lambda one: (one.start, one.number), default=None)

    def _route(self, one: _Waiting, room: Room) -> Route | None:
        """The way that it can take now; None: it waits."""
        if len(self._on_their_way) >= room.arrivals:
            return None
        if one.wish is not Wish.SPLIT and (why := self._why_whole(one, room)):
            if why is Route.SHORT_PROMPT:
                return why
            return why if room.decode.take(one, self._whole) else None
        if room.prefill.take(one, self._prefilling):
            return Route.SPLIT
        if one.wish is not Wish.SPLIT and self._may_help(one, room):
            return Route.PREFILL_BUSY
        return None

    def _why_whole(self, one: _Waiting, room: Room) -> Route | None:
        """Why it should be left to a decode worker, also where prefill workers have room."""
        short = room.short_tokens
        if not short:
            return None
        if one.wish is Wish.WHOLE:
            return Route.WISHED
        if one.tokens <= short and self._computes_soon(one, room):
            return Route.SHORT_PROMPT
        return None if room.prefill_workers else Route.NO_PREFILL

    def _computes_soon(self, one: _Waiting, room: Room) -> bool:
        """Would a decode worker compute this short prompt in a step that keeps nobody waiting?"""
        most: float = _SHORT_PROMPTS * room.short_tokens
        if not (self._answered or self._on_their_way or self._num_of_others(room)):
            # There is nobody: prompts that come together share a step that is full.
            most = max(most, room.step_tokens)
        most *= room.part * max(1, room.decode_workers)
        has_place = len(self._whole) < room.arrivals
        # (One at least, however small this process's part is.)
        fits = not self._whole or sum(self._whole.values()) + one.tokens <= most
        return has_place and fits

    def _may_help(self, one: _Waiting, room: Room) -> bool:
        """Have decode workers nothing to do, nor soon?"""
        own = self._answered or self._on_their_way or self._whole
        return (
            not (own or self._num_of_others(room))
            and one.tokens <= _LONGEST_FOR_IDLE * room.short_tokens
        )

    def _num_of_others(self, room: Room) -> int:
        """Requests that decode workers run for others than this process.

        What the workers say is seconds old: own ones that have ended since are none of others'.
        """
        return max(0, room.decode_active - self._lately.most(len(self._answered)))

    def _forget_flows(self) -> None:
        """Those whose next turn would be as that of a new one."""
        if not self._items:
            self._flows.clear()
            self._now = 0.0
