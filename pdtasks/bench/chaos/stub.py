"""An engine core that computes nothing: a token follows from prompt, seed and place.

Stands where vLLM's engine core stands in a worker (`pdtasks.worker.service`); all else of the
worker is the product's.  KV is one value in the store that says which prompt it belongs to: decode
goes on with what it finds there, so KV of another prompt would make another answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import SchedulerStats

from pdtasks.errors import InvalidRequest
from pdtasks.kv import params as kv_params
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.keys import tail_key
from pdtasks.kv.plan import TransferRecord
from pdtasks.kv.store import BlockStore, StoreError
from pdtasks.settings import Settings

#: Seconds of one step, which makes a token for each request.
STEP_S = 0.04
#: Ids that every tokenizer has as ordinary ones.
TOKENS = range(300, 30_000)
_VOCABULARY = 1 << 20
_MAX_MODEL_LEN = 2048
_BLOCK_SIZE = 16
_KV_BYTES = 16


def token_of(kv: bytes, seed: int | None, place: int) -> int:
    """The token at `place` of the answer to the prompt whose KV is `kv`."""
    digest = hashlib.blake2b(kv + f"{seed}:{place}".encode(), digest_size=8).digest()
    return TOKENS[int.from_bytes(digest) % len(TOKENS)]


def kv_of(prompt: list[int]) -> bytes:
    """What stands for the KV of `prompt`."""
    return hashlib.blake2b(str(prompt).encode(), digest_size=_KV_BYTES).digest()


class StubCore:
    """Of vLLM's `EngineCoreClient`, what `pdtasks.engine.core.Engine` uses."""

    def __init__(self, settings: Settings) -> None:
        self._store = BlockStore(
            settings.kv_urls, ttl_s=settings.kv_ttl_s, timeout_s=settings.kv_timeout_s
        )
        self._requests: dict[str, EngineCoreRequest] = {}
        self._running: dict[str, tuple[bytes, int]] = {}  # KV, and tokens that there are
        self._records: list[dict[str, Any]] = []
        self._transfers: set[asyncio.Task[None]] = set()
        self._work = asyncio.Event()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Begin `request`, when its KV is there."""
        self._requests[request.request_id] = request
        self._beside(self._begin(request))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Forget them."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)
            self._running.pop(request_id, None)

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next step's tokens, and what has been moved meanwhile."""
        await self._work.wait()
        await asyncio.sleep(STEP_S)
        outputs = [self._next_of(request_id) for request_id in list(self._running)]
        step = EngineCoreOutputs(outputs=outputs, timestamp=time.monotonic())
        if self._records:
            step.scheduler_stats = SchedulerStats(kv_connector_stats={"records": self._records})
            self._records = []
        if not self._running:
            self._work.clear()
        return step

    def shutdown(self, timeout: float | None = None) -> None:
        """Close the connections to the store."""
        self._store.close()

    def _next_of(self, request_id: str) -> EngineCoreOutput:
        request = self._requests[request_id]
        params = request.sampling_params
        assert params is not None
        kv, place = self._running[request_id]
        seed = params.seed if params.temperature > 0 else None
        output = EngineCoreOutput(request_id=request_id, new_token_ids=[token_of(kv, seed, place)])
        self._running[request_id] = kv, place + 1
        if place + 1 >= (params.max_tokens or _MAX_MODEL_LEN):
            output.finish_reason = FinishReason.LENGTH
            del self._running[request_id], self._requests[request_id]
            if transfer_id := transfer_of(request).get("save"):
                prompt = request.prompt_token_ids or []
                output.kv_transfer_params = kv_params.saved(_handle(transfer_id, len(prompt)))
                self._beside(self._save(request_id, transfer_id, kv))
        return output

    # -- KV ------------------------------------------------------------------------------------

    async def _begin(self, request: EngineCoreRequest) -> None:
        wants = transfer_of(request)
        kv = kv_of(request.prompt_token_ids or [])
        if handle := wants.get("load"):
            kv = await self._load(request.request_id, handle, kv)
        if request.request_id in self._requests:
            self._running[request.request_id] = kv, len(wants.get("resume") or ())
            self._work.set()

    async def _load(self, request_id: str, handle: dict[str, Any], own: bytes) -> bytes:
        found = bytearray(_KV_BYTES)
        key = KVHandle.from_wire(handle).key(0, 0)
        try:
            is_there = await asyncio.to_thread(self._store.get, key, [memoryview(found)])
        except StoreError:
            is_there = False
        self._note(request_id, "load", int(is_there), missing=int(not is_there))
        return bytes(found) if is_there else own  # recomputed

    async def _save(self, request_id: str, transfer_id: str, kv: bytes) -> None:
        error = ""
        try:
            await asyncio.to_thread(self._store.put, tail_key(transfer_id, 0), [memoryview(kv)])
        except StoreError as exc:
            error = type(exc).__name__
        self._note(request_id, "save", int(not error), error=error)

    def _note(self, request_id: str, op: str, blocks: int, **more: Any) -> None:
        record = TransferRecord(
            request_id=request_id,
            op=op,
            rank=0,
            world=1,
            blocks=blocks,
            bytes=blocks * _KV_BYTES,
            **more,
        )
        self._records.append(asdict(record))
        self._work.set()

    def _beside(self, transfer: Any) -> None:
        task = asyncio.create_task(transfer)
        self._transfers.add(task)
        task.add_done_callback(self._transfers.discard)


class NoText:
    """Stands for `TextFrontend`: the API makes the tokens, here is no tokenizer."""

    def __init__(self, config: VllmConfig) -> None:
        """`config` is the stub's."""

    async def prepare(self, request_id: str, text: object) -> EngineCoreRequest:
        """Raises InvalidRequest."""
        raise InvalidRequest("the stub engine takes token ids only")


async def start_stub(
    settings: Settings, _model: str, _reports_to: str, **_options: Any
) -> tuple[VllmConfig, EngineCoreClient]:
    """As `pdtasks.engine.boot.start_core`."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=_MAX_MODEL_LEN, get_vocab_size=lambda: _VOCABULARY
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
        cache_config=SimpleNamespace(block_size=_BLOCK_SIZE, num_gpu_blocks=1000),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    return cast("VllmConfig", config), cast("EngineCoreClient", StubCore(settings))


def transfer_of(request: EngineCoreRequest) -> dict[str, Any]:
    """What `request` says of its hand-over."""
    params = request.sampling_params
    assert params is not None
    return kv_params.ours((params.extra_args or {}).get("kv_transfer_params"))


def _handle(transfer_id: str, num_tokens: int) -> dict[str, Any]:
    return KVHandle(
        fingerprint="stub",
        transfer_id=transfer_id,
        num_tokens=num_tokens,
        block_size=_BLOCK_SIZE,
        hashes=(),
        expires_at=time.time() + 600,
    ).to_wire()
