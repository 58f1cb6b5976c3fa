"""An engine core whose steps cost nothing, for many streams that run side by side.

What a request says about the run is in its prompt (`prompt_of`): how many make a group with it, and
where the client says when that is to get its next step.  All get their first token at once.
"""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, ClassVar, Final

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import SchedulerStats

from pdtasks.bench.chaos.stub import NoText, transfer_of
from pdtasks.bench.control.stub import note_transfer
from pdtasks.bench.control.stub import start_stub as start_instant
from pdtasks.settings import Settings

__all__ = ["NoText", "StreamCore", "prompt_of", "start_stub"]

#: Ids that every tokenizer has as ordinary ones.
_FIRST_ID: Final = 300
_NUM_IDS: Final = 20_000


def prompt_of(size: int, port: int) -> list[int]:
    """A prompt for one of `size` streams that share their steps, one for each byte at `port`."""
    return [_FIRST_ID + size, _FIRST_ID + port // 256, _FIRST_ID + port % 256]


class StreamCore(EngineCoreClient):
    """Of vLLM's `EngineCoreClient`, what our `Engine` and vLLM's `AsyncLLM` use."""

    engine_ranks_managed: ClassVar = [0]

    def __init__(self) -> None:
        self.resources = SimpleNamespace(engine_dead=False)  # vLLM asks for it
        self._requests: dict[str, EngineCoreRequest] = {}
        self._made: dict[str, int] = {}  # tokens
        self._new: list[str] = []
        self._gathering: dict[int, list[str]] = {}  # by port
        self._steps: asyncio.Queue[list[str]] = asyncio.Queue()  # whose turn it is
        self._tempos: set[asyncio.Task[None]] = set()
        self._num_steps = 0

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Begin `request`."""
        self._requests[request.request_id] = request
        self._made[request.request_id] = len(transfer_of(request).get("resume") or ())
        self._go_on(request.request_id)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Forget them."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            self._made.pop(request_id, None)
            for gathering in self._gathering.values():
                if request_id in gathering:
                    gathering.remove(request_id)

    async def get_output_async(self) -> EngineCoreOutputs:
        """A token for those who begin, or for each stream of a group that is to go on."""
        while True:
            turn = await self._steps.get()
            begin = turn is self._new
            if begin:
                self._new = []
            if running := [r for r in turn if r in self._requests]:
                step = self._step(running)
                if begin:
                    for request_id in running:
                        self._go_on(request_id)
                return step

    async def get_supported_tasks_async(self) -> tuple[Any, ...]:
        return ("generate",)

    async def reset_mm_cache_async(self) -> None:
        """There is none."""

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to do."""

    def _go_on(self, request_id: str) -> None:
        """Have it get its first token, then those of its group once that is complete."""
        if request_id not in self._requests:
            return
        if not self._made[request_id]:
            self._new.append(request_id)
            if len(self._new) == 1:
                self._steps.put_nowait(self._new)
            return
        size, high, low = (i - _FIRST_ID for i in self._requests[request_id].prompt_token_ids or ())
        port = 256 * high + low
        group = self._gathering.setdefault(port, [])
        group.append(request_id)
        if len(group) == size:
            del self._gathering[port]
            tempo = asyncio.create_task(self._keep_tempo(port, group))
            self._tempos.add(tempo)
            tempo.add_done_callback(self._tempos.discard)

    async def _keep_tempo(self, port: int, group: list[str]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while await reader.read(1):
                self._steps.put_nowait(group)
        finally:
            writer.close()

    def _step(self, request_ids: list[str]) -> EngineCoreOutputs:
        records: list[dict[str, Any]] = []
        token = _FIRST_ID + self._num_steps % _NUM_IDS
        self._num_steps += 1
        outputs = []
        for request_id in request_ids:
            output = EngineCoreOutput(request_id=request_id, new_token_ids=[token])
            self._made[request_id] += 1
            request = self._requests[request_id]
            assert request.sampling_params is not None
            if self._made[request_id] == request.sampling_params.max_tokens:
                output.finish_reason = FinishReason.LENGTH
                del self._requests[request_id], self._made[request_id]
                if transfer_of(request):
                    note_transfer(request, output, records)
            outputs.append(output)
        step = EngineCoreOutputs(outputs=outputs, timestamp=time.monotonic())
        if records:
            step.scheduler_stats = SchedulerStats(kv_connector_stats={"records": records})
        return step


async def start_stub(
    settings: Settings, model: str, reports_to: str, **options: Any
) -> tuple[VllmConfig, EngineCoreClient]:
    """As `pdtasks.engine.boot.start_core`."""
    config, _ = await start_instant(settings, model, reports_to, **options)
    return config, StreamCore()
