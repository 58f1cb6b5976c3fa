"""How much is under way at once, for how long, and what is left of it after the close?"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable

import pytest

from pdtasks.kv import movers as movers_module
from pdtasks.kv.pages import BlockPages, Staging
from pdtasks.kv.transfer import BlockTransfer
from tests.unit.kv.doubles import MemoryStore
from tests.unit.kv.vllm_worker import (
    FP,
    NUM_THREADS,
    Side,
    a_handle,
    a_load,
    a_save,
    payload_of,
)
from tests.waiting import wait_until


@pytest.fixture
def stagings(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Staging]]:
    """All that are made."""
    made: list[weakref.ref[Staging]] = []

    class Recorded(Staging):
        def __init__(self, pages: BlockPages) -> None:
            super().__init__(pages)
            made.append(weakref.ref(self))

    monkeypatch.setattr(movers_module, "Staging", Recorded)
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

    threads = side.transfer._movers[0]._threads
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
    threads = side.transfer._movers[0]._threads
    wait_until(lambda: threads is None or threads._shutdown, what="the close")
    store.let_go()
    closing.join(10)

    # Then nothing is left open
    assert not closing.is_alive()
    assert side.transfer._saves.running == {}


def test_a_step_after_the_close_ends_its_transfers_and_not_the_engine(
    make_side: Callable[..., Side],
) -> None:
    side = make_side()
    side.transfer.close()

    side.step(a_save(a_handle(), [0, 1, 2]))
    side.step(a_load(a_handle(), [0, 1, 2]))

    side.step_until(lambda: side.failed["d"] and side.records)
    assert side.transfer._saves.running == side.transfer._loads.running == {}
