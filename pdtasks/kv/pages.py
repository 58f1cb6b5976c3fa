"""How do blocks lie in vLLM's paged cache, and how do they get from there to host memory?

vLLM 0.32 keeps the caches of all layers in a few storages and says in `KVCacheTensor` how block
and layer follow each other there.  Seen as bytes each storage is `[regions, num_blocks,
region_bytes]`, whatever the layout: one region for each layer when the layer is outermost, one for
all layers when the block is.  Block *b* is the concatenation of row *b* of every region.

Theory of operation on CUDA
---------------------------
Kernels of the forward pass run on vLLM's own stream, later than Python says so.  `mark` records a
point there; a `Copier` reads on a stream of its own after that point, into pinned memory, and
returns when the copy is done.  vLLM's stream never waits for it.  A block is read in `parts`, each
as soon as the layers that write it are computed (`marks`).

Many blocks are one call into vLLM, of its offloading to host memory, not one copy each: between two
copies a thread needs Python's lock, which the engine's thread gives away at each operation on a
tensor and waits for then.  With eight threads that copied, an engine step of 6 ms took 24 to 34.

From the host into the cache a kernel copies, before other kernels: the engine's own small copies
into the GPU do not stand behind ours.  Out of it, and from GPU to GPU, the copy engine does: a
kernel would wait for the next prompt's, which leave it no room.

Blocks that are to be written need no such point: vLLM 0.32 gives an engine that may load KV only
blocks that no step under way still touches (`Scheduler.defer_block_free`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.kv_cache_interface import KVCacheConfig

from pdtasks.kv.marks import Mark, Marks, Part

#: Numbers of blocks, each with its bytes in host memory.
Blocks = Sequence[tuple[int, memoryview]]

#: Numbers of blocks, each with an address for its bytes.
Addresses = Sequence[tuple[int, int]]

#: Numbers of blocks here, each with its number in another engine's cache.
Places = Sequence[tuple[int, int]]

#: Of streams whose kernels run before vLLM's.
_FIRST = -1
#: Bytes that one program of the kernel copies before it takes others, and at once.
_PIECE_BYTES = 1 << 20
_CHUNK_BYTES = 16384
#: Below so many pieces vLLM's kernel is none.
_MIN_PIECES = 16
#: Parts of a block that leave one after the other on CUDA, at most.
_PARTS = 8
#: Bytes that leave the cache in one call: 1 to 2 ms on a GPU's link, in which the engine's own
#: small copies wait.
_CALL_BYTES = 64 << 20


class BlockPages:
    """Byte view of one rank's cache."""

    def __init__(self, caches: dict[str, torch.Tensor], config: KVCacheConfig) -> None:
        """Args:
        caches: layer name to cache tensor, engine dtype, on the engine's device.
        config: vLLM's description of the storages behind them.
        """
        num_blocks = config.num_blocks
        self.regions: list[torch.Tensor] = []  # each (num_blocks, region_bytes), int8
        offsets: dict[int, int] = {}  # of regions in a block, by address
        writers: dict[int, set[str]] = {}  # layers, by the place in a block at which theirs begins
        for spec in config.kv_cache_tensors:
            cache = caches[next(name for name in spec.layers if name in caches)]
            storage = torch.empty(0, dtype=torch.int8, device=cache.device)
            storage.set_(cache.untyped_storage())
            layer_bytes = num_blocks * spec.block_stride
            start, span = 0, layer_bytes
            layer_outermost = spec.layer_stride >= layer_bytes
            if layer_outermost:  # one region for each layer
                start, span = spec.offset, len(spec.layers) * spec.layer_stride
            places = []
            for region in storage[start : start + span].view(-1, num_blocks, spec.block_stride):
                # Layers that share a cache appear twice; their bytes travel once.
                if region.data_ptr() not in offsets:
                    offsets[region.data_ptr()] = sum(other.shape[1] for other in self.regions)
                    self.regions.append(region)
                places.append(offsets[region.data_ptr()])
            for index, layer in enumerate(spec.layers):
                in_row = spec.offset + index * spec.layer_stride
                place = places[index] if layer_outermost else places[0] + in_row
                writers.setdefault(place, set()).add(layer)
        #: Does vLLM clear blocks before it says that it writes them?
        self.is_cleared = config.needs_kv_cache_zeroing
        self.block_bytes = sum(region.shape[1] for region in self.regions)
        self.device = self.regions[0].device
        #: What of a block is complete sooner than the rest.
        self.parts: Sequence[Part] = parts_of(writers, self.block_bytes, num_parts_on(self.device))

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

    On CUDA copies use a stream of their own.
    """

    def __init__(self, pages: BlockPages, many: ManyCopies | None = None) -> None:
        """`many`: copies pinned blocks; None: one after the other."""
        self._pages = pages
        self._many = many
        self._stream: torch.cuda.Stream | None = None
        if pages.device.type == "cuda":
            self._stream = torch.cuda.Stream(pages.device, priority=_FIRST)

    def gather(self, blocks: Blocks, after: Marks, *, pinned: bool) -> None:
        """Copy blocks into their payloads, all regions, one by one; parts when they are complete.

        `pinned`: CUDA knows the payloads' memory.
        """
        for part, mark in after:
            if mark is not None:
                mark.synchronize()
            at_once = max(1, _CALL_BYTES // (part.end - part.begin))
            for begin in range(0, len(blocks), at_once):
                self._copy(blocks[begin : begin + at_once], part, pinned, out_of_cache=True)

    def scatter(self, blocks: Blocks, *, pinned: bool) -> None:
        """Copy payloads over their blocks, which nobody uses."""
        whole = Part(0, self._pages.block_bytes)
        self._copy(blocks, whole, pinned, out_of_cache=False)

    def scatter_from_peer(self, blocks: Places, peer: NDArray[np.int64]) -> None:
        """Copy blocks of another engine's cache over ours, which nobody uses.

        `peer`: where its regions lie (`PeerCache.use`), as many and as wide as here.
        """
        assert self._many is not None
        with torch.cuda.stream(self._stream):
            self._many.copy_from_peer(blocks, peer)
        self._wait()

    def _copy(self, blocks: Blocks, part: Part, pinned: bool, *, out_of_cache: bool) -> None:
        with torch.cuda.stream(self._stream):  # does nothing where there is none
            if pinned and self._many is not None:
                self._many.copy(blocks, part, out_of_cache=out_of_cache)
            else:
                for block_id, payload in blocks:
                    self._copy_one(block_id, payload, part, out_of_cache=out_of_cache)
        self._wait()

    def _wait(self) -> None:
        if self._stream is not None:
            # Sleeps, and lets others run.
            event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
            event.synchronize()

    def _copy_one(
        self, block_id: int, payload: memoryview, part: Part, *, out_of_cache: bool
    ) -> None:
        buffer = torch.frombuffer(payload, dtype=torch.int8)
        for region, offset, begin, end in slices_of(self._pages.regions, part):
            in_cache = region[block_id][begin:end]
            in_host = buffer[offset + begin : offset + end]
            if out_of_cache:
                in_host.copy_(in_cache, non_blocking=True)
            else:
                in_cache.copy_(in_host, non_blocking=True)


#: Copies so many bytes from each of these addresses to those: all int64, of one shape.
Swap = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class ManyCopies:
    """Copies many blocks at once, by their addresses. For any thread."""

    def __init__(self, pages: BlockPages, *, into_cache: Swap, out_of_cache: Swap) -> None:
        self._into_cache = into_cache
        self._out_of_cache = out_of_cache
        whole = Part(0, pages.block_bytes)
        self._pieces = {
            (part.begin, part.end): pieces_of(pages.regions, part) for part in (whole, *pages.parts)
        }
        # The copy engine takes a piece of any size.
        self._rows = {
            (part.begin, part.end): pieces_of(pages.regions, part, pages.block_bytes)
            for part in (whole, *pages.parts)
        }
        self._regions = self._rows[whole.begin, whole.end]

    @staticmethod
    def can_copy(pages: BlockPages) -> bool:
        """Are these blocks, and this device, for vLLM's functions?"""
        return pages.device.type == "cuda" and not any(r.shape[1] % 8 for r in pages.regions)

    @classmethod
    def of_vllm(cls, pages: BlockPages) -> ManyCopies | None:
        """With vLLM's functions for CUDA; None: these blocks, or this device, are not for them."""
        if not cls.can_copy(pages):
            return None
        from vllm import _custom_ops
        from vllm.v1.kv_offload.cpu.swap_blocks_triton import swap_blocks_batch

        kernel: Swap = partial(swap_blocks_batch, bytes_per_chunk=_CHUNK_BYTES)
        # Compiled now, with nothing to copy: the first hand-over would wait two seconds for it.
        # (Triton makes another kernel where the number of pieces is a multiple of 16.)
        for num_pieces in (_MIN_PIECES, _MIN_PIECES + 1):
            nothing = torch.zeros(num_pieces, dtype=torch.int64)
            kernel(nothing, nothing, nothing)
        return cls(pages, into_cache=kernel, out_of_cache=_custom_ops.swap_blocks_batch)

    def copy(self, blocks: Blocks, part: Part, *, out_of_cache: bool) -> None:
        """Have this part of `blocks` copied, on CUDA on the current stream."""
        pieces = (self._rows if out_of_cache else self._pieces)[part.begin, part.end]
        addresses = [(block_id, _address(payload)) for block_id, payload in blocks]
        cache, host, sizes = _tables(addresses, pieces)
        if out_of_cache:
            self._out_of_cache(cache, host, sizes)
        else:
            self._into_cache(host, cache, sizes)

    def copy_from_peer(self, blocks: Places, peer: NDArray[np.int64]) -> None:
        """Have `blocks` copied from another engine's cache, by the copy engine."""
        begin, stride, _, size = self._regions
        ours, theirs = np.array(blocks, dtype=np.int64).T[:, :, np.newaxis]
        sizes = np.broadcast_to(size, (len(blocks), len(size)))
        source = _table(peer[0] + theirs * peer[1])
        self._out_of_cache(source, _table(begin + ours * stride), _table(sizes))


def num_parts_on(device: torch.device) -> int:
    """On a CPU a step's work is done when the copies begin."""
    return _PARTS if device.type == "cuda" else 1


def parts_of(
    writers: Mapping[int, Collection[str]], block_bytes: int, num_parts: int
) -> list[Part]:
    """A block in `num_parts` parts or fewer, of about as many bytes, each of whole layers.

    `writers`: the layers whose bytes begin there, for each place in a block.
    """
    parts: list[Part] = []
    begin, layers = 0, set[str]()
    for place in sorted(writers):
        if layers and place * num_parts >= block_bytes * (len(parts) + 1):
            parts.append(Part(begin, place, frozenset(layers)))
            begin, layers = place, set()
        layers.update(writers[place])
    return [*parts, Part(begin, block_bytes, frozenset(layers))]


def slices_of(
    regions: Sequence[torch.Tensor], part: Part
) -> Iterator[tuple[torch.Tensor, int, int, int]]:
    """Where `part` lies: region, its place in the payload, `[begin, end)` of its rows."""
    offset = 0
    for region in regions:
        width = region.shape[1]
        begin, end = max(part.begin - offset, 0), min(part.end - offset, width)
        if begin < end:
            yield region, offset, begin, end
        offset += width


def pieces_of(
    regions: Sequence[torch.Tensor], part: Part, piece_bytes: int | None = None
) -> NDArray[np.int64]:
    """The pieces, of at most `piece_bytes`, in which a block's `part` is copied.

    Returns int64 of shape (4, pieces): address in block 0, bytes from one block to the next, offset
    in the payload, bytes.
    """
    pieces = []
    most = piece_bytes or _PIECE_BYTES
    for region, offset, first, last in slices_of(regions, part):
        for begin in range(first, last, most):
            size = min(most, last - begin)
            pieces.append((region.data_ptr() + begin, region.stride(0), offset + begin, size))
    return np.array(pieces, dtype=np.int64).T


def _tables(
    blocks: Addresses, pieces: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Addresses in the cache and outside of it, and bytes, of all pieces of `blocks`."""
    begin, stride, offset, size = pieces
    ids = np.array([[block_id] for block_id, _ in blocks], dtype=np.int64)
    outside = np.array([[address] for _, address in blocks], dtype=np.int64)
    sizes = np.broadcast_to(size, (len(blocks), len(size)))
    return _table(begin + ids * stride), _table(outside + offset), _table(sizes)


def _table(values: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(values.reshape(-1).copy())


def _address(payload: memoryview) -> int:
    return int(torch.frombuffer(payload, dtype=torch.int8).data_ptr())


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
