"""How do blocks get from the engine's cache to the store and back?"""

from __future__ import annotations

import gc
import hashlib
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from pdtasks.kv import transfer as transfer_module
from pdtasks.kv.codec import HEADER_BYTES, check
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.pages import BlockPages, Staging
from pdtasks.kv.plan import BlockLoad, BlockSave, TransferPlan
from pdtasks.kv.transfer import BlockTransfer
from tests.unit.kv.doubles import MemoryStore
from tests.waiting import wait_until

FP = "0123456789abcdef"
NUM_BLOCKS = 8
NUM_THREADS = 2
PAGE = 32
BLOCK_BYTES = 2 * PAGE
WIRE_BYTES = HEADER_BYTES + BLOCK_BYTES


class Side:
    """One engine's transfer side over a small cache on the CPU."""

    def __init__(
        self,
        store: MemoryStore,
        fingerprint: str = FP,
        world: int = 1,
        num_threads: int = NUM_THREADS,
        timeout_s: float = 10.0,
    ) -> None:
        tensor = KVCacheTensor(
            size=NUM_BLOCKS * BLOCK_BYTES,
            layers=["a", "b"],
            layer_stride=PAGE,
            block_stride=BLOCK_BYTES,
        )
        config = KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[tensor], kv_cache_groups=[])
        self.cache = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8)
        self.pages: Any = BlockPages({"a": self.cache, "b": self.cache}, config)
        self.transfer = BlockTransfer(
            store,  # type: ignore[arg-type]  # a double
            fingerprint=fingerprint,
            rank=0,
            world=world,
            num_threads=num_threads,
            timeout_s=timeout_s,
        )
        self.transfer.attach(self.pages)
        self.records: list[dict[str, Any]] = []
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

        self._begun: set[str] = set()
        self._ended: set[str] = set()

    def step(self, plan: TransferPlan | None = None, finished: set[str] | None = None) -> None:
        """What vLLM's model runner does with the connector in each step, in its order."""
        plan = plan or TransferPlan()
        self._begun |= {save.request_id for save in plan.saves}
        self._ended |= set(plan.finished)
        self.transfer.give_up(plan.preempted)
        self.transfer.start_loads(plan)
        self.transfer.start_saves(plan)
        results: KVConnectorTransferResults = self.transfer.take_results(finished or set())
        self.sent.update(results.finished_sending)
        self.received.update(results.finished_recving)
        self.failed.update(results.failed_recving)
        if (stats := self.transfer.take_stats()) is not None:
            self.records += stats.data["records"]

    def finish(self, **wanted: bool) -> None:
        """A step after these requests have ended."""
        self.step(TransferPlan(finished=wanted), finished=set(wanted))

    def end(self) -> None:
        """When all requests have ended, nothing is kept of any."""
        self.finish(**dict.fromkeys(self._begun - self._ended, False))
        self.step_until(lambda: not self.transfer.leftovers())

    def step_until(self, condition: Callable[[], Any]) -> None:
        def stepped() -> Any:
            self.step()
            return condition()

        wait_until(lambda: condition() or stepped(), what="the transfer's end")

    def steps(self, count: int = 3) -> None:
        """Some steps, in which a report that comes twice would be seen."""
        for _ in range(count):
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
    store.let_go()
    for side in sides:
        side.end()
        side.transfer.close()
    assert store.closed


def fill(side: Side, seed: int = 0) -> None:
    """As if the engine had computed something."""
    side.cache.copy_((torch.arange(side.cache.numel()) + seed).view_as(side.cache) % 251)


@pytest.fixture
def prefill(make_side: Callable[..., Side]) -> Side:
    side = make_side()
    fill(side)
    return side


@pytest.fixture
def decode(make_side: Callable[..., Side]) -> Side:
    return make_side()


def a_handle(
    num_blocks: int = 3, tail: bool = True, name: str = "t", tail_digest: str = "digest"
) -> KVHandle:
    num_full = num_blocks - tail
    return KVHandle(
        fingerprint=FP,
        transfer_id=name,
        num_tokens=num_full * 16 + (5 if tail else 0),
        block_size=16,
        hashes=tuple(f"{name}{i}".encode() for i in range(num_full)),
        tail_digest=tail_digest,
        expires_at=time.time() + 60,
    )


def a_save(
    handle: KVHandle, ids: list[int], *, first: int = 0, last: bool = True, request_id: str = "p"
) -> TransferPlan:
    return TransferPlan(
        saves=[
            BlockSave(request_id=request_id, handle=handle, first=first, block_ids=ids, last=last)
        ]
    )


def a_load(handle: KVHandle, ids: list[int], *, first: int = 0) -> TransferPlan:
    return TransferPlan(
        loads=[BlockLoad(request_id="d", handle=handle, first=first, block_ids=ids)]
    )


def payload_of(store: MemoryStore, key: str) -> list[int]:
    """What is stored under `key`, which is intact."""
    value = memoryview(store.values[key])
    content = f"{key}:digest" if key.startswith("pd:kv:tail:") else key
    check(value[:HEADER_BYTES], content, value[HEADER_BYTES:], FP)
    return list(value[HEADER_BYTES:])


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


def test_the_engines_thread_copies_nothing(prefill: Side, store: MemoryStore) -> None:
    # Given a store that is slow to say what it has
    store.hold("touch")
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))

    # When the blocks change, which vLLM's do not until it is told that they are sent
    fill(prefill, seed=100)
    store.let_go()
    prefill.step_until(lambda: prefill.records)

    # Then it shows that they were not copied within the step
    assert payload_of(store, handle.key(0, 0)) == prefill.cache[5].tolist()


def test_a_block_is_copied_before_it_is_sent_not_while(prefill: Side, store: MemoryStore) -> None:
    store.hold("put")
    handle, computed = a_handle(2), prefill.cache.clone()
    prefill.step(a_save(handle, [5, 0]))
    wait_until(lambda: store.under_way["put"] == 2)

    fill(prefill, seed=100)
    store.let_go()
    prefill.step_until(lambda: prefill.records)

    assert payload_of(store, handle.key(0, 0)) == computed[5].tolist()
    assert payload_of(store, handle.key(1, 0)) == computed[0].tolist()


@pytest.mark.parametrize("tail", [False, True])
def test_a_block_that_is_in_the_store_is_not_sent_again_unless_it_is_partial(
    prefill: Side, store: MemoryStore, tail: bool
) -> None:
    # A full block's name says what it contains, a partial one's only whose it is.
    handle = a_handle(tail=tail)
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    store.puts.clear()

    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: len(prefill.records) == 2)

    assert store.puts == ([handle.key(2, 0)] if tail else [])
    assert prefill.records[1]["blocks"] == 3
    assert prefill.records[1]["bytes"] == WIRE_BYTES * tail


def test_a_prompt_in_chunks_is_one_record_when_the_last_chunk_is_sent(prefill: Side) -> None:
    handle = a_handle(4)
    prefill.step(a_save(handle, [0, 1], last=False))
    prefill.step(a_save(handle, [2], first=2, last=False))
    assert not prefill.records

    prefill.step(a_save(handle, [3], first=3))
    prefill.step_until(lambda: prefill.records)

    assert [r["blocks"] for r in prefill.records] == [4]


def test_a_last_chunk_may_bring_no_block(prefill: Side) -> None:
    prefill.step(a_save(a_handle(2, tail=False), [0, 1], last=False))
    prefill.step(a_save(a_handle(2, tail=False), [], first=2))

    prefill.step_until(lambda: prefill.records)

    assert [r["blocks"] for r in prefill.records] == [2]


# -- finished requests -------------------------------------------------------------------------


@pytest.mark.parametrize("finishes_first", [True, False])
@pytest.mark.parametrize("wanted", [True, False], ids=["finished", "aborted"])
def test_an_ended_request_is_reported_as_sent_exactly_once(
    prefill: Side, store: MemoryStore, finishes_first: bool, wanted: bool
) -> None:
    if finishes_first:
        store.hold("touch", "put")
    prefill.step(a_save(a_handle(), [5, 0, 3]))
    if not finishes_first:
        prefill.step_until(lambda: prefill.records)
        assert not prefill.sent, "the scheduler has not said that the request has finished"

    prefill.finish(p=wanted)
    if finishes_first:
        prefill.steps()
        assert not prefill.sent, "its blocks may still be read"
    store.let_go()
    prefill.step_until(lambda: prefill.sent)
    prefill.steps()

    assert prefill.sent == Counter("p")
    assert len(prefill.records) == 1
    assert not prefill.transfer._held, "it is forgotten"


def test_a_request_that_never_had_a_save_is_never_reported(prefill: Side) -> None:
    # vLLM says of every request that it has finished, but the plan names those that saved.
    prefill.step(a_save(a_handle(), [5, 0, 3]))
    prefill.step(TransferPlan(finished={"p": True}), finished={"p", "other"})

    prefill.step_until(lambda: prefill.sent)
    prefill.steps()

    assert prefill.sent == Counter("p")


def test_a_finished_request_sends_all_its_blocks(prefill: Side, store: MemoryStore) -> None:
    store.hold("touch")
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.finish(p=True)
    store.let_go()

    prefill.step_until(lambda: prefill.sent)

    assert sorted(store.puts) == sorted(handle.key(i, 0) for i in range(3))


def test_an_aborted_request_skips_what_was_not_sent_yet(prefill: Side, store: MemoryStore) -> None:
    # Given eight blocks, of which each thread is sending one
    store.hold("put")
    handle, computed = a_handle(8), prefill.cache.clone()
    prefill.step(a_save(handle, list(range(8))))
    wait_until(lambda: store.under_way["put"] == NUM_THREADS)

    # When the request is aborted
    prefill.finish(p=False)
    store.let_go()
    prefill.step_until(lambda: prefill.sent)

    # Then the rest stays, and what was sent is as good as any other block
    assert len(store.puts) == NUM_THREADS
    for key in store.puts:
        assert payload_of(store, key) in computed.tolist()
    (record,) = prefill.records
    assert (record["blocks"], record["error"]) == (NUM_THREADS, "")


def test_a_request_aborted_between_two_chunks_is_reported_when_the_first_is_through(
    prefill: Side, store: MemoryStore
) -> None:
    store.hold("touch")
    prefill.step(a_save(a_handle(4), [0, 1], last=False))
    prefill.finish(p=False)
    assert not prefill.sent

    store.let_go()
    prefill.step_until(lambda: prefill.sent)
    prefill.steps()

    assert prefill.sent == Counter("p")
    assert store.puts == []
    assert not prefill.transfer._saves


def test_a_request_aborted_when_all_its_chunks_so_far_are_sent_is_reported(prefill: Side) -> None:
    prefill.step(a_save(a_handle(4), [0, 1], last=False))
    wait_until(lambda: prefill.transfer._saves["p"].open == 0)

    prefill.finish(p=False)

    assert prefill.sent == Counter("p")


def test_an_abort_leaves_other_requests_alone(prefill: Side, store: MemoryStore) -> None:
    store.hold("touch")
    prefill.step(a_save(a_handle(), [5, 0, 3]))
    prefill.step(a_save(a_handle(name="u"), [1, 2, 4], request_id="q"))

    prefill.finish(p=False, q=True)
    store.let_go()
    prefill.step_until(lambda: len(prefill.sent) == 2)

    assert sorted(store.puts) == sorted(a_handle(name="u").key(i, 0) for i in range(3))
    assert prefill.sent == Counter("pq")


def test_an_aborted_request_still_says_when_its_blocks_are_in_the_store(
    prefill: Side, store: MemoryStore
) -> None:
    # Whoever started it has to wait for that before it can delete the partial block.
    handle = a_handle(1)
    store.hold("put")
    prefill.step(a_save(handle, [5]))
    wait_until(lambda: store.under_way["put"])
    prefill.finish(p=False)
    prefill.steps()
    assert not prefill.records
    store.let_go()

    prefill.step_until(lambda: prefill.records)

    assert handle.key(0, 0) in store.values


@pytest.mark.parametrize("operation", ["touch", "put"])
def test_a_store_that_is_away_fails_the_save_and_frees_the_blocks(
    prefill: Side, store: MemoryStore, operation: str
) -> None:
    handle = a_handle()
    if operation == "touch":
        store.away = True
    else:
        store.hold("put")
    prefill.step(a_save(handle, [5, 0, 3]))
    if operation == "put":
        wait_until(lambda: store.under_way["put"] == NUM_THREADS)
        store.away = True
        store.let_go()
    prefill.finish(p=True)

    prefill.step_until(lambda: prefill.sent and prefill.records)
    prefill.steps()

    assert prefill.sent == Counter("p")
    (record,) = prefill.records
    assert record["blocks"] == record["bytes"] == 0
    assert record["error"].startswith("store: ")


def test_one_block_that_is_refused_spares_the_rest(prefill: Side, store: MemoryStore) -> None:
    # Decode will compute all of the prompt: the others are of no use.
    handle = a_handle(8)
    store.hold("put")
    prefill.step(a_save(handle, list(range(8))))
    wait_until(lambda: store.under_way["put"] == NUM_THREADS)
    store.broken.update(handle.key(i, 0) for i in range(NUM_THREADS))
    store.let_go()

    prefill.step_until(lambda: prefill.records)

    assert store.puts == []
    assert prefill.records[0]["error"] == "store: ValkeyError: the store is away"


# -- preemption --------------------------------------------------------------------------------


def preempted(*request_ids: str) -> TransferPlan:
    return TransferPlan(preempted=set(request_ids))


@pytest.mark.parametrize("operation", ["touch", "put"])
def test_a_block_of_a_preempted_request_is_stored_as_it_was_or_not_at_all(
    prefill: Side, store: MemoryStore, operation: str
) -> None:
    # Given a store that is slow, and a prompt of eight blocks on its way
    store.hold(operation)
    handle, computed = a_handle(8), prefill.cache.clone()
    prefill.step(a_save(handle, list(range(8))))
    wait_until(lambda: store.under_way[operation])
    if operation == "put":
        wait_until(lambda: store.under_way["put"] == NUM_THREADS)

    # When vLLM gives its blocks to somebody else
    prefill.step(preempted("p"))
    fill(prefill, seed=100)
    store.let_go()
    prefill.transfer._submit(lambda: None)
    wait_until(lambda: not store.under_way["put"] and not store.under_way["touch"])
    prefill.transfer.close()  # waits for whatever is still to come

    # Then nothing of theirs is stored under its names
    assert len(store.values) == (NUM_THREADS if operation == "put" else 0)
    for index in range(8):
        if (key := handle.key(index, 0)) in store.values:
            assert payload_of(store, key) == computed[index].tolist()
    # and nobody hears of it
    prefill.steps()
    assert not prefill.sent
    assert not prefill.records


class HeldMark:
    """Work of the engine that a copy has to wait for, as on CUDA."""

    def __init__(self) -> None:
        self.waiting = threading.Semaphore(0)
        self.reached = threading.Event()

    def synchronize(self) -> None:
        self.waiting.release()
        assert self.reached.wait(10)


def test_giving_up_waits_for_copies_under_way(prefill: Side, store: MemoryStore) -> None:
    # Given threads that copy
    mark, handle, computed = HeldMark(), a_handle(8), prefill.cache.clone()
    prefill.pages.mark = lambda: mark
    prefill.step(a_save(handle, list(range(8))))
    for _ in range(NUM_THREADS):
        assert mark.waiting.acquire(timeout=10)

    # When their request is preempted
    done = threading.Event()

    def give_up() -> None:
        prefill.transfer.give_up({"p"})
        prefill.cache.fill_(99)
        done.set()

    giving_up = threading.Thread(target=give_up)
    giving_up.start()

    # Then the engine may not go on before they are done
    assert not done.wait(0.1)
    mark.reached.set()
    assert done.wait(10)
    giving_up.join()
    wait_until(lambda: len(store.puts) == NUM_THREADS)
    prefill.transfer.close()
    assert len(store.puts) == NUM_THREADS
    for index in range(NUM_THREADS):
        assert payload_of(store, handle.key(index, 0)) == computed[index].tolist()


def test_giving_up_does_not_wait_for_the_network(prefill: Side, store: MemoryStore) -> None:
    store.hold("put")
    prefill.step(a_save(a_handle(8), list(range(8))))
    wait_until(lambda: store.under_way["put"] == NUM_THREADS)

    prefill.transfer.give_up({"p"})

    assert store.under_way["put"] == NUM_THREADS


def test_giving_up_one_request_does_not_wait_for_copies_of_another(prefill: Side) -> None:
    mark = HeldMark()
    prefill.pages.mark = lambda: mark
    prefill.step(a_save(a_handle(1, name="u"), [1], request_id="q"))
    assert mark.waiting.acquire(timeout=10)

    prefill.transfer.give_up({"p", "never heard of"})

    mark.reached.set()
    prefill.finish(q=True)
    prefill.step_until(lambda: prefill.sent)


@pytest.mark.parametrize("operation", ["touch", "put", "nothing"])
def test_a_preempted_request_that_is_saved_again_is_reported_once(
    prefill: Side, store: MemoryStore, operation: str
) -> None:
    # Given a request that is preempted before, while or after it is sent
    store.hold(operation)
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    if operation == "nothing":
        prefill.step_until(lambda: prefill.records)
        prefill.records.clear()
    else:
        wait_until(lambda: store.under_way[operation])

    # When it is computed again, in other blocks, and finishes
    again = a_save(handle, [1, 2, 4])
    again.preempted = {"p"}
    prefill.step(again)
    prefill.finish(p=True)
    if operation != "nothing":
        prefill.steps()
        assert not prefill.sent, "the first attempt does not count"
    store.let_go()
    prefill.step_until(lambda: prefill.sent)
    prefill.steps()

    # Then
    assert prefill.sent == Counter("p")
    (record,) = prefill.records
    assert record["blocks"] == 3
    assert {handle.key(i, 0) for i in range(3)} == set(store.values)
    for key in store.values:
        payload_of(store, key)


def test_a_request_preempted_after_it_was_sent_waits_for_its_second_save(
    prefill: Side, store: MemoryStore
) -> None:
    prefill.step(a_save(a_handle(), [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    prefill.step(preempted("p"))

    # It is aborted before anything is saved again: vLLM has its blocks and asks for no report.
    prefill.steps()

    assert not prefill.sent
    assert not prefill.transfer._sent


# -- limits ------------------------------------------------------------------------------------


@pytest.fixture
def stagings(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Staging]]:
    """All that are made."""
    made: list[weakref.ref[Staging]] = []

    class Recorded(Staging):
        def __init__(self, pages: BlockPages) -> None:
            super().__init__(pages)
            made.append(weakref.ref(self))

    monkeypatch.setattr(transfer_module, "Staging", Recorded)
    return made


@pytest.mark.parametrize("num_threads", [1, 3])
def test_no_more_blocks_are_under_way_than_there_are_threads(
    make_side: Callable[..., Side],
    store: MemoryStore,
    stagings: list[weakref.ref[Staging]],
    num_threads: int,
) -> None:
    side = make_side(num_threads=num_threads)
    store.hold("put")
    names = [f"r{i}" for i in range(20)]
    for name in names:
        side.step(a_save(a_handle(8, name=name), list(range(8)), request_id=name))
    wait_until(lambda: store.under_way["put"] == num_threads)

    store.let_go()
    side.finish(**dict.fromkeys(names, True))
    side.step_until(lambda: len(side.sent) == len(names))

    assert len(store.puts) == 160
    assert store.peak["put"] == num_threads
    assert len(stagings) == num_threads


def test_no_more_blocks_are_fetched_at_once_than_there_are_threads(
    make_side: Callable[..., Side], store: MemoryStore, stagings: list[weakref.ref[Staging]]
) -> None:
    side = make_side(num_threads=3)
    store.hold("get")
    side.step(a_load(a_handle(8), list(range(8))))
    wait_until(lambda: store.under_way["get"] == 3)
    store.let_go()

    side.step_until(lambda: side.received)

    assert store.peak["get"] == 3
    assert len(stagings) == 3


def test_a_store_that_takes_too_long_is_an_error_and_the_blocks_are_released(
    make_side: Callable[..., Side], store: MemoryStore
) -> None:
    # Given a store that tells what it has when the deadline is over
    side = make_side(timeout_s=0.1)
    store.hold("touch")
    side.step(a_save(a_handle(8), list(range(8))))
    side.finish(p=True)
    deadline = time.monotonic() + 0.1
    wait_until(lambda: time.monotonic() > deadline)
    store.let_go()

    side.step_until(lambda: side.sent)
    side.steps()

    assert side.sent == Counter("p")
    assert store.puts == []
    (record,) = side.records
    assert record["blocks"] == 0
    assert record["error"].startswith("store: too slow")


@pytest.mark.parametrize("num_blocks", [1, 8])
def test_a_store_that_takes_no_block_in_time_is_an_error_and_the_blocks_are_released(
    make_side: Callable[..., Side], store: MemoryStore, num_blocks: int
) -> None:
    side = make_side(timeout_s=0.2)
    store.hold("put")
    began = time.monotonic()
    side.step(a_save(a_handle(num_blocks), list(range(num_blocks))))
    side.finish(p=True)

    side.step_until(lambda: side.sent)

    assert 0.2 <= time.monotonic() - began < 2, "one deadline for all blocks, not one for each"
    assert "deadline" in side.records[0]["error"]
    assert store.peak["put"] <= NUM_THREADS


def test_a_load_that_takes_too_long_fails(
    make_side: Callable[..., Side], store: MemoryStore
) -> None:
    side = make_side(timeout_s=0.2)
    store.hold("get")
    began = time.monotonic()

    side.step(a_load(a_handle(8), list(range(8))))
    side.step_until(lambda: side.received)
    side.steps()

    assert 0.2 <= time.monotonic() - began < 2
    assert side.received == side.failed == Counter("d")
    assert "deadline" in side.records[0]["error"]


def test_a_late_save_does_not_spoil_the_next(
    make_side: Callable[..., Side], store: MemoryStore
) -> None:
    side = make_side(timeout_s=0.2)
    store.hold("put")
    side.step(a_save(a_handle(), [5, 0, 3]))
    side.step_until(lambda: side.records)
    store.let_go()

    side.step(a_save(a_handle(name="u"), [5, 0, 3], request_id="q"))
    side.step_until(lambda: len(side.records) == 2)

    assert (side.records[1]["blocks"], side.records[1]["error"]) == (3, "")


@pytest.mark.parametrize("used", [False, True])
def test_closing_frees_the_memory_and_closes_the_store(
    store: MemoryStore, stagings: list[weakref.ref[Staging]], used: bool
) -> None:
    side = Side(store, num_threads=4)
    if used:
        side.step(a_save(a_handle(1), [0]))  # one thread does it
        side.step_until(lambda: side.records)
    assert sum(ref() is not None for ref in stagings) == 4

    side.transfer.close()

    gc.collect()
    assert [ref() for ref in stagings] == [None] * 4
    assert store.closed
    assert not [t for t in threading.enumerate() if t.name.startswith("kv-transfer")]


def test_closing_waits_for_what_is_under_way_and_drops_the_rest(store: MemoryStore) -> None:
    side = Side(store)
    store.hold("put")
    side.step(a_save(a_handle(8), list(range(8))))
    wait_until(lambda: store.under_way["put"] == NUM_THREADS)

    threads = side.transfer._threads
    assert threads is not None
    closing = threading.Thread(target=side.transfer.close)
    closing.start()
    # What waits for its turn is dropped, but for the word that says that this is the end.
    wait_until(lambda: threads._work_queue.qsize() == 1)
    assert closing.is_alive()
    store.let_go()
    closing.join(10)

    assert store.closed
    assert len(store.puts) == NUM_THREADS
    for key in store.puts:
        payload_of(store, key)


def test_a_side_that_never_got_a_cache_can_be_closed(store: MemoryStore) -> None:
    transfer = BlockTransfer(
        store,  # type: ignore[arg-type]  # a double
        fingerprint=FP,
        rank=0,
        world=1,
        num_threads=2,
        timeout_s=1,
    )

    transfer.close()

    assert store.closed


# -- loads -------------------------------------------------------------------------------------


def test_a_load_without_a_block_ends_as_well(decode: Side) -> None:
    decode.step(a_load(a_handle(), []))

    decode.step_until(lambda: decode.received["d"])
    assert decode.failed == Counter()


def test_what_is_to_be_sent_after_the_close_ends_too(
    store: MemoryStore, make_side: Callable[..., Side]
) -> None:
    # Given a store that hangs while it says what it has
    side = make_side(num_threads=1)
    store.hold("touch")
    side.step(a_save(a_handle(), [0, 1, 2]))
    wait_until(lambda: store.under_way["touch"])

    # When the engine stops meanwhile
    closing = threading.Thread(target=side.transfer.close)
    closing.start()
    threads = side.transfer._threads
    wait_until(lambda: threads is None or threads._shutdown, what="the close")
    store.let_go()
    closing.join(10)

    # Then nothing is left open
    assert not closing.is_alive()
    assert side.transfer._saves == {}


def test_a_step_after_the_close_ends_its_transfers_and_not_the_engine(
    make_side: Callable[..., Side],
) -> None:
    side = make_side()
    side.transfer.close()

    side.step(a_save(a_handle(), [0, 1, 2]))
    side.step(a_load(a_handle(), [0, 1, 2]))

    side.step_until(lambda: side.failed["d"] and side.records)
    assert side.transfer._saves == side.transfer._loads == {}


def test_a_load_ends_whatever_is_raised_while_a_damaged_block_is_deleted(
    prefill: Side, decode: Side, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    key = handle.key(0, 0)
    store.values[key] = store.values[key][:-1] + b"?"

    def surprise(keys: Iterable[str]) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(store, "delete", surprise)
    decode.step(a_load(handle, [1, 2, 4]))

    decode.step_until(lambda: decode.failed["d"])
    assert decode.transfer._loads == {}


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

    assert store.num_gets <= NUM_THREADS, "these are on their way together"
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
    assert decode.records[0]["missing"] >= 1
    assert not decode.cache[7].any(), "damaged bytes must not reach the cache"
    assert "is not usable" in caplog.text
    assert key not in store.values, "prefill would take it for a good one"


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


def test_a_partial_block_of_another_content_counts_as_missing(
    prefill: Side, decode: Side, store: MemoryStore
) -> None:
    # The same transfer's name, but the prompt ended with other tokens.
    prefill.step(a_save(a_handle(tail_digest="other"), [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)

    decode.step(a_load(a_handle(), [1, 2, 7]))
    decode.step_until(lambda: decode.received)

    assert decode.failed == Counter("d")
    assert not decode.cache[7].any()
    assert a_handle().key(2, 0) not in store.values


def test_a_block_under_the_name_of_another_counts_as_missing(
    prefill: Side, decode: Side, store: MemoryStore
) -> None:
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    first, second = handle.key(0, 0), handle.key(1, 0)
    store.values[first] = store.values[second]

    decode.step(a_load(handle, [1, 2, 7]))
    decode.step_until(lambda: decode.received)

    assert decode.failed == Counter("d")
    assert not decode.cache[1].any()
    assert first not in store.values, "prefill would take it for a good one"


@pytest.mark.parametrize("length", [0, 5, WIRE_BYTES - 1, WIRE_BYTES + 1])
def test_a_value_of_another_length_counts_as_missing_and_is_deleted(
    prefill: Side, decode: Side, store: MemoryStore, length: int
) -> None:
    handle = a_handle()
    prefill.step(a_save(handle, [5, 0, 3]))
    prefill.step_until(lambda: prefill.records)
    store.values[handle.key(2, 0)] = bytes(length)

    decode.step(a_load(handle, [1, 2, 7]))
    decode.step_until(lambda: decode.received)

    assert decode.received == decode.failed == Counter("d")
    assert not decode.cache[7].any()
    assert handle.key(2, 0) not in store.values


def test_a_load_of_an_aborted_request_fetches_no_further_blocks(
    prefill: Side, decode: Side, store: MemoryStore
) -> None:
    handle = a_handle(8)
    prefill.step(a_save(handle, list(range(8))))
    prefill.step_until(lambda: prefill.records)
    store.hold("get")
    decode.step(a_load(handle, list(range(8))))
    wait_until(lambda: store.under_way["get"] == NUM_THREADS)

    decode.step(finished={"d"})
    store.let_go()
    decode.step_until(lambda: decode.received)
    decode.steps()

    assert store.num_gets == NUM_THREADS
    assert decode.received == Counter("d"), "vLLM keeps the blocks until it hears of them"


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
    prefill.finish(**dict.fromkeys(names, True))
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


# -- everything at once ------------------------------------------------------------------------


def content_of(key: str) -> torch.Tensor:
    """What the engine computes for the block of this name, and for no other."""
    digest = hashlib.shake_128(key.encode()).digest(BLOCK_BYTES)
    return torch.tensor(list(digest), dtype=torch.uint8)


class Engine:
    """Requests that come, are preempted, aborted and finished, in a cache that is always full."""

    def __init__(self, side: Side, seed: int) -> None:
        self.side = side
        self.random = random.Random(seed)
        self.free = list(range(NUM_BLOCKS))
        self.running: dict[str, tuple[KVHandle, list[int], int]] = {}  # blocks, how many are saved
        self.ended: dict[str, list[int]] = {}
        self.expected: set[str] = set()
        self.count = 0

    def step(self) -> None:
        plan = TransferPlan()
        self.decide(plan)
        while len(self.free) >= 3:
            self.count += 1
            self.start(f"r{self.count}", a_handle(name=f"r{self.count % 7}"))
        # vLLM's order: blocks are given up before the step computes in them.
        self.side.transfer.give_up(plan.preempted)
        plan.preempted = set()
        self.compute(plan)
        before = Counter(self.side.sent)
        self.side.step(plan, finished=set(plan.finished))
        for request_id in self.side.sent - before:
            self.free += self.ended.pop(request_id)

    def decide(self, plan: TransferPlan) -> None:
        """Preempt, abort and finish."""
        for request_id in list(self.running):
            handle, blocks, saved = self.running[request_id]
            fate = self.random.random()
            if fate < 0.15:
                del self.running[request_id]
                plan.preempted.add(request_id)
                self.free += blocks
                if fate < 0.1:  # resumes in the same step
                    self.start(request_id, handle)
            elif saved == 3 or fate < 0.3:
                del self.running[request_id]
                if saved:
                    plan.finished[request_id] = saved == 3
                    self.ended[request_id] = blocks
                    self.expected.add(request_id)
                else:
                    self.free += blocks

    def compute(self, plan: TransferPlan) -> None:
        """Fill further blocks of what runs, and plan to save them."""
        for request_id, (handle, blocks, saved) in self.running.items():
            if saved < 3:
                upto = self.random.randint(saved + 1, 3)
                for index in range(saved, upto):
                    self.side.cache[blocks[index]] = content_of(handle.key(index, 0))
                plan.saves += a_save(
                    handle, blocks[saved:upto], first=saved, last=upto == 3, request_id=request_id
                ).saves
                self.running[request_id] = handle, blocks, upto

    def start(self, request_id: str, handle: KVHandle) -> None:
        self.random.shuffle(self.free)
        self.running[request_id] = handle, [self.free.pop() for _ in range(3)], 0


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_a_name_has_its_own_bytes_or_none(
    make_side: Callable[..., Side], store: MemoryStore, seed: int
) -> None:
    engine = Engine(make_side(num_threads=3), seed)

    def enough() -> bool:
        engine.step()
        if engine.random.random() < 0.2:
            store.hold(engine.random.choice(["touch", "put"]))
        if engine.random.random() < 0.4:
            store.let_go()
        if engine.random.random() < 0.2:
            store.values.clear()  # evicted
        for key in list(store.values):
            seen.add((key, tuple(payload_of(store, key))))
        return len(store.puts) > 100 and engine.count > 100

    seen: set[tuple[str, tuple[int, ...]]] = set()
    wait_until(enough)
    store.let_go()
    engine.side.step_until(lambda: not engine.ended.keys() - engine.side.sent.keys())
    engine.side.steps()

    assert seen
    assert seen == {(key, tuple(content_of(key).tolist())) for key, _ in seen}
    assert engine.side.sent == Counter(engine.expected), "each request once, and no other"
    assert not any(record["error"] for record in engine.side.records)
