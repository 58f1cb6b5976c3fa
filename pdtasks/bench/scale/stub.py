"""A stub engine that computes nothing and takes a GPU's times (`gpu`, `batching`).

Stands where vLLM's engine core stands in a worker; all else of the worker is the product's.  It
says what an engine with a ring says, and moves no KV: what a hand-over's copy takes is in the
times of its steps.
"""

from __future__ import annotations

import asyncio
import os
import time
from types import SimpleNamespace
from typing import Any, Final, cast

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import SchedulerStats

from pdtasks.bench.chaos.stub import NoText, transfer_of
from pdtasks.bench.control.stub import note_transfer
from pdtasks.bench.scale.batching import Batch, Request, Step
from pdtasks.bench.scale.gpu import H200
from pdtasks.settings import Settings

__all__ = ["MAX_MODEL_LEN", "SLOWER", "NoText", "start_stub"]

#: Environment variable: all times are so many times a GPU's, so that a host carries more workers.
SLOWER: Final = "STUB_ENGINE_SLOWER"

#: Tokens of prompt and answer: what the embedded model, whose tokenizer the API has, may have.
MAX_MODEL_LEN: Final = 8192
_VOCABULARY: Final = 1 << 17
_BLOCK_SIZE: Final = 64
_TOKEN: Final = 1000


class TimedStub:
    """Of vLLM's `EngineCoreClient`, what `pdtasks.engine.core.Engine` uses."""

    def __init__(self, slower: float) -> None:
        """`slower`: how many times as long as a GPU it takes."""
        self._slower = slower
        self._batch = Batch(H200)
        self._requests: dict[str, EngineCoreRequest] = {}
        self._work = asyncio.Event()
        self._free_at = 0.0  # the end of the last step, on time.monotonic()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Have `request` share steps."""
        params = request.sampling_params
        assert params is not None
        wants = transfer_of(request)
        there = len(wants.get("resume") or ())
        prompt = len(request.prompt_token_ids or ())
        is_loaded = "load" in wants
        self._requests[request.request_id] = request
        self._batch.add(
            Request(
                request.request_id,
                to_compute=0 if is_loaded else prompt,
                kv_tokens=prompt + there if is_loaded else 0,
                to_make=(params.max_tokens or 1) - there,
                to_load=prompt if is_loaded else 0,
                saves="save" in wants,
            )
        )
        self._work.set()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Forget them."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            self._batch.remove(request_id)

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next step's tokens, when a GPU would have them."""
        while True:
            step = self._batch.begin_step()
            if step is not None:
                await self._take(self._slower * step.seconds)
                if outputs := self._end(step):
                    return outputs
            else:
                self._work.clear()
                await self._work.wait()
                self._free_at = time.monotonic()

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to do."""

    async def _take(self, seconds: float) -> None:
        # From the end of the step before, not from now: a GPU's next step does not wait until this
        # process has its turn.  Of more than a step it does not catch up.
        now = time.monotonic()
        self._free_at = max(self._free_at + seconds, now)
        await asyncio.sleep(self._free_at - now)

    def _end(self, step: Step) -> EngineCoreOutputs | None:
        records: list[dict[str, Any]] = []
        outputs = []
        for made in self._batch.end_step(step):
            output = EngineCoreOutput(request_id=made.key, new_token_ids=[_TOKEN])
            if made.to_make <= 0:
                output.finish_reason = FinishReason.LENGTH
                request = self._requests.pop(made.key)
                if transfer_of(request):
                    note_transfer(request, output, records)
            outputs.append(output)
        if not outputs:
            return None
        told = EngineCoreOutputs(outputs=outputs, timestamp=time.monotonic())
        if records:
            told.scheduler_stats = SchedulerStats(kv_connector_stats={"records": records})
        return told


async def start_stub(
    _settings: Settings, _model: str, _reports_to: str, **_options: Any
) -> tuple[VllmConfig, EngineCoreClient]:
    """As `pdtasks.engine.boot.start_core`."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=MAX_MODEL_LEN, get_vocab_size=lambda: _VOCABULARY
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=H200.step_tokens),
        cache_config=SimpleNamespace(block_size=_BLOCK_SIZE, num_gpu_blocks=1000),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    core = TimedStub(float(os.environ.get(SLOWER, "1")))
    return cast("VllmConfig", config), cast("EngineCoreClient", core)
