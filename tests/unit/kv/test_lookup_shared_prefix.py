"""Which blocks that others have left does a request read? On vLLM's own `Request` objects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import RequestStatus

from pdtasks.kv.lookup import BlockLookup
from tests.unit.kv.vllm_scheduler import (
    BLOCK,
    FP,
    FakeProbe,
    FakeScheduler,
    a_request,
    blocks_of,
    saves_of,
)

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


def test_closing_closes_the_probe(lookup: BlockLookup, probe: FakeProbe) -> None:
    lookup.close()

    assert probe.closed
