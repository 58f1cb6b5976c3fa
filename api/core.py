"""An engine core that is a pipeline of Celery tasks.

`EngineCoreRequest`s are published as prefill jobs; the `EngineCoreOutputs` that come on the reply
stream are put together to each request's answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol

from prometheus_client import Counter
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import SchedulerStats

from api.admission import Admission
from api.answer import Answer, leave_what_can_be
from api.engine_stats import EngineStats
from api.family import Family
from api.line import Flow, Line
from api.publishing import Publishing, SendsJobs
from api.reports import Record, Reports
from api.route import Route, route_wish
from api.service_class import ServiceClass, service_class
from api.tracing import AskedSpan
from api.usage import Usage
from api.workers import Workers
from pdtasks.background import Background
from pdtasks.broker.aborting import Aborter
from pdtasks.bus.buses import Buses
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.progress import Progress, tell_progress
from pdtasks.bus.reply import STREAM_TTL_S, ReplyStream, new_stream
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.engine.wire import decode_outputs
from pdtasks.errors import (
    IncompatibleWorker,
    InvalidRequest,
    NoWorker,
    PdtasksError,
    RepliesLost,
    RequestTimeout,
    WorkerLost,
    where,
)
from pdtasks.keys import asker_name
from pdtasks.messages import Ask, DecodeJob, PrefillJob, StepReply
from pdtasks.naming import STAGES
from pdtasks.pipeline import Publisher
from pdtasks.settings import Settings
from pdtasks.siblings import whole

logger = logging.getLogger(__name__)

#: Seconds for each half of a close: both fit into what the supervisor gives beyond the drain, and
#: the `Aborter`, which says what is left, takes 5.
_CLOSE_S = 6.0
#: Names that are drawn for each bus until one falls on a bus that answers.
_NAMES = 3
#: Seconds between two looks at the workers and the deadlines.
_WATCH_S = 1.0
#: Seconds without an answer after which a further bus is away: a restart takes less.
_AWAY_S = 5.0

_REPLIES = Counter("pdtasks_replies", "Messages on this API's reply stream")
_LEAKS = Counter("pdtasks_api_leaks", "Requests that were kept although nobody waited for them")
_OUTPUTS = Counter(
    "pdtasks_outputs", "Outputs in them; more than one each where requests share steps"
)
_ENDED = Counter(
    "pdtasks_requests",
    "Requests of this process that have ended, by how",
    ["model", "kind", "outcome"],
)
_ROUTES = Counter(
    "pdtasks_routes",
    "Requests that were published, by their way and why: both stages, or a decode worker alone",
    ["model", "route"],
)
#: Outcome of a request that this process has ended: its text reached a stop string, or its caller
#: went away.
_ENDED_HERE = "ended_here"


#: Called with stage, worker and route when a worker begins a stage of a request made in this
#: context.
StageWatch = Callable[[str, str, str], None]
_stage_watch: ContextVar[StageWatch | None] = ContextVar("stage_watch", default=None)


@contextmanager
def stage_watcher(watch: StageWatch) -> Iterator[None]:
    """Have `watch` called for the requests that are made in this context."""
    before = _stage_watch.set(watch)
    try:
        yield
    finally:
        _stage_watch.reset(before)


class TellsAborts(Protocol):
    """`pdtasks.broker.aborting.Aborter`, as far as this module needs it."""

    def abort(self, request_ids: Iterable[str]) -> None: ...

    def close(self) -> None: ...


class BringsReplies(Protocol):
    """`pdtasks.bus.reply.ReplyStream`, as far as this module needs it."""

    @property
    def name(self) -> str: ...

    @property
    def away_s(self) -> float: ...

    async def open(self) -> None: ...

    async def keep(self) -> None: ...

    def read(self) -> AsyncIterator[StepReply]: ...

    async def close(self) -> None: ...


@dataclass
class _Open:
    """A request whose answer is not finished."""

    request: EngineCoreRequest
    deadline: float  # UNIX seconds
    record: Record
    answer: Answer
    stage_watch: StageWatch | None = None
    stage_waited_for: str = STAGES[0]
    owner: str = ""  #: whose API key asked
    kind: ServiceClass = ServiceClass.INTERACTIVE

    @property
    def num_tokens(self) -> int:
        """Of the prompt and the answer so far."""
        return len(self.request.prompt_token_ids or ()) + len(self.answer.token_ids)


class PipelineCore(EngineCoreClient):
    """An engine core that is a pipeline of Celery tasks. Lives in one event loop."""

    engine_ranks_managed: ClassVar = [0]

    def __init__(
        self,
        settings: Settings,
        fail: Callable[[str, PdtasksError], Awaitable[None]],
        *,
        is_known: Callable[[str], bool] = lambda _: True,
        on_stats: Callable[[SchedulerStats], None] = lambda _: None,
        vocabulary: int = 1 << 40,
        publisher: SendsJobs | None = None,
        aborter: TellsAborts | None = None,
        stream: BringsReplies | None = None,
    ) -> None:
        """Args:
        is_known: tells of a request id whether whoever asked still waits for it.
        on_stats: gets, about once a second, what an engine tells with its steps.
        vocabulary: token ids are below this.
        fail: `fail(request_id, error)` ends a request with an error that is not the model's.
        publisher, aborter, stream: None: of RabbitMQ and the bus that `settings` name.
        """
        self.resources = SimpleNamespace(engine_dead=False)  # vLLM asks for it
        self.reports = Reports()
        self._admission = Admission(settings.max_waiting, settings.model_name)
        self._settings = settings
        self._fail = fail
        self._is_known = is_known
        self._on_stats = on_stats
        self._engine_stats = EngineStats()
        self._vocabulary = vocabulary
        self._unknown_before: set[str] = set()
        self._open: dict[str, _Open] = {}
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        settings.require_broker()
        self._buses = Buses(settings)
        self._bus = self._buses.first
        name = new_stream()
        self.usage = Usage(self._bus)
        self.workers = Workers(self._bus, settings.model_name, settings.queue_of)
        self._line = Line(self.workers.room, settings.model_name)
        self._stream: BringsReplies = stream or ReplyStream(
            self._buses.of(name), self._replies_are_lost, name
        )
        self._replies_bus = self._buses.of(self._stream.name)
        self.background = Background()
        self._publishing = Publishing(publisher or Publisher(self.background))
        self._publications: set[asyncio.Task[None]] = set()
        self._family: Family | None = None  # the last one, until it is published
        self._aborter: TellsAborts = aborter or Aborter(self.background)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def model(self) -> str:
        """What callers call the model whose requests these are."""
        return self._settings.model_name

    def queue_of(self, stage: str) -> str:
        """Where its jobs of a stage wait."""
        return self._settings.queue_of(stage)

    # -- life --------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin to listen. Raises valkey.ValkeyError when the bus cannot be reached."""
        await self._open_stream()
        await self.workers.look()
        # Without these no answer comes and no deadline holds: they survive any surprise.
        self._tasks = [
            self.background.task("reply-stream", self._stream.keep),
            self.background.task("replies", self._listen),
            self.background.task("workers", self._watch_workers),
            self.background.task("deadlines", self._watch_deadlines),
            self.background.task("usage", self.usage.tell),
        ]

    async def _open_stream(self) -> None:
        """On another bus, where the one is away that its name falls on."""
        for tries_left in reversed(range(_NAMES * len(self._buses.all))):
            try:
                await self._stream.open()
            except BUS_ERRORS:
                if len(self._buses.all) == 1 or not tries_left:
                    raise
            else:
                return
            name = new_stream()
            self._stream = ReplyStream(self._buses.of(name), self._replies_are_lost, name)
            self._replies_bus = self._buses.of(name)

    async def close(self) -> None:
        """Stop listening; workers drop what is left. Bounded, whatever hangs or fails."""
        self.background.close()
        for task in self._tasks:
            task.cancel()
        await _end(
            [
                *((task.get_name(), task) for task in self._tasks),
                *(("a publication", publishing) for publishing in self._publications),
                ("closing the reply stream", self._stream.close()),
            ]
        )
        await _end(
            [
                ("closing the bus", self._buses.aclose()),
                # Each joins its thread for some seconds at most.
                ("closing the publisher", asyncio.to_thread(self._publishing.close)),
                ("closing the aborter", asyncio.to_thread(self._aborter.close)),
            ]
        )

    def shutdown(self, timeout: float | None = None) -> None:
        """vLLM's hook; what needs an event loop is done in `close`."""
        self.resources.engine_dead = True

    # -- requests, called by vLLM ----------------------------------------------------------------

    def require_room(self, n: int) -> None:
        """Raises NoWorker when nobody could begin a request, TooManyRequests when many wait, and
        what `require_replies` raises.

        Jobs are asked about their workers only: they are taken as there is room for them.
        """
        self.require_replies()
        self.workers.require()
        if _stage_watch.get() is None:
            self._admission.require_room(n)

    def require_replies(self) -> None:
        """Raises RepliesLost when this process's replies go over a further bus, which is away.

        Its requests would keep places of workers that other API processes have a use for.
        """
        if self._replies_away_s() > _AWAY_S:
            raise RepliesLost("the bus of this API process's replies does not answer")

    def _replies_away_s(self) -> float:
        # While the first bus is away nobody else could be answered either: requests wait for it.
        return 0.0 if self._replies_bus is self._bus else self._stream.away_s

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Have `request` published. A broker that does not take it fails this request alone.

        Never suspends: a caller that hangs up while vLLM awaits this would be forgotten, for vLLM
        aborts only what it has finished adding.
        """
        now = time.time()
        deadline = now + self._settings.request_timeout_s
        watch = _stage_watch.get()
        owner = asker_name()
        if self._settings.salt_by_key and owner:
            request.cache_salt = f"{owner}:{request.cache_salt or ''}"
        record = self.reports.expect(request, owner)
        kind = service_class()
        self._open[request.request_id] = _Open(
            request, deadline, record, Answer(self._vocabulary), watch, owner=owner, kind=kind
        )
        self._admission.enter(request.request_id)
        if self._family is not None and self._family.takes(request):
            self._family.requests.append(request)
        else:
            flow, most = Flow(kind, owner), self.workers.room().together
            span = AskedSpan(request, now, kind, self._settings.model_name)
            self._family = Family(request, flow, now, most, span=span, wish=route_wish())
            self._in_background(self._line_up(self._family))
        record.traced_by(self._family.span)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        publishing = asyncio.create_task(work)
        self._publications.add(publishing)
        publishing.add_done_callback(self._publications.discard)

    async def _line_up(self, family: Family) -> None:
        """Have `family` published when it is its turn."""
        # By now it is complete: this is another turn of the loop.
        if self._family is family:
            self._family = None
        entry = self._open.get(family.first.request_id)
        if entry is None:
            return
        try:
            job = family.job(
                self._settings.model_name,
                entry.deadline,
                tells_start=entry.stage_watch is not None,
            )
        except InvalidRequest as exc:
            await self._give_up_all(family.request_ids, exc)
            return
        self._line.enter(
            family.flow,
            job.request_ids,
            len(family.first.prompt_token_ids or ()),
            lambda route: self._go(job, route),
            family.wish,
        )

    def _go(self, job: PrefillJob, route: Route) -> None:
        _ROUTES.labels(self._settings.model_name, route).inc(len(job.request_ids))
        for request_id in job.request_ids:
            if entry := self._open.get(request_id):
                entry.record.published(route)
                if not route.is_split:
                    entry.stage_waited_for = STAGES[-1]
        try:
            jobs: Sequence[PrefillJob | DecodeJob] = (job,) if route.is_split else whole(job)
        except InvalidRequest as exc:
            self._in_background(self._give_up_all(job.request_ids, exc))
            return
        for one in jobs:
            self._in_background(self._publish(one))

    async def _publish(self, job: PrefillJob | DecodeJob) -> None:
        entry = self._open.get(job.request_id)
        if entry is None:
            return
        try:
            if await self._publishing.publish(job, self._stream.name, entry.record.trace):
                entry.record.confirmed()
        except PdtasksError as exc:
            await self._give_up_all(job.request_ids, exc)
        except Exception as exc:  # noqa: BLE001 - whatever it is, one request fails
            logger.error("could not publish %s: %s", job.request_id, where(exc))  # noqa: TRY400
            error = PdtasksError(f"the request was not published: {type(exc).__name__}")
            await self._give_up_all(job.request_ids, error)

    async def _give_up_all(self, request_ids: Sequence[str], error: PdtasksError) -> None:
        for request_id in request_ids:
            await self._give_up(request_id, error)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Forget `request_ids` and have the workers drop them."""
        known = []
        for request_id in request_ids:
            entry = self._open.get(request_id)
            if entry is not None and self._forget(request_id, _ENDED_HERE):
                known.append(request_id)
                self.reports.ended_here(request_id)
                entry.record.end("stopped", time.monotonic())  # also one that is not remembered
        if known:
            self._tell_workers_to_drop(known)

    def _tell_workers_to_drop(self, request_ids: list[str]) -> None:
        # Not waited for: a broker that is slow to hear it must not hold up other answers.
        self._aborter.abort(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._outputs.get()

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    # -- for people --------------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """The requests whose answers are not finished."""
        return [entry.record for entry in self._open.values()]

    # -- replies -----------------------------------------------------------------------------------

    async def _listen(self) -> None:
        async for reply in self._stream.read():
            try:
                await self._take(reply)
            except IncompatibleWorker as exc:
                logger.error("a reply of %s could not be used: %s", reply.worker, exc)  # noqa: TRY400
            except Exception as exc:  # noqa: BLE001
                # One bad reply must not end the answers of all others.
                logger.error("a reply of %s could not be used: %s", reply.worker, where(exc))  # noqa: TRY400

    async def _take(self, reply: StepReply) -> None:
        _REPLIES.inc()
        _OUTPUTS.inc(len(reply.positions))
        for request_id, reports in reply.reports.items():
            self.reports.take(request_id, reports, said_by=reply.stage)
        for request_id in reply.started:
            if (entry := self._open.get(request_id)) and entry.stage_watch is not None:
                entry.stage_watch(reply.stage, reply.worker, entry.record.route or "")
        for request_id, ask in reply.asks.items():
            self._tell_progress(request_id, reply.stage, ask)
        for request_id, failure in reply.failures.items():
            entry = self._open.get(request_id)
            if entry is not None and entry.answer.ended_by(reply.stage, failure.attempt):
                await self._give_up(request_id, failure.to_error())
        if reply.outputs and reply.engine == ENGINE_VERSION:
            await self._take_outputs(reply)
        elif reply.outputs:
            logger.error("%s runs %s, this API %s", reply.worker, reply.engine, ENGINE_VERSION)

    def _tell_progress(self, request_id: str, stage: str, ask: Ask) -> None:
        """A worker runs a request again: tell it where to go on, and take nothing from others."""
        entry = self._open.get(request_id)
        if entry is None:
            progress = Progress(state="gone")
        elif stage == STAGES[-1] and not entry.answer.takes_over(ask):
            progress = Progress(state="elsewhere")
        else:
            progress = Progress(state="wanted", token_ids=tuple(entry.answer.token_ids))
        if entry is not None:  # else it is whatever somebody calls a request
            logger.info("%s is run again: its %s is %s", request_id, stage, progress.state)

        async def tell() -> None:
            try:
                await tell_progress(self._replies_bus, request_id, ask.attempt, progress)
            except BUS_ERRORS as exc:
                # It begins after the first token then.
                logger.warning("bus is away: %s", type(exc).__name__)

        self._in_background(tell())

    async def _take_outputs(self, reply: StepReply) -> None:
        step = decode_outputs(reply.outputs)
        now = time.monotonic()
        wanted, unknown = [], []
        attempts = reply.attempts or (0,) * len(reply.positions)
        if not len(reply.positions) == len(attempts) == len(step.outputs):
            # Before anything is noted of it.
            raise IncompatibleWorker("its outputs are not as many as their positions")
        for position, attempt, output in zip(reply.positions, attempts, step.outputs, strict=True):
            entry = self._open.get(output.request_id)
            if entry is None:
                unknown.append(output.request_id)
                continue
            # Each host has a monotonic clock of its own: shift the worker's times to ours.
            leave_what_can_be(entry.request, output, shift=now - step.timestamp)
            if await self._takes(entry, position, output, reply.stage, attempt):
                self._account(entry, output, now)
                wanted.append(output)
        if wanted:
            self._outputs.put_nowait(EngineCoreOutputs(outputs=wanted, timestamp=now))
        if unknown:
            # A worker that was started after the abort has not heard of it.
            self._tell_workers_to_drop(unknown)

    async def _takes(
        self, entry: _Open, position: int, output: EngineCoreOutput, stage: str, attempt: int
    ) -> bool:
        """Is there something new in it? What is raised fails this request and no other."""
        try:
            return entry.answer.take(position, output, stage=stage, attempt=attempt)
        except WorkerLost as exc:
            await self._give_up(output.request_id, exc)
        except Exception as exc:  # noqa: BLE001
            logger.error("output of %s: %s", output.request_id, where(exc))  # noqa: TRY400
            error = WorkerLost(f"an output could not be used: {type(exc).__name__}")
            await self._drop(output.request_id, error)
        return False

    def _account(self, entry: _Open, output: EngineCoreOutput, now: float) -> None:
        """Note how far the request is, with what is new in `output`. `now`: monotonic seconds."""
        if output.new_token_ids:
            entry.record.take_tokens(len(output.new_token_ids), now)
        entry.stage_waited_for = STAGES[1]
        self._line.has_first_token(output.request_id)
        if len(entry.answer.token_ids) > 1 or output.finish_reason is not None:
            self._admission.begin(output.request_id)
            self._line.has_second_token(output.request_id)
        if output.finish_reason is not None:
            self.usage.charge(entry.owner, entry.num_tokens)
            self._count(entry, str(output.finish_reason))
            del self._open[output.request_id]
            entry.record.end("done", now)
            self._line.leave(output.request_id)

    async def _give_up(self, request_id: str, error: PdtasksError) -> None:
        entry = self._open.get(request_id)
        if entry is not None and self._forget(request_id, error.code):
            entry.record.end(error.code, time.monotonic())
            logger.warning("%s failed: %s", request_id, error.code)
            await self._fail(request_id, error)

    def _forget(self, request_id: str, outcome: str) -> bool:
        """False when nobody waits for it anyhow. `outcome`: what is counted."""
        entry = self._open.pop(request_id, None)
        self._admission.leave(request_id)
        self._line.leave(request_id)
        self._publishing.withdraw(request_id)
        if entry is not None and entry.answer.token_ids:
            self.usage.charge(entry.owner, entry.num_tokens)
        if entry is not None:
            self._count(entry, outcome)
        return entry is not None

    def _count(self, entry: _Open, outcome: str) -> None:
        _ENDED.labels(self._settings.model_name, entry.kind, outcome).inc()

    # -- watching ----------------------------------------------------------------------------------

    async def _watch_workers(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                await self.workers.look()
            except BUS_ERRORS as exc:
                # Deadlines hold all the same.
                logger.warning("bus is away: %s", type(exc).__name__)
                self.workers.unknown()
            else:
                await self.workers.share(self._line.need())
            self._line.move()  # there may be more workers
            self.tell_stats()

    def under_way(self, now: float) -> dict[str, tuple[int, float]]:
        """How many requests are where, and how long the oldest has waited there, in seconds.

        In `decode`, after the first token there, nothing waits.  `now`: monotonic.
        """
        found = dict.fromkeys(("line", "prefill", "handover", "decode"), (0, 0.0))
        for entry in self._open.values():
            record = entry.record
            count, oldest = found.get(record.state, (0, 0.0))
            wait = now - record.waits_since if record.waits_for else 0.0
            found[record.state] = count + 1, max(oldest, wait)
        return found

    def tell_stats(self) -> None:
        """Tell how much is under way, and what the engines have told since the last time."""
        self._on_stats(
            self._engine_stats.look(
                self.workers.ours(),
                open_=len(self._open),
                begun=sum(bool(entry.answer.token_ids) for entry in self._open.values()),
                in_line=len(self._line),
            )
        )

    async def _watch_deadlines(self) -> None:
        """Nothing waits for ever: not beyond its deadline, not for a stage without workers.

        Waits for nobody: a bus that does not answer makes no deadline late.
        """
        while True:
            await asyncio.sleep(_WATCH_S)
            self._look_for_leaks()
            if self._replies_away_s() > STREAM_TTL_S:  # the stream has expired by now
                await self._replies_are_lost()
            now = time.time()
            for request_id, entry in list(self._open.items()):
                if now > entry.deadline:
                    await self._drop(request_id, RequestTimeout("the request took too long"))
                    continue
                stage = entry.stage_waited_for
                if entry.record.state == "line" and self.workers.decode_does_all:
                    continue
                # A worker that was killed is restarted by its supervisor: give it time.
                if self.workers.missing_s(stage) > self._settings.stage_grace_s:
                    await self._drop(request_id, NoWorker(f"no {stage} worker is alive"))

    def _look_for_leaks(self) -> None:
        """Requests that vLLM knows nothing of any more would stay here for ever: drop them, loudly.

        Twice in a row: between the two a request may just be on its way.
        """
        unknown = {r for r in self._open if not self._is_known(r)}
        for request_id in unknown & self._unknown_before:
            _LEAKS.inc()
            logger.warning("%s has ended without our hearing of it: please report this", request_id)
            self._tell_workers_to_drop([request_id])
            self._open[request_id].record.end("stopped", time.monotonic())
            self._forget(request_id, "leaked")
        self._unknown_before = unknown - self._unknown_before

    async def _replies_are_lost(self) -> None:
        for request_id in list(self._open):
            error = RepliesLost("the bus was restarted, tokens of this answer are lost: ask again")
            await self._drop(request_id, error)

    async def _drop(self, request_id: str, error: PdtasksError) -> None:
        self._tell_workers_to_drop([request_id])
        await self._give_up(request_id, error)


async def _end(steps: Iterable[tuple[str, Awaitable[object]]]) -> None:
    """Let the named `steps` of a close end side by side, for `_CLOSE_S` and whatever they raise."""
    names = {asyncio.ensure_future(step): name for name, step in steps}
    if not names:
        return
    done, late = await asyncio.wait(names, timeout=_CLOSE_S)
    for task in late:
        task.cancel()
        logger.warning("%s has not ended within %g s", names[task], _CLOSE_S)
    for task in done:
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.error("%s failed: %s", names[task], where(exc))
