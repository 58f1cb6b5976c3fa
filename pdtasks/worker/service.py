"""What does one worker process hold? Its engine, its end of the reply streams, its good name.

Made once when Celery starts the worker (`start`), used by the tasks of both stages (`current`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from celery import Celery
from prometheus_client import Counter
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.serial_utils import MsgpackEncoder

from pdtasks.background import Background
from pdtasks.broker.publishing import ConfirmedSender
from pdtasks.bus.connection import BUS_ERRORS, connect, connect_async
from pdtasks.bus.presence import worker_key
from pdtasks.bus.reply import ReplyWriter, is_reply_stream
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.engine.core import Engine
from pdtasks.engine.generation import Generation
from pdtasks.engine.models import resolve_model
from pdtasks.engine.text import TextFrontend
from pdtasks.errors import (
    EngineFailed,
    IncompatibleWorker,
    PdtasksError,
    RequestAborted,
    RequestTimeout,
    where,
)
from pdtasks.kv.keys import tail_key
from pdtasks.kv.store import BlockStore
from pdtasks.messages import Failure, StageReport, StepReply, WorkerStatus
from pdtasks.settings import Settings
from pdtasks.worker.discarding import Discarder
from pdtasks.worker.liveness import EXIT_NO_ENGINE, Liveness, end_process, watch
from pdtasks.worker.results import ResultStore

logger = logging.getLogger(__name__)

#: Aborted requests remembered in case their job is still on its way here.
_REMEMBERED_ABORTS = 10_000
_ANNOUNCE_S = 2.0
#: Longest time that an engine may take to compute and write a prompt nobody wants any more.
_ABORTED_SAVE_S = 60.0
#: Longest time that the store may take to delete what belongs to finished requests.
_DISCARD_S = 2.0
#: Longest wait for the bus to take what is left, at a stop or after a failure.
_FLUSH_S = 5.0

_LEAKS = Counter("pdtasks_leaks", "Times that an idle worker was found to hold ended requests")

T = TypeVar("T")


@dataclass
class _StreamStep:
    """What one engine step has for one reply stream."""

    outputs: list[EngineCoreOutput] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    reports: dict[str, tuple[StageReport, ...]] = field(default_factory=dict)


class Worker:
    """Everything that the tasks of this process share."""

    def __init__(self, app: Celery, settings: Settings, *, name: str, role: str) -> None:
        self.settings = settings
        self.name = name
        self.role = role
        self._state = "starting"
        self._state_changed = threading.Event()
        self._engine_ids = itertools.count()
        self._encoder = MsgpackEncoder(size_threshold=1 << 60)
        self._aborted: OrderedDict[str, None] = OrderedDict()
        self._final_reports: dict[Generation, Callable[[], tuple[StageReport, ...]]] = {}
        self._stages: dict[str, Future[Any]] = {}
        self._stages_lock = threading.Lock()
        self._waiting: set[asyncio.Task[None]] = set()
        self.background = Background()
        self.liveness = Liveness()
        store = BlockStore(settings.kv_urls, ttl_s=settings.kv_ttl_s, timeout_s=_DISCARD_S)
        self._discarder = Discarder(store, self.background)
        self.results = ResultStore(app)
        self.sender = ConfirmedSender(app, self.background, "stage-publisher")
        self._ended = threading.Event()
        self._leaked_before = self._leaks_told = 0
        self.engine: Engine
        self.text: TextFrontend

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring up the engine; returns when it can take requests."""
        self._announcer = self.background.thread("presence", self._announce)
        self.background.thread("watchdog", self._watch)
        model = resolve_model(self.settings.model, self.settings.cache_dir, logger.info)
        self.engine = Engine(self.settings, model, self._publish_step, on_death=_exit_at_once)
        started = time.monotonic()
        logger.info("starting the engine for %s", self.settings.model_name)
        self.engine.start()
        logger.info("the engine is ready after %.1f s", time.monotonic() - started)
        self.text = TextFrontend(self.engine.config)
        self._replies = ReplyWriter(connect_async(self.settings), self._reader_is_gone)
        replies = self.engine.call(self._replies.run())
        replies.add_done_callback(_exit_unless_cancelled)

    def stop(self) -> None:
        """End the engine and leave the bus."""
        self.enter("stopped")
        self._announcer.join(_FLUSH_S)
        self.wait_for_replies()
        self._discarder.close()
        self.sender.close()
        self.results.close()
        self.engine.stop()
        self.background.close()
        self._ended.set()
        with connect(self.settings) as bus, suppress(*BUS_ERRORS):
            bus.delete(worker_key(self.name))

    def status(self) -> WorkerStatus:
        """What this worker says of itself."""
        running = self._state in ("ready", "draining")
        state, reason = self._state, ""
        if state == "ready":
            if stall := self.liveness.stall():
                state, reason = "stalled", stall.reason
            else:
                reason = "; ".join(self.background.problems())
        return WorkerStatus(
            name=self.name,
            role=self.role,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=state,
            reason=reason,
            active=self.engine.num_running if running else 0,
            held=self._num_held() if running else 0,
            kv_usage=self.engine.kv_usage if running else 0.0,
            model=self.settings.model_name,
            max_model_len=self.engine.config.model_config.max_model_len if running else 0,
            engine=ENGINE_VERSION,
        )

    def _num_held(self) -> int:
        # Without those whose KV the engine may still write, which are seen to (`_waiting`).
        engine = self.engine.num_held - len(self._waiting)
        return max(engine, len(self._stages), len(self._final_reports), 0)

    def _announce(self) -> None:
        bus = connect(self.settings)
        ttl_ms = int(self.settings.worker_ttl_s * 1000)
        while self._state != "stopped":
            self._state_changed.clear()
            try:
                bus.set(worker_key(self.name), self.status().to_wire(), px=ttl_ms)
            except BUS_ERRORS as exc:
                logger.warning("bus is away: %s", type(exc).__name__)
            except Exception as exc:  # noqa: BLE001
                # A worker that works but is not seen would be a riddle: say it and go on.
                logger.error("the worker's status could not be announced: %s", where(exc))  # noqa: TRY400
            self._look_for_leaks()
            self._state_changed.wait(min(_ANNOUNCE_S, self.settings.worker_ttl_s / 3))

    def _look_for_leaks(self) -> None:
        """An idle worker that holds anything will hold more and more: say so, once."""
        is_idle = self._state == "ready" and not self._stages
        leaked = self._num_held() if is_idle else 0
        # Twice in a row: between the two numbers a request may have begun.
        if leaked and self._leaked_before and leaked != self._leaks_told:
            _LEAKS.inc()
            self._leaks_told = leaked
            logger.warning("%d requests that have ended are still held: please report this", leaked)
        self._leaked_before = leaked

    def _watch(self) -> None:
        watch(
            self.liveness,
            self.settings.stall_timeout_s,
            self.settings.drain_timeout_s,
            self._ended,
        )

    def enter(self, state: str) -> None:
        """Change to `state` ("ready", "draining" or "stopped") and say so at once."""
        self._state = state
        self._state_changed.set()

    # -- for the tasks, on the engine's loop ------------------------------------------------------

    def run(self, task_id: str, stage: Callable[[], Coroutine[Any, Any, T]], deadline: float) -> T:
        """Run a stage on the engine's loop and wait for it, in a task's thread.

        A job that RabbitMQ delivers again while it runs here (the connection was lost, the work
        was not) joins the stage under way; `stage` is not called then.

        Raises RequestTimeout when `deadline` (UNIX seconds) passes; the stage is cancelled then.
        An error that is none of ours becomes EngineFailed without its text, which Celery would
        put into results, logs and events: it may quote a prompt.
        """
        with self._stages_lock:
            future = self._stages.get(task_id)
            if future is None:
                future = self.engine.call(_within(stage, deadline))
                self._stages[task_id] = future
        try:
            found: T = future.result()
        except PdtasksError:
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it is, its text stays here
            logger.error("%s failed: %s", task_id, where(exc))  # noqa: TRY400
            raise EngineFailed(f"the stage failed: {type(exc).__name__}") from None
        finally:
            with self._stages_lock:
                if self._stages.get(task_id) is future:
                    del self._stages[task_id]
        return found

    def engine_id(self, request_id: str) -> str:
        """A name for the engine that no other attempt at `request_id` has."""
        return f"{request_id}#{os.getpid()}.{next(self._engine_ids)}"

    async def generate(
        self, generation: Generation, final_reports: Callable[[], tuple[StageReport, ...]]
    ) -> None:
        """Run `generation`; `final_reports` is asked when its answer is finished here."""
        self.require_wanted(generation.request_id)
        self._final_reports[generation] = final_reports
        try:
            await self.engine.generate(generation)
        finally:
            del self._final_reports[generation]
        # Acknowledged is only what the asker can read: the job comes again if this worker dies.
        await self._replies.flush()

    def check_origin(self, engine: str, model: str | None) -> None:
        """Raises IncompatibleWorker when a request was made for another vLLM or model.

        Token ids of another model's vocabulary would be answered, wrongly.
        """
        if engine and engine != ENGINE_VERSION:
            raise IncompatibleWorker(
                f"the request was made by {engine}, this worker runs {ENGINE_VERSION}"
            )
        if model is not None and model != self.settings.model_name:
            raise IncompatibleWorker(
                f"the request is for {model}, this worker serves {self.settings.model_name}"
            )

    def discard_when_saved(self, generation: Generation) -> None:
        """`discard`, after what the engine may still write for an aborted `generation`."""

        async def wait() -> None:
            if generation.entered_engine:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_ABORTED_SAVE_S):
                        await generation.saved.wait()
            self.engine.forget(generation)
            self.discard(generation.request_id)

        waiting = asyncio.create_task(wait())
        self._waiting.add(waiting)
        waiting.add_done_callback(self._waiting.discard)

    def discard(self, request_id: str) -> None:
        """Delete what belongs to one request alone, soon. A store that is away lets it expire."""
        world = self.engine.config.parallel_config.tensor_parallel_size
        # Not waited for: a slow store must not keep a task's slot.
        self._discarder.discard(tail_key(request_id, rank) for rank in range(world))

    # -- replies -------------------------------------------------------------------------------

    def _publish_step(
        self, step: list[tuple[Generation, int, EngineCoreOutput]], timestamp: float
    ) -> None:
        """One message for each reply stream, however many requests are in the step."""
        by_stream: dict[str, _StreamStep] = {}
        for generation, position, output in step:
            if generation.reply_to is None:
                continue
            reports = None
            if output.finish_reason is not None:
                try:
                    reports = self._final_reports[generation]()
                except Exception as exc:  # noqa: BLE001 - it ends one request, not the engine
                    logger.error("no report of %s: %s", generation.request_id, where(exc))  # noqa: TRY400
                    generation.end(EngineFailed(f"the answer was lost: {type(exc).__name__}"))
                    continue
            part = by_stream.setdefault(generation.reply_to, _StreamStep())
            part.outputs.append(output)
            part.positions.append(position)
            if reports is not None:
                part.reports[generation.request_id] = reports
        for stream, part in by_stream.items():
            outputs = EngineCoreOutputs(outputs=part.outputs, timestamp=timestamp)
            self._replies.put(
                stream,
                self._reply(
                    outputs=bytes(cast("bytes", self._encoder.encode(outputs)[0])),
                    positions=tuple(part.positions),
                    reports=part.reports,
                ),
            )

    def publish_failure(self, stream: str | None, request_id: str, error: PdtasksError) -> None:
        """Tell the asker that there will be no answer. Callable from any thread."""
        if stream is None or not is_reply_stream(stream):
            return
        reply = self._reply(failures={request_id: Failure.of(error)})
        self.engine.loop.call_soon_threadsafe(self._replies.put, stream, reply)

    def publish_reports(
        self, stream: str | None, request_id: str, reports: tuple[StageReport, ...]
    ) -> None:
        """Tell the asker what was done for a request that it ended itself. On the engine's loop."""
        if stream is not None:
            self._replies.put(stream, self._reply(reports={request_id: reports}))

    def publish_start(self, stream: str | None, request_id: str) -> None:
        """Tell the asker who does the stage that begins now. On the engine's loop."""
        if stream is not None:
            self._replies.put(stream, self._reply(started=(request_id,)))

    def _reply(self, **content: Any) -> StepReply:
        return StepReply(worker=self.name, stage=self.role, engine=ENGINE_VERSION, **content)

    def wait_for_replies(self) -> None:
        """Return when the bus has what was published so far, or does not take it in time."""
        with suppress(TimeoutError):
            self.engine.call(self._replies.flush()).result(_FLUSH_S)

    def _reader_is_gone(self, stream: str) -> None:
        for generation in list(self._final_reports):
            if generation.reply_to == stream:
                self.abort([generation.request_id])

    # -- control -------------------------------------------------------------------------------

    def abort_soon(self, request_ids: Iterable[str]) -> None:
        """`abort`, from any thread."""
        self.engine.loop.call_soon_threadsafe(self.abort, list(request_ids))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests, running or still on their way here. Runs on the engine's loop."""
        for request_id in request_ids:
            self._aborted[request_id] = None
            if len(self._aborted) > _REMEMBERED_ABORTS:
                self._aborted.popitem(last=False)
            if self.engine.abort(request_id):
                logger.info("aborted %s", request_id)

    def require_wanted(self, request_id: str) -> None:
        """Raises RequestAborted when the caller of `request_id` has hung up."""
        if request_id in self._aborted:
            raise RequestAborted("the caller hung up")


async def _within(stage: Callable[[], Coroutine[Any, Any, T]], deadline: float) -> T:
    try:
        # Also when the deadline has passed: the stage begins, and cleans up when it is cancelled.
        async with asyncio.timeout(deadline - time.time()):
            return await stage()
    except TimeoutError as exc:
        raise RequestTimeout("the deadline passed before the answer was finished") from exc


def _exit_unless_cancelled(replies: Future[None]) -> None:
    if not replies.cancelled():
        logger.critical("replies cannot be sent any more", exc_info=replies.exception())
        _exit_at_once()


def _exit_at_once() -> None:
    """End a worker whose engine is dead.

    A worker without an engine would answer every job with an error at once and swallow the whole
    queue.  When the process ends, RabbitMQ gives all its jobs to others, together and at once.
    """
    end_process("no engine, no worker", EXIT_NO_ENGINE)


#: The worker that this process is; empty in all others.
_current: list[Worker] = []


def start(app: Celery, settings: Settings, *, name: str, role: str) -> None:
    """Make this process a worker of `app`."""
    here = Worker(app, settings, name=name, role=role)
    here.start()
    _current.append(here)


def current() -> Worker:
    """The worker that this process is."""
    (here,) = _current
    return here
