"""The class that vLLM loads: builds one half by role and delegates every call.

Theory of operation
-------------------
vLLM makes two objects of `ValkeyConnector`.  The one in the scheduler (our `BlockLookup`) decides,
the one in each worker rank (our `BlockTransfer`) moves bytes; in a Celery project "worker" already
means something else, hence the other names.  Between them travels, with every engine step, a
`TransferPlan`, and back, with the step's statistics, `TransferRecord`s.

Writing, in the engine that computes a prompt::

    step n     forward pass computes a chunk of the prompt; save_kv_layer marks the points at which
               its layers are computed
               wait_for_save: threads begin to copy out and send its finished blocks
    last step  the request finishes with its first token; the handle leaves with that token
    polling    the engine keeps the blocks and asks until the save is done: finished_sending

Reading, in the engine that continues::

    on_new_request            the first token becomes output that is already there
    get_num_new_matched_tokens  the whole prompt can be loaded
    update_state_after_alloc  blocks are allocated, the load is planned
    start_load_kv             threads fetch; other requests go on decoding
    get_transfer_results      finished_recving, or failed_recving: vLLM recomputes the prompt
                              (`kv_load_failure_policy="recompute"`)
    handle_preemptions        before a later step: what it reads and was told too soon is there

Sharing, in the engine that computes a prompt which begins like an earlier one: a probe asks the
store for the blocks while the request waits, then reading goes as above for that part of it.

Options in `kv_connector_extra_config`:

==================  ============================================================================
urls                kv servers (default: environment PDTASKS_KV_URLS, comma separated, so that
                    passwords stay out of vLLM's logged configuration)
ttl_s               seconds that a block lives without being used (3600)
connections         blocks that move at once in each rank: connections, and blocks of host
                    memory, pinned on CUDA (4; on CUDA 8)
timeout_s           seconds that the blocks of one engine step may take; then: recompute (10)
min_prefix_tokens   a shared prefix that is shorter is computed, not loaded (128; on CUDA 512)
ring_mib            shared memory of each rank for blocks that engines of this host read at once
                    (256; on CUDA 4096; 0: hand-overs wait for the store)
gpu_to_gpu          engines of this host read each other's caches on CUDA (true)
reports_to          unix datagram socket that hears at once of each transfer that has ended
exit_with_pid       the engine's processes end when this process is gone
==================  ============================================================================
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec

from pdtasks.kv.identity import fingerprint
from pdtasks.kv.lookup import BlockLookup
from pdtasks.kv.pages import BlockPages, block_bytes
from pdtasks.kv.plan import TransferPlan, TransferStats
from pdtasks.kv.probe import PROBE_TIMEOUT_S, PrefixProbe
from pdtasks.kv.reports import Reporter
from pdtasks.kv.rings import Rings
from pdtasks.kv.store import BlockStore
from pdtasks.kv.transfer import BlockTransfer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

#: Defaults of the options above.
TTL_S = 3600
CONNECTIONS = {"cpu": 4, "cuda": 8}
TIMEOUT_S = 10.0
MIN_PREFIX_TOKENS = {"cpu": 128, "cuda": 512}
RING_MIB = {"cpu": 256, "cuda": 4096}
#: What may still be on its way from a ring when a request joins a step, and what the only request
#: of an engine waits for in its step: about 15 ms of copying.
SYNC_MIB = {"cpu": 64, "cuda": 768}
#: The same of requests that others would wait for: one or two milliseconds.
SHORT_MIB = {"cpu": 8, "cuda": 64}
#: Tokens of prompts that keep the processor busy in one step.
FULL_STEP = {"cpu": 1024, "cuda": 2048}
#: Seconds between two looks for rings that have come to this host.
_RINGS_INTERVAL_S = 1.0
#: Longest time that one of the engine's threads keeps the others from running, seconds.
SWITCH_INTERVAL_S = 1e-4
#: Seconds between two looks at the process to end with.
_WATCH_INTERVAL_S = 0.5


class ValkeyConnector(KVConnectorBase_V1):
    """Hands prompt KV from one vLLM engine to another through Valkey.

    It does not declare `SupportsHMA`, so vLLM gives layers with a sliding window, in models that
    have full attention too, blocks for the whole prompt: all layers of a block are one value.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _require_supported(vllm_config, kv_cache_config)
        option = self._kv_transfer_config.get_from_extra_config
        device = "cuda" if current_platform.is_cuda() else "cpu"
        urls = option("urls", None) or os.environ.get("PDTASKS_KV_URLS", "").split(",")
        urls = [url for url in urls if url]
        ttl_s = int(option("ttl_s", TTL_S))
        digest = fingerprint(vllm_config, kv_cache_config).digest()
        tp_size = vllm_config.parallel_config.tensor_parallel_size
        ring_bytes = int(option("ring_mib", RING_MIB[device])) << 20
        engine_id = str(self._kv_transfer_config.engine_id)
        # With two halves of a batch in turn a layer is computed twice, on two streams.
        self._tells_of_layers = not vllm_config.parallel_config.use_ubatching
        self._lookup: BlockLookup | None = None
        self._transfer: BlockTransfer | None = None
        self._reporter: Reporter | None = None
        if role == KVConnectorRole.SCHEDULER:
            if pid := option("exit_with_pid", None):
                _exit_with(int(pid))
            self._lookup = BlockLookup(
                fingerprint=digest,
                block_size=vllm_config.cache_config.block_size,
                tp_size=tp_size,
                ttl_s=ttl_s,
                probe=PrefixProbe(BlockStore(urls, ttl_s=ttl_s, timeout_s=PROBE_TIMEOUT_S)),
                min_prefix_tokens=int(option("min_prefix_tokens", MIN_PREFIX_TOKENS[device])),
                vocabulary=vllm_config.model_config.get_vocab_size(),
                max_tokens=vllm_config.model_config.max_model_len,
                ring=engine_id if ring_bytes else None,
                rings=Rings(payloads=False, own_engine=engine_id),
                block_bytes=block_bytes(kv_cache_config),
                short_bytes=SHORT_MIB[device] << 20,
                sync_bytes=SYNC_MIB[device] << 20,
                full_step=FULL_STEP[device],
            )
        else:
            timeout_s = float(option("timeout_s", TIMEOUT_S))
            if reports_to := option("reports_to", None):
                self._reporter = Reporter(reports_to)
            # The engine's own thread is busy with Python; threads that have moved a block would
            # wait 5 ms each time to go on with the next.
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            self._transfer = BlockTransfer(
                BlockStore(urls, ttl_s=ttl_s, timeout_s=timeout_s),
                fingerprint=digest,
                rank=get_tensor_model_parallel_rank(),
                world=tp_size,
                num_threads=int(option("connections", CONNECTIONS[device])),
                timeout_s=timeout_s,
                engine_id=engine_id,
                ring_bytes=ring_bytes,
                gpu_to_gpu=bool(option("gpu_to_gpu", True)),
                soon_bytes=SYNC_MIB[device] << 20,
                report=self._reporter,
            )
            _look_for_rings(self._transfer)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Ask for all layers of a block beside each other, where the attention backend can."""
        # One copy for a block instead of one for each layer. CPU attention knows one layout.
        return "BLHNC" if current_platform.is_cuda() else None

    # -- scheduler side ------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        assert self._lookup is not None
        self._lookup.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        assert self._lookup is not None
        num_tokens = self._lookup.num_loadable_tokens(request, num_computed_tokens)
        return num_tokens, bool(num_tokens) and self._lookup.loads_beside(request)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        assert self._lookup is not None
        self._lookup.plan_load(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self._lookup is not None
        return self._lookup.build_plan(scheduler_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._lookup is not None
        return self._lookup.finish(request)

    # -- worker side ---------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self._transfer is not None
        self._transfer.attach(BlockPages(kv_caches, self._kv_cache_config))

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert self._transfer is not None
        assert isinstance(kv_connector_metadata, TransferPlan)
        # vLLM calls this before each step, whether or not something is preempted.
        self._transfer.before_step(kv_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        assert self._transfer is not None
        self._transfer.start_loads(self._plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads happen between steps; no layer ever waits."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, *a: Any, **kw: Any) -> None:
        """Called where a layer's attention is not part of a captured graph."""
        if self._transfer is not None and self._tells_of_layers:
            self._transfer.layer_done(layer_name)

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

    def reset_cache(self) -> bool:
        """False: what other engines may read stays. New weights need a new engine."""
        return False

    def shutdown(self) -> None:
        if self._lookup is not None:
            self._lookup.close()
        if self._transfer is not None:
            self._transfer.close()
        if self._reporter is not None:
            self._reporter.close()

    def _plan(self) -> TransferPlan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, TransferPlan)
        return plan


def _require_supported(config: VllmConfig, kv_config: KVCacheConfig) -> None:
    """Raises ValueError for engines whose blocks cannot be handed over as they lie there."""
    parallel = config.parallel_config
    if (
        parallel.pipeline_parallel_size != 1
        or parallel.decode_context_parallel_size != 1
        or parallel.prefill_context_parallel_size != 1
    ):
        raise ValueError(
            "pdtasks does not support pipeline or context parallelism: use tensor parallelism"
        )
    specs = {
        type(spec).__name__: isinstance(spec, FullAttentionSpec)
        for group in kv_config.kv_cache_groups
        for spec in getattr(
            group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}
        ).values()
    }
    if len(kv_config.kv_cache_groups) != 1 or not all(specs.values()):
        kinds = ", ".join(sorted(specs))
        raise ValueError(
            "pdtasks hands over models whose layers keep the whole prompt in one KV cache group; "
            f"this one has {len(kv_config.kv_cache_groups)} group(s) of {kinds}"
        )


def _look_for_rings(transfer: BlockTransfer) -> None:
    """Open other engines' rings when they come: mapping and pinning one takes a second."""

    def watch(found: weakref.ref[BlockTransfer]) -> None:
        while (transfer := found()) is not None:
            transfer.look_for_rings()
            del transfer
            threading.Event().wait(_RINGS_INTERVAL_S)

    watcher = threading.Thread(target=watch, args=(weakref.ref(transfer),), name="kv-rings")
    watcher.daemon = True
    watcher.start()


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
