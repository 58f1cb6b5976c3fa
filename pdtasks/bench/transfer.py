"""How fast do blocks move between an engine's memory, shared memory and the store?

No engine runs: a cache of the right shape, filled with noise, and the connector's own transfer side
(`pdtasks.kv.transfer`), copies to and from the device and checksums included.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
import valkey
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from pdtasks.bench.shapes import SHAPES
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.pages import BlockPages
from pdtasks.kv.plan import BlockLoad, BlockSave, TransferPlan
from pdtasks.kv.store import BlockStore
from pdtasks.kv.transfer import BlockTransfer

FINGERPRINT = "0" * 16
_TIMEOUT_S = 120.0


#: What is measured, in the order of the rows.
OPS = ("put fresh", "put", "get", "into ring", "out of ring")


@dataclass(frozen=True)
class Row:
    """One measurement: a prompt's blocks moved as one request."""

    shape: str
    device: str
    #: Of `OPS`: into memory that the store has not touched before, into used memory, out of it;
    #: into and out of shared memory.
    op: str
    connections: int
    block_bytes: int
    blocks: int
    seconds: float  #: median of the passes
    best_seconds: float
    worst_seconds: float
    gb_per_s: float  #: of the median


def run_transfer(
    *, shape: str, device: str, tokens: int, block_tokens: int, connections: list[int], passes: int
) -> Iterator[Row]:
    """Move a prompt of `tokens` tokens with each number of connections.

    Raises RuntimeError when bytes come back changed.
    """
    block_bytes = SHAPES[shape].kv_bytes_per_token * block_tokens
    blocks = -(-tokens // block_tokens)
    config = KVCacheConfig(
        num_blocks=2 * blocks,  # the first half is sent, the second received into
        kv_cache_tensors=[
            KVCacheTensor(
                size=2 * blocks * block_bytes,
                layers=["all"],
                layer_stride=block_bytes,
                block_stride=block_bytes,
            )
        ],
        kv_cache_groups=[],
    )
    cache = torch.zeros(2 * blocks, block_bytes, dtype=torch.int8, device=device)
    cache[:blocks].random_(-128, 127)
    bench = _Bench(cache, BlockPages({"all": cache}, config), blocks, block_tokens)
    for count in connections:
        samples: dict[str, list[float]] = {op: [] for op in OPS}
        for _ in range(passes):
            with _server() as server, bench.transfer(server.url, count) as transfer:
                samples["put fresh"].append(bench.pass_through_store(transfer, server)["put"])
        with _server() as server, bench.transfer(server.url, count) as transfer:
            for number in range(passes + 1):
                seconds = bench.pass_through_store(transfer, server)
                if number:  # the first pass touches the memory
                    samples["put"].append(seconds["put"])
                    samples["get"].append(seconds["get"])
        with _server() as server, bench.transfer(server.url, count, ring=True) as transfer:
            for number in range(passes + 1):
                seconds = bench.pass_through_ring(transfer)
                if number:
                    samples["into ring"].append(seconds["put"])
                    samples["out of ring"].append(seconds["get"])
        for op, taken in samples.items():
            median = statistics.median(taken)
            yield Row(
                shape=shape,
                device=device,
                op=op,
                connections=count,
                block_bytes=block_bytes,
                blocks=blocks,
                seconds=median,
                best_seconds=min(taken),
                worst_seconds=max(taken),
                gb_per_s=blocks * block_bytes / median / 1e9,
            )


class _Bench:
    """A cache whose first half is moved into its second."""

    def __init__(
        self, cache: torch.Tensor, pages: BlockPages, blocks: int, block_tokens: int
    ) -> None:
        self._cache = cache
        self._pages = pages
        self._blocks = blocks
        self._block_tokens = block_tokens
        self._next_number = 0

    @contextmanager
    def transfer(
        self, url: str, connections: int, *, ring: bool = False
    ) -> Iterator[BlockTransfer]:
        """The connector's transfer side over the cache."""
        self._next_number = 0
        ring_bytes = 2 * self._blocks * (self._pages.block_bytes + 4096) if ring else 0
        transfer = BlockTransfer(
            BlockStore([url], ttl_s=60),
            fingerprint=FINGERPRINT,
            rank=0,
            world=1,
            num_threads=connections,
            timeout_s=_TIMEOUT_S,
            engine_id=f"bench-{secrets.token_hex(8)}",
            ring_bytes=ring_bytes,
        )
        transfer.attach(self._pages)
        try:
            yield transfer
        finally:
            transfer.close()

    def pass_through_store(self, transfer: BlockTransfer, server: ValkeyServer) -> dict[str, float]:
        """Seconds for put and get."""
        seconds, handle = self._pass(transfer, self._handle())
        # A store that runs for long reuses its memory.
        store = BlockStore([server.url], ttl_s=60)
        store.delete(handle.key(index, 0) for index in range(self._blocks))
        store.close()
        with valkey.Valkey.from_url(server.operator_url) as operator:
            _wait_until_free(operator)
        return seconds

    def pass_through_ring(self, transfer: BlockTransfer) -> dict[str, float]:
        """Seconds until others can read it, and for reading."""
        numbers = (self._next_number, self._blocks)
        self._next_number += self._blocks
        handle = msgspec.structs.replace(
            self._handle(), ring=transfer.engine_id, numbers=(numbers,)
        )
        return self._pass(transfer, handle)[0]

    def _pass(self, transfer: BlockTransfer, handle: KVHandle) -> tuple[dict[str, float], KVHandle]:
        blocks = self._blocks
        self._cache[blocks:].zero_()
        ours, theirs = list(range(blocks)), list(range(blocks, 2 * blocks))
        seconds = {
            "put": _move(transfer, handle, save=ours),
            "get": _move(transfer, handle, load=theirs),
        }
        if not torch.equal(self._cache[:blocks], self._cache[blocks:]):
            raise RuntimeError("bytes came back changed")
        return seconds, handle

    def _handle(self) -> KVHandle:
        return KVHandle(
            fingerprint=FINGERPRINT,
            transfer_id="bench",
            num_tokens=self._blocks * self._block_tokens,
            block_size=self._block_tokens,
            hashes=tuple(secrets.token_bytes(32) for _ in range(self._blocks)),
        )


@contextmanager
def _server() -> Iterator[ValkeyServer]:
    """A kv server that has touched no memory yet."""
    with tempfile.TemporaryDirectory() as folder, ValkeyServer(Path(folder), "kv") as server:
        yield server


def _wait_until_free(server: valkey.Valkey) -> None:
    """UNLINK frees in the background."""
    while int(cast("dict[str, Any]", server.info("memory"))["lazyfree_pending_objects"]):
        time.sleep(0.001)


def _move(
    transfer: BlockTransfer,
    handle: KVHandle,
    *,
    save: list[int] | None = None,
    load: list[int] | None = None,
) -> float:
    """Seconds until the request's record says that all blocks have moved."""
    plan = TransferPlan()
    if save is not None:
        plan.saves.append(
            BlockSave(
                request_id="bench",
                handle=handle,
                first=0,
                block_ids=save,
                last=True,
                numbered_from=handle.number(0),
            )
        )
    if load is not None:
        plan.loads.append(BlockLoad(request_id="bench", handle=handle, first=0, block_ids=load))
    started = time.perf_counter()
    transfer.start_saves(plan)
    transfer.start_loads(plan)
    while (stats := transfer.take_stats()) is None or not stats.data["records"]:
        if time.perf_counter() - started > _TIMEOUT_S:
            raise RuntimeError("the transfer never came to its end")
        time.sleep(0.0002)
    seconds = time.perf_counter() - started
    (record,) = stats.data["records"]
    if record["error"] or record["missing"]:
        raise RuntimeError(f"the transfer failed: {record}")
    transfer.take_results(set())
    return seconds


def to_json(rows: list[Row]) -> list[dict[str, object]]:
    """For `--json`."""
    return [asdict(row) for row in rows]
