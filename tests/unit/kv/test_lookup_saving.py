"""Which blocks does a request write, and when? On vLLM's own `Request` objects."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.request import Request, RequestStatus

from pdtasks.kv import lookup as lookup_module
from pdtasks.kv.handle import KVHandle
from pdtasks.kv.lookup import BlockLookup
from pdtasks.kv.params import ours
from tests.unit.kv.vllm_scheduler import (
    BLOCK,
    FP,
    FakeProbe,
    FakeScheduler,
    a_lookup,
    a_request,
    hasher,
    saves_of,
)


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


def test_the_plan_names_the_blocks_that_are_written_over(scheduler: FakeScheduler) -> None:
    request = a_request(40, save="t1")
    scheduler.add(request, [7, 3, 9])
    assert scheduler.step({request: 40}).written == [7, 3, 9]
    assert scheduler.step({request: 1}).written == []

    scheduler.grow(request, [4])
    assert scheduler.step({request: 1}).written == [4]
    assert scheduler.step().written == []

    lost = scheduler.preempt(request, [5, 6, 8])
    assert scheduler.step({request: 40}, preempted=lost).written == [5, 6, 8]


def test_blocks_of_a_prefix_that_is_there_are_not_written_over(scheduler: FakeScheduler) -> None:
    request = a_request(40, save="t1")
    request.num_computed_tokens = 32
    scheduler.add(request, [7, 3, 9])

    assert scheduler.step({request: 8}).written == [9]


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
    num_full = num_tokens // BLOCK
    # Of those that nobody waits for, none where nobody would load so few
    num_blocks = -(-num_tokens // BLOCK) if handed_over else num_full * (num_full >= 2)
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


def test_equal_prefixes_have_equal_names_whatever_follows(scheduler: FakeScheduler) -> None:
    longer, shorter = a_request(70, save="t1"), a_request(40, request_id="s", save="t2")
    scheduler.add(longer, [1, 2, 3, 4, 5])
    scheduler.add(shorter, [6, 7, 8])

    saves = {s.request_id: s.handle for s in scheduler.step({longer: 70, shorter: 40}).saves}

    assert [saves["r"].key(i, 0) for i in (0, 1)] == [saves["s"].key(i, 0) for i in (0, 1)]
    assert saves["r"].key(4, 0) != saves["s"].key(2, 0)


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
