"""What goes from GPU to GPU, and what when it cannot?

The engines' caches are the test's own memory here.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

from pdtasks.kv import saving, transfer
from pdtasks.kv.device_memory import HANDLE_BYTES, DeviceMemory, DeviceMemoryError, SharedRegion
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.pages import BlockPages, Blocks, Copier, ManyCopies
from pdtasks.kv.plan import Join, TransferPlan
from pdtasks.kv.ring import has_writer
from pdtasks.kv.rings import Rings
from tests.unit.kv.doubles import MemoryStore
from tests.unit.kv.vllm_worker import Side, a_handle, a_load, a_save, fill

#: Bytes before a cache in its allocation.
BEFORE = 24


class FakeDevice:
    """GPUs that reach each other, as far as transfers see them."""

    def __init__(self) -> None:
        self.allocations: dict[bytes, int] = {}  # their addresses
        self.reaches = True
        self.num_from_host = 0  # copies into a cache, of one batch each
        self.on_copy: Callable[[], None] = lambda: None
        self.open: list[int] = []  # addresses that are mapped

    def share(self, regions: Sequence[torch.Tensor]) -> list[SharedRegion]:
        handle = bytes([len(self.allocations) + 1]) * HANDLE_BYTES
        base = min(region.data_ptr() for region in regions) - BEFORE
        self.allocations[handle] = base
        return [SharedRegion(handle, r.data_ptr() - base, r.stride(0)) for r in regions]

    def open_peer(self, handle: bytes, device: torch.device) -> DeviceMemory:
        if not self.reaches:
            raise DeviceMemoryError("peer access is not supported between these two devices")
        address = self.allocations[handle]
        self.open.append(address)
        return DeviceMemory(address, lambda: self.open.remove(address))

    def many(self, pages: BlockPages) -> ManyCopies:
        return ManyCopies(pages, into_cache=self._move, out_of_cache=self._move)

    def _move(self, source: torch.Tensor, target: torch.Tensor, sizes: torch.Tensor) -> None:
        for come, go, size in zip(source.tolist(), target.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(go, come, size)
        self.on_copy()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(ManyCopies, "can_copy", staticmethod(lambda pages: True))
    monkeypatch.setattr(ManyCopies, "of_vllm", fake.many)
    monkeypatch.setattr(transfer, "share", fake.share)
    monkeypatch.setattr(transfer, "open_peer", fake.open_peer)
    scatter = Copier.scatter

    def from_host(copier: Copier, blocks: Blocks, *, pinned: bool) -> None:
        fake.num_from_host += 1
        scatter(copier, blocks, pinned=pinned)

    monkeypatch.setattr(Copier, "scatter", from_host)
    return fake


@pytest.fixture
def prefill(make_side: Callable[..., Side], device: FakeDevice) -> Side:
    """A side whose cache others can read."""
    side = make_side(ring_slots=8)
    fill(side)
    return side


@pytest.fixture
def reader(make_side: Callable[..., Side], prefill: Side) -> Side:
    """A side that loads from it."""
    return make_side(ring_slots=8)


@pytest.fixture
def scheduler(reader: Side) -> Iterator[Rings]:
    """What the reader's scheduler sees."""
    rings = Rings(payloads=False, own_engine=reader.transfer.engine_id)
    yield rings
    rings.close()


def save(side: Side, block_ids: list[int], name: str = "t") -> KVHandle:
    """Returns the handle that leaves."""
    handle = a_handle(len(block_ids), name=name)
    side.step(a_save(handle, block_ids, request_id=name))
    side.step_until(lambda: any(r["request_id"] == name for r in side.records))
    return side.handed_over(handle, name)


def load(side: Side, handle: KVHandle, block_ids: list[int]) -> None:
    side.transfer.start_loads(a_load(handle, block_ids, join=Join.NOW))


def overwrite(side: Side, block_ids: list[int]) -> None:
    """Have the side's next step compute something else there."""
    side.step(TransferPlan(written=block_ids))
    side.cache[block_ids] = 255


def test_blocks_go_from_gpu_to_gpu(
    prefill: Side, reader: Side, device: FakeDevice, store: MemoryStore
) -> None:
    handle = save(prefill, [5, 0, 3])

    load(reader, handle, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert (device.num_from_host, store.num_gets) == (0, 0)


def test_caches_need_not_be_of_one_size(
    prefill: Side, make_side: Callable[..., Side], device: FakeDevice
) -> None:
    reader = make_side(num_blocks=3)

    load(reader, save(prefill, [7, 0]), [1, 2])

    assert reader.cache[[1, 2]].tolist() == prefill.cache[[7, 0]].tolist()
    assert device.num_from_host == 0


def test_what_the_engine_has_written_over_comes_from_the_ring(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    handle = save(prefill, [5, 0, 3])
    computed = prefill.cache.clone()
    overwrite(prefill, [0])

    load(reader, handle, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == computed[[5, 0, 3]].tolist()
    assert device.num_from_host == 1


def test_what_the_engine_writes_over_while_it_is_copied_comes_from_the_ring(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    handle = save(prefill, [5, 0, 3])
    computed = prefill.cache.clone()

    def write() -> None:
        device.on_copy = lambda: None
        overwrite(prefill, [3])
        reader.cache[4] = 255  # which of the two came is not known

    device.on_copy = write
    load(reader, handle, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == computed[[5, 0, 3]].tolist()
    assert device.num_from_host == 1


def test_blocks_that_two_prompts_share_are_found_by_both(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    first, second = save(prefill, [5, 0]), save(prefill, [5, 3], name="u")

    load(reader, first, [1, 2])
    load(reader, second, [4, 6])
    assert reader.cache[[1, 2, 4, 6]].tolist() == prefill.cache[[5, 0, 5, 3]].tolist()
    assert device.num_from_host == 0

    computed = prefill.cache.clone()
    overwrite(prefill, [5])
    for handle, ids in ((first, [5, 0]), (second, [5, 3])):
        load(reader, handle, [1, 2])
        assert reader.cache[[1, 2]].tolist() == computed[ids].tolist()
    assert device.num_from_host == 2


def test_a_place_that_has_another_block_by_now_is_not_taken_for_the_first_ones(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    first = save(prefill, [5, 0])
    computed = prefill.cache.clone()
    overwrite(prefill, [5])
    second = save(prefill, [5, 3], name="u")

    load(reader, second, [4, 6])
    assert reader.cache[[4, 6]].tolist() == prefill.cache[[5, 3]].tolist()
    assert device.num_from_host == 0

    load(reader, first, [1, 2])
    assert reader.cache[[1, 2]].tolist() == computed[[5, 0]].tolist()
    assert device.num_from_host == 1


def test_a_slot_that_another_block_has_taken_says_nothing_of_the_first_ones_place(
    prefill: Side, scheduler: Rings
) -> None:
    first = save(prefill, [0, 1, 2, 3])
    second = save(prefill, [4, 5, 6, 7], name="u")
    third = save(prefill, [0, 4], name="v")  # takes the slots of the first's first two

    assert not scheduler.are_cached(first, 0)
    assert scheduler.are_cached(first, 2)
    assert scheduler.are_cached(third, 0)
    overwrite(prefill, [0])
    assert not scheduler.are_cached(third, 0)
    assert scheduler.are_cached(second, 0)


def test_what_was_taken_from_a_preempted_prompt_is_cached_no_more(
    prefill: Side, scheduler: Rings
) -> None:
    handle = save(prefill, [5, 0, 3])
    assert scheduler.are_cached(handle, 0)

    prefill.step(TransferPlan(preempted={"t"}, written=[3]))

    assert not scheduler.are_cached(handle, 0)


def test_a_gpu_that_cannot_be_reached_is_not_counted_on_by_who_cannot(
    make_side: Callable[..., Side], prefill: Side, device: FakeDevice
) -> None:
    device.reaches = False
    reader = make_side(ring_slots=8)
    scheduler = Rings(payloads=False, own_engine=reader.transfer.engine_id)
    handle = save(prefill, [5, 0, 3])
    assert scheduler.are_cached(handle, 0)

    load(reader, handle, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert device.num_from_host == 1
    assert not scheduler.are_cached(handle, 0)
    scheduler.close()
    # Another one can.
    device.reaches = True
    other = make_side(ring_slots=8)
    load(other, handle, [1, 2, 4])
    assert device.num_from_host == 1


def test_an_engine_that_ends_takes_nothing_from_others(
    make_side: Callable[..., Side], prefill: Side, reader: Side, device: FakeDevice
) -> None:
    handle = save(prefill, [5, 0, 3])
    load(reader, handle, [1, 2, 4])

    reader.transfer.close()

    other = make_side(ring_slots=8)
    scheduler = Rings(payloads=False, own_engine=other.transfer.engine_id)
    assert scheduler.are_cached(handle, 0)
    load(other, handle, [1, 2, 4])
    assert other.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert device.num_from_host == 0
    scheduler.close()


def test_a_cache_that_vllm_clears_beforehand_is_not_shared(
    make_side: Callable[..., Side], device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCacheConfig, "needs_kv_cache_zeroing", property(lambda _: True))

    make_side(ring_slots=8)

    assert not device.allocations


def test_a_prefix_that_all_prompts_share_is_noted_for_as_many_as_there_are_slots(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    handle = [save(prefill, [5, 0], name=f"r{number}") for number in range(40)][-1]
    ring = prefill.transfer._ring
    assert ring is not None
    assert sum(map(len, ring._slots_at.values())) == 8

    computed = prefill.cache.clone()
    overwrite(prefill, [5, 0])
    assert not ring._slots_at
    load(reader, handle, [1, 2])
    assert reader.cache[[1, 2]].tolist() == computed[[5, 0]].tolist()
    assert device.num_from_host == 1


def test_memory_that_cannot_be_shared_hands_over_through_host_memory(
    make_side: Callable[..., Side],
    reader: Side,
    device: FakeDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def share(regions: Sequence[torch.Tensor]) -> list[SharedRegion]:
        raise DeviceMemoryError("invalid argument")

    monkeypatch.setattr(transfer, "share", share)
    side = make_side(ring_slots=8)
    fill(side)

    load(reader, save(side, [5, 0, 3]), [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == side.cache[[5, 0, 3]].tolist()
    assert device.num_from_host == 1


def test_an_engine_that_is_told_not_to_shares_nothing_and_reads_from_no_other(
    make_side: Callable[..., Side], prefill: Side, device: FakeDevice
) -> None:
    alone = make_side(ring_slots=8, gpu_to_gpu=False)
    fill(alone, seed=7)

    load(alone, save(prefill, [5, 0]), [1, 2])
    assert alone.cache[[1, 2]].tolist() == prefill.cache[[5, 0]].tolist()
    load(prefill, save(alone, [5, 0]), [1, 2])
    assert prefill.cache[[1, 2]].tolist() == alone.cache[[5, 0]].tolist()
    assert device.num_from_host == 2
    assert not device.open


def test_an_engine_does_not_map_its_own_memory(prefill: Side, device: FakeDevice) -> None:
    # CUDA would refuse, and it would count on no other's any more either.
    prefill.transfer.look_for_rings()

    assert not device.open
    ring = prefill.transfer._ring
    assert ring is not None
    assert ring.reaches_others
    scheduler = Rings(payloads=False, own_engine=prefill.transfer.engine_id)
    assert not scheduler.are_cached(save(prefill, [5, 0, 3]), 0), "it comes through host memory"
    scheduler.close()


def test_where_cuda_refuses_to_copy_blocks_go_through_host_memory(
    prefill: Side, reader: Side, device: FakeDevice, store: MemoryStore, scheduler: Rings
) -> None:
    calls = itertools.count()

    def refuse() -> None:
        if next(calls) == 0:
            raise RuntimeError("CUDA error: invalid argument")

    handle = save(prefill, [5, 0, 3])
    device.on_copy = refuse
    load(reader, handle, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert (device.num_from_host, store.num_gets) == (1, 0)
    assert not scheduler.are_cached(handle, 0)


def test_the_memory_of_an_engine_that_was_killed_is_let_go_of_and_its_ring_still_read(
    prefill: Side, reader: Side, device: FakeDevice, store: MemoryStore
) -> None:
    handle = save(prefill, [5, 0, 3])
    reader.transfer.look_for_rings()
    assert len(device.open) == 1

    kill(prefill)
    reader.transfer.look_for_rings()

    assert not device.open, "the engine that is started there next would find no room"
    load(reader, handle, [1, 2, 4])
    assert reader.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert (device.num_from_host, store.num_gets) == (1, 0)


def test_nothing_is_copied_out_of_the_memory_of_an_engine_that_was_just_killed(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    handle = save(prefill, [5, 0, 3])
    reader.transfer.look_for_rings()

    kill(prefill)
    load(reader, handle, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert device.num_from_host == 1


def kill(side: Side) -> None:
    """As the kernel ends a process: its locks go, its files stay."""
    writer = side.transfer._ring
    assert writer is not None
    fcntl.flock(writer._fd, fcntl.LOCK_UN)
    side.transfer._ring = None  # or its end would remove the file
    os.close(writer._fd)
    assert not has_writer(writer.name)


def test_memory_is_not_let_go_of_in_the_middle_of_a_copy(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    handle = save(prefill, [5, 0, 3])
    open_at_end: list[int] = []

    def end() -> None:
        device.on_copy = lambda: None
        closing = threading.Thread(target=reader.transfer._rings.close)  # type: ignore[union-attr]
        closing.start()
        closing.join(0.1)  # it waits for this copy
        open_at_end.extend(device.open)
        ended.append(closing)

    ended: list[threading.Thread] = []
    device.on_copy = end
    load(reader, handle, [1, 2, 4])
    ended[0].join(10)

    assert len(open_at_end) == 1
    assert not device.open


def test_memory_of_a_gpu_is_let_go_of_with_the_ring(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    load(reader, save(prefill, [5, 0, 3]), [1, 2, 4])
    assert len(device.open) == 1

    reader.transfer.close()

    assert not device.open


def test_blocks_stay_in_the_cache_for_who_comes_to_copy_them(
    prefill: Side, reader: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_READ_S", 3600.0)
    prefill.transfer.look_for_rings()
    save(prefill, [5, 0, 3])
    prefill.finish(t=True)

    prefill.steps()

    assert not prefill.sent
    prefill.transfer._saves._sent["t"] -= 3600  # as if they had passed
    prefill.step_until(lambda: prefill.sent == {"t": 1})


def test_blocks_that_nobody_can_copy_are_free_when_they_are_saved(
    prefill: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_READ_S", 3600.0)
    monkeypatch.setattr(Rings, "has_others", False)  # (whatever else runs on this host)
    save(prefill, [5, 0, 3])

    prefill.finish(t=True)

    prefill.step_until(lambda: prefill.sent)


def test_blocks_that_nobody_waits_for_are_free_when_they_are_saved(
    prefill: Side, reader: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_READ_S", 3600.0)
    prefill.transfer.look_for_rings()
    handle = a_handle(3, name="t")
    plan = a_save(handle, [5, 0, 3], request_id="t")
    plan.saves = [replace(save, last=False) for save in plan.saves]
    prefill.step(plan)

    prefill.finish(t=False)

    prefill.step_until(lambda: prefill.sent)


def test_requests_that_are_saved_side_by_side_do_not_mix(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    first, second = a_handle(4, name="t"), a_handle(4, name="u")
    plan = a_save(first, [0, 1, 2, 3], request_id="t")
    plan.saves += a_save(second, [4, 5, 6, 7], request_id="u").saves
    prefill.step(plan)
    prefill.step_until(lambda: len(prefill.records) == 2)

    for name, handle, ids in (("t", first, [0, 1, 2, 3]), ("u", second, [4, 5, 6, 7])):
        load(reader, prefill.handed_over(handle, name), [0, 1, 2, 3])
        assert reader.cache[:4].tolist() == prefill.cache[ids].tolist()
    assert device.num_from_host == 0
