"""How do blocks lie in vLLM's paged cache?

vLLM 0.32 keeps the caches of all layers in a few storages and says in `KVCacheTensor` how block
and layer follow each other there.  Seen as bytes each storage is `[regions, num_blocks,
region_bytes]`, whatever the layout: one region for each layer when the layer is outermost, one for
all layers when the block is.  Block *b* is the concatenation of row *b* of every region.
"""

from __future__ import annotations

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig


class BlockPages:
    """Byte view of one rank's cache. Not thread safe for the same block; blocks are independent."""

    def __init__(self, caches: dict[str, torch.Tensor], config: KVCacheConfig) -> None:
        """Args:
        caches: layer name to cache tensor, engine dtype, on the engine's device.
        config: vLLM's description of the storages behind them.
        """
        num_blocks = config.num_blocks
        self._regions: list[torch.Tensor] = []  # each (num_blocks, region_bytes), int8
        seen: set[int] = set()
        for spec in config.kv_cache_tensors:
            cache = caches[next(name for name in spec.layers if name in caches)]
            storage = torch.empty(0, dtype=torch.int8, device=cache.device)
            storage.set_(cache.untyped_storage())
            layer_bytes = num_blocks * spec.block_stride
            start, span = 0, layer_bytes
            if spec.layer_stride >= layer_bytes:  # layer outermost: one region for each layer
                start, span = spec.offset, len(spec.layers) * spec.layer_stride
            for region in storage[start : start + span].view(-1, num_blocks, spec.block_stride):
                # Layers that share a cache appear twice; their bytes travel once.
                if region.data_ptr() not in seen:
                    seen.add(region.data_ptr())
                    self._regions.append(region)
        self.block_bytes = sum(region.shape[1] for region in self._regions)

    def gather(self, block_id: int, into: torch.Tensor) -> None:
        """Copy block `block_id` into `into`, shape (block_bytes,), int8, host memory."""
        offset = 0
        for region in self._regions:
            size = region.shape[1]
            into[offset : offset + size].copy_(region[block_id])
            offset += size

    def scatter(self, block_id: int, source: torch.Tensor) -> None:
        """Copy `source`, shape (block_bytes,), int8, host memory, over block `block_id`."""
        offset = 0
        for region in self._regions:
            size = region.shape[1]
            region[block_id].copy_(source[offset : offset + size])
            offset += size


def block_bytes(config: KVCacheConfig) -> int:
    """Bytes of one block of one rank, from the description alone."""
    total = 0
    for spec in config.kv_cache_tensors:
        layer_bytes = config.num_blocks * spec.block_stride
        layers = len(spec.layers) if spec.layer_stride >= layer_bytes else 1
        total += layers * spec.block_stride
    return total
