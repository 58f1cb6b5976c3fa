"""Does a name keep its own bytes when vLLM gives the blocks to somebody else?"""

from __future__ import annotations

import hashlib
import random
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from pdtasks.kv.handle import KVHandle
from pdtasks.kv.plan import TransferPlan
from tests.unit.kv.doubles import MemoryStore
from tests.unit.kv.vllm_worker import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    NUM_THREADS,
    Side,
    a_handle,
    a_save,
    fill,
    payload_of,
)
from tests.waiting import wait_until


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
    prefill.transfer._movers[0].submit(lambda: None)
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
        prefill.transfer.before_step(TransferPlan(preempted={"p"}))
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

    prefill.transfer.before_step(TransferPlan(preempted={"p"}))

    assert store.under_way["put"] == NUM_THREADS


def test_giving_up_one_request_does_not_wait_for_copies_of_another(prefill: Side) -> None:
    mark = HeldMark()
    prefill.pages.mark = lambda: mark
    prefill.step(a_save(a_handle(1, name="u"), [1], request_id="q"))
    assert mark.waiting.acquire(timeout=10)

    prefill.transfer.before_step(TransferPlan(preempted={"p", "never heard of"}))

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
    assert not prefill.transfer._saves._sent


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
        self.side.transfer.before_step(plan)
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


@pytest.mark.parametrize(
    ("seed", "ring_slots"), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 5), (5, 5), (6, 100)]
)
def test_whatever_happens_a_name_has_its_own_bytes_or_none(
    make_side: Callable[..., Side], store: MemoryStore, seed: int, ring_slots: int
) -> None:
    engine = Engine(make_side(num_threads=3, ring_slots=ring_slots), seed)

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
