"""How do blocks lie in vLLM's paged cache?"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from pdtasks.kv import pages as pages_module
from pdtasks.kv.pages import BlockPages, Copier, ManyCopies, Mark, Staging, block_bytes

PAGE = 24  # bytes of one layer's part of a block
NUM_BLOCKS = 5
LAYERS = ("layer.0", "layer.1", "layer.2")


def layer_outermost(layers: Sequence[str] = LAYERS) -> tuple[KVCacheConfig, torch.Tensor]:
    """Each layer has a region of its own."""
    tensor = KVCacheTensor(
        size=len(layers) * NUM_BLOCKS * PAGE,
        layers=list(layers),
        layer_stride=NUM_BLOCKS * PAGE,
        block_stride=PAGE,
    )
    return config_of([tensor]), storage_of(tensor.size)


def block_outermost(layers: Sequence[str] = LAYERS) -> tuple[KVCacheConfig, torch.Tensor]:
    """Each block holds the pages of all layers."""
    tensor = KVCacheTensor(
        size=len(layers) * NUM_BLOCKS * PAGE,
        layers=list(layers),
        layer_stride=PAGE,
        block_stride=len(layers) * PAGE,
    )
    return config_of([tensor]), storage_of(tensor.size)


def config_of(tensors: list[KVCacheTensor]) -> KVCacheConfig:
    return KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=tensors, kv_cache_groups=[])


def storage_of(size: int) -> torch.Tensor:
    return (torch.arange(size) % 251).to(torch.uint8)


def caches(config: KVCacheConfig, storage: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each layer's view, as vLLM makes it from a `KVCacheTensor`: bfloat16, strided."""
    views = {}
    for spec in config.kv_cache_tensors:
        for index, name in enumerate(spec.layers):
            views[name] = torch.as_strided(
                storage.view(torch.bfloat16),
                (NUM_BLOCKS, PAGE // 2),
                (spec.block_stride // 2, 1),
                (spec.offset + index * spec.layer_stride) // 2,
            )
    return views


def gathered(pages: BlockPages, block_id: int) -> torch.Tensor:
    """The bytes of a block as they leave."""
    staging = Staging(pages)
    Copier(pages).gather([(block_id, staging.payload)], pages.mark(), pinned=True)
    return torch.tensor(list(staging.payload), dtype=torch.uint8)


def pages_of(views: dict[str, torch.Tensor], names: Sequence[str], block_id: int) -> torch.Tensor:
    """What these bytes should be."""
    return torch.cat([views[name][block_id].view(torch.uint8) for name in names])


@pytest.fixture(params=[layer_outermost, block_outermost])
def cache(request: pytest.FixtureRequest) -> tuple[KVCacheConfig, torch.Tensor]:
    made: tuple[KVCacheConfig, torch.Tensor] = request.param()
    return made


def test_a_block_is_the_pages_of_all_its_layers(cache: tuple[KVCacheConfig, torch.Tensor]) -> None:
    config, storage = cache
    views = caches(config, storage)
    pages = BlockPages(views, config)
    assert pages.block_bytes == block_bytes(config) == len(LAYERS) * PAGE

    assert torch.equal(gathered(pages, 3), pages_of(views, LAYERS, 3))


def test_the_regions_are_views_of_the_cache(cache: tuple[KVCacheConfig, torch.Tensor]) -> None:
    config, storage = cache
    pages = BlockPages(caches(config, storage), config)

    storage.zero_()

    assert all(region.shape[0] == NUM_BLOCKS for region in pages.regions)
    assert sum(region.numel() for region in pages.regions) == storage.numel()
    assert not any(region.any() for region in pages.regions)


def test_a_block_moves_to_another_engine_and_nothing_else_changes(
    cache: tuple[KVCacheConfig, torch.Tensor],
) -> None:
    config, storage = cache
    source = caches(config, storage)
    target_storage = torch.full_like(storage, 255)
    target = caches(config, target_storage)
    writer, reader = BlockPages(source, config), BlockPages(target, config)

    sent, received = Staging(writer), Staging(reader)
    Copier(writer).gather([(1, sent.payload)], writer.mark(), pinned=True)
    received.payload[:] = sent.payload
    Copier(reader).scatter(
        [(4, received.payload)], pinned=True
    )  # another engine has other free blocks

    for name in LAYERS:
        assert torch.equal(target[name][4].view(torch.int8), source[name][1].view(torch.int8))
        others = target[name][[0, 1, 2, 3]].view(torch.uint8)
        assert bool((others == 255).all()), f"{name}: a neighbour was overwritten"


def test_both_layouts_of_the_same_cache_make_the_same_bytes() -> None:
    blocks = []
    for config, storage in (layer_outermost(), block_outermost()):
        views = caches(config, storage)
        for index, name in enumerate(LAYERS):
            views[name].view(torch.int8).fill_(index + 1)
        blocks.append(gathered(BlockPages(views, config), 2))

    assert torch.equal(*blocks)


def test_several_storages_are_gathered_one_after_the_other() -> None:
    first, one = layer_outermost(["a", "b"])
    second, other = layer_outermost(["c"])
    config = config_of([*first.kv_cache_tensors, *second.kv_cache_tensors])
    views = caches(first, one) | caches(second, other)
    pages = BlockPages(views, config)

    assert pages.block_bytes == block_bytes(config) == 3 * PAGE
    assert torch.equal(gathered(pages, 0), pages_of(views, "abc", 0))


def test_layers_with_one_storage_at_different_offsets_are_kept_apart() -> None:
    # One allocation, two groups of layers behind each other.
    region = NUM_BLOCKS * PAGE
    tensors = [
        KVCacheTensor(3 * region, ["a", "b"], layer_stride=region, block_stride=PAGE),
        KVCacheTensor(3 * region, ["c"], layer_stride=region, block_stride=PAGE, offset=2 * region),
    ]
    config, storage = config_of(tensors), storage_of(3 * region)
    views = caches(config, storage)
    pages = BlockPages(views, config)

    assert torch.equal(gathered(pages, 2), pages_of(views, "abc", 2))


def test_layers_that_share_a_cache_travel_once() -> None:
    config, storage = layer_outermost(["a"])
    shared = config_of(
        [
            *config.kv_cache_tensors,
            KVCacheTensor(
                NUM_BLOCKS * PAGE, ["b"], layer_stride=NUM_BLOCKS * PAGE, block_stride=PAGE
            ),
        ]
    )
    views = caches(config, storage)
    views["b"] = views["a"]

    pages = BlockPages(views, shared)

    assert len(pages.regions) == 1
    assert pages.block_bytes == PAGE


def test_a_staging_holds_one_block_whatever_happens_to_the_cache(
    cache: tuple[KVCacheConfig, torch.Tensor],
) -> None:
    config, storage = cache
    views = caches(config, storage)
    pages = BlockPages(views, config)
    staging = Staging(pages)
    Copier(pages).gather([(2, staging.payload)], pages.mark(), pinned=True)
    before = pages_of(views, LAYERS, 2).tolist()

    storage.fill_(7)

    assert len(staging.payload) == pages.block_bytes
    assert list(staging.payload) == before
    assert staging.payload.contiguous, "it is sent as it is"
    assert staging.payload.format == "B"


class FakeEvent:
    """A point in the engine's work that is reached when somebody waits for it."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def synchronize(self) -> None:
        self._work()


def test_a_copy_waits_for_the_engines_work(cache: tuple[KVCacheConfig, torch.Tensor]) -> None:
    # As on CUDA, where Python says "computed" before the kernels have run.
    config, storage = cache
    pages = BlockPages(caches(config, storage), config)
    computed = FakeEvent(lambda: storage.fill_(5))
    staging = Staging(pages)

    Copier(pages).gather([(1, staging.payload)], cast("Mark", computed), pinned=True)

    assert set(staging.payload) == {5}


def test_on_a_cpu_work_is_done_when_python_says_so() -> None:
    config, storage = layer_outermost()

    assert BlockPages(caches(config, storage), config).mark() is None


def memmove_all(source: torch.Tensor, target: torch.Tensor, sizes: torch.Tensor) -> None:
    """What vLLM's functions do, on the CPU."""
    for come, go, size in zip(source.tolist(), target.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(go, come, size)


@pytest.mark.parametrize("piece_bytes", [1 << 20, 24])
def test_many_copies_at_once_do_what_single_ones_do(
    cache: tuple[KVCacheConfig, torch.Tensor], monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(pages_module, "_PIECE_BYTES", piece_bytes)
    config, storage = cache
    pages = BlockPages(caches(config, storage), config)
    many = ManyCopies(pages, into_cache=memmove_all, out_of_cache=memmove_all)
    stagings = {block_id: Staging(pages) for block_id in (3, 0, 4)}
    blocks = [(block_id, staging.payload) for block_id, staging in stagings.items()]

    many.copy(blocks, out_of_cache=True)
    before = storage.clone()
    for block_id, payload in blocks:
        assert list(payload) == gathered(pages, block_id).tolist()

    storage.zero_()
    many.copy(blocks[:2], out_of_cache=False)
    expected = torch.zeros_like(storage)
    for region, empty in zip(
        BlockPages(caches(config, before), config).regions,
        BlockPages(caches(config, expected), config).regions,
        strict=True,
    ):
        for block_id, _ in blocks[:2]:
            empty[block_id] = region[block_id]
    assert torch.equal(storage, expected)


def test_a_cpu_copies_one_block_after_the_other(
    cache: tuple[KVCacheConfig, torch.Tensor],
) -> None:
    config, storage = cache
    assert ManyCopies.of_vllm(BlockPages(caches(config, storage), config)) is None
