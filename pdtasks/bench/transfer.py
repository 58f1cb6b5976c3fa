"""How fast do blocks move between an engine's memory and the store?

No engine runs: a cache of the right shape, filled with noise, and the connector's own transfer side
(`pdtasks.kv.transfer`), copies to and from the device and checksums included.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

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


@dataclass(frozen=True)
class Row:
    """One measurement: a prompt's blocks moved as one request."""

    shape: str
    device: str
    op: str  #: ``"put"`` or ``"get"``
    connections: int
    block_bytes: int
    blocks: int
    seconds: float  #: best of the passes
    gb_per_s: float


def run_transfer(
    *, shape: str, device: str, tokens: int, block_tokens: int, connections: list[int], passes: int
) -> Iterator[Row]:
    """Put and get a prompt of `tokens` tokens with each number of connections.

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
    with tempfile.TemporaryDirectory() as folder, ValkeyServer(Path(folder), "kv") as server:
        store = BlockStore([server.url], ttl_s=60)
        operator = valkey.Valkey.from_url(server.operator_url)
        for count in connections:
            with _transfer(server.url, count, BlockPages({"all": cache}, config)) as transfer:
                best: dict[str, float] = {}
                for number in range(passes + 1):
                    cache[blocks:].zero_()
                    handle = _handle(blocks, block_tokens)
                    ours, theirs = list(range(blocks)), list(range(blocks, 2 * blocks))
                    seconds = {
                        "put": _move(transfer, handle, save=ours),
                        "get": _move(transfer, handle, load=theirs),
                    }
                    if not torch.equal(cache[:blocks], cache[blocks:]):
                        raise RuntimeError("bytes came back changed")
                    # A store that runs for long reuses its memory.
                    store.delete(handle.key(index, 0) for index in range(blocks))
                    _wait_until_free(operator)
                    if number:  # the first pass warms up
                        best = {op: min(s, best.get(op, s)) for op, s in seconds.items()}
            for op, s in best.items():
                gb_per_s = blocks * block_bytes / s / 1e9
                yield Row(shape, device, op, count, block_bytes, blocks, s, gb_per_s)
        store.close()


def _wait_until_free(server: valkey.Valkey) -> None:
    """UNLINK frees in the background."""
    while int(cast("dict[str, Any]", server.info("memory"))["lazyfree_pending_objects"]):
        time.sleep(0.001)


@contextmanager
def _transfer(url: str, connections: int, pages: BlockPages) -> Iterator[BlockTransfer]:
    transfer = BlockTransfer(
        BlockStore([url], ttl_s=60),
        fingerprint=FINGERPRINT,
        rank=0,
        world=1,
        num_threads=connections,
        timeout_s=_TIMEOUT_S,
    )
    transfer.attach(pages)
    try:
        yield transfer
    finally:
        transfer.close()


def _handle(blocks: int, block_tokens: int) -> KVHandle:
    return KVHandle(
        fingerprint=FINGERPRINT,
        transfer_id="bench",
        num_tokens=blocks * block_tokens,
        block_size=block_tokens,
        hashes=tuple(secrets.token_bytes(32) for _ in range(blocks)),
    )


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
            BlockSave(request_id="bench", handle=handle, first=0, block_ids=save, last=True)
        )
    if load is not None:
        plan.loads.append(BlockLoad(request_id="bench", handle=handle, first=0, block_ids=load))
    started = time.perf_counter()
    transfer.start_saves(plan)
    transfer.start_loads(plan)
    while (stats := transfer.take_stats()) is None:
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
