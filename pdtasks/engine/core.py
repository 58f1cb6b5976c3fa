"""The vLLM engine of one worker process: many tasks share its batch.

The engine core runs in a process of its own (vLLM's `EngineCore`); here lives its client, on an
event loop in its own thread, because Celery's tasks run in threads and vLLM's client is asyncio.
`EngineCoreRequest`s go in, `EngineCoreOutputs` come out, one for each step: tokens, never text, so
detokenising stays with whoever asked.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient

from pdtasks.engine.figures import EngineFigures
from pdtasks.engine.generation import Generation, State
from pdtasks.errors import EngineFailed, RequestAborted, where
from pdtasks.kv.reports import Reports

logger = logging.getLogger(__name__)

T = TypeVar("T")


def log_surprise(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody has looked at: asyncio's own words have the error's text, which may quote."""
    exc = context.get("exception")
    logger.error("in the engine's loop: %s", "an unknown error" if exc is None else where(exc))


#: Called on the engine's loop with all outputs of one step and vLLM's timestamp of it.
StepListener = Callable[[list[tuple[Generation, int, EngineCoreOutput]], float], None]

#: Starts vLLM's engine core, in a process of its own, with the path that hears of transfers:
#: its configuration, and its client.
StartCore = Callable[[str], Awaitable[tuple[VllmConfig, EngineCoreClient]]]


class Engine:
    """One engine core and the loop that talks to it."""

    def __init__(
        self,
        start_core: StartCore,
        on_step: StepListener,
        on_death: Callable[[], None],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Args:
        start_core: `pdtasks.engine.boot.start_core` for a model; called on the engine's loop.
        on_step: gets every step's outputs.
        on_death: called once when the engine core is gone; the process should end then.
        loop: None: one of the engine's own, for `start` and a thread.
        """
        self._start_core = start_core
        self._on_step = on_step
        self._on_death = on_death
        self._running: dict[str, Generation] = {}
        self._num_running = 0
        self._stopping = False
        self.figures = EngineFigures()
        self.loop = loop or asyncio.new_event_loop()
        self.config: VllmConfig

    @property
    def num_running(self) -> int:
        """Requests whose answer is under way here."""
        # A number, not a look into what the loop is changing: presence asks in another thread.
        return self._num_running

    @property
    def num_held(self) -> int:
        """Requests that anything is kept of: more than run only until their KV is saved."""
        return len(self._running)

    # -- from other threads --------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine; returns when it is ready. Raises EngineFailed with the reason."""
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(ready,), name="engine-loop", daemon=True
        )
        self._thread.start()
        try:
            ready.result()
        except Exception as exc:
            raise EngineFailed(f"the engine did not start: {exc}") from exc

    def call(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `coroutine` on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self) -> None:
        """End the engine core and its processes."""
        self._stopping = True
        # All requests are finished by now; the interpreter of the core takes seconds to clean up.
        self._core.shutdown(timeout=1)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    # -- on the loop ---------------------------------------------------------------------------

    def _main(self, ready: Future[None]) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.set_exception_handler(log_surprise)
        try:
            self.loop.run_until_complete(self.boot())
        except BaseException as exc:  # noqa: BLE001 - whatever it is, `start` raises it
            ready.set_exception(exc)
            return
        ready.set_result(None)
        self._pumping = self.loop.create_task(self.pump())
        self.loop.run_forever()
        if not self._stopping:
            self._on_death()  # nobody could do anything with this engine any more
        # One that does not end must not keep the worker from ending.
        if tasks := asyncio.all_tasks(self.loop):
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=1))

    async def boot(self) -> None:
        """Start the engine core. `start` does it, and goes on with `pump`."""
        self._reports = Reports()
        self.loop.add_reader(self._reports.fileno(), self._take_reports)
        try:
            self.config, self._core = await self._start_core(self._reports.path)
        except BaseException:
            self._close_reports()
            raise

    async def pump(self) -> None:
        """Hand on what the engine core makes, as long as it lives."""
        try:
            while True:
                outputs = await self._core.get_output_async()
                self.figures.take(outputs)
                stats = outputs.scheduler_stats
                if stats is not None and stats.kv_connector_stats:
                    self._take_records(stats.kv_connector_stats["records"])
                self._take_step(outputs.outputs, outputs.timestamp)
        except asyncio.CancelledError:
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it is, the engine is lost
            if self._stopping:
                return
            logger.critical("the engine is dead: %s", exc)
            for generation in list(self._running.values()):
                generation.fail(EngineFailed("the engine died"))
            self._on_death()
        finally:
            self._close_reports()

    def _close_reports(self) -> None:
        self.loop.remove_reader(self._reports.fileno())
        self._reports.close()

    def _take_reports(self) -> None:
        self._take_records(self._reports.take())

    def _take_records(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self.figures.take_record(record)
            if generation := self._running.get(record["request_id"]):
                parts = generation.transfers.setdefault(record["op"], [])
                parts.append(record)
                generation.moved_at[record["op"]] = time.time()
                if record["op"] == "save" and len(parts) == record["world"]:
                    generation.saved.set()

    def _take_step(self, outputs: list[EngineCoreOutput], timestamp: float) -> None:
        step = []
        for output in outputs:
            generation = self._running.get(output.request_id)
            if generation is not None and not generation.is_over:
                output.request_id = generation.request_id
                try:
                    step.append((generation, generation.take(output), output))
                except Exception as exc:  # noqa: BLE001 - see below
                    # One odd request must not take the engine, and with it all others, along.
                    logger.error("output of %s: %s", generation.request_id, where(exc))  # noqa: TRY400
                    generation.fail(EngineFailed(type(exc).__name__))
        if step:
            try:
                self._on_step(step, timestamp)
            except Exception as exc:  # noqa: BLE001 - nor must an odd step
                logger.error("the outputs of a step were lost: %s", where(exc))  # noqa: TRY400
                for generation, _, _ in step:
                    generation.fail(EngineFailed("an output was lost"))
        for generation, _, _ in step:
            if generation.finish_reason is not None:
                generation.end()

    async def generate(self, generation: Generation) -> None:
        """Run `generation` to its end.

        Raises RequestAborted after `abort`, EngineFailed when vLLM cannot finish it.  Cancelling
        the caller aborts the request in the engine.
        """
        engine_id = generation.request.request_id
        self._running[engine_id] = generation
        self._num_running += 1
        try:
            generation.begin()
            await self._core.add_request_async(generation.request)
            await generation.finished
        finally:
            self._num_running -= 1
            if generation.state is not State.ANSWERED:
                await self._core.abort_requests_async([engine_id])
        if generation.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise EngineFailed("vLLM reported an internal error for this request")

    def forget(self, generation: Generation) -> None:
        """`generation` is of no further interest; late transfer records are dropped."""
        self._running.pop(generation.request.request_id, None)

    def under_way(self, stage: str) -> list[Generation]:
        """Generations of `stage` whose answer is under way here."""
        found = self._running.values()
        return [g for g in found if g.state is State.RUNNING and g.stage == stage]

    def interrupt(self, stage: str, error: type[Exception], at_most: int) -> int:
        """Have `error` raised for those who wait for `stage` here; returns their number."""
        found = self.under_way(stage)[:at_most]
        for generation in found:
            generation.fail(error())
        return len(found)

    def abort(self, request_id: str) -> bool:
        """End all generations of `request_id`; True when there was one."""
        found = [
            generation
            for generation in self._running.values()
            if generation.request_id == request_id and not generation.is_over
        ]
        for generation in found:
            generation.fail(RequestAborted("the caller hung up"))
        return bool(found)
