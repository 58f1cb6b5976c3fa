"""An engine core whose steps cost nothing, and which moves no KV: what is left is ours.

It says what an engine with a ring says (`pdtasks.kv.ring`), so that both stages do all that they do
under `pdtasks up` on one host.
"""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import SchedulerStats

from pdtasks.bench.chaos.stub import NoText, transfer_of
from pdtasks.kv import params as kv_params
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.plan import TransferRecord
from pdtasks.settings import Settings

__all__ = ["NoText", "start_stub"]

_MAX_MODEL_LEN = 1 << 20
_BLOCK_SIZE = 64
_TOKEN = 1000


class InstantCore:
    """Of vLLM's `EngineCoreClient`, what `pdtasks.engine.core.Engine` uses.

    Requests that come in one turn of the loop share a step.
    """

    def __init__(self) -> None:
        self._running: dict[str, tuple[EngineCoreRequest, int]] = {}  # with tokens still to come
        self._work = asyncio.Event()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Begin `request`."""
        params = request.sampling_params
        assert params is not None
        there = len(transfer_of(request).get("resume") or ())
        self._running[request.request_id] = request, (params.max_tokens or 1) - there
        self._work.set()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Forget them."""
        for request_id in request_ids:
            self._running.pop(request_id, None)

    async def get_output_async(self) -> EngineCoreOutputs:
        """A token for each request."""
        await self._work.wait()
        records: list[dict[str, Any]] = []
        outputs = []
        for request_id, (request, left) in list(self._running.items()):
            output = EngineCoreOutput(request_id=request_id, new_token_ids=[_TOKEN])
            if left <= 1:
                del self._running[request_id]
                output.finish_reason = FinishReason.LENGTH
                note_transfer(request, output, records)
            else:
                self._running[request_id] = request, left - 1
            outputs.append(output)
        step = EngineCoreOutputs(outputs=outputs, timestamp=time.monotonic())
        if records:
            step.scheduler_stats = SchedulerStats(kv_connector_stats={"records": records})
        if self._running:
            await asyncio.sleep(0)
        else:
            self._work.clear()
        return step

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to do."""


def note_transfer(
    request: EngineCoreRequest, output: EngineCoreOutput, records: list[dict[str, Any]]
) -> None:
    """Say what an engine with a ring says when `request` ends with `output`: all KV was moved."""
    wants = transfer_of(request)
    op = "save" if "save" in wants else "load"
    num_tokens = len(request.prompt_token_ids or ())
    num_blocks = -(-num_tokens // _BLOCK_SIZE)
    if op == "save":
        full = num_tokens // _BLOCK_SIZE
        handle = KVHandle(
            fingerprint="stub",
            transfer_id=wants["save"],
            num_tokens=num_tokens,
            block_size=_BLOCK_SIZE,
            hashes=tuple(index.to_bytes(32) for index in range(full)),
            expires_at=time.time() + 600,
            ring="stub",
            numbers=((0, num_blocks),),
        )
        output.kv_transfer_params = kv_params.saved(handle.to_wire())
    record = TransferRecord(
        request_id=request.request_id, op=op, rank=0, world=1, blocks=num_blocks, bytes=0
    )
    records.append(vars(record))


async def start_stub(
    _settings: Settings, _model: str, _reports_to: str, **_options: Any
) -> tuple[VllmConfig, EngineCoreClient]:
    """As `pdtasks.engine.boot.start_core`."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=_MAX_MODEL_LEN, get_vocab_size=lambda: _MAX_MODEL_LEN
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=_MAX_MODEL_LEN),
        cache_config=SimpleNamespace(block_size=_BLOCK_SIZE, num_gpu_blocks=1000),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    return cast("VllmConfig", config), cast("EngineCoreClient", InstantCore())
