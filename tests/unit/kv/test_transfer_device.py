"""What goes from GPU to GPU, and what when it cannot?

GPU memory is the test's own memory here.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pdtasks.kv import transfer
from pdtasks.kv.device_memory import HANDLE_BYTES, DeviceMemory, DeviceMemoryError
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.pages import BlockPages, Blocks, Copier, ManyCopies
from pdtasks.kv.plan import Join
from pdtasks.kv.rings import Rings
from tests.unit.kv.doubles import MemoryStore
from tests.unit.kv.vllm_worker import BLOCK_BYTES, Side, a_handle, a_load, a_save, fill


class FakeDevice:
    """GPUs that reach each other, as far as transfers see them."""

    def __init__(self) -> None:
        self.memory: dict[bytes, np.ndarray] = {}
        self.reaches = True
        self.free = 1 << 20
        self.num_from_host = 0  # copies into a cache, of one batch each
        self.on_copy: Callable[[], None] = lambda: None
        self.open: list[int] = []  # addresses that are mapped

    def allocate(self, num_bytes: int, device: torch.device) -> DeviceMemory:
        handle = bytes([len(self.memory) + 1]) * HANDLE_BYTES
        self.memory[handle] = np.zeros(num_bytes, dtype=np.uint8)
        return DeviceMemory(self._address(handle), lambda: None, handle)

    def open_peer(self, handle: bytes, device: torch.device) -> DeviceMemory:
        if not self.reaches:
            raise DeviceMemoryError("peer access is not supported between these two devices")
        address = self._address(handle)
        self.open.append(address)
        return DeviceMemory(address, lambda: self.open.remove(address))

    def _address(self, handle: bytes) -> int:
        return int(self.memory[handle].ctypes.data)

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
    monkeypatch.setattr(transfer, "allocate", fake.allocate)
    monkeypatch.setattr(transfer, "open_peer", fake.open_peer)
    monkeypatch.setattr(transfer, "free_bytes", lambda device: fake.free)
    scatter = Copier.scatter

    def from_host(copier: Copier, blocks: Blocks, *, pinned: bool) -> None:
        fake.num_from_host += 1
        scatter(copier, blocks, pinned=pinned)

    monkeypatch.setattr(Copier, "scatter", from_host)
    return fake


@pytest.fixture
def prefill(make_side: Callable[..., Side], device: FakeDevice) -> Side:
    """A side with a ring whose newest four blocks are in GPU memory too."""
    side = make_side(ring_slots=8, device_slots=4)
    fill(side)
    return side


@pytest.fixture
def reader(make_side: Callable[..., Side], prefill: Side) -> Side:
    """A side that loads from it."""
    return make_side()


def save(side: Side, block_ids: list[int], name: str = "t") -> KVHandle:
    """Returns the handle that leaves."""
    handle = a_handle(len(block_ids), name=name)
    side.step(a_save(handle, block_ids, request_id=name))
    side.step_until(lambda: any(r["request_id"] == name for r in side.records))
    return side.handed_over(handle, name)


def load(side: Side, handle: KVHandle, block_ids: list[int]) -> None:
    side.transfer.start_loads(a_load(handle, block_ids, join=Join.NOW))


def test_the_newest_blocks_go_from_gpu_to_gpu(
    prefill: Side, reader: Side, device: FakeDevice, store: MemoryStore
) -> None:
    handle = save(prefill, [5, 0, 3])

    load(reader, handle, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert (device.num_from_host, store.num_gets) == (0, 0)


def test_what_has_left_the_gpu_comes_from_the_ring(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    first = save(prefill, [5, 0, 3])
    computed = prefill.cache.clone()
    fill(prefill, seed=7)
    save(prefill, [1, 2, 6], name="u")

    load(reader, first, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == computed[[5, 0, 3]].tolist()
    assert device.num_from_host == 1


def test_what_another_block_takes_the_place_of_while_it_is_copied_comes_from_the_ring(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    first = save(prefill, [5, 0, 3])
    computed = prefill.cache.clone()
    fill(prefill, seed=7)
    ring = prefill.transfer._ring
    assert ring is not None

    def overwrite() -> None:
        device.on_copy = lambda: None
        slot = ring.take_in_device(4)  # where block 0 is
        assert slot == 0
        ctypes.memset(ring.device_address(slot), 255, BLOCK_BYTES)

    device.on_copy = overwrite
    load(reader, first, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == computed[[5, 0, 3]].tolist()
    assert device.num_from_host == 1


def test_two_blocks_for_one_place_are_not_written_there_at_once(
    prefill: Side, device: FakeDevice
) -> None:
    ring = prefill.transfer._ring
    assert ring is not None

    assert ring.take_in_device(1) == 1
    assert ring.take_in_device(5) is None
    ring.publish_in_device(1, 1)

    assert ring.is_in_device(1)
    assert ring.take_in_device(5) == 1
    assert not ring.is_in_device(1)
    ring.publish_in_device(1, None)  # the copy has failed
    assert not ring.is_in_device(5)


def test_more_blocks_than_have_room_in_the_gpu_are_in_the_ring_all_the_same(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    handle = save(prefill, [5, 0, 3, 1, 2, 4])

    load(reader, handle, [1, 2, 4, 0, 3, 5])

    assert reader.cache[[1, 2, 4, 0, 3, 5]].tolist() == prefill.cache[[5, 0, 3, 1, 2, 4]].tolist()


def test_a_gpu_that_cannot_be_reached_is_not_counted_on(
    make_side: Callable[..., Side], prefill: Side, device: FakeDevice
) -> None:
    device.reaches = False
    reader, scheduler = make_side(), Rings(payloads=False)
    handle = save(prefill, [5, 0, 3])
    assert scheduler.are_in_device(handle, 0)

    load(reader, handle, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert device.num_from_host == 1
    assert not scheduler.are_in_device(handle, 0)
    scheduler.close()


def test_an_engine_does_not_map_its_own_memory(prefill: Side, device: FakeDevice) -> None:
    # CUDA would refuse, and nobody would count on that memory any more.
    prefill.transfer.look_for_rings()

    assert not device.open
    scheduler = Rings(payloads=False)
    assert scheduler.are_in_device(save(prefill, [5, 0, 3]), 0)
    scheduler.close()


@pytest.mark.parametrize("num_copies", [0, 2], ids=["out of the cache", "into the cache"])
def test_where_cuda_refuses_to_copy_blocks_go_through_host_memory(
    prefill: Side, reader: Side, device: FakeDevice, store: MemoryStore, num_copies: int
) -> None:
    calls = itertools.count()

    def refuse() -> None:
        if next(calls) == num_copies:
            raise RuntimeError("CUDA error: invalid argument")

    # Two threads copy within the GPU, each in one call.
    device.on_copy = refuse
    handle = save(prefill, [5, 0, 3])
    load(reader, handle, [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == prefill.cache[[5, 0, 3]].tolist()
    assert (device.num_from_host, store.num_gets) == (1, 0)
    scheduler = Rings(payloads=False)
    assert not scheduler.are_in_device(handle, 0)
    scheduler.close()


def test_the_scheduler_sees_what_is_in_the_gpu(prefill: Side, device: FakeDevice) -> None:
    scheduler = Rings(payloads=False)

    first = save(prefill, [5, 0, 3])
    assert scheduler.are_in_device(first, 0)
    second = save(prefill, [1, 2], name="u")

    assert not scheduler.are_in_device(first, 0)
    assert scheduler.are_in_device(first, 1), "block 4 took the place of block 0 alone"
    assert scheduler.are_in_device(second, 0)
    scheduler.close()


def test_memory_of_a_gpu_is_let_go_of_with_the_ring(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    load(reader, save(prefill, [5, 0, 3]), [1, 2, 4])
    assert len(device.open) == 1

    reader.transfer.close()

    assert not device.open


@pytest.mark.parametrize(("free_blocks", "num_slots"), [(16, 4), (8, 2), (0, 0)])
def test_no_more_of_the_gpu_is_taken_than_a_quarter_of_what_is_free(
    make_side: Callable[..., Side], device: FakeDevice, free_blocks: int, num_slots: int
) -> None:
    device.free = free_blocks * BLOCK_BYTES

    make_side(ring_slots=8, device_slots=4)

    assert [len(memory) for memory in device.memory.values()] == [num_slots * BLOCK_BYTES] * bool(
        num_slots
    )


def test_a_gpu_without_room_hands_over_through_host_memory(
    make_side: Callable[..., Side],
    reader: Side,
    device: FakeDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def allocate(num_bytes: int, device: torch.device) -> DeviceMemory:
        raise DeviceMemoryError("out of memory")

    monkeypatch.setattr(transfer, "allocate", allocate)
    side = make_side(ring_slots=8, device_slots=4)
    fill(side)

    load(reader, save(side, [5, 0, 3]), [1, 2, 4])

    assert reader.cache[[1, 2, 4]].tolist() == side.cache[[5, 0, 3]].tolist()


def test_requests_that_are_saved_side_by_side_do_not_mix(
    prefill: Side, reader: Side, device: FakeDevice
) -> None:
    # Two copiers, and half as many places in the GPU as blocks.
    first, second = a_handle(4, name="t"), a_handle(4, name="u")
    plan = a_save(first, [0, 1, 2, 3], request_id="t")
    plan.saves += a_save(second, [4, 5, 6, 7], request_id="u").saves
    prefill.step(plan)
    prefill.step_until(lambda: len(prefill.records) == 2)

    for name, handle, ids in (("t", first, [0, 1, 2, 3]), ("u", second, [4, 5, 6, 7])):
        load(reader, prefill.handed_over(handle, name), [0, 1, 2, 3])
        assert reader.cache[:4].tolist() == prefill.cache[ids].tolist()
