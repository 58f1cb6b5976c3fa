"""Which blocks does a request write or read? On vLLM's own `Request` objects."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from pdtasks.kv.handle import KVHandle
from pdtasks.kv.lookup import BlockLookup
from pdtasks.kv.params import ours
from pdtasks.kv.plan import TransferPlan

FP = "0123456789abcdef"
BLOCK = 16

init_none_hash(sha256)
hasher = get_request_block_hasher(BLOCK, sha256)


def a_request(num_tokens: int = 40, request_id: str = "r", **params: Any) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=list(range(num_tokens)),
        sampling_params=SamplingParams(
            max_tokens=5, extra_args={"kv_transfer_params": {"pdtasks": params} if params else None}
        ),
        pooling_params=None,
        block_hasher=hasher,
    )


def a_handle(num_tokens: int = 40, **fields: Any) -> KVHandle:
    values: dict[str, Any] = {
        "fingerprint": FP,
        "transfer_id": "t1",
        "num_tokens": num_tokens,
        "block_size": BLOCK,
        "hashes": tuple(bytes(h) for h in a_request(num_tokens).block_hashes),
        "expires_at": time.time() + 60,
    }
    return KVHandle(**values | fields)


def blocks_of(ids: list[int], num_cached: int = 0) -> KVCacheBlocks:
    """Blocks that vLLM has given a request, the first ones out of its own prefix cache."""
    blocks = [KVCacheBlock(block_id=i) for i in ids]
    for block in blocks[:num_cached]:
        block.set_block_hash(make_block_hash_with_group_id(a_request().block_hashes[0], 0))
    return KVCacheBlocks((blocks,))


class FakeScheduler:
    """What vLLM's scheduler does around the connector, for requests that do nothing else."""

    def __init__(self, lookup: BlockLookup) -> None:
        self.lookup = lookup
        self.tables: dict[str, list[int]] = {}

    def add(self, request: Request, block_ids: list[int]) -> None:
        self.lookup.on_new_request(request)
        self.tables[request.request_id] = block_ids

    def step(self, scheduled: dict[Request, int] | None = None) -> TransferPlan:
        scheduled = scheduled or {}
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = {r.request_id: n for r, n in scheduled.items()}
        output.kv_connector_block_state = KVConnectorBlockState(
            req_ids=set(output.num_scheduled_tokens),
            resolve_block_ids=lambda request_id: (self.tables[request_id],),
            boundary_state_offloads={},
        )
        plan = self.lookup.build_plan(output)
        for request, num_tokens in scheduled.items():
            request.num_computed_tokens += num_tokens
        return plan


@pytest.fixture
def make_lookup() -> Callable[..., BlockLookup]:
    def make(**options: Any) -> BlockLookup:
        values: dict[str, Any] = {"fingerprint": FP, "block_size": BLOCK, "tp_size": 1, "ttl_s": 60}
        return BlockLookup(**values | options)

    return make


@pytest.fixture
def lookup(make_lookup: Callable[..., BlockLookup]) -> BlockLookup:
    return make_lookup()


@pytest.fixture
def scheduler(lookup: BlockLookup) -> FakeScheduler:
    return FakeScheduler(lookup)


# -- prefill -----------------------------------------------------------------------------------


def test_a_prompt_in_one_step_leaves_with_its_partial_block(scheduler: FakeScheduler) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])

    (save,) = scheduler.step({request: 40}).saves

    assert (save.request_id, save.first, save.block_ids, save.last) == ("r", 0, [7, 3, 9], True)
    assert save.handle.num_tokens == 40
    assert save.handle.transfer_id == "t1"
    assert save.handle.fingerprint == FP
    assert save.handle.hashes == tuple(bytes(h) for h in request.block_hashes)
    assert save.handle.has_tail


def test_a_chunked_prompt_leaves_in_full_blocks_and_the_partial_one_last(
    scheduler: FakeScheduler,
) -> None:
    # Given a prompt of 70 tokens: four full blocks and six tokens
    request = a_request(70, save="t1")
    scheduler.add(request, [10, 11, 12, 13, 14])

    # When it is computed in chunks that do not end with a block
    plans = [scheduler.step({request: n}) for n in (20, 5, 30, 15)]

    # Then each block leaves once, when it is complete
    saves = [[(s.first, s.block_ids, s.last) for s in plan.saves] for plan in plans]
    assert saves == [
        [(0, [10], False)],
        [],
        [(1, [11, 12], False)],
        [(3, [13, 14], True)],
    ]


def test_a_prompt_of_whole_blocks_has_no_partial_one(scheduler: FakeScheduler) -> None:
    request = a_request(32, save="t1")
    scheduler.add(request, [1, 2])

    (save,) = scheduler.step({request: 32}).saves

    assert save.block_ids == [1, 2]
    assert not save.handle.has_tail


def test_a_locally_cached_prefix_is_handed_over_as_well(scheduler: FakeScheduler) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    request.num_computed_tokens = 32  # vLLM found two blocks in its prefix cache

    (save,) = scheduler.step({request: 8}).saves

    assert (save.first, save.block_ids, save.last) == (0, [7, 3, 9], True)


def test_a_preempted_prompt_sends_each_block_once(scheduler: FakeScheduler) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    scheduler.step({request: 32})

    # When vLLM takes its blocks away and computes it again in others
    request.num_computed_tokens = 0
    scheduler.tables["r"] = [1, 2, 4]
    plans = [scheduler.step({request: n}) for n in (16, 24)]

    assert [[(s.first, s.block_ids, s.last) for s in p.saves] for p in plans] == [
        [],
        [(2, [4], True)],
    ]


def test_nothing_is_saved_for_others_nor_twice(scheduler: FakeScheduler) -> None:
    plain, saving = a_request(request_id="plain"), a_request(save="t1")
    scheduler.add(plain, [1, 2, 3])
    scheduler.add(saving, [4, 5, 6])

    first = scheduler.step({plain: 40, saving: 40})
    second = scheduler.step({plain: 1, saving: 1})  # a second step runs ahead of the first's output

    assert [s.request_id for s in first.saves] == ["r"]
    assert second.saves == []


@pytest.mark.parametrize(
    "status", [RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED]
)
def test_a_finished_request_leaves_its_handle_and_keeps_its_blocks_until_saved(
    scheduler: FakeScheduler, status: RequestStatus
) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    scheduler.step({request: 40})
    request.append_output_token_ids(99)
    request.status = status

    keeps_blocks, params = scheduler.lookup.finish(request)

    assert keeps_blocks
    assert params is not None
    handle = KVHandle.from_wire(ours(params)["handle"])
    assert (handle.num_tokens, handle.num_blocks) == (40, 3), "the first token has no KV yet"
    assert 0 < handle.expires_at - time.time() <= 60
    # The worker side is told in the next step, and once.
    assert [scheduler.step().held for _ in range(2)] == [{"r"}, set()]


@pytest.mark.parametrize("scheduled", [0, 20, 40])
@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR])
def test_an_aborted_request_is_never_held(
    scheduler: FakeScheduler, scheduled: int, status: RequestStatus
) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    if scheduled:
        scheduler.step({request: scheduled})
    request.status = status

    assert scheduler.lookup.finish(request) == (False, None)

    plan = scheduler.step()
    assert (plan.held, plan.saves) == (set(), [])
    assert not scheduler.lookup._saving


def test_a_request_without_us_finishes_like_any_other(scheduler: FakeScheduler) -> None:
    request = a_request()
    scheduler.add(request, [7, 3, 9])
    request.status = RequestStatus.FINISHED_STOPPED

    assert scheduler.lookup.finish(request) == (False, None)


def test_equal_prefixes_have_equal_names_whatever_follows(scheduler: FakeScheduler) -> None:
    longer, shorter = a_request(70, save="t1"), a_request(40, request_id="s", save="t2")
    scheduler.add(longer, [1, 2, 3, 4, 5])
    scheduler.add(shorter, [6, 7, 8])

    saves = {s.request_id: s.handle for s in scheduler.step({longer: 70, shorter: 40}).saves}

    assert [saves["r"].key(i, 0) for i in (0, 1)] == [saves["s"].key(i, 0) for i in (0, 1)]
    assert saves["r"].key(4, 0) != saves["s"].key(2, 0)


def test_a_salt_keeps_equal_prompts_apart(scheduler: FakeScheduler) -> None:
    mine, yours = (
        Request("r", list(range(40)), SamplingParams(), None, block_hasher=hasher, cache_salt=salt)
        for salt in ("mine", "yours")
    )

    assert set(mine.block_hashes).isdisjoint(yours.block_hashes)


# -- decode ------------------------------------------------------------------------------------


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


def test_an_ordinary_request_is_left_alone(lookup: BlockLookup) -> None:
    # vLLM's own server uses this connector, too.
    request = a_request()
    lookup.on_new_request(request)

    assert lookup.num_loadable_tokens(request, 0) == 0
    assert list(request.output_token_ids) == []
