"""vLLM's `AsyncLLM` over a pipeline of Celery tasks.

It does for us what it does for `vllm serve`: input processing, detokenising, stop strings,
logprobs, n > 1, statistics.  Only its engine core is another, `PipelineCore`.  No weights, no
device.  (Why here and not in the workers: text, stop strings and UTF-8 pieces would be torn between
the first token and the second.)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.renderers import renderer_from_config
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    OutputProcessorOutput,
    RequestOutputCollector,
)
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

from api.core import PipelineCore
from api.guard import retry_after
from pdtasks.engine.detokenise import begin_behind_prompt
from pdtasks.engine.grammar import require_possible
from pdtasks.engine.wire import encode_request
from pdtasks.errors import (
    NoWorker,
    PdtasksError,
    RepliesLost,
    TooManyRequests,
    WorkerLost,
    where,
)
from pdtasks.settings import Settings

logger = logging.getLogger(__name__)


class _TextOutput(OutputProcessor):
    """vLLM's, with text that begins behind the prompt."""

    def add_request(
        self, request: EngineCoreRequest, prompt: str | None, *args: Any, **options: Any
    ) -> None:
        super().add_request(request, prompt, *args, **options)
        detokenizer = self.request_states[request.request_id].detokenizer
        if detokenizer is not None:
            begin_behind_prompt(detokenizer, request)

    def process_outputs(
        self, engine_core_outputs: list[EngineCoreOutput], *args: Any, **options: Any
    ) -> OutputProcessorOutput:
        """What vLLM raises for one output would end its loop, and all answers: it ends that one.

        The others are processed in one call nevertheless: one for each output costs more.
        """
        left = iter(engine_core_outputs)
        done = OutputProcessorOutput(request_outputs=[], reqs_to_abort=[])
        while True:
            begun: list[EngineCoreOutput] = []
            try:
                # (vLLM goes through them once, whatever its types say.)
                each: Any = _noting(left, begun)
                some = super().process_outputs(each, *args, **options)
            except Exception as exc:
                if not begun:
                    raise
                spoilt = begun[-1]
                logger.error("output of %s: %s", spoilt.request_id, where(exc))  # noqa: TRY400
                # What the call would have returned: those that their text has ended.
                done.reqs_to_abort += [
                    output.request_id
                    for output in begun
                    if output.finish_reason is None and output.request_id not in self.request_states
                ]
                error = WorkerLost(f"an output could not be used: {type(exc).__name__}")
                done.reqs_to_abort += self.fail(spoilt.request_id, error)
            else:
                done.reqs_to_abort += some.reqs_to_abort
                return done

    def fail(self, request_id: str, error: PdtasksError) -> list[str]:
        """End a request with `error`; returns those that the engine core is to drop."""
        state = self.request_states.get(request_id)
        if state is None or state.queue is None:
            return []
        state.queue.put(PipelineHTTPError(error))
        # With n > 1 the siblings share the queue and end with it.
        parent = state.parent_req
        return self.abort_requests([parent.request_id if parent else request_id], internal=True)


def _noting(
    outputs: Iterator[EngineCoreOutput], begun: list[EngineCoreOutput]
) -> Iterator[EngineCoreOutput]:
    for output in outputs:
        begun.append(output)
        yield output


class _Statistics(StatLoggerManager):
    """vLLM's, which ends no answer: it is called in the loop that takes them all."""

    def record(self, *args: Any, **options: Any) -> None:
        try:
            super().record(*args, **options)
        except Exception as exc:  # noqa: BLE001
            logger.error("the statistics of a step are lost: %s", where(exc))  # noqa: TRY400


class PipelineLLM(AsyncLLM):
    """vLLM's `AsyncLLM` over a `PipelineCore`."""

    engine_core: PipelineCore
    output_processor: _TextOutput

    def __init__(self, config: VllmConfig, settings: Settings) -> None:
        # AsyncLLM's own __init__ would start an engine: this sets what its methods read.
        self.vllm_config = config
        self.model_config = config.model_config
        self.scheduler_config = config.scheduler_config
        self.observability_config = config.observability_config
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self.log_requests = False
        self.log_stats = True
        self.admission_stats = None
        self.output_processor = _TextOutput(
            self.renderer.tokenizer,
            log_stats=self.log_stats,
            stream_interval=config.scheduler_config.stream_interval,
        )
        self.engine_core = PipelineCore(
            settings,
            self._fail,
            is_known=self.output_processor.request_states.__contains__,
            on_stats=self._record,
            vocabulary=config.model_config.get_vocab_size(),
        )
        self.logger_manager = _Statistics(
            vllm_config=config,
            engine_idxs=self.engine_core.engine_ranks_managed,
            enable_default_loggers=True,
        )
        self.output_handler = None
        self.profiler = None
        self._client_count = 1
        self._elastic_ep_lock = asyncio.Lock()
        self._frontend_profiler_injected = False
        self._profile_lock = asyncio.Lock()
        self._profile_session_guard_enabled = True
        self._profile_session_active = False

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse before any work when a stage has no worker (503), or too many wait (429).

        Each route asks once before it begins, without `request_id`; what vLLM asks for each
        sequence of an admitted request is answered by that.
        """
        super().check_admission(n, request_id)
        if request_id is None:
            try:
                self.engine_core.require_room(n)
            except (NoWorker, RepliesLost, TooManyRequests) as exc:
                raise PipelineHTTPError(exc) from exc

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **options: Any
    ) -> RequestOutputCollector:
        """vLLM's, without answers that cannot exist.

        Its trace is in this context (`api.tracing`); vLLM would say that it does not trace.
        """
        options.pop("trace_headers", None)
        if isinstance(params, SamplingParams):
            require_possible(params)
        return await super().add_request(request_id, prompt, params, *args, **options)

    def require_valid(self, request_id: str, prompt: Any, params: Any) -> None:
        """Raises what `add_request` would raise for this request, and does nothing else."""
        require_possible(params)
        request = self.input_processor.process_inputs(
            request_id, prompt, params, supported_tasks=("generate",)
        )
        encode_request(request)

    async def check_health(self) -> None:
        """This process is well; workers come and go (see /ready)."""

    def _record(self, stats: SchedulerStats) -> None:
        if self.logger_manager is not None:  # vLLM's type allows that
            self.logger_manager.record(scheduler_stats=stats, iteration_stats=None)

    async def _fail(self, request_id: str, error: PdtasksError) -> None:
        dropped = self.output_processor.fail(request_id, error)
        await self.engine_core.abort_requests_async(dropped)


class PipelineHTTPError(GracefulHTTPError):
    """An error of ours on its way through vLLM's handlers."""

    def __init__(self, error: PdtasksError) -> None:
        # 499 is no status that Python knows. No 5xx, for official clients would ask again for what
        # somebody has revoked.
        status = error.http_status if error.http_status != 499 else HTTPStatus.GONE
        super().__init__(str(error), HTTPStatus(status))
        self.error = error
        self.headers = retry_after(error)
