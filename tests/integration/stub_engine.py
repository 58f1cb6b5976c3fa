"""The engine of tests' workers: it makes tokens when a test says so, or at once.

Stands where `pdtasks.bench.chaos.stub` stands for benches, by the same names.  Steered through
database 1 of the bus (`steering.py`), whose URL is in STUB_STEERING: it has more rights than the
worker has.  With the variable STUB_SILENT the engine neither reads nor writes there, and ends
requests as fast as it can.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import valkey.asyncio
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.metrics.stats import SchedulerStats

from pdtasks.errors import InvalidRequest
from pdtasks.kv import params as kv_params
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.keys import tail_key
from pdtasks.kv.plan import TransferRecord
from pdtasks.kv.store import BlockStore
from pdtasks.messages import TextRequest
from pdtasks.settings import Settings
from tests.integration.steering import POISON, added_key, held_key, steps_key, token_text

VOCABULARY = 1 << 40
MAX_MODEL_LEN = 1000
BLOCK_SIZE = 16

_attempts = itertools.count()


class StubCore:
    """Makes one token for each of its requests when a test, or nobody, says so.

    Greedy requests get 100 + the token's place in the answer.  Others get what no second
    attempt will repeat.
    """

    def __init__(self, settings: Settings) -> None:
        self._name = os.environ["STUB_NAME"]
        self._records = "STUB_SILENT" not in os.environ
        self._bus = valkey.asyncio.Valkey.from_url(os.environ["STUB_STEERING"])
        self._store = BlockStore(settings.kv_urls, ttl_s=600)
        self._running: dict[str, EngineCoreRequest] = {}
        self._made: dict[str, int] = {}
        self._salts: dict[str, int] = {}
        self._work = asyncio.Event()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if POISON in (request.prompt_token_ids or ()):
            os.kill(os.getpid(), signal.SIGKILL)
        request_id = request.request_id
        self._running[request_id] = request
        self._made[request_id] = len(self._ours(request).get("resume") or ())
        self._salts[request_id] = 1000 * (next(_attempts) + os.getpid())
        if self._records:
            await self._bus.rpush(added_key(self._name), request_id)
        self._work.set()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._running.pop(request_id, None)

    async def get_output_async(self) -> EngineCoreOutputs:
        while True:
            await self._work.wait()
            if self._records and await self._bus.exists(held_key(self._name)):
                if await self._bus.blpop([steps_key(self._name)], timeout=0.1) is None:
                    continue
            else:
                await asyncio.sleep(0.002)
            if self._running:
                return self._step()
            self._work.clear()

    def shutdown(self, timeout: float | None = None) -> None:
        self._store.close()

    def _step(self) -> EngineCoreOutputs:
        records: list[dict[str, Any]] = []
        outputs = [self._next_of(r, records) for r in list(self._running.values())]
        made = EngineCoreOutputs(outputs=outputs, timestamp=1.0)
        if records:
            made.scheduler_stats = SchedulerStats(kv_connector_stats={"records": records})
        return made

    def _next_of(
        self, request: EngineCoreRequest, records: list[dict[str, Any]]
    ) -> EngineCoreOutput:
        params, request_id = request.sampling_params, request.request_id
        assert params is not None
        position = self._made[request_id]
        self._made[request_id] += 1
        token_id = 100 + position
        if params.temperature > 0:
            token_id += self._salts[request_id]
        output = EngineCoreOutput(request_id=request_id, new_token_ids=[token_id])
        if self._made[request_id] >= (params.max_tokens or MAX_MODEL_LEN):
            output.finish_reason = FinishReason.LENGTH
            del self._running[request_id]
            if transfer_id := self._ours(request).get("save"):
                # The partial block of a prompt, for real: somebody has to delete it.
                self._store.put(tail_key(transfer_id, 0), [memoryview(b"partial block")])
                handle = KVHandle(
                    fingerprint="stub",
                    transfer_id=transfer_id,
                    num_tokens=len(request.prompt_token_ids or ()),
                    block_size=BLOCK_SIZE,
                    hashes=(),
                    expires_at=time.time() + 600,
                )
                output.kv_transfer_params = kv_params.saved(handle.to_wire())
                records.append(
                    asdict(
                        TransferRecord(
                            request_id=request_id,
                            op="save",
                            rank=0,
                            world=1,
                            blocks=1,
                            bytes=13,
                        )
                    )
                )
        return output

    @staticmethod
    def _ours(request: EngineCoreRequest) -> dict[str, Any]:
        assert request.sampling_params is not None
        extra = request.sampling_params.extra_args or {}
        return kv_params.ours(extra["kv_transfer_params"])


async def start_stub(
    settings: Settings, _model: str, _reports_to: str, **_: Any
) -> tuple[Any, StubCore]:
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=MAX_MODEL_LEN, get_vocab_size=lambda: VOCABULARY
        ),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=int(os.environ.get("STUB_STEP_TOKENS", "8192"))
        ),
        cache_config=SimpleNamespace(block_size=BLOCK_SIZE, num_gpu_blocks=1000),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    return config, StubCore(settings)


class StubDetokeniser:
    """Collects a text without a tokenizer."""

    def __init__(self) -> None:
        self._text = ""

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        self._text += "".join(token_text(t) for t in new_token_ids)
        return None

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        return self._text


class NoText:
    """Text in and out without a model."""

    def __init__(self, config: Any) -> None:
        """`config` is the stub engine's."""

    async def prepare(self, request_id: str, text: TextRequest) -> EngineCoreRequest:
        if text.prompt == "":
            raise InvalidRequest("the prompt is empty")
        ids = text.prompt_token_ids or tuple((text.prompt or "chat").encode())
        return EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=list(ids),
            mm_features=None,
            sampling_params=SamplingParams(**text.sampling),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=text.cache_salt,
            data_parallel_rank=None,
        )

    def detokeniser(self, request: EngineCoreRequest) -> StubDetokeniser:
        return StubDetokeniser()
