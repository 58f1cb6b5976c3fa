"""How do blocks get from the store into the engine's cache, and which are refused?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import torch

from pdtasks.kv.plan import BlockLoad, BlockSave, TransferPlan
from tests.unit.kv.doubles import MemoryStore
from tests.unit.kv.vllm_worker import (
    NUM_THREADS,
    WIRE_BYTES,
    Side,
    a_handle,
    a_load,
    a_save,
)
from tests.waiting import wait_until


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


def test_a_load_without_a_block_ends_as_well(decode: Side) -> None:
    decode.step(a_load(a_handle(), []))

    decode.step_until(lambda: decode.received["d"])
    assert decode.failed == Counter()


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
    assert decode.transfer._loads.running == {}


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
