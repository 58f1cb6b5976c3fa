"""The class that vLLM loads: builds one half by role and delegates every call.

Theory of operation
-------------------
vLLM makes two objects of `ValkeyConnector`.  The one in the scheduler (our `BlockLookup`) decides,
the one in each worker rank (our `BlockTransfer`) moves bytes; in a Celery project "worker" already
means something else, hence the other names.  Between them travels, with every engine step, a
`TransferPlan`, and back, with the step's statistics, `TransferRecord`s.

Writing, in the engine that computes a prompt::

    step n     forward pass computes a chunk of the prompt
               wait_for_save: its finished blocks are copied out and sent by threads
    last step  the request finishes with its first token; the handle leaves with that token
    polling    the engine keeps the blocks and asks until the save is done: finished_sending

Reading, in the engine that continues::

    on_new_request            the first token becomes output that is already there
    get_num_new_matched_tokens  the whole prompt can be loaded
    update_state_after_alloc  blocks are allocated, the load is planned
    start_load_kv             threads fetch; other requests go on decoding
    get_transfer_results      finished_recving, or failed_recving: vLLM recomputes the prompt
                              (`kv_load_failure_policy="recompute"`)

Options in `kv_connector_extra_config`: `urls` (default: environment PDTASKS_KV_URLS, comma
separated, so that passwords stay out of vLLM's logged configuration), `ttl_s`, `threads`,
`exit_with_pid` (the engine's processes end when this process is gone).
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.core.sched.output import SchedulerOutput

from pdtasks.kv.identity import fingerprint
from pdtasks.kv.lookup import BlockLookup
from pdtasks.kv.pages import BlockPages
from pdtasks.kv.plan import TransferPlan, TransferStats
from pdtasks.kv.store import BlockStore
from pdtasks.kv.transfer import BlockTransfer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

#: Seconds that a block lives without being used, unless `ttl_s` says otherwise.
DEFAULT_TTL_S = 3600
DEFAULT_THREADS = 4
#: Seconds between two looks at the process to end with.
_WATCH_INTERVAL_S = 0.5


class ValkeyConnector(KVConnectorBase_V1, SupportsHMA):
    """Hands prompt KV from one vLLM engine to another through Valkey."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _require_supported(vllm_config, kv_cache_config)
        option = self._kv_transfer_config.get_from_extra_config
        ttl_s = int(option("ttl_s", DEFAULT_TTL_S))
        digest = fingerprint(vllm_config, kv_cache_config).digest()
        tp_size = vllm_config.parallel_config.tensor_parallel_size
        self._lookup: BlockLookup | None = None
        self._transfer: BlockTransfer | None = None
        if role == KVConnectorRole.SCHEDULER:
            if pid := option("exit_with_pid", None):
                _exit_with(int(pid))
            self._lookup = BlockLookup(
                fingerprint=digest,
                block_size=vllm_config.cache_config.block_size,
                tp_size=tp_size,
                ttl_s=ttl_s,
            )
        else:
            threads = int(option("threads", DEFAULT_THREADS))
            urls = option("urls", None) or os.environ.get("PDTASKS_KV_URLS", "").split(",")
            store = BlockStore([u for u in urls if u], ttl_s=ttl_s, max_connections=threads)
            self._transfer = BlockTransfer(
                store,
                fingerprint=digest,
                rank=get_tensor_model_parallel_rank(),
                world=tp_size,
                num_threads=threads,
            )

    # -- scheduler side ------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        assert self._lookup is not None
        self._lookup.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        assert self._lookup is not None
        num_tokens = self._lookup.num_loadable_tokens(request, num_computed_tokens)
        return num_tokens, num_tokens > 0

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        assert self._lookup is not None
        self._lookup.plan_load(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self._lookup is not None
        return self._lookup.build_plan(scheduler_output)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._lookup is not None
        return self._lookup.finish(request)

    # -- worker side ---------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self._transfer is not None
        self._transfer.attach(BlockPages(kv_caches, self._kv_cache_config))

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        assert self._transfer is not None
        self._transfer.start_loads(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads happen between steps; no layer ever waits."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, *a: Any, **kw: Any) -> None:
        """Blocks leave whole, after the forward pass."""

    def wait_for_save(self) -> None:
        assert self._transfer is not None
        self._transfer.start_saves(self._plan())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self._transfer is not None
        return self._transfer.take_results(finished_req_ids)

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self._transfer.take_stats() if self._transfer is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return TransferStats(data)

    def shutdown(self) -> None:
        if self._transfer is not None:
            self._transfer.close()

    def _plan(self) -> TransferPlan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, TransferPlan)
        return plan


def _require_supported(config: VllmConfig, kv_config: KVCacheConfig) -> None:
    if len(kv_config.kv_cache_groups) != 1:
        raise ValueError(
            "pdtasks hands over models with one kind of attention layer; this one has "
            f"{len(kv_config.kv_cache_groups)} KV cache groups (sliding window or hybrid)"
        )
    if config.parallel_config.pipeline_parallel_size != 1:
        raise ValueError("pdtasks does not support pipeline parallelism: use tensor parallelism")


def _exit_with(pid: int) -> None:
    """End this process and its children when process `pid`, our parent, is gone.

    A Celery worker that is killed cannot tell vLLM's engine core, which would go on holding memory.
    """

    def watch() -> None:
        while os.getppid() == pid:
            threading.Event().wait(_WATCH_INTERVAL_S)
        # Tensor-parallel ranks watch a pipe to this process and follow it.
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
