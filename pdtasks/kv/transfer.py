"""How do blocks get from the engine's cache to the store and back? (vLLM's worker side)

Theory of operation
-------------------
The engine's thread only says what is to be done; it never copies and never waits for the network.
A fixed number of threads do it, each with memory for one block (`Staging`) and a connection, so
neither memory nor bytes under way can grow, however slow the store is:

    save    ask the store which blocks it has, and for each of the others:
            copy out of the cache -> checksum -> send
    load    for each block: receive -> check -> copy into the cache

The engine keeps the blocks of a finished request until their saves are done, so a slow store
costs the hand-over time and the engine some room in its cache, until the deadline.  Blocks that
vLLM takes away earlier, from a preempted request, are given up before they are overwritten
(`give_up`): bytes of another request must never be stored under their name.

A block that is missing, late or damaged fails the load of its request; the engine then computes
the prompt itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from pdtasks.kv.codec import HEADER_BYTES, CorruptBlock, check, seal
from pdtasks.kv.pages import BlockPages, Mark, Staging
from pdtasks.kv.plan import BlockLoad, BlockSave, TransferPlan, TransferRecord, TransferStats
from pdtasks.kv.store import BlockStore, StoreError, UnexpectedValue

logger = init_logger(__name__)


class _Late(Exception):
    """The deadline of a transfer has passed before its turn came."""


@dataclass(eq=False)
class _Tally:
    """What has been moved for one request so far."""

    request_id: str
    op: str
    started: float = field(default_factory=time.monotonic)
    open: int = 0  # blocks on their way
    copying: int = 0  # blocks that a thread is copying out of the cache
    blocks: int = 0
    bytes: int = 0
    missing: int = 0
    error: str = ""
    sealed: bool = False  # no further blocks will be added
    cancelled: bool = False  # nobody wants the rest


#: Seconds between two looks for transfers that never end, and how old those are.
_LOOK_S = 60.0
_LEAKED_AFTER_S = 1800.0


@dataclass(frozen=True)
class _Block:
    """One block's way."""

    key: str
    content: str  #: what its checksum is seeded with
    shared: bool  #: named by content: what is in the store is this block
    block_id: int
    after: Mark
    deadline: float


class BlockTransfer:
    """Carries out `TransferPlan`s for one rank."""

    def __init__(
        self,
        store: BlockStore,
        *,
        fingerprint: str,
        rank: int,
        world: int,
        num_threads: int,
        timeout_s: float,
    ) -> None:
        """Args:
        num_threads: blocks that move at once; each takes a block of host memory (pinned on CUDA)
            and a connection.
        timeout_s: seconds that the blocks of one step may take.
        """
        self._store = store
        self._fingerprint = fingerprint
        self._rank = rank
        self._world = world
        self._num_threads = num_threads
        self._timeout_s = timeout_s
        self._own = threading.local()
        self._pages: BlockPages
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()  # guards everything below
        self._copied = threading.Condition(self._lock)
        self._saves: dict[str, _Tally] = {}
        self._loads: dict[str, _Tally] = {}
        self._sent: set[str] = set()  # saved, not yet reported
        self._held: set[str] = set()  # the scheduler keeps their blocks until they are saved
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._records: list[TransferRecord] = []
        self._to_tell: list[str] = []
        self._looked_at = time.monotonic()

    def attach(self, pages: BlockPages) -> None:
        """Tell where the cache lies; called once before any transfer."""
        self._pages = pages
        # All memory is taken now: a host that lacks it says so at the start.
        stagings = [Staging(pages) for _ in range(self._num_threads)]

        def equip() -> None:
            if pages.device.type == "cuda":
                torch.cuda.set_device(pages.device)
            self._own.staging = stagings.pop()
            self._own.header = memoryview(bytearray(HEADER_BYTES))

        self._threads = ThreadPoolExecutor(self._num_threads, "kv-transfer", initializer=equip)

    def _blocks_of(
        self, move: BlockSave | BlockLoad, after: Mark, deadline: float
    ) -> Iterable[_Block]:
        handle = move.handle
        for index, block_id in enumerate(move.block_ids, start=move.first):
            yield _Block(
                key=handle.key(index, self._rank),
                content=handle.content(index, self._rank),
                shared=index < len(handle.hashes),
                block_id=block_id,
                after=after,
                deadline=deadline,
            )

    def _submit(self, job: Callable[..., None], *arguments: object) -> None:
        """Raises RuntimeError after `close`."""
        threads = self._threads
        if threads is None:
            raise RuntimeError("not attached, or closed")
        threads.submit(job, *arguments)

    # -- saves ---------------------------------------------------------------------------------

    def start_saves(self, plan: TransferPlan) -> None:
        """Start sending the blocks that the step completes. Called in the engine's thread."""
        with self._lock:
            for request_id, wanted in plan.finished.items():
                self._held.add(request_id)
                tally = self._saves.get(request_id)
                if tally is None:
                    self._sent.add(request_id)  # also when its blocks were given up
                elif not wanted:
                    tally.cancelled = tally.sealed = True
                    self._end_save_if_done(tally)
        if not plan.saves:
            return
        after = self._pages.mark()
        deadline = time.monotonic() + self._timeout_s
        for save in plan.saves:
            with self._lock:
                tally = self._saves.get(save.request_id)
                if tally is None:
                    tally = self._saves[save.request_id] = _Tally(save.request_id, "save")
                tally.open += len(save.block_ids)
                tally.sealed = save.last
                self._end_save_if_done(tally)  # the last one may bring no further block
            blocks = list(self._blocks_of(save, after, deadline))
            if not blocks:
                continue
            try:
                self._submit(self._send_missing, tally, blocks)
            except RuntimeError as exc:  # closed: the engine's thread must not end of it
                for _ in blocks:
                    self._block_saved(tally, None, exc)
        self._tell()

    def _send_missing(self, tally: _Tally, blocks: list[_Block]) -> None:
        """Send those of `blocks` that the store does not have."""
        try:
            # Behind a store that hangs each of these would hang as long.
            _keep(blocks[0].deadline)
            shared = [block.key for block in blocks if block.shared]
            present = dict(zip(shared, self._store.touch(shared), strict=True))
        except Exception as exc:  # noqa: BLE001 - whatever it is, decode will recompute
            for _ in blocks:
                self._block_saved(tally, None, exc)
            return
        for block in blocks:
            if present.get(block.key):
                self._block_saved(tally, 0)
                continue
            try:
                self._submit(self._send, tally, block)
            except RuntimeError as exc:  # closed meanwhile: nobody would look at this thread's end
                self._block_saved(tally, None, exc)

    def _send(self, tally: _Tally, block: _Block) -> None:
        try:
            sent = self._copy_and_send(tally, block)
        except Exception as exc:  # noqa: BLE001 - whatever it is, decode will recompute
            self._block_saved(tally, None, exc)
        else:
            self._block_saved(tally, sent)

    def _copy_and_send(self, tally: _Tally, block: _Block) -> int | None:
        """Returns the bytes sent; None when it is pointless."""
        staging: Staging = self._own.staging
        with self._lock:
            # One block of the prompt was refused: decode will recompute all of it.
            if tally.cancelled or tally.error:
                return None
            tally.copying += 1
        try:
            _keep(block.deadline)
            staging.gather(block.block_id, block.after)
        finally:
            with self._lock:
                tally.copying -= 1
                self._copied.notify_all()
        header = seal(block.content, staging.payload, self._fingerprint)
        self._store.put(block.key, [memoryview(header), staging.payload], block.deadline)
        return len(header) + len(staging.payload)

    def _block_saved(self, tally: _Tally, sent: int | None, error: Exception | None = None) -> None:
        with self._lock:
            tally.open -= 1
            if error is not None:
                tally.error = tally.error or _describe(error)
            if sent is not None:
                tally.blocks += 1
                tally.bytes += sent
            self._end_save_if_done(tally)
        self._tell()

    def _end_save_if_done(self, tally: _Tally) -> None:
        # A tally that was given up is in the list no more: its blocks belong to others now.
        if tally.sealed and tally.open == 0 and self._saves.get(tally.request_id) is tally:
            del self._saves[tally.request_id]
            self._sent.add(tally.request_id)
            self._record(tally)

    def give_up(self, request_ids: Collection[str]) -> None:
        """vLLM takes the blocks of these requests away; returns when nobody reads them any more.

        Waits for copies within the host, never for the network.
        """
        with self._lock:
            tallies = [self._saves.pop(r) for r in request_ids if r in self._saves]
            for tally in tallies:
                tally.cancelled = True
            self._sent.difference_update(request_ids)  # saved already: will be saved again
            self._copied.wait_for(lambda: not any(tally.copying for tally in tallies))

    # -- loads ---------------------------------------------------------------------------------

    def start_loads(self, plan: TransferPlan) -> None:
        """Start fetching the blocks of the step's new requests. Called in the engine's thread."""
        if not plan.loads:
            return
        after = self._pages.mark()
        deadline = time.monotonic() + self._timeout_s
        for load in plan.loads:
            tally = _Tally(load.request_id, "load", open=len(load.block_ids), sealed=True)
            with self._lock:
                if not load.block_ids:
                    self._received.add(load.request_id)  # no thread would ever end it
                    continue
                self._loads[load.request_id] = tally
            for block in self._blocks_of(load, after, deadline):
                try:
                    self._submit(self._fetch, tally, block)
                except RuntimeError as exc:  # closed
                    self._block_loaded(tally, None, exc)

    def _fetch(self, tally: _Tally, block: _Block) -> None:
        error: Exception | None = None
        received: int | None = None
        try:
            received = self._receive_and_copy(tally, block)
        except (CorruptBlock, UnexpectedValue) as exc:
            logger.warning("KV block %s is not usable: %s", block.key, exc)
            # Prefill would take it for a good one and never write it again.
            error = self._forget(block.key)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the prompt is recomputed
            error = exc
        self._block_loaded(tally, received, error)

    def _block_loaded(self, tally: _Tally, received: int | None, error: Exception | None) -> None:
        with self._lock:
            tally.open -= 1
            if error is not None:
                tally.error = tally.error or _describe(error)
            if received is None:
                tally.missing += 1
            else:
                tally.blocks += 1
                tally.bytes += received
            if tally.open == 0:
                del self._loads[tally.request_id]
                self._received.add(tally.request_id)
                if tally.missing:
                    self._failed.add(tally.request_id)
                self._record(tally)
        self._tell()

    def _receive_and_copy(self, tally: _Tally, block: _Block) -> int | None:
        """Returns the bytes received, or None when the store lacks the block.

        Raises CorruptBlock and UnexpectedValue.
        """
        # One block is missing: the prompt will be recomputed, the others are of no use.
        if tally.missing or tally.cancelled:
            return None
        _keep(block.deadline)
        staging: Staging = self._own.staging
        header: memoryview = self._own.header
        if not self._store.get(block.key, [header, staging.payload], block.deadline):
            return None
        check(header, block.content, staging.payload, self._fingerprint)
        staging.scatter(block.block_id, block.after)
        return len(header) + len(staging.payload)

    def _forget(self, key: str) -> Exception | None:
        try:
            self._store.delete([key])
        except Exception as exc:  # noqa: BLE001 - whatever it is, the load has to end
            return exc
        return None

    # -- reports -------------------------------------------------------------------------------

    def _record(self, tally: _Tally) -> None:
        self._records.append(
            TransferRecord(
                request_id=tally.request_id,
                op=tally.op,
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
            self._to_tell.append(f"KV {tally.op} of {tally.request_id}: {tally.error}")

    def _tell(self) -> None:
        """Log what was noted under the lock, without it: the engine's thread takes it each step."""
        if self._to_tell:
            with self._lock:
                lines, self._to_tell = self._to_tell, []
            for line in lines:
                logger.warning("%s", line)

    def take_results(self, finished_request_ids: set[str]) -> KVConnectorTransferResults:
        """What is done since the last call; each request is reported exactly once."""
        with self._lock:
            for request_id in finished_request_ids:
                if tally := self._loads.get(request_id):
                    tally.cancelled = True
            leaked = self._leaked()
            sent = self._held & self._sent
            self._held -= sent
            self._sent -= sent
            received, self._received = self._received, set()
            failed, self._failed = self._failed, set()
        if leaked:
            logger.warning("%d KV transfers never end: please report this", leaked)
        return KVConnectorTransferResults(sent, received, failed)

    def _leaked(self) -> int:
        """Transfers that are older than any request. Looked for now and then."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return 0
        self._looked_at = now
        tallies = [*self._saves.values(), *self._loads.values()]
        return sum(now - tally.started > _LEAKED_AFTER_S for tally in tallies)

    def leftovers(self) -> dict[str, int]:
        """How much is kept, by kind; nothing when all requests have ended and were reported."""
        with self._lock:
            kept = {
                "saves": self._saves,
                "loads": self._loads,
                "sent": self._sent,
                "held": self._held,
                "received": self._received,
                "failed": self._failed,
            }
            return {name: len(those) for name, those in kept.items() if those}

    def take_stats(self) -> TransferStats | None:
        """The records since the last call."""
        with self._lock:
            records, self._records = self._records, []
        return TransferStats({"records": [asdict(r) for r in records]}) if records else None

    def close(self) -> None:
        """Wait for transfers under way, then close the connections and free the memory."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None  # it has the memory of threads that never started
        self._own = threading.local()
        self._store.close()


def _keep(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise _Late


def _describe(error: Exception) -> str:
    if isinstance(error, _Late):
        return "store: too slow: the deadline passed before all blocks had moved"
    kind = "store" if isinstance(error, StoreError) else "transfer"
    return f"{kind}: {type(error).__name__}: {error}"[:200]
