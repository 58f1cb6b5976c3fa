"""An engine core whose steps cost nothing, for many streams that run side by side.

What a request says about the run is in its prompt (`prompt_of`).  All streams get their first token
at once and the others when all are there: then it is known how many run while it is measured.
"""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, ClassVar, Final, cast

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient

from pdtasks.bench.chaos.stub import NoText, transfer_of
from pdtasks.bench.control.stub import note_transfer
from pdtasks.bench.control.stub import start_stub as start_instant
from pdtasks.settings import Settings

__all__ = ["NoText", "StreamCore", "prompt_of", "start_stub"]

#: Ids that every tokenizer has as ordinary ones.
_FIRST_ID: Final = 300
_NUM_IDS: Final = 20_000


def prompt_of(streams: int, step_ms: int) -> list[int]:
    """A prompt for one of `streams` that run together, a step every `step_ms` at most."""
    return [_FIRST_ID + streams, _FIRST_ID + step_ms]


class StreamCore(EngineCoreClient):
    """Of vLLM's `EngineCoreClient`, what our `Engine` and vLLM's `AsyncLLM` use."""

    engine_ranks_managed: ClassVar = [0]

    def __init__(self) -> None:
        self.resources = SimpleNamespace(engine_dead=False)  # vLLM asks for it
        self._requests: dict[str, EngineCoreRequest] = {}
        self._new: list[str] = []
        self._gathering: list[str] = []
        self._running: list[str] = []
        self._left: dict[str, int] = {}  # tokens still to come
        self._work = asyncio.Event()
        self._step_at = 0.0
        self._num_steps = 0

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Begin `request`."""
        params = request.sampling_params
        assert params is not None
        there = len(transfer_of(request).get("resume") or ())
        self._requests[request.request_id] = request
        self._left[request.request_id] = (params.max_tokens or 1) - there
        (self._gathering if there else self._new).append(request.request_id)
        self._work.set()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Forget them."""
        for request_id in request_ids:
            if self._requests.pop(request_id, None) is not None:
                for those in (self._new, self._gathering, self._running):
                    if request_id in those:
                        those.remove(request_id)

    async def get_output_async(self) -> EngineCoreOutputs:
        """First tokens for who has none; when all have one, the next of each stream."""
        while True:
            if self._new:
                begun, self._new = self._new, []
                self._gathering += [r for r in begun if self._left[r] > 1]
                return self._step(begun)
            if self._running:
                pause_s = self._said(self._running[0], 1) / 1000
                await asyncio.sleep(max(0.0, self._step_at + pause_s - time.monotonic()))
                # What is late is not made up for.
                self._step_at = max(self._step_at + pause_s, time.monotonic() - pause_s)
                return self._step(self._running)
            if self._gathering and len(self._gathering) >= self._said(self._gathering[0], 0):
                self._running, self._gathering = self._gathering, []
                self._step_at = time.monotonic()
            else:
                self._work.clear()
                await self._work.wait()

    async def get_supported_tasks_async(self) -> tuple[Any, ...]:
        return ("generate",)

    async def reset_mm_cache_async(self) -> None:
        """There is none."""

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to do."""

    def _said(self, request_id: str, place: int) -> int:
        return (self._requests[request_id].prompt_token_ids or [])[place] - _FIRST_ID

    def _step(self, request_ids: list[str]) -> EngineCoreOutputs:
        records: list[dict[str, Any]] = []
        token = _FIRST_ID + self._num_steps % _NUM_IDS
        self._num_steps += 1
        outputs = []
        for request_id in request_ids:
            output = EngineCoreOutput(request_id=request_id, new_token_ids=[token])
            self._left[request_id] -= 1
            if self._left[request_id] == 0:
                output.finish_reason = FinishReason.LENGTH
                request = self._requests.pop(request_id)
                del self._left[request_id]
                if transfer_of(request):
                    note_transfer(request, output, records)
            outputs.append(output)
        self._running = [r for r in self._running if r in self._requests]
        step = EngineCoreOutputs(outputs=outputs, timestamp=time.monotonic())
        if records:
            stats = SimpleNamespace(kv_cache_usage=0.0, kv_connector_stats={"records": records})
            step.scheduler_stats = cast("Any", stats)
        return step


async def start_stub(
    settings: Settings, model: str, reports_to: str, **options: Any
) -> tuple[VllmConfig, EngineCoreClient]:
    """As `pdtasks.engine.boot.start_core`."""
    config, _ = await start_instant(settings, model, reports_to, **options)
    return config, StreamCore()
