"""What became of a request, and what did the stages do for it? Of those that came lately."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice

from prometheus_client import Histogram
from vllm.v1.engine import EngineCoreRequest

from api.route import Route
from api.tracing import AskedSpan
from api.window import Recently
from pdtasks.messages import StageReport
from pdtasks.naming import DECODE, PREFILL, STAGES
from pdtasks.overview import RequestView, Way
from pdtasks.tracing import NO_TRACE

_GAP = Histogram(
    "pdtasks_first_to_second_token_seconds",
    "Between the first two tokens of an answer: the hand-over, as its reader sees it",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60),
)
#: Requests whose reports can still be asked for.
_REMEMBERED = 1000
#: Seconds in which a worker reports of a request that was ended here.
_LATE_S = 2.0


class Record:
    """One answer: when its tokens came, and what the stages say."""

    def __init__(
        self, request: EngineCoreRequest, owner: str, now: float, recently: Recently
    ) -> None:
        """`now`: monotonic seconds."""
        self.external_id = request.external_req_id or request.request_id
        self.owner = owner
        self.state = "line"
        self.route: Route | None = None  #: None: it was not its turn yet
        self.ended_here = False  # and no report has come since
        self.by_stage: dict[str, StageReport] = {}
        self._span: AskedSpan | None = None
        self._recently = recently
        self._prompt_tokens = len(request.prompt_token_ids or ())
        self._output_tokens = 0
        self._began = now
        self._submitted_at = time.time()
        self._first_at = self._second_at = self._last_at = self._ended_at = 0.0

    def traced_by(self, span: AskedSpan) -> None:
        """It is one of the answers that `span` tells of."""
        self._span = span
        span.joins()

    @property
    def trace(self) -> Mapping[str, str]:
        """Headers of its trace."""
        return NO_TRACE if self._span is None else self._span.headers

    @property
    def has_ended(self) -> bool:
        """Will nothing more come?"""
        return self._ended_at > 0

    @property
    def is_split(self) -> bool:
        """Do two workers share it, as far as is known?"""
        return self.route is None or self.route.is_split

    @property
    def waits_for(self) -> str:
        """The stage of which it waits for the first token; empty: it goes on, or has ended."""
        if self.state in ("line", PREFILL):
            return PREFILL
        is_begun = self.state == DECODE and not self._first_at  # by the worker that does all of it
        return DECODE if is_begun or self.state == "handover" else ""

    @property
    def waits_since(self) -> float:
        """Monotonic seconds: since when it waits for what makes it go on."""
        return self._first_at or self._began

    def published(self, route: Route) -> None:
        """It is on its way to prefill, or to the worker that does all of it."""
        self.route = route
        if self.state == "line":
            self.state = "prefill" if route.is_split else "decode"
            if self._span is not None:
                self._span.publishing(route)

    def confirmed(self) -> None:
        """RabbitMQ has the message that it is in."""
        if self._span is not None:
            self._span.published()

    def take_tokens(self, count: int, now: float) -> None:
        """`count` more have come. `now`: monotonic seconds."""
        slot = self._recently.slot(now)
        slot.tokens += count
        if self._output_tokens > 1:
            slot.itl.add((now - self._last_at) / count)
        elif self._output_tokens:
            slot.gap.add(now - self._last_at)
            _GAP.observe(now - self._last_at)
            self._second_at = now
            self.state = "decode"
        else:
            slot.ttft.add(now - self._began)
            self._first_at = now
            self.state = "handover" if count == 1 and self.is_split else "decode"
        self._output_tokens += count
        self._last_at = now

    def end(self, state: str, now: float) -> None:
        """It has ended as `state` says: "done", "stopped", or an error's code."""
        if self.has_ended:
            return
        self._ended_at = now
        self.state = state
        if self._span is not None:
            self._span.answered(
                state,
                self._unix(now),
                output_tokens=self._output_tokens,
                first_at=self._unix(self._first_at) if self._first_at else None,
                second_at=self._unix(self._second_at) if self._second_at else None,
            )
        slot = self._recently.slot(now)
        if state in ("done", "stopped"):
            slot.ended += 1
            slot.end_to_end.add(now - self._began)
        else:
            slot.failed += 1

    def _unix(self, at: float) -> float:
        return self._submitted_at + at - self._began

    def reports(self) -> tuple[StageReport, ...]:
        """In the order of the stages."""
        return tuple(self.by_stage[stage] for stage in STAGES if stage in self.by_stage)

    def shown(self, now: float) -> RequestView:
        """For people."""
        first, second = self._first_at, self._second_at
        end = self._ended_at or now
        return RequestView(
            id=self.external_id,
            key=self.owner,
            state=self.state,
            route=self.route or "",
            submitted_at=self._submitted_at,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            first_s=first - self._began if first else None,
            second_s=second - self._began if second else None,
            seconds=end - self._began,
            way=self._way(first or end, second or end, end),
            stages=self.reports(),
        )

    def _way(self, first: float, second: float, end: float) -> Way:
        begun = self.by_stage.get(PREFILL if self.is_split else DECODE)
        # (hosts' clocks compared: it may be longer than the whole, or negative)
        queue_s = min(max(begun.queue_s if begun else 0.0, 0.0), first - self._began)
        return Way(
            queue_s=queue_s,
            prefill_s=first - self._began - queue_s,
            handover_s=second - first if self.is_split else 0.0,
            decode_s=end - (second if self.is_split else first),
        )


class Reports:
    """The last requests, by the name that the caller knows. For one event loop.

    A stage may report twice of a request: prefill hands over before its blocks are saved, and a
    stage whose worker was lost is run again.  The later one counts, from its own worker.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.recently = Recently(clock)
        self._clock = clock
        self._known: OrderedDict[str, Record] = OrderedDict()

    def expect(self, request: EngineCoreRequest, owner: str = "") -> Record:
        """Reports of `request` will come. `owner`: the name of the key that asks."""
        record = Record(request, owner, self._clock(), self.recently)
        self._known[request.request_id] = record
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return record

    def ended_here(self, request_id: str) -> None:
        """This process has ended it itself, at a stop string perhaps."""
        if known := self._known.get(request_id):
            known.ended_here = True
            known.end("stopped", self._clock())

    def take(self, request_id: str, reports: Iterable[StageReport], *, said_by: str) -> None:
        """A worker of stage `said_by` says what was done; of others' stages it knows less."""
        if known := self._known.get(request_id):
            known.ended_here = False
            for report in reports:
                before = known.by_stage.get(report.stage)
                if report.stage == said_by or before is None:
                    known.by_stage[report.stage] = report
                    self.recently.took(report, before)

    def newest(self, limit: int, sees: Callable[[str], bool]) -> list[RequestView]:
        """The last ones, the newest first. `sees`: those of which owner?"""
        now = self._clock()
        seen = (k for k in reversed(self._known.values()) if sees(k.owner))
        return [known.shown(now) for known in islice(seen, limit)]

    async def of(
        self, external_id: str, sees: Callable[[str], bool] = lambda _: True
    ) -> list[Record]:
        """Those called `external_id` that the stages have reported of, one for each sequence.

        Waits a moment for what is to come of a sequence that this process has ended itself.

        Args:
            sees: may the asker know of requests of that owner?
        """
        found = [known for known in self._called(external_id) if sees(known.owner)]
        with suppress(TimeoutError):
            async with asyncio.timeout(_LATE_S):
                while any(known.ended_here for known in found):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        return [known for known in found if known.by_stage]

    def _called(self, external_id: str) -> Iterator[Record]:
        return (k for k in self._known.values() if is_called(k.external_id, external_id))


def is_called(name: str, external_id: str) -> bool:
    """Is that a sequence of the request that its caller knows as `external_id`?"""
    # vLLM numbers the prompts of one completion request: <id>-0, <id>-1, …
    rest = name.removeprefix(external_id)
    return name.startswith(external_id) and (not rest or (rest[0] == "-" and rest[1:].isdecimal()))
