"""How do blocks lie in vLLM's paged cache?"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from pdtasks.kv import pages as pages_module
from pdtasks.kv.marks import Mark, Marks, Part
from pdtasks.kv.pages import BlockPages, Copier, ManyCopies, Staging, block_bytes, parts_of

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


def now(pages: BlockPages, mark: object = None) -> Marks:
    """All of a block is complete at `mark`."""
    return [(whole(pages), cast("Mark", mark))]


def whole(pages: BlockPages) -> Part:
    return Part(0, pages.block_bytes)


def gathered(pages: BlockPages, block_id: int) -> torch.Tensor:
    """The bytes of a block as they leave."""
    staging = Staging(pages)
    Copier(pages).gather([(block_id, staging.payload)], now(pages), pinned=True)
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
    Copier(writer).gather([(1, sent.payload)], now(writer), pinned=True)
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
    Copier(pages).gather([(2, staging.payload)], now(pages), pinned=True)
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

    Copier(pages).gather([(1, staging.payload)], now(pages, computed), pinned=True)

    assert set(staging.payload) == {5}


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA."""
    monkeypatch.setattr(pages_module, "num_parts_on", lambda device: len(LAYERS))


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("at_once", [False, True], ids=["one_by_one", "many_at_once"])
def test_each_part_of_a_block_leaves_when_its_layers_are_computed(
    cache: tuple[KVCacheConfig, torch.Tensor], monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    config, storage = cache
    views = caches(config, storage)
    storage.zero_()
    pages = BlockPages(views, config)
    assert [part.layers for part in pages.parts] == [{layer} for layer in LAYERS]
    many = ManyCopies(pages, into_cache=memmove_all, out_of_cache=memmove_all)
    monkeypatch.setattr(pages_module, "_CALL_BYTES", 1)
    stagings = {block_id: Staging(pages) for block_id in (4, 1)}
    when: list[bytes] = []

    def compute(layer: str) -> None:
        when.append(bytes(stagings[1].payload))
        for block_id in stagings:
            views[layer][block_id].view(torch.uint8).fill_(1 + LAYERS.index(layer))

    marks = [
        (part, cast("Mark", FakeEvent(partial(compute, *part.layers)))) for part in pages.parts
    ]
    blocks = [(block_id, staging.payload) for block_id, staging in stagings.items()]
    Copier(pages, many if at_once else None).gather(blocks, marks, pinned=True)

    rows = [bytes([1 + index]) * PAGE for index in range(len(LAYERS))]
    assert [bytes(staging.payload) for staging in stagings.values()] == [b"".join(rows)] * 2
    # and each was there before the next was computed
    assert [seen[: index * PAGE] for index, seen in enumerate(when)] == [
        b"".join(rows[:index]) for index in range(len(LAYERS))
    ]


@pytest.mark.parametrize(("num_parts", "ends"), [(1, [60]), (2, [30, 60]), (4, [20, 30, 50, 60])])
def test_parts_are_of_whole_layers(num_parts: int, ends: list[int]) -> None:
    # layers of 10 and 20 bytes, two of which share theirs
    writers = {0: {"a"}, 10: {"b"}, 20: {"c", "c'"}, 30: {"d"}, 50: {"e"}}

    parts = parts_of(writers, 60, num_parts)

    assert [part.end for part in parts] == ends
    assert [part.begin for part in parts] == [0, *ends[:-1]]
    for part in parts:
        assert part.layers == {
            layer
            for place, layers in writers.items()
            for layer in layers
            if part.begin <= place < part.end
        }


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

    many.copy(blocks, whole(pages), out_of_cache=True)
    before = storage.clone()
    for block_id, payload in blocks:
        assert list(payload) == gathered(pages, block_id).tolist()

    storage.zero_()
    many.copy(blocks[:2], whole(pages), out_of_cache=False)
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
