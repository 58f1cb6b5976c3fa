"""vLLM's worker around the transfer, for tests: a small engine side and the plans it gets."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from pdtasks.kv.codec import HEADER_BYTES, check
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.pages import BlockPages
from pdtasks.kv.plan import BlockLoad, BlockSave, Join, TransferPlan
from pdtasks.kv.transfer import BlockTransfer
from tests.unit.kv.doubles import MemoryStore
from tests.waiting import wait_until

# `vllm` is part of this file's name on purpose: tests/unit/conftest.py imports vLLM early for those
# test modules that name it.

FP = "0123456789abcdef"
NUM_BLOCKS = 8
NUM_THREADS = 2
PAGE = 32
BLOCK_BYTES = 2 * PAGE
WIRE_BYTES = HEADER_BYTES + BLOCK_BYTES
SLOT_BYTES = 4096  # a page


class Side:
    """One engine's transfer side over a small cache on the CPU."""

    def __init__(
        self,
        store: MemoryStore,
        *,
        fingerprint: str = FP,
        world: int = 1,
        num_threads: int = NUM_THREADS,
        timeout_s: float = 10.0,
        ring_slots: int = 0,
        soon_blocks: int = 8,
        num_blocks: int = NUM_BLOCKS,
        gpu_to_gpu: bool = True,
    ) -> None:
        """Args:
        ring_slots: blocks for which its ring has room; 0: it has none.
        soon_blocks: see `Loads`.
        num_blocks: of its cache.
        gpu_to_gpu: see `BlockTransfer`; on a CPU there is none, unless a test makes one.
        """
        tensor = KVCacheTensor(
            size=num_blocks * BLOCK_BYTES,
            layers=["a", "b"],
            layer_stride=PAGE,
            block_stride=BLOCK_BYTES,
        )
        config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[tensor], kv_cache_groups=[])
        self.cache = torch.zeros(num_blocks, BLOCK_BYTES, dtype=torch.uint8)
        self.pages: Any = BlockPages({"a": self.cache, "b": self.cache}, config)
        self.transfer = BlockTransfer(
            store,  # type: ignore[arg-type]  # a double
            fingerprint=fingerprint,
            rank=0,
            world=world,
            num_threads=num_threads,
            timeout_s=timeout_s,
            engine_id=f"test-{uuid.uuid4().hex}",
            ring_bytes=ring_slots * SLOT_BYTES,
            gpu_to_gpu=gpu_to_gpu,
            soon_bytes=soon_blocks * BLOCK_BYTES,
        )
        self.ring = self.transfer.engine_id if ring_slots else None
        self._next_number = 0
        self.transfer.attach(self.pages)
        self.records: list[dict[str, Any]] = []
        self.unsent = 0
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

        self.numbers: dict[str, list[tuple[int, int]]] = {}
        self._begun: set[str] = set()
        self._ended: set[str] = set()

    def step(self, plan: TransferPlan | None = None, finished: set[str] | None = None) -> None:
        """What vLLM's model runner does with the connector in each step, in its order."""
        plan = plan or TransferPlan()
        if self.ring is not None:
            plan.saves = [self._numbered(save) for save in plan.saves]
        self._begun |= {save.request_id for save in plan.saves}
        self._ended |= set(plan.finished)
        self.transfer.before_step(plan)
        self.transfer.start_loads(plan)
        self.transfer.start_saves(plan)
        results: KVConnectorTransferResults = self.transfer.take_results(finished or set())
        self.sent.update(results.finished_sending)
        self.received.update(results.finished_recving)
        self.failed.update(results.failed_recving)
        if (stats := self.transfer.take_stats()) is not None:
            self.records += stats.data["records"]
            self.unsent += stats.data["unsent"]

    def _numbered(self, save: BlockSave) -> BlockSave:
        """As the scheduler numbers blocks for the ring."""
        number = self._next_number
        self._next_number += len(save.block_ids)
        self.numbers.setdefault(save.request_id, []).append((number, len(save.block_ids)))
        return replace(save, numbered_from=number)

    def handed_over(self, handle: KVHandle, request_id: str = "p") -> KVHandle:
        """`handle` as it leaves with the hand-over of a request that was saved here."""
        return msgspec.structs.replace(
            handle,
            ring=self.ring,
            numbers=tuple(self.numbers[request_id]),
            made_at=time.time(),
        )

    def finish(self, **wanted: bool) -> None:
        """A step after these requests have ended."""
        self.step(TransferPlan(finished=wanted), finished=set(wanted))

    def end(self) -> None:
        """When all requests have ended, nothing is kept of any."""
        self.finish(**dict.fromkeys(self._begun - self._ended, False))
        self.step_until(lambda: not self.transfer.leftovers())

    def step_until(self, condition: Callable[[], Any]) -> None:
        def stepped() -> Any:
            self.step()
            return condition()

        wait_until(lambda: condition() or stepped(), what="the transfer's end")

    def steps(self, count: int = 3) -> None:
        """Some steps, in which a report that comes twice would be seen."""
        for _ in range(count):
            self.step()


def fill(side: Side, seed: int = 0) -> None:
    """As if the engine had computed something."""
    side.cache.copy_((torch.arange(side.cache.numel()) + seed).view_as(side.cache) % 251)


def a_handle(
    num_blocks: int = 3, tail: bool = True, name: str = "t", tail_digest: str = "digest"
) -> KVHandle:
    """The handle of a prompt of `num_blocks` blocks, the last one partial or not."""
    num_full = num_blocks - tail
    return KVHandle(
        fingerprint=FP,
        transfer_id=name,
        num_tokens=num_full * 16 + (5 if tail else 0),
        block_size=16,
        hashes=tuple(f"{name}{i}".encode() for i in range(num_full)),
        tail_digest=tail_digest,
        expires_at=time.time() + 60,
    )


def a_save(
    handle: KVHandle, ids: list[int], *, first: int = 0, last: bool = True, request_id: str = "p"
) -> TransferPlan:
    """A step's plan that saves the blocks `ids` of one request."""
    return TransferPlan(
        saves=[
            BlockSave(request_id=request_id, handle=handle, first=first, block_ids=ids, last=last)
        ]
    )


def a_load(
    handle: KVHandle, ids: list[int], *, first: int = 0, join: Join = Join.THERE
) -> TransferPlan:
    """A step's plan that loads the blocks of a prompt into `ids`."""
    return TransferPlan(
        loads=[BlockLoad(request_id="d", handle=handle, first=first, block_ids=ids, join=join)]
    )


def payload_of(store: MemoryStore, key: str) -> list[int]:
    """What is stored under `key`, which is intact."""
    value = memoryview(store.values[key])
    content = f"{key}:digest" if key.startswith("pd:kv:tail:") else key
    check(value[:HEADER_BYTES], content, value[HEADER_BYTES:], FP)
    return list(value[HEADER_BYTES:])
