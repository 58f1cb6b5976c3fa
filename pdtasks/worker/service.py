"""What does one worker process hold? This module only puts it together.

Made once when Celery starts the worker (`start`), used by the tasks of both stages (`current`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from celery import Celery
from celery.worker import state as worker_state
from prometheus_client import REGISTRY

from pdtasks.background import Background
from pdtasks.broker.publishing import ConfirmedSender
from pdtasks.bus.buses import Buses
from pdtasks.bus.connection import BUS_ERRORS
from pdtasks.bus.presence import read_workers_async
from pdtasks.bus.progress import Progress, read_progress
from pdtasks.bus.writers import ReplyWriters
from pdtasks.drained import Drained
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.engine.boot import start_core
from pdtasks.engine.core import Engine
from pdtasks.engine.generation import Generation, State
from pdtasks.engine.models import resolve_model
from pdtasks.engine.text import TextFrontend
from pdtasks.errors import IncompatibleWorker, PdtasksError, where
from pdtasks.kv.keys import tail_key
from pdtasks.kv.ring import sweep
from pdtasks.kv.store import BlockStore
from pdtasks.messages import Ask
from pdtasks.naming import DECODE
from pdtasks.running_stack import read_stack
from pdtasks.settings import Settings
from pdtasks.tracing import make_tracer
from pdtasks.worker.aborted import AbortMemory
from pdtasks.worker.announcing import Figures, Presence
from pdtasks.worker.answering import Answers, Reports
from pdtasks.worker.counting import Look, WorkerFigures
from pdtasks.worker.credit import Credit
from pdtasks.worker.discarding import Discarder
from pdtasks.worker.exporting import Exporter
from pdtasks.worker.kv_servers import KVServers
from pdtasks.worker.liveness import EXIT_NO_ENGINE, Liveness, end_process, watch
from pdtasks.worker.results import ResultStore
from pdtasks.worker.serving import Serving
from pdtasks.worker.stage_runner import OVERDUE_AFTER_S, StageRunner
from pdtasks.worker.store_figures import StoreWatch

logger = logging.getLogger(__name__)

#: Longest time that an engine may take to compute and write a prompt nobody wants any more.
_ABORTED_SAVE_S = 60.0
#: Longest time that the store may take to delete what belongs to finished requests.
_DISCARD_S = 2.0
#: Seconds between the notice that this worker stops and a look at who else is there.
_LOOK_AROUND_S = 0.5
#: Seconds between two looks whether anybody wants what its bus does not take.
_STILL_WANTED_S = 1.0
#: Longest wait for the bus to take what is left, at a stop or after a failure.
_FLUSH_S = 5.0


class HandsOn(Exception):
    """This worker stops: another one of its stage is to go on with the request."""


class Worker:
    """Everything that the tasks of this process share; complete once it is made."""

    def __init__(
        self, app: Celery, settings: Settings, *, name: str, role: str, slots: int
    ) -> None:
        """Bring up the engine; returns when it can take requests. May take minutes.

        Args:
            slots: jobs that this worker takes at once.

        Raises NameTaken, EngineFailed and what `resolve_model` raises.
        """
        self.settings = settings
        self.name = name
        self._slots = slots
        self._hands_on = False
        self.serving = Serving(role, self, patience_s=settings.request_timeout_s + OVERDUE_AFTER_S)
        self.background = Background()
        self.liveness = Liveness()
        # Seen from the start, also while the engine comes up.
        self._exporter = Exporter(settings)
        self.presence = Presence(
            settings,
            name=name,
            role=role,
            slots=slots,
            liveness=self.liveness,
            background=self.background,
            on_name_taken=_stop_without_name,
            on_drain=partial(_drain, settings.home),
            on_role=self._on_role,
            metrics=self._exporter.address,
        )
        self.presence.claim()
        self.presence.start()
        self._ended = threading.Event()
        self.background.thread("watchdog", self._watch)

        store = BlockStore(settings.kv_urls, ttl_s=settings.kv_ttl_s, timeout_s=_DISCARD_S)
        self._discarder = Discarder(store, self.background)
        self._store_watch = StoreWatch(settings.kv_urls, self.background)
        self.results = ResultStore(app)
        self.sender = ConfirmedSender(app, self.background, "stage-publisher")
        self.aborted = AbortMemory()
        self._buses = Buses(settings)
        self._replies = ReplyWriters(self._buses, self._reader_is_gone)
        self.answers = Answers(self._replies, worker=name)
        self._waiting: set[asyncio.Task[None]] = set()
        # Unlike those of other processes, and of one of this name and pid before.
        self._attempts = itertools.count(secrets.randbits(31) << 32)

        model = resolve_model(settings.model, settings.cache_dir, logger.info)
        self.engine = Engine(
            partial(start_core, settings, model),
            self.answers.publish_step,
            on_death=_exit_without_engine,
        )
        self.stages = StageRunner(self.engine)
        for figures in (
            self.engine.figures,
            WorkerFigures(self._look),
            KVServers(lambda: self._store_watch.found),
        ):
            REGISTRY.register(figures)
        started = time.monotonic()
        logger.info("starting the engine for %s", settings.model_name)
        self.engine.start()
        logger.info("the engine is ready after %.1f s", time.monotonic() - started)
        config = self.engine.config
        self.credit = Credit(
            slots,
            step_tokens=config.scheduler_config.max_num_batched_tokens,
            on_change=self.serving.credit_changed,
        )
        self.text = TextFrontend(config)
        self.tracer = make_tracer(f"pdtasks-{role}", name)
        self.engine.call(self._replies.run()).add_done_callback(_exit_unless_cancelled)
        self.presence.observe(self._figures)

    def stop(self) -> None:
        """End the engine and leave the bus."""
        self.presence.enter("stopped")
        self.presence.wait_until_silent()
        self._wait_within(self._replies.flush_all())
        self._discarder.close()
        self._store_watch.close()
        self.sender.close()
        self.results.close()
        self.engine.stop()
        self._exporter.close()
        self.tracer.close()
        sweep()  # it is not given the time to clean up
        self.background.close()
        self._ended.set()
        self.presence.leave()

    def _figures(self) -> Figures:
        engine = self.engine
        # Without those whose KV the engine may still write, which are seen to (`_waiting`).
        held = engine.num_held - len(self._waiting)
        return Figures(
            active=engine.num_running,
            stages=len(self.stages),
            held=max(held, len(self.stages), len(self.answers), 0),
            kv_usage=engine.figures.kv_usage,
            max_model_len=engine.config.model_config.max_model_len,
            step_tokens=engine.config.scheduler_config.max_num_batched_tokens,
            stores=self._store_watch.found,
            kv_blocks=engine.config.cache_config.num_gpu_blocks or 0,
            kv_block_size=engine.config.cache_config.block_size,
            totals=engine.figures.totals,
        )

    def _look(self) -> Look:
        return Look(
            state=self.presence.status().state,
            slots=self._slots,
            stages=len(self.stages),
            overdue=self.stages.num_overdue,
            unsent_replies=self._replies.num_unsent,
        )

    def _watch(self) -> None:
        settings = self.settings
        watch(self.liveness, settings.stall_timeout_s, settings.drain_timeout_s, self._ended)

    # -- for the stages, on the engine's loop ----------------------------------------------------

    def new_attempt(self) -> int:
        """A number that no other attempt at any request has, here or elsewhere."""
        return next(self._attempts)

    async def ask_progress(
        self, stream: str, stage: str, request_id: str, ask: Ask
    ) -> Progress | None:
        """What the asker has of an answer that is to be gone on with; None: it does not say.

        From here on the asker takes tokens from this attempt alone.
        """
        self.answers.ask(stream, stage, request_id, ask)
        return await read_progress(self._buses.of(stream), request_id, ask.attempt)

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

    async def generate(self, generation: Generation, reports: Callable[[], Reports]) -> None:
        """Run `generation`; `reports` is asked when its answer is finished here.

        Raises HandsOn when this worker stops and another one is to go on.
        """
        self.aborted.require_wanted(generation.request_id)
        if self._hands_on and generation.stage == DECODE:
            raise HandsOn
        self.answers.begin(generation, reports)
        try:
            await self.engine.generate(generation)
        finally:
            self.answers.end(generation)

    async def replies_taken(self, stream: str | None, *request_ids: str) -> None:
        """Return when its bus has what was published on `stream`, or nobody wants `request_ids`.

        Acknowledged is only what the asker can read: the job comes again if this worker dies.  What
        was aborted while its bus is away must not keep a place that others have a use for.
        """
        if stream is None:
            return
        taken = asyncio.create_task(self._replies.flush(stream))
        try:
            while not taken.done() and not self.aborted.has_all(request_ids):
                await asyncio.wait([taken], timeout=_STILL_WANTED_S)
            if taken.done():
                taken.result()
        finally:
            taken.cancel()

    def discard_when_saved(self, generation: Generation) -> None:
        """`discard`, after what the engine may still write for an aborted `generation`."""

        async def wait() -> None:
            if generation.state is not State.NEW:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_ABORTED_SAVE_S):
                        await generation.saved.wait()
            self.engine.forget(generation)
            self.discard(generation.request_id)

        waiting = asyncio.create_task(wait())
        self._waiting.add(waiting)
        waiting.add_done_callback(self._waiting.discard)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests, running or still on their way here."""
        request_ids = list(request_ids)
        self.aborted.remember(request_ids)
        for request_id in request_ids:
            if self.engine.abort(request_id):
                logger.info("aborted %s", request_id)

    @property
    def num_jobs(self) -> int:
        """Jobs that this worker has taken and that have not ended."""
        return max(len(self.stages), len(worker_state.reserved_requests))

    async def hand_on(self) -> None:
        """Leave answers under way to other workers, as far as they have room for them.

        A prompt takes a moment to be computed, an answer may take minutes.
        """
        if not self.stages:
            return
        # Those that stop in the same moment have said so by then.
        await asyncio.sleep(_LOOK_AROUND_S)
        try:
            workers = await read_workers_async(self._buses.first)
        except BUS_ERRORS as exc:
            logger.warning("bus is away: %s: running requests are finished here", where(exc))
            return
        own = self.presence.status().process  # (a successor may have the name already)
        ours = (self.settings.model_name, ENGINE_VERSION, "ready")
        # Not more than begin at once elsewhere: the others are finished sooner here.
        room = sum(
            max(0, w.slots - w.active)
            for w in workers
            if w.process != own and w.serves(DECODE) and (w.model, w.engine, w.state) == ours
        )
        if room == 0:
            logger.info("no room elsewhere: running requests are finished here")
            return
        self._hands_on = len(self.engine.under_way(DECODE)) <= room
        logger.info("handing on %d requests", self.engine.interrupt(DECODE, HandsOn, room))

    def keeps_its_jobs(self) -> None:
        """`hand_on` is over: answers that begin now end here."""
        self._hands_on = False

    def _reader_is_gone(self, stream: str) -> None:
        self.abort(self.answers.readers_of(stream))

    # -- for any thread --------------------------------------------------------------------------

    def consumes_no_more(self) -> None:
        """No job comes any more: for good, or until there is another connection to RabbitMQ."""
        if self.presence.is_draining:
            self.engine.call(self.hand_on())

    def _on_role(self, role: str) -> None:
        self.engine.loop.call_soon_threadsafe(self.serving.become, role)

    def soon(self, call: Callable[[], None]) -> None:
        """Have it called on the engine's loop."""
        self.engine.loop.call_soon_threadsafe(call)

    def credit_by_queue(self) -> dict[str, int]:
        """Jobs that this worker takes at once, of each queue that is its model's."""
        return {self.settings.queue_of(stage): most for stage, most in self.credit.of.items()}

    def abort_soon(self, request_ids: Iterable[str]) -> None:
        """`abort`, from any thread."""
        self.engine.loop.call_soon_threadsafe(self.abort, list(request_ids))

    def discard(self, request_id: str) -> None:
        """Delete what belongs to one request alone, soon. A store that is away lets it expire."""
        world = self.engine.config.parallel_config.tensor_parallel_size
        # Not waited for: a slow store must not keep a task's slot.
        self._discarder.discard(tail_key(request_id, rank) for rank in range(world))

    def fail(self, stream: str | None, stage: str, request_id: str, error: PdtasksError) -> None:
        """Tell the asker, if one reads along, that there will be no answer: `stage` has failed."""
        self.engine.loop.call_soon_threadsafe(self.answers.fail, stream, stage, request_id, error)

    def wait_for_replies(self, stream: str | None) -> None:
        """Return when its bus has what was published on `stream`, or does not take it in time."""
        if stream is not None:
            self._wait_within(self._replies.flush(stream))

    def _wait_within(self, flush: Coroutine[Any, Any, None]) -> None:
        with suppress(TimeoutError):
            self.engine.call(flush).result(_FLUSH_S)


def _exit_unless_cancelled(replies: Future[None]) -> None:
    if not replies.cancelled():
        logger.critical("replies cannot be sent any more", exc_info=replies.exception())
        _exit_without_engine()


def _stop_without_name(why: str) -> None:
    """End in order a worker whose name another one has: it was frozen for long, or out of touch.

    It is not seen any more; what is to be handed on goes to others, that one among them.
    """
    logger.critical("%s. This one stops", why)
    os.kill(os.getpid(), signal.SIGTERM)


def _drain(home: Path) -> None:
    """End in order, and have the stack that runs this worker, if one does, not start it again."""
    logger.warning("somebody has asked this worker to drain: it stops")
    stack = read_stack(home)
    for member in stack.services if stack is not None else ():
        if member.pid == os.getpid():
            Drained(home).add(member.name)
    os.kill(os.getpid(), signal.SIGTERM)


def _exit_without_engine() -> None:
    """End a worker whose engine is dead.

    A worker without an engine would answer every job with an error at once and swallow the whole
    queue.  When the process ends, RabbitMQ gives all its jobs to others, together and at once.
    """
    end_process("no engine, no worker", EXIT_NO_ENGINE)


#: The worker that this process is; none in all others.
_current: Worker | None = None


def start(app: Celery, settings: Settings, *, name: str, role: str, slots: int) -> None:
    """Make this process a worker of `app`."""
    global _current  # noqa: PLW0603 - Celery's tasks have no other way to it
    _current = Worker(app, settings, name=name, role=role, slots=slots)


def current() -> Worker:
    """The worker that this process is."""
    assert _current is not None, "this process is no worker"
    return _current
