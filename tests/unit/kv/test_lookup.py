"""Which blocks does a request write or read? On vLLM's own `Request` objects."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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

from pdtasks.kv import lookup as lookup_module
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.lookup import BlockLookup, _tail_digest
from pdtasks.kv.params import ours
from pdtasks.kv.plan import TransferPlan

FP = "0123456789abcdef"
BLOCK = 16

init_none_hash(sha256)
hasher = get_request_block_hasher(BLOCK, sha256)


def a_request(
    num_tokens: int = 40, request_id: str = "r", salt: str | None = None, **params: Any
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=list(range(num_tokens)),
        sampling_params=SamplingParams(
            max_tokens=5, extra_args={"kv_transfer_params": {"pdtasks": params} if params else None}
        ),
        pooling_params=None,
        block_hasher=hasher,
        cache_salt=salt,
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


def blocks_of(ids: list[int], num_cached: int = 0) -> KVCacheBlocks:
    """Blocks that vLLM has given a request, the first ones out of its own prefix cache."""
    blocks = [KVCacheBlock(block_id=i) for i in ids]
    for block in blocks[:num_cached]:
        block.set_block_hash(make_block_hash_with_group_id(a_request().block_hashes[0], 0))
    return KVCacheBlocks((blocks,))


class FakeProbe:
    """A store that has what a test says of it."""

    def __init__(self) -> None:
        self.asked: dict[str, list[list[str]]] = {}  #: request -> names of its blocks
        self.found: int | None = 0  #: what the next answer is
        self.forgotten: list[str] = []
        self.closed = False
        self._open: set[str] = set()

    def start(self, request_id: str, blocks: Sequence[Sequence[str]]) -> None:
        assert request_id not in self.asked, "one question for each request"
        self.asked[request_id] = [list(names) for names in blocks]
        self._open.add(request_id)

    def take(self, request_id: str) -> int | None:
        if request_id not in self._open:
            return 0
        if self.found is not None:
            self._open.remove(request_id)
        return self.found

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)
        self._open.discard(request_id)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def close(self) -> None:
        self.closed = True


class FakeScheduler:
    """What vLLM's scheduler does around the connector, for requests that do nothing else."""

    def __init__(self, lookup: BlockLookup) -> None:
        self.lookup = lookup
        self.tables: dict[str, list[int]] = {}

    def add(self, request: Request, block_ids: list[int]) -> None:
        self.lookup.on_new_request(request)
        self.tables[request.request_id] = block_ids

    def preempt(self, request: Request, block_ids: list[int]) -> set[str]:
        """`request` loses its blocks, and gets others later; returns what the next step says."""
        request.num_computed_tokens = 0
        self.tables[request.request_id] = block_ids
        return {request.request_id}

    def step(
        self, scheduled: dict[Request, int] | None = None, preempted: set[str] | None = None
    ) -> TransferPlan:
        scheduled = scheduled or {}
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = {r.request_id: n for r, n in scheduled.items()}
        output.preempted_req_ids = preempted
        output.kv_connector_block_state = KVConnectorBlockState(
            req_ids=set(output.num_scheduled_tokens),
            resolve_block_ids=lambda request_id: (self.tables[request_id],),
            boundary_state_offloads={},
        )
        plan = self.lookup.build_plan(output)
        for request, num_tokens in scheduled.items():
            request.num_computed_tokens += num_tokens
        return plan


def saves_of(*plans: TransferPlan) -> list[list[tuple[int, list[int], bool]]]:
    return [[(s.first, s.block_ids, s.last) for s in plan.saves] for plan in plans]


@pytest.fixture
def probe() -> FakeProbe:
    return FakeProbe()


@pytest.fixture
def make_lookup(
    probe: FakeProbe, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., BlockLookup]]:
    """Makes lookups, and sees to it that they keep nothing of requests that have ended."""
    made: list[BlockLookup] = []
    running: dict[tuple[BlockLookup, str], Request] = {}
    begin, end = BlockLookup.on_new_request, BlockLookup.finish

    def on_new_request(lookup: BlockLookup, request: Request) -> None:
        running[lookup, request.request_id] = request
        begin(lookup, request)

    def finish(lookup: BlockLookup, request: Request) -> tuple[bool, dict[str, Any] | None]:
        running.pop((lookup, request.request_id), None)
        return end(lookup, request)

    monkeypatch.setattr(BlockLookup, "on_new_request", on_new_request)
    monkeypatch.setattr(BlockLookup, "finish", finish)

    def make(**options: Any) -> BlockLookup:
        made.append(a_lookup(probe, **options))
        return made[-1]

    yield make
    for (lookup, _), request in list(running.items()):
        request.status = RequestStatus.FINISHED_ABORTED
        lookup.finish(request)
    for lookup in made:
        FakeScheduler(lookup).step()
        assert lookup.leftovers() == {}


def a_lookup(probe: FakeProbe, **options: Any) -> BlockLookup:
    values: dict[str, Any] = {
        "fingerprint": FP,
        "block_size": BLOCK,
        "tp_size": 1,
        "ttl_s": 60,
        "probe": probe,
        "min_prefix_tokens": 2 * BLOCK,
        "vocabulary": 1000,
        "max_tokens": 1000,
    }
    return BlockLookup(**values | options)


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
    assert saves_of(*plans) == [
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


def a_prompt(*tail: int, salt: str | None = None, first: int = 0) -> Request:
    """A prompt of one full block and `tail`, to be handed over."""
    request = a_request(BLOCK + len(tail), salt=salt, save="t1")
    return Request(
        request_id="r",
        prompt_token_ids=[first, *range(1, BLOCK), *tail],
        sampling_params=request.sampling_params,
        pooling_params=None,
        block_hasher=hasher,
        cache_salt=salt,
    )


def test_a_partial_block_is_told_by_what_it_contains(
    make_lookup: Callable[..., BlockLookup],
) -> None:
    def digest(request: Request) -> str:
        scheduler = FakeScheduler(make_lookup(min_prefix_tokens=10**6))
        scheduler.add(request, [1, 2])
        (save,) = scheduler.step({request: request.num_prompt_tokens}).saves
        return save.handle.tail_digest

    different = [
        a_prompt(7, 8),
        a_prompt(8, 7),
        a_prompt(7),
        a_prompt(7, 8, 9),
        a_prompt(7, 8, first=99),
        a_prompt(7, 8, salt="salt"),
        a_prompt(7, 8, salt="None"),
    ]

    assert len({digest(request) for request in different}) == len(different)
    assert digest(a_prompt(7, 8)) == digest(a_prompt(7, 8))


def test_tokens_after_the_prompt_are_no_part_of_its_partial_block(scheduler: FakeScheduler) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    (save,) = scheduler.step({request: 40}).saves
    request.append_output_token_ids(99)
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED

    _, wire = scheduler.lookup.finish(request)

    handle = KVHandle.from_wire(ours(wire)["handle"])
    assert [handle.content(i, 0) for i in range(3)] == [save.handle.content(i, 0) for i in range(3)]


def test_a_locally_cached_prefix_is_handed_over_as_well(scheduler: FakeScheduler) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    request.num_computed_tokens = 32  # vLLM found two blocks in its prefix cache

    (save,) = scheduler.step({request: 8}).saves

    assert (save.first, save.block_ids, save.last) == (0, [7, 3, 9], True)


def test_a_preempted_prompt_is_saved_again_from_its_first_block(
    scheduler: FakeScheduler,
) -> None:
    # Given a prompt of which two blocks were planned
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    assert saves_of(scheduler.step({request: 32})) == [[(0, [7, 3], False)]]

    # When vLLM takes its blocks away and computes it again in others
    preempted = scheduler.preempt(request, [1, 2, 4])
    plans = [scheduler.step(preempted=preempted), *(scheduler.step({request: n}) for n in (20, 20))]

    # Then the worker side is told, and gets all of them
    assert [plan.preempted for plan in plans] == [{"r"}, set(), set()]
    assert saves_of(*plans) == [[], [(0, [1], False)], [(1, [2, 4], True)]]


def test_a_prompt_that_was_saved_whole_is_saved_again_after_a_preemption(
    scheduler: FakeScheduler,
) -> None:
    # It may not have left yet, and its blocks are somebody else's now.
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    scheduler.step({request: 40})

    preempted = scheduler.preempt(request, [1, 2, 4])
    plan = scheduler.step({request: 40}, preempted)  # as after a reset of the prefix cache

    assert plan.preempted == {"r"}
    assert saves_of(plan) == [[(0, [1, 2, 4], True)]]


def test_a_request_that_ends_while_it_is_preempted_has_nothing_to_wait_for(
    scheduler: FakeScheduler,
) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    scheduler.step({request: 40})
    scheduler.step(preempted=scheduler.preempt(request, []))
    request.status = RequestStatus.FINISHED_ABORTED

    assert scheduler.lookup.finish(request) == (False, None)
    assert scheduler.step().finished == {}


def test_a_preempted_stranger_is_no_error(scheduler: FakeScheduler) -> None:
    assert scheduler.step(preempted={"never heard of"}).saves == []


def test_prompts_in_one_step_are_planned_side_by_side_and_once(scheduler: FakeScheduler) -> None:
    one, other = a_request(request_id="one", save="t1"), a_request(request_id="other", save="t2")
    scheduler.add(one, [1, 2, 3])
    scheduler.add(other, [4, 5, 6])

    first = scheduler.step({one: 40, other: 40})
    second = scheduler.step({one: 1, other: 1})  # a second step runs ahead of the first's output

    assert [s.request_id for s in first.saves] == ["one", "other"]
    assert second.saves == []


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_after_the_last_preemption_each_block_is_planned_once_and_in_order(
    data: st.DataObject,
) -> None:
    # Given any prompt, with or without a hand-over
    num_tokens = data.draw(st.integers(1, 130), label="tokens")
    handed_over = data.draw(st.booleans(), label="handed over")
    request = a_request(num_tokens, save="t1") if handed_over else a_request(num_tokens)
    num_blocks = -(-num_tokens // BLOCK) if handed_over else num_tokens // BLOCK
    table = list(range(100, 100 + num_tokens // BLOCK + 2))  # and room for the next tokens
    scheduler = FakeScheduler(a_lookup(FakeProbe()))
    scheduler.add(request, table)

    # When vLLM computes it in any chunks, finds any part in its own cache and preempts it anywhere
    planned: list[tuple[int, int]] = []
    ended: list[bool] = []
    preempted: set[str] = set()
    for attempt in reversed(range(data.draw(st.integers(1, 4), label="attempts"))):
        cached = data.draw(st.integers(0, (num_tokens - 1) // BLOCK), label="cached blocks")
        request.num_computed_tokens = cached * BLOCK
        decoding = 0
        while decoding < 2:
            left = num_tokens - request.num_computed_tokens
            if attempt and data.draw(st.booleans(), label="preempt"):
                break
            plan = scheduler.step(
                {request: data.draw(st.integers(1, left), label="chunk") if left > 0 else 1},
                preempted,
            )
            if preempted:
                assert plan.preempted == preempted
                planned, ended, preempted = [], [], set()
            for save in plan.saves:
                assert save.handle.num_tokens == num_tokens
                planned += [(save.first + i, b) for i, b in enumerate(save.block_ids)]
                ended.append(save.last)
            # Nothing is planned before it is computed.
            num_computed = min(request.num_computed_tokens, num_tokens)
            assert len(planned) <= num_computed // BLOCK or num_computed == num_tokens
            decoding += left <= 0
        if attempt:
            table = [block_id + 100 for block_id in table]
            preempted = scheduler.preempt(request, table)
            if data.draw(st.booleans(), label="a step without it"):
                assert saves_of(scheduler.step(preempted=preempted)) == [[]]
                planned, ended, preempted = [], [], set()

    # Then
    assert planned == list(enumerate(table[:num_blocks]))
    assert ended == ([*[False] * (len(ended) - 1), True] if num_blocks else [])


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
    assert [scheduler.step().finished for _ in range(2)] == [{"r": True}, {}]


@pytest.mark.parametrize("save", [{"save": "t1"}, {}], ids=["handed over", "ordinary"])
@pytest.mark.parametrize("scheduled", [20, 40])
@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR])
def test_an_aborted_request_keeps_its_blocks_until_nobody_reads_them(
    scheduler: FakeScheduler, scheduled: int, status: RequestStatus, save: dict[str, str]
) -> None:
    request = a_request(40, **save)
    scheduler.add(request, [7, 3, 9])
    scheduler.step({request: scheduled})
    request.status = status

    assert scheduler.lookup.finish(request) == (True, None)

    # The worker side need not send the rest.
    assert [scheduler.step().finished for _ in range(2)] == [{"r": False}, {}]
    assert not scheduler.lookup._saving


@pytest.mark.parametrize("scheduled", [0, 15])
@pytest.mark.parametrize(
    "status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_LENGTH_CAPPED]
)
def test_a_request_without_a_planned_save_has_nothing_to_wait_for(
    scheduler: FakeScheduler, scheduled: int, status: RequestStatus
) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    if scheduled:
        scheduler.step({request: scheduled})
    request.status = status

    assert scheduler.lookup.finish(request) == (False, None)

    plan = scheduler.step()
    assert (plan.finished, plan.saves) == ({}, [])


def test_a_prompt_that_stops_before_its_end_leaves_no_handle(scheduler: FakeScheduler) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    scheduler.step({request: 20})
    request.status = RequestStatus.FINISHED_STOPPED

    assert scheduler.lookup.finish(request) == (True, None)
    assert scheduler.step().finished == {"r": False}


# -- ordinary requests: `vllm serve` -----------------------------------------------------------


def test_an_ordinary_request_leaves_its_full_blocks_for_whoever_comes_next(
    scheduler: FakeScheduler,
) -> None:
    request = a_request(40)
    scheduler.add(request, [7, 3, 9])

    plans = [scheduler.step({request: n}) for n in (20, 20, 1)]

    assert saves_of(*plans) == [[(0, [7], False)], [(1, [3], True)], []]
    (save,) = plans[0].saves
    assert save.handle.transfer_id == ""


def test_a_last_chunk_without_a_full_block_still_says_that_it_was_the_last(
    scheduler: FakeScheduler,
) -> None:
    request = a_request(40)
    scheduler.add(request, [7, 3, 9])

    plans = [scheduler.step({request: n}) for n in (32, 8)]

    assert saves_of(*plans) == [[(0, [7, 3], False)], [(2, [], True)]]


def test_a_prompt_shorter_than_a_block_leaves_nothing(scheduler: FakeScheduler) -> None:
    request = a_request(15)
    scheduler.add(request, [7])
    plan = scheduler.step({request: 15})
    request.status = RequestStatus.FINISHED_STOPPED

    assert plan.saves == []
    assert scheduler.lookup.finish(request) == (False, None)


def test_an_ordinary_request_ends_without_a_handle(scheduler: FakeScheduler) -> None:
    request = a_request(40)
    scheduler.add(request, [7, 3, 9])
    scheduler.step({request: 40})
    request.status = RequestStatus.FINISHED_STOPPED

    assert scheduler.lookup.finish(request) == (True, None)
    assert scheduler.step().finished == {"r": True}


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


def test_equal_prefixes_have_equal_names_whatever_follows(scheduler: FakeScheduler) -> None:
    longer, shorter = a_request(70, save="t1"), a_request(40, request_id="s", save="t2")
    scheduler.add(longer, [1, 2, 3, 4, 5])
    scheduler.add(shorter, [6, 7, 8])

    saves = {s.request_id: s.handle for s in scheduler.step({longer: 70, shorter: 40}).saves}

    assert [saves["r"].key(i, 0) for i in (0, 1)] == [saves["s"].key(i, 0) for i in (0, 1)]
    assert saves["r"].key(4, 0) != saves["s"].key(2, 0)


# -- shared prefixes ---------------------------------------------------------------------------

ordinary_or_saved = pytest.mark.parametrize(
    "wants", [{"save": "t1"}, {}], ids=["handed over", "ordinary"]
)


@ordinary_or_saved
def test_a_prefix_that_the_store_has_is_loaded(
    scheduler: FakeScheduler, probe: FakeProbe, wants: dict[str, str]
) -> None:
    # Given a prompt of five blocks, of which the store has three
    lookup, request = scheduler.lookup, a_request(70, **wants)
    probe.found = 3
    scheduler.add(request, [5, 6, 7, 8, 9])

    # When vLLM finds room for it, at the second time
    assert [lookup.num_loadable_tokens(request, 0) for _ in range(2)] == [48, 48]
    lookup.plan_load(request, blocks_of([5, 6, 7]), 48)

    # Then these are loaded
    (load,) = scheduler.step().loads
    assert (load.request_id, load.first, load.block_ids) == ("r", 0, [5, 6, 7])
    assert (load.handle.num_tokens, load.handle.num_blocks) == (48, 3)
    # from where they were looked for
    assert [[load.handle.key(i, 0)] for i in range(3)] == probe.asked["r"][:3]
    # and the whole prompt is still saved; the worker side finds out what is there already.
    request.num_computed_tokens = 48
    (save,) = scheduler.step({request: 22}).saves
    assert (save.first, save.last) == (0, True)
    assert save.block_ids == [5, 6, 7, 8, 9][: 5 if wants else 4]


def test_a_request_waits_while_the_store_has_not_answered(
    lookup: BlockLookup, probe: FakeProbe
) -> None:
    request = a_request(70)
    probe.found = None
    lookup.on_new_request(request)

    assert [lookup.num_loadable_tokens(request, 0) for _ in range(3)] == [None] * 3

    probe.found = 4
    assert lookup.num_loadable_tokens(request, 0) == 64


@pytest.mark.parametrize(("num_tokens", "num_asked"), [(64, 3), (65, 4), (63, 3), (48, 2)])
def test_the_last_token_is_always_computed(
    lookup: BlockLookup, probe: FakeProbe, num_tokens: int, num_asked: int
) -> None:
    request = a_request(num_tokens)
    probe.found = num_asked

    lookup.on_new_request(request)

    assert len(probe.asked["r"]) == num_asked
    assert lookup.num_loadable_tokens(request, 0) == num_asked * BLOCK < num_tokens


@pytest.mark.parametrize(("num_tokens", "asks"), [(16, False), (32, False), (33, True)])
def test_a_prompt_too_short_to_gain_is_not_looked_for(
    lookup: BlockLookup, probe: FakeProbe, num_tokens: int, asks: bool
) -> None:
    # Its longest prefix has less than 32 tokens.
    lookup.on_new_request(a_request(num_tokens))

    assert bool(probe.asked) == asks


@pytest.mark.parametrize("least", [0, 1, 16])
def test_a_prompt_within_one_block_is_never_looked_for(
    make_lookup: Callable[..., BlockLookup], probe: FakeProbe, least: int
) -> None:
    make_lookup(min_prefix_tokens=least).on_new_request(a_request(16))

    assert probe.asked == {}


def test_a_prefix_too_short_to_gain_is_computed(lookup: BlockLookup, probe: FakeProbe) -> None:
    request = a_request(70)
    probe.found = 1  # less than 32 tokens
    lookup.on_new_request(request)

    assert lookup.num_loadable_tokens(request, 0) == 0
    lookup.plan_load(request, blocks_of([5, 6]), 0)

    assert lookup.build_plan(SchedulerOutput.make_empty()).loads == []


@pytest.mark.parametrize(
    ("num_local", "expected"), [(0, 64), (1, 48), (2, 32), (3, 0), (4, 0)], ids=str
)
def test_what_the_local_cache_has_is_not_loaded(
    lookup: BlockLookup, probe: FakeProbe, num_local: int, expected: int
) -> None:
    request = a_request(70)
    probe.found = 4
    lookup.on_new_request(request)

    assert lookup.num_loadable_tokens(request, num_local * BLOCK) == expected
    lookup.plan_load(request, blocks_of([1, 2, 3, 4, 5], num_cached=num_local), expected)

    loads = lookup.build_plan(SchedulerOutput.make_empty()).loads
    planned = [(load.first, load.block_ids) for load in loads]
    assert planned == ([(num_local, [1, 2, 3, 4][num_local:])] if expected else [])


def test_a_prefix_that_could_not_be_loaded_is_not_tried_again(
    scheduler: FakeScheduler, probe: FakeProbe
) -> None:
    # Given a load of which a block was missing: vLLM computes the prompt
    lookup, request = scheduler.lookup, a_request(70)
    probe.found = 4
    scheduler.add(request, [5, 6, 7, 8, 9])
    tokens = lookup.num_loadable_tokens(request, 0)
    assert tokens == 64
    lookup.plan_load(request, blocks_of([5, 6, 7, 8]), tokens)
    scheduler.step()

    # When it considers the request once more
    assert lookup.num_loadable_tokens(request, 0) == 0
    lookup.plan_load(request, blocks_of([5, 6, 7, 8, 9]), 0)

    # Then it is an ordinary request
    plan = scheduler.step({request: 70})
    assert plan.loads == []
    assert saves_of(plan) == [[(0, [5, 6, 7, 8], True)]]


def test_a_request_aborted_while_it_loads_is_left_to_vllm(
    scheduler: FakeScheduler, probe: FakeProbe
) -> None:
    # vLLM keeps the blocks until the load is reported: a second report would be one too many.
    lookup, request = scheduler.lookup, a_request(70)
    probe.found = 4
    scheduler.add(request, [5, 6, 7, 8, 9])
    lookup.plan_load(request, blocks_of([5, 6, 7, 8]), lookup.num_loadable_tokens(request, 0) or 0)
    scheduler.step()
    request.status = RequestStatus.FINISHED_ABORTED

    assert lookup.finish(request) == (False, None)

    assert scheduler.step().finished == {}


def test_a_request_aborted_before_the_store_has_answered_is_forgotten(
    lookup: BlockLookup, probe: FakeProbe
) -> None:
    request = a_request(70)
    probe.found = None
    lookup.on_new_request(request)
    request.status = RequestStatus.FINISHED_ABORTED

    assert lookup.finish(request) == (False, None)

    assert probe.forgotten == ["r"]
    assert not lookup._saving


def test_a_preempted_request_is_not_looked_for_again(
    scheduler: FakeScheduler, probe: FakeProbe
) -> None:
    lookup, request = scheduler.lookup, a_request(70)
    scheduler.add(request, [5, 6, 7, 8, 9])
    assert lookup.num_loadable_tokens(request, 0) == 0
    lookup.plan_load(request, blocks_of([5, 6, 7, 8, 9]), 0)
    scheduler.step({request: 70})
    probe.found = 4

    scheduler.step(preempted=scheduler.preempt(request, [1, 2, 3, 4, 10]))

    assert lookup.num_loadable_tokens(request, 0) == 0
    assert len(probe.asked) == 1


def test_a_request_that_skips_the_prefix_cache_is_not_looked_for(
    lookup: BlockLookup, probe: FakeProbe
) -> None:
    # vLLM sets it where it needs every token computed: prompt logprobs.
    request = a_request(70)
    request.skip_reading_prefix_cache = True

    lookup.on_new_request(request)

    assert probe.asked == {}


def test_every_rank_is_asked_for_its_part(
    make_lookup: Callable[..., BlockLookup], probe: FakeProbe
) -> None:
    request = a_request(40)

    make_lookup(tp_size=2).on_new_request(request)

    hashes = [bytes(h).hex() for h in request.block_hashes]
    assert probe.asked["r"] == [[f"pd:kv:{FP}:{rank}:{h}" for rank in (0, 1)] for h in hashes]


def test_a_salt_keeps_equal_prompts_apart(scheduler: FakeScheduler, probe: FakeProbe) -> None:
    requests = [a_request(40, salt or "none", salt) for salt in ("mine", "yours", None)]
    for request in requests:
        scheduler.add(request, [1, 2, 3])

    plan = scheduler.step(dict.fromkeys(requests, 40))

    written = [{s.handle.key(i, 0) for i in range(len(s.block_ids))} for s in plan.saves]
    looked_for = [{name for names in blocks for name in names} for blocks in probe.asked.values()]
    assert written == looked_for
    assert len(set.union(*written)) == sum(map(len, written)) == 6


def test_requests_that_ended_unnoticed_are_told_once(
    scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Given two requests that run, and one that ended without a word to us
    monkeypatch.setattr(lookup_module, "_LOOK_S", 0.0)
    for name in ("a", "b"):
        scheduler.add(a_request(40, request_id=name, save=name), [1, 2, 3])
    lost = a_request(40, request_id="c", save="c")
    scheduler.add(lost, [4, 5, 6])
    scheduler.step()
    assert "still kept" not in caplog.text
    lost.status = RequestStatus.FINISHED_ABORTED

    # When further steps go by
    for _ in range(3):
        scheduler.step()

    # Then
    assert caplog.text.count("1 requests that have ended are still kept") == 1
    assert scheduler.lookup.leftovers()["saving"] == 3


def test_closing_closes_the_probe(lookup: BlockLookup, probe: FakeProbe) -> None:
    lookup.close()

    assert probe.closed


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
