"""How do blocks get from the engine's cache to the store, and when are they reported as sent?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from pdtasks.kv.plan import TransferPlan
from tests.unit.kv.doubles import MemoryStore
from tests.unit.kv.vllm_worker import (
    NUM_THREADS,
    WIRE_BYTES,
    Side,
    a_handle,
    a_save,
    fill,
    payload_of,
)
from tests.waiting import wait_until


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


def test_each_rank_says_how_many_ranks_will_report(
    make_side: Callable[..., Side],
) -> None:
    side = make_side(world=4)

    side.step(a_save(a_handle(), [5, 0, 3]))
    side.step_until(lambda: side.records)

    assert (side.records[0]["rank"], side.records[0]["world"]) == (0, 4)


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
    assert not prefill.transfer._saves._held, "it is forgotten"


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
    assert not prefill.transfer._saves.running


def test_a_request_aborted_when_all_its_chunks_so_far_are_sent_is_reported(prefill: Side) -> None:
    prefill.step(a_save(a_handle(4), [0, 1], last=False))
    wait_until(lambda: prefill.transfer._saves.running["p"].open == 0)

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
