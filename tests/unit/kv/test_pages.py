"""How do blocks lie in vLLM's paged cache?"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from pdtasks.kv.pages import BlockPages, block_bytes

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


@pytest.fixture(params=[layer_outermost, block_outermost])
def cache(request: pytest.FixtureRequest) -> tuple[KVCacheConfig, torch.Tensor]:
    made: tuple[KVCacheConfig, torch.Tensor] = request.param()
    return made


def test_a_block_is_the_pages_of_all_its_layers(cache: tuple[KVCacheConfig, torch.Tensor]) -> None:
    config, storage = cache
    views = caches(config, storage)
    pages = BlockPages(views, config)
    assert pages.block_bytes == block_bytes(config) == len(LAYERS) * PAGE

    block = torch.empty(pages.block_bytes, dtype=torch.int8)
    pages.gather(3, block)

    expected = torch.cat([views[name][3] for name in LAYERS]).view(torch.int8)
    assert torch.equal(block, expected)


def test_a_block_moves_to_another_engine_and_nothing_else_changes(
    cache: tuple[KVCacheConfig, torch.Tensor],
) -> None:
    config, storage = cache
    source = caches(config, storage)
    target_storage = torch.full_like(storage, 255)
    target = caches(config, target_storage)
    writer, reader = BlockPages(source, config), BlockPages(target, config)

    block = torch.empty(writer.block_bytes, dtype=torch.int8)
    writer.gather(1, block)
    reader.scatter(4, block)  # another engine has other free blocks

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
        pages = BlockPages(views, config)
        block = torch.empty(pages.block_bytes, dtype=torch.int8)
        pages.gather(2, block)
        blocks.append(block)

    assert torch.equal(*blocks)


def test_several_storages_are_gathered_one_after_the_other() -> None:
    first, one = layer_outermost(["a", "b"])
    second, other = layer_outermost(["c"])
    config = config_of([*first.kv_cache_tensors, *second.kv_cache_tensors])
    views = caches(first, one) | caches(second, other)
    pages = BlockPages(views, config)

    block = torch.empty(pages.block_bytes, dtype=torch.int8)
    pages.gather(0, block)

    assert pages.block_bytes == block_bytes(config) == 3 * PAGE
    assert torch.equal(block, torch.cat([views[n][0] for n in "abc"]).view(torch.int8))


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

    block = torch.empty(pages.block_bytes, dtype=torch.int8)
    pages.gather(2, block)

    assert torch.equal(block, torch.cat([views[n][2] for n in "abc"]).view(torch.int8))


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

    assert BlockPages(views, shared).block_bytes == PAGE
