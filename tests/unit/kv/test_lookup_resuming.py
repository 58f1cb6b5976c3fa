"""Which blocks does a handed-over request read? On vLLM's own `Request` objects."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from pdtasks.kv.handle import KVHandle
from pdtasks.kv.lookup import BlockLookup, _tail_digest
from tests.unit.kv.vllm_scheduler import (
    BLOCK,
    FP,
    FakeProbe,
    FakeScheduler,
    a_request,
    blocks_of,
)


def a_handle(num_tokens: int = 40, **fields: Any) -> KVHandle:
    request = a_request(num_tokens)
    hashes = tuple(bytes(h) for h in request.block_hashes)
    values: dict[str, Any] = {
        "fingerprint": FP,
        "transfer_id": "t1",
        "num_tokens": num_tokens,
        "block_size": BLOCK,
        "hashes": hashes,
        "tail_digest": _tail_digest(request, hashes, len(hashes) * BLOCK),
        "expires_at": time.time() + 60,
    }
    return KVHandle(**values | fields)


@pytest.mark.parametrize("load", [None, {}], ids=["no handle", "an empty one"])
def test_a_request_that_only_resumes_neither_saves_nor_looks_for_a_prefix(
    scheduler: FakeScheduler, probe: FakeProbe, load: dict[str, Any] | None
) -> None:
    # The prefill engine has written its blocks, or nobody wants them.
    request = a_request(40, load=load, resume=[99])
    scheduler.add(request, [7, 3, 9])

    assert scheduler.lookup.num_loadable_tokens(request, 0) == 0
    assert scheduler.step({request: 41}).saves == []
    assert probe.asked == {}
    request.status = RequestStatus.FINISHED_STOPPED
    assert scheduler.lookup.finish(request) == (False, None)


def test_a_request_that_loads_neither_saves_nor_looks_for_a_prefix(
    scheduler: FakeScheduler, probe: FakeProbe
) -> None:
    request = a_decode_request()
    scheduler.add(request, [7, 3, 9])

    assert scheduler.step({request: 41}).saves == []
    assert probe.asked == {}


def a_decode_request(handle: KVHandle | dict[str, Any] | None = None, **fields: Any) -> Request:
    handle = handle if handle is not None else a_handle(**fields)
    wire = handle.to_wire() if isinstance(handle, KVHandle) else handle
    # As it arrives: through MessagePack.
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(wire))
    return a_request(40, load=wire, resume=[99])


def test_a_whole_prompt_is_loaded_and_only_once(lookup: BlockLookup) -> None:
    request = a_decode_request()
    lookup.on_new_request(request)

    # vLLM may ask several times before it finds room.
    assert [lookup.num_loadable_tokens(request, 0) for _ in range(2)] == [40, 40]
    lookup.plan_load(request, blocks_of([5, 6, 8]), 40)

    (load,) = lookup.build_plan(SchedulerOutput.make_empty()).loads
    assert (load.request_id, load.first, load.block_ids) == ("r", 0, [5, 6, 8])
    assert load.handle == a_handle(expires_at=load.handle.expires_at)
    assert lookup.build_plan(SchedulerOutput.make_empty()).loads == []
    # A request that comes here again (failed load, preemption) recomputes.
    assert lookup.num_loadable_tokens(request, 0) == 0
    lookup.plan_load(request, blocks_of([5, 6, 8]), 0)
    assert lookup.build_plan(SchedulerOutput.make_empty()).loads == []


def test_the_first_token_is_output_that_is_already_there(lookup: BlockLookup) -> None:
    request = a_decode_request()

    lookup.on_new_request(request)

    assert list(request.output_token_ids) == [99]
    assert request.num_prompt_tokens == 40
    assert request.num_tokens == 41


def test_blocks_of_the_local_prefix_cache_are_not_loaded(lookup: BlockLookup) -> None:
    request = a_decode_request()
    lookup.on_new_request(request)

    assert lookup.num_loadable_tokens(request, 32) == 8
    lookup.plan_load(request, blocks_of([5, 6, 8], num_cached=2), 8)

    (load,) = lookup.build_plan(SchedulerOutput.make_empty()).loads
    assert (load.first, load.block_ids) == (2, [8])


def test_room_for_the_next_token_is_not_loaded_into(lookup: BlockLookup) -> None:
    # Given a prompt that ends with a block, so that the first token has a block of its own
    request = a_request(32, load=a_handle(32).to_wire(), resume=[99])
    lookup.on_new_request(request)

    assert lookup.num_loadable_tokens(request, 0) == 32
    lookup.plan_load(request, blocks_of([5, 6, 8]), 32)

    (load,) = lookup.build_plan(SchedulerOutput.make_empty()).loads
    assert load.block_ids == [5, 6]


def test_a_prompt_that_is_all_in_the_local_cache_loads_nothing(lookup: BlockLookup) -> None:
    request = a_request(32, load=a_handle(32).to_wire(), resume=[99])
    lookup.on_new_request(request)

    assert lookup.num_loadable_tokens(request, 32) == 0
    lookup.plan_load(request, blocks_of([5, 6], num_cached=2), 0)

    assert lookup.build_plan(SchedulerOutput.make_empty()).loads == []


@pytest.mark.parametrize(
    "handle",
    [
        pytest.param(a_handle(fingerprint="f" * 16), id="foreign"),
        pytest.param(a_handle(expires_at=time.time() - 1), id="expired"),
        pytest.param(a_handle(56), id="longer than the prompt"),
        pytest.param({"fingerprint": 7}, id="unreadable"),
    ],
)
def test_a_handle_that_cannot_be_used_is_a_recompute(
    lookup: BlockLookup, handle: KVHandle | dict[str, Any]
) -> None:
    request = a_decode_request(handle)
    lookup.on_new_request(request)

    assert lookup.num_loadable_tokens(request, 0) == 0
    lookup.plan_load(request, blocks_of([5, 6, 8]), 0)

    assert lookup.build_plan(SchedulerOutput.make_empty()).loads == []
    assert list(request.output_token_ids) == [99], "it goes on after the first token all the same"


def test_a_request_without_a_handle_is_a_recompute(lookup: BlockLookup) -> None:
    request = a_request(40, load=None, resume=[99])
    lookup.on_new_request(request)

    assert lookup.num_loadable_tokens(request, 0) == 0


def test_a_decode_request_that_ends_is_forgotten_and_leaves_no_handle(lookup: BlockLookup) -> None:
    request = a_decode_request()
    lookup.on_new_request(request)
    request.status = RequestStatus.FINISHED_ABORTED

    assert lookup.finish(request) == (False, None)
    assert lookup.num_loadable_tokens(request, 0) == 0


def test_an_ordinary_request_gets_no_output_of_ours(lookup: BlockLookup) -> None:
    request = a_request()
    lookup.on_new_request(request)

    assert list(request.output_token_ids) == []


def test_a_decode_request_aborted_while_it_loads_is_left_to_vllm(
    scheduler: FakeScheduler,
) -> None:
    request = a_decode_request()
    scheduler.add(request, [5, 6, 8])
    scheduler.lookup.plan_load(request, blocks_of([5, 6, 8]), 40)
    scheduler.step()
    request.status = RequestStatus.FINISHED_ABORTED

    assert scheduler.lookup.finish(request) == (False, None)
    assert scheduler.step().finished == {}
