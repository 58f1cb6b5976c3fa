"""How do blocks lie in vLLM's paged cache, and how do they get from there to host memory?

vLLM 0.32 keeps the caches of all layers in a few storages and says in `KVCacheTensor` how block
and layer follow each other there.  Seen as bytes each storage is `[regions, num_blocks,
region_bytes]`, whatever the layout: one region for each layer when the layer is outermost, one for
all layers when the block is.  Block *b* is the concatenation of row *b* of every region.

Theory of operation on CUDA
---------------------------
Kernels of the forward pass run on vLLM's own stream, later than Python says so.  `mark` records a
point there; a `Copier` reads on a stream of its own after that point, into pinned memory, and
returns when the copy is done.  vLLM's stream never waits for it.

Blocks that are to be written need no such point: vLLM 0.32 gives an engine that may load KV only
blocks that no step under way still touches (`Scheduler.defer_block_free`).
"""

from __future__ import annotations

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

#: A point in the engine's work; None on CPU, where work is done when Python says so.
Mark = torch.cuda.Event | None


class BlockPages:
    """Byte view of one rank's cache."""

    def __init__(self, caches: dict[str, torch.Tensor], config: KVCacheConfig) -> None:
        """Args:
        caches: layer name to cache tensor, engine dtype, on the engine's device.
        config: vLLM's description of the storages behind them.
        """
        num_blocks = config.num_blocks
        self.regions: list[torch.Tensor] = []  # each (num_blocks, region_bytes), int8
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
                    self.regions.append(region)
        self.block_bytes = sum(region.shape[1] for region in self.regions)
        self.device = self.regions[0].device

    def mark(self) -> Mark:
        """The point up to which the engine's work is queued now. Called in the engine's thread."""
        if self.device.type != "cuda":
            return None
        # Blocking: whoever waits for it sleeps; a prompt may take 100 ms to compute.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class Copier:
    """Copies between blocks of the cache and host memory. For one thread.

    On CUDA copies use a stream of their own; they are fast where the host memory is pinned.
    """

    def __init__(self, pages: BlockPages) -> None:
        self._pages = pages
        cuda = pages.device.type == "cuda"
        self._stream = torch.cuda.Stream(pages.device) if cuda else None

    def gather(self, block_id: int, after: Mark, payload: memoryview) -> None:
        """Copy block `block_id`, complete at `after`, into `payload`: all regions, one by one."""
        if after is not None:
            after.synchronize()
        self._copy(block_id, payload, out_of_cache=True)

    def scatter(self, block_id: int, payload: memoryview) -> None:
        """Copy `payload` over block `block_id`, which nobody uses."""
        self._copy(block_id, payload, out_of_cache=False)

    def _copy(self, block_id: int, payload: memoryview, *, out_of_cache: bool) -> None:
        buffer = torch.frombuffer(payload, dtype=torch.int8)
        with torch.cuda.stream(self._stream):  # does nothing where there is none
            offset = 0
            for region in self._pages.regions:
                row = region[block_id]
                part = buffer[offset : offset + row.numel()]
                offset += row.numel()
                if out_of_cache:
                    part.copy_(row, non_blocking=True)
                else:
                    row.copy_(part, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()


class Staging:
    """Host memory for one block, pinned on CUDA."""

    def __init__(self, pages: BlockPages) -> None:
        cuda = pages.device.type == "cuda"
        self._buffer = torch.empty(pages.block_bytes, dtype=torch.int8, pin_memory=cuda)
        #: The block's bytes, all regions one after the other.
        self.payload = memoryview(self._buffer.numpy().data).cast("B")


def block_bytes(config: KVCacheConfig) -> int:
    """Bytes of one block of one rank, from the description alone."""
    total = 0
    for spec in config.kv_cache_tensors:
        layer_bytes = config.num_blocks * spec.block_stride
        layers = len(spec.layers) if spec.layer_stride >= layer_bytes else 1
        total += layers * spec.block_stride
    return total
