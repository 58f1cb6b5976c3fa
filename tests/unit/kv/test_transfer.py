"""How do blocks get from the engine's cache to the store and back?"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from pdtasks.kv.handle import KVHandle
from pdtasks.kv.pages import BlockPages
from pdtasks.kv.plan import BlockLoad, BlockSave, TransferPlan
from pdtasks.kv.transfer import BlockTransfer
from tests.unit.kv.doubles import MemoryStore

# The store's bytes are read only; torch is told not to write to them.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")

FP = "0123456789abcdef"
NUM_BLOCKS = 8
PAGE = 32
BLOCK_BYTES = 2 * PAGE
WIRE_BYTES = 32 + BLOCK_BYTES  # with the header


class Side:
    """One engine's transfer side over a small cache on the CPU."""

    def __init__(self, store: MemoryStore, fingerprint: str = FP, world: int = 1) -> None:
        tensor = KVCacheTensor(
            size=NUM_BLOCKS * BLOCK_BYTES,
            layers=["a", "b"],
            layer_stride=PAGE,
            block_stride=BLOCK_BYTES,
        )
        config = KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[tensor], kv_cache_groups=[])
        self.cache = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
        self.transfer = BlockTransfer(
            store,  # type: ignore[arg-type]  # a double
            fingerprint=fingerprint,
            rank=0,
            world=world,
            num_threads=2,
        )
        self.transfer.attach(BlockPages({"a": self.cache, "b": self.cache}, config))
        self.records: list[dict[str, Any]] = []
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def step(self, plan: TransferPlan | None = None, finished: set[str] | None = None) -> None:
        """What vLLM's model runner does with the connector in each step, in its order."""
        plan = plan or TransferPlan()
        self.transfer.start_loads(plan)
        self.transfer.start_saves(plan)
        results: KVConnectorTransferResults = self.transfer.take_results(finished or set())
        self.sent.update(results.finished_sending)
        self.received.update(results.finished_recving)
        self.failed.update(results.failed_recving)
        if (stats := self.transfer.take_stats()) is not None:
            self.records += stats.data["records"]

    def step_until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "the transfer never came to its end"
            time.sleep(0.002)
            self.step()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def make_side(store: MemoryStore) -> Iterator[Callable[..., Side]]:
    sides: list[Side] = []

    def make(**options: Any) -> Side:
        sides.append(Side(store, **options))
        return sides[-1]

    yield make
    store.may_go_on.set()
    for side in sides:
        side.transfer.close()
    assert store.closed


@pytest.fixture
def prefill(make_side: Callable[..., Side]) -> Side:
    side = make_side()
    side.cache.copy_(torch.arange(side.cache.numel()).view_as(side.cache) % 251)
    return side


@pytest.fixture
def decode(make_side: Callable[..., Side]) -> Side:
    return make_side()


def a_handle(num_blocks: int = 3, tail: bool = True, name: str = "t") -> KVHandle:
    num_full = num_blocks - tail
    return KVHandle(
        fingerprint=FP,
        transfer_id=name,
        num_tokens=num_full * 16 + (5 if tail else 0),
        block_size=16,
        hashes=tuple(f"{name}{i}".encode() for i in range(num_full)),
        expires_at=time.time() + 60,
    )


def a_save(handle: KVHandle, ids: list[int], *, first: int = 0, last: bool = True) -> TransferPlan:
    save = BlockSave(request_id="p", handle=handle, first=first, block_ids=ids, last=last)
    return TransferPlan(saves=[save])


def a_load(handle: KVHandle, ids: list[int], *, first: int = 0) -> TransferPlan:
    return TransferPlan(
        loads=[BlockLoad(request_id="d", handle=handle, first=first, block_ids=ids)]
    )


def test_a_prompt_arrives_in_other_blocks_of_another_engine(prefill: Side, decode: Side) -> None:
    # Given a prompt of three blocks that was computed in one step
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)

    # When another engine loads it into blocks of its own
    decode.step(a_load(handle, [1, 2, 7]))
    decode.step_until(lambda: decode.received)

    # Then exactly these have its bytes
    assert torch.equal(decode.cache[[1, 2, 7]], prefill.cache[[5, 0, 3]])
    assert not decode.cache[[0, 3, 4, 5, 6]].any()
    assert decode.received == Counter("d")
    assert not decode.failed
    # and the records say what moved
    (saved,), (loaded,) = prefill.records, decode.records
    assert (saved["op"], saved["blocks"], saved["bytes"]) == ("save", 3, 3 * WIRE_BYTES)
    assert (loaded["op"], loaded["blocks"], loaded["bytes"]) == ("load", 3, 3 * WIRE_BYTES)
    assert saved["error"] == loaded["error"] == ""
    assert loaded["missing"] == 0


def test_blocks_before_the_first_are_local_and_not_fetched(prefill: Side, decode: Side) -> None:
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)

    decode.step(a_load(handle, [6, 2], first=1))
    decode.step_until(lambda: decode.received)

    assert torch.equal(decode.cache[[6, 2]], prefill.cache[[0, 3]])
    assert decode.records[0]["blocks"] == 2


def test_the_engine_may_reuse_its_blocks_as_soon_as_the_step_is_over(
    prefill: Side, decode: Side, store: MemoryStore
) -> None:
    # Given a store that is slow to take the blocks
    store.may_go_on.clear()
    handle, computed = a_handle(), prefill.cache[[5, 0, 3]].clone()
    prefill.step(a_save(handle, [5, 0, 3]))

    # When the engine computes something else in the same blocks meanwhile
    prefill.cache.fill_(99)
    store.may_go_on.set()
    prefill.step_until(lambda: prefill.records)

    # Then the store has what was there
    decode.step(a_load(handle, [0, 1, 2]))
    decode.step_until(lambda: decode.received)
    assert torch.equal(decode.cache[[0, 1, 2]], computed)


def test_a_block_that_is_in_the_store_is_not_sent_again(prefill: Side, store: MemoryStore) -> None:
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    store.puts.clear()

    prefill.step(a_save(a_handle(name="t"), [5, 0, 3]))
    prefill.step_until(lambda: len(prefill.records) == 2)

    assert store.puts == []
    assert prefill.records[1]["blocks"] == 3
    assert prefill.records[1]["bytes"] == 0


def test_a_prompt_in_chunks_is_one_record_when_the_last_chunk_is_sent(prefill: Side) -> None:
    handle = a_handle(4)
    prefill.step(a_save(handle, [0, 1], last=False))
    prefill.step(a_save(handle, [2], first=2, last=False))
    assert not prefill.records

    prefill.step(a_save(handle, [3], first=3))
    prefill.step_until(lambda: prefill.records)

    assert [r["blocks"] for r in prefill.records] == [4]


@pytest.mark.parametrize("finishes_first", [True, False])
def test_a_finished_request_is_reported_as_sent_exactly_once(
    prefill: Side, store: MemoryStore, finishes_first: bool
) -> None:
    if finishes_first:
        store.may_go_on.clear()
    prefill.step(a_save(a_handle(), [5, 0, 3]))
    if not finishes_first:
        prefill.step_until(lambda: prefill.records)
        assert not prefill.sent, "the scheduler has not been told that the request has finished"

    prefill.step(TransferPlan(held={"p"}), finished={"p"})
    store.may_go_on.set()
    prefill.step_until(lambda: prefill.sent)
    for _ in range(3):
        prefill.step()

    assert prefill.sent == Counter("p")


def test_an_aborted_request_is_never_reported_as_sent(prefill: Side, store: MemoryStore) -> None:
    # Given two requests whose blocks are still on their way
    store.may_go_on.clear()
    prefill.step(a_save(a_handle(), [5, 0, 3]))
    other = BlockSave(
        request_id="q", handle=a_handle(name="u"), first=0, block_ids=[1, 2, 4], last=True
    )
    prefill.step(TransferPlan(saves=[other]))

    # When one is aborted (finished, but not held) and one finishes
    prefill.step(TransferPlan(held={"q"}), finished={"p", "q"})
    store.may_go_on.set()
    prefill.step_until(lambda: prefill.sent)
    prefill.step()

    # Then vLLM, which knows the first no more, does not hear of it
    assert prefill.sent == Counter("q")


def test_an_aborted_request_that_was_sent_already_is_not_reported(prefill: Side) -> None:
    prefill.step(a_save(a_handle(), [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)

    prefill.step(finished={"p"})
    prefill.step()

    assert not prefill.sent


def test_an_aborted_request_still_says_when_its_blocks_are_in_the_store(
    prefill: Side, store: MemoryStore
) -> None:
    # Whoever started it has to wait for that before it can delete the partial block.
    handle = a_handle()
    store.may_go_on.clear()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step(finished={"p"})
    assert not prefill.records
    store.may_go_on.set()

    prefill.step_until(lambda: prefill.records)

    assert len(prefill.records) == 1
    assert handle.key(2, 0) in store.values


def test_a_request_aborted_between_two_chunks_is_forgotten(prefill: Side) -> None:
    prefill.step(a_save(a_handle(4), [0, 1], last=False))
    prefill.step(finished={"p"})

    prefill.step_until(lambda: not prefill.transfer._saves)

    assert not prefill.sent


def test_a_store_that_is_away_fails_the_save_and_frees_the_blocks(
    prefill: Side, store: MemoryStore
) -> None:
    store.away = True
    prefill.step(a_save(a_handle(), [5, 0, 3]))
    prefill.step(TransferPlan(held={"p"}), finished={"p"})

    prefill.step_until(lambda: prefill.sent and prefill.records)

    assert prefill.sent == Counter("p")
    (record,) = prefill.records
    assert record["blocks"] == record["bytes"] == 0
    assert record["error"].startswith("store: ")


def test_a_missing_block_fails_the_load_and_still_counts_as_received(
    prefill: Side, decode: Side, store: MemoryStore
) -> None:
    # Given a prompt of which the store has evicted one block
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    del store.values[handle.key(1, 0)]

    decode.step(a_load(handle, [1, 2, 7]))
    decode.step_until(lambda: decode.received)
    for _ in range(3):
        decode.step()

    # vLLM wants both: received lets the request go on, failed makes it recompute.
    assert decode.received == decode.failed == Counter("d")
    assert decode.records[0]["missing"] >= 1
    assert decode.records[0]["error"] == ""


def test_a_load_that_is_lost_already_fetches_no_further_blocks(
    decode: Side, store: MemoryStore
) -> None:
    # With a server that answers nothing, each block would wait for a timeout of its own.
    store.away = True
    handle = a_handle(8)

    decode.step(a_load(handle, list(range(8))))
    decode.step_until(lambda: decode.received)

    assert store.num_gets <= 2, "one for each thread, for these are on their way together"
    assert decode.failed == Counter("d")


@pytest.mark.parametrize("place", [0, 8, 40, -1])
def test_a_damaged_block_counts_as_missing(
    prefill: Side,
    decode: Side,
    store: MemoryStore,
    caplog: pytest.LogCaptureFixture,
    place: int,
) -> None:
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    key = handle.key(2, 0)
    damaged = bytearray(store.values[key])
    damaged[place] ^= 1
    store.values[key] = bytes(damaged)

    decode.step(a_load(handle, [1, 2, 7]))
    decode.step_until(lambda: decode.received)

    assert decode.received == decode.failed == Counter("d")
    assert decode.records[0]["missing"] == 1
    assert not decode.cache[7].any(), "damaged bytes must not reach the cache"
    assert "is not usable" in caplog.text


def test_a_block_sealed_by_another_engine_counts_as_missing(
    make_side: Callable[..., Side], store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    # The same key, which cannot happen unless somebody tampers: the header has the last word.
    foreign, decode = make_side(fingerprint="f" * 16), make_side()
    handle = a_handle()
    foreign.step(a_save(handle, [5, 0, 3]))
    foreign.step_until(lambda: foreign.records)

    decode.step(a_load(handle, [1, 2, 7]))
    decode.step_until(lambda: decode.received)

    assert decode.failed == Counter("d")
    assert not decode.cache.any()


def test_a_store_that_is_away_fails_the_load_with_its_reason(
    decode: Side, store: MemoryStore
) -> None:
    store.away = True

    decode.step(a_load(a_handle(), [1, 2, 7]))
    decode.step_until(lambda: decode.received)

    assert decode.failed == Counter("d")
    assert decode.records[0]["missing"] >= 1
    assert decode.records[0]["error"].startswith("store: ")


def test_each_rank_says_how_many_ranks_will_report(
    make_side: Callable[..., Side],
) -> None:
    side = make_side(world=4)

    side.step(a_save(a_handle(), [5, 0, 3]))
    side.step_until(lambda: side.records)

    assert (side.records[0]["rank"], side.records[0]["world"]) == (0, 4)


def test_many_requests_at_once_are_each_reported_once(prefill: Side, decode: Side) -> None:
    names = [f"r{i}" for i in range(40)]
    handles = {name: a_handle(name=name) for name in names}
    saves = [
        BlockSave(request_id=n, handle=h, first=0, block_ids=[1, 2, 3], last=True)
        for n, h in handles.items()
    ]
    prefill.step(TransferPlan(saves=saves))
    prefill.step(TransferPlan(held=set(names)), finished=set(names))
    prefill.step_until(lambda: len(prefill.sent) == 40 and len(prefill.records) == 40)

    loads = [
        BlockLoad(request_id=n, handle=h, first=0, block_ids=[4, 5, 6]) for n, h in handles.items()
    ]
    decode.step(TransferPlan(loads=loads))
    decode.step_until(lambda: len(decode.received) == 40 and len(decode.records) == 40)

    assert prefill.sent == decode.received == Counter(names)
    assert not decode.failed
    assert sum(r["blocks"] for r in prefill.records) == 120
    assert sum(r["bytes"] for r in decode.records) == 120 * WIRE_BYTES
