"""How do blocks get from the engine's cache to the store and back? (vLLM's worker side)

Saves: the blocks of a step are copied to host memory right after the forward pass, so the cache may
be reused at once; threads seal and send the copies.  Loads: threads fetch, check and scatter the
blocks between engine steps.  A block that is missing, late or damaged fails the load of its
request; the engine then computes the prompt itself.
"""

from __future__ import annotations

import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from pdtasks.kv.codec import HEADER_BYTES, CorruptBlock, seal, unseal
from pdtasks.kv.pages import BlockPages
from pdtasks.kv.plan import BlockLoad, BlockSave, TransferPlan, TransferRecord, TransferStats
from pdtasks.kv.store import BlockStore, StoreError

logger = init_logger(__name__)

# What a client library hands out is read-only; it is only ever read from.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


@dataclass
class _Tally:
    """What has been moved for one request so far."""

    started: float = field(default_factory=time.monotonic)
    open: int = 0  # blocks on their way
    blocks: int = 0
    bytes: int = 0
    missing: int = 0
    error: str = ""
    sealed: bool = False  # no further blocks will be added
    abandoned: bool = False  # the request was aborted: nobody waits for it


class BlockTransfer:
    """Carries out `TransferPlan`s for one rank."""

    def __init__(
        self, store: BlockStore, *, fingerprint: str, rank: int, world: int, num_threads: int
    ) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._rank = rank
        self._world = world
        self._pages: BlockPages | None = None
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kv-transfer")
        self._lock = threading.Lock()  # guards everything below
        self._saves: dict[str, _Tally] = {}
        self._loads: dict[str, _Tally] = {}
        self._sent: set[str] = set()  # saved, not yet reported
        self._held: set[str] = set()  # the scheduler keeps their blocks until they are saved
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._records: list[TransferRecord] = []

    def attach(self, pages: BlockPages) -> None:
        """Tell where the cache lies; called once before any transfer."""
        self._pages = pages

    # -- saves ---------------------------------------------------------------------------------

    def start_saves(self, plan: TransferPlan) -> None:
        """Copy the step's finished blocks out of the cache and start sending them."""
        with self._lock:
            self._held |= plan.held
        for save in plan.saves:
            with self._lock:
                tally = self._saves.setdefault(save.request_id, _Tally())
                tally.open += len(save.block_ids)
                tally.sealed = save.last
            for offset, block_id in enumerate(save.block_ids):
                value = self._copy_out(block_id)
                key = save.handle.key(save.first + offset, self._rank)
                future = self._threads.submit(self._send, tally, key, value)
                future.add_done_callback(partial(self._save_done, save))

    def _copy_out(self, block_id: int) -> torch.Tensor:
        assert self._pages is not None
        value = torch.empty(HEADER_BYTES + self._pages.block_bytes, dtype=torch.int8)
        self._pages.gather(block_id, value[HEADER_BYTES:])
        return value

    def _send(self, tally: _Tally, key: str, value: torch.Tensor) -> int | None:
        """Returns the bytes that crossed the wire, 0 when the block was there already.

        None: not sent, because another block of the prompt was refused; decode will recompute it.
        """
        if tally.error:
            return None
        if self._store.touch(key):
            return 0
        view = memoryview(value.numpy().data).cast("B")
        seal(view, self._fingerprint)
        self._store.put(key, view)
        return len(view)

    def _save_done(self, save: BlockSave, future: Future[int | None]) -> None:
        with self._lock:
            tally = self._saves[save.request_id]
            tally.open -= 1
            error = future.exception()
            sent = None if error is not None else future.result()
            if error is not None:
                tally.error = tally.error or _describe(error)
            if sent is not None:
                tally.blocks += 1
                tally.bytes += sent
            self._finish_save(save.request_id, tally)

    def _finish_save(self, request_id: str, tally: _Tally) -> None:
        if tally.sealed and tally.open == 0:
            del self._saves[request_id]
            if not tally.abandoned:
                self._sent.add(request_id)
            self._record(request_id, "save", tally)

    # -- loads ---------------------------------------------------------------------------------

    def start_loads(self, plan: TransferPlan) -> None:
        """Start fetching the blocks of the step's new requests."""
        for load in plan.loads:
            tally = _Tally(open=len(load.block_ids), sealed=True)
            with self._lock:
                self._loads[load.request_id] = tally
            for offset, block_id in enumerate(load.block_ids):
                key = load.handle.key(load.first + offset, self._rank)
                future = self._threads.submit(self._fetch, tally, key, block_id)
                future.add_done_callback(partial(self._load_done, load))

    def _fetch(self, tally: _Tally, key: str, block_id: int) -> int | None:
        """Returns the bytes received, or None when the store lacks the block or it is damaged."""
        assert self._pages is not None
        if tally.missing:
            return None  # the prompt will be recomputed: the other blocks are of no use
        value = self._store.get(key)
        if value is None:
            return None
        try:
            payload = unseal(value, self._fingerprint, self._pages.block_bytes)
        except CorruptBlock as exc:
            logger.warning("KV block %s is not usable: %s", key, exc)
            # Prefill would take it for a good one and never write it again.
            self._store.delete([key])
            return None
        self._pages.scatter(block_id, torch.frombuffer(payload, dtype=torch.int8))
        return len(value)

    def _load_done(self, load: BlockLoad, future: Future[int | None]) -> None:
        with self._lock:
            tally = self._loads[load.request_id]
            tally.open -= 1
            error = future.exception()
            received = None if error is not None else future.result()
            if error is not None:
                tally.error = tally.error or _describe(error)
            if received is None:
                tally.missing += 1
            else:
                tally.blocks += 1
                tally.bytes += received
            if tally.open == 0:
                del self._loads[load.request_id]
                self._received.add(load.request_id)
                if tally.missing:
                    self._failed.add(load.request_id)
                self._record(load.request_id, "load", tally)

    # -- reports -------------------------------------------------------------------------------

    def _record(self, request_id: str, op: str, tally: _Tally) -> None:
        self._records.append(
            TransferRecord(
                request_id=request_id,
                op=op,
                rank=self._rank,
                world=self._world,
                blocks=tally.blocks,
                bytes=tally.bytes,
                missing=tally.missing,
                seconds=time.monotonic() - tally.started,
                error=tally.error,
            )
        )
        if tally.error:
            logger.warning("KV %s of %s: %s", op, request_id, tally.error)

    def take_results(self, finished_request_ids: set[str]) -> KVConnectorTransferResults:
        """What is done since the last call; each request is reported exactly once.

        A request that was aborted is never reported as sent: the scheduler knows it no more.
        """
        with self._lock:
            for request_id in finished_request_ids - self._held:
                self._sent.discard(request_id)
                if tally := self._saves.get(request_id):
                    tally.abandoned = tally.sealed = True
                    self._finish_save(request_id, tally)
            sent = self._held & self._sent
            self._held -= sent
            self._sent -= sent
            received, self._received = self._received, set()
            failed, self._failed = self._failed, set()
        return KVConnectorTransferResults(sent, received, failed)

    def take_stats(self) -> TransferStats | None:
        """The records since the last call."""
        with self._lock:
            records, self._records = self._records, []
        return TransferStats({"records": [asdict(r) for r in records]}) if records else None

    def close(self) -> None:
        """Wait for transfers under way, then close the connections."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._store.close()


def _describe(error: BaseException) -> str:
    kind = "store" if isinstance(error, StoreError) else "transfer"
    return f"{kind}: {type(error).__name__}: {error}"[:200]
