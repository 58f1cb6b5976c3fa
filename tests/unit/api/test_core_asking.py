"""What becomes of a request on its way to the broker? Without network."""

from __future__ import annotations

import asyncio
import time
from copy import copy

import msgspec
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest, FinishReason

from api import core, publishing
from pdtasks.engine.arguments import ENGINE_VERSION
from pdtasks.engine.wire import decode_request
from pdtasks.errors import (
    BrokerUnavailable,
    InvalidRequest,
    NoWorker,
    RequestTimeout,
    TooManyRequests,
)
from pdtasks.keys import asking_for
from pdtasks.messages import DecodeJob, WorkerStatus
from tests.unit.api.core_bench import (
    READY,
    Bench,
    presence,
    watch_until,
    with_bench,
)
from tests.unit.factories import a_request, an_output
from tests.waiting import until


def test_a_request_is_published_as_the_client_meant_it() -> None:
    async def test(bench: Bench) -> None:
        before = time.time()
        await bench.ask("r")

        (job,) = bench.broker.published
        assert job.request_id == "r"
        assert job.engine == ENGINE_VERSION
        assert job.request is not None
        assert decode_request(job.request) == a_request("r")
        assert before + 30 <= job.deadline <= time.time() + 30

    with_bench(test, leaves=("r",), request_timeout_s=30)


@pytest.mark.parametrize("salt", [None, "mine", "bob:mine", ":", "alice:"])
def test_nobody_can_name_the_salt_of_another_key(salt: str | None) -> None:
    async def test(bench: Bench) -> None:
        for key in ("alice", "bob"):
            request = a_request(key)
            request.cache_salt = salt
            with asking_for(key):
                await bench.core.add_request_async(request)
                await asyncio.gather(*bench.core._publications)

        jobs = [decode_request(job.request or b"") for job in bench.broker.published]
        assert [job.cache_salt for job in jobs] == [f"alice:{salt or ''}", f"bob:{salt or ''}"]

    with_bench(test, leaves=("alice", "bob"), salt_by_key=True)


def test_a_broker_that_is_away_fails_the_request_alone() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a")
        bench.broker.away = True
        await bench.ask("b")

        assert [type(e) for e in bench.failed.values()] == [BrokerUnavailable]
        await bench.take((0, an_output([7], "a", FinishReason.STOP)))
        assert bench.answer() == [("a", [7], FinishReason.STOP)]

    with_bench(test)


def test_an_id_that_amqp_cannot_carry_is_refused() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("x" * 201)

        (error,) = bench.failed.values()
        assert type(error) is InvalidRequest
        assert not bench.broker.published

    with_bench(test)


def test_what_cannot_be_sent_fails_its_request_and_leaves_nothing() -> None:
    async def test(bench: Bench) -> None:
        odd = a_request("odd")
        assert odd.sampling_params is not None
        odd.sampling_params.top_k = 2**64

        await bench.core.add_request_async(odd)
        await until(lambda: "odd" in bench.failed)

        assert type(bench.failed["odd"]) is InvalidRequest
        assert "top_k" in str(bench.failed["odd"])

    with_bench(test)


def test_a_burst_is_not_published_one_by_one() -> None:
    async def test(bench: Bench) -> None:
        # Given a broker that has confirmed nothing yet
        bench.broker.hangs = True
        for n in range(50):
            await bench.core.add_request_async(a_request(f"r{n}"))
        await bench.sent(50)

        assert len(bench.broker.unsent) == 50
        for sent in bench.broker.unsent:
            sent.set_result(None)
        await bench.published()

    with_bench(test, leaves=tuple(f"r{n}" for n in range(50)))


def siblings(n: int, name: str = "r") -> list[EngineCoreRequest]:
    """What vLLM makes of one request with `n` and a seed."""
    parent = a_request(name)
    found = [copy(parent) for _ in range(n)]
    for number, child in enumerate(found):
        child.request_id = f"{number}_{name}"
        child.sampling_params = SamplingParams(max_tokens=20, seed=7 + number)
    return found


def test_answers_to_one_prompt_are_asked_for_with_one_message() -> None:
    async def test(bench: Bench) -> None:
        for request in [*siblings(3), a_request("other"), *siblings(2, "s")]:
            await bench.core.add_request_async(request)
        await bench.published()

        told = [job.request_ids for job in bench.broker.published]
        assert told == [("0_r", "1_r", "2_r"), ("other",), ("0_s", "1_s")]
        assert [one.seed for one in bench.broker.published[0].siblings] == [8, 9]

        # And each is answered, or ends, by itself
        await bench.take((0, an_output([7], "1_r", FinishReason.STOP)))
        assert bench.answer() == [("1_r", [7], FinishReason.STOP)]
        await bench.core.abort_requests_async(["0_r", "2_r"])
        assert sorted(bench.aborted) == ["0_r", "2_r"]

    with_bench(test, leaves=("other", "0_s", "1_s"))


def test_very_many_answers_to_one_prompt_are_several_messages() -> None:
    async def test(bench: Bench) -> None:
        most = bench.core.workers.room().together
        for request in siblings(most + 3):
            await bench.core.add_request_async(request)
        await bench.published()

        told = [len(job.request_ids) for job in bench.broker.published]
        assert told == [most, 3]
        await bench.core.abort_requests_async(list(bench.core._open))

    with_bench(test)


def test_a_broker_that_is_away_fails_all_answers_to_a_prompt() -> None:
    async def test(bench: Bench) -> None:
        bench.broker.away = True
        for request in siblings(3):
            await bench.core.add_request_async(request)
        await bench.published()

        assert {type(error) for error in bench.failed.values()} == {BrokerUnavailable}
        assert len(bench.failed) == 3

    with_bench(test)


def test_a_request_that_is_hung_up_before_it_was_sent_is_not_sent() -> None:
    async def test(bench: Bench) -> None:
        bench.broker.hangs = True
        await bench.core.add_request_async(a_request("r"))
        await bench.sent(1)

        await bench.core.abort_requests_async(["r"])

        assert [sent.cancelled() for sent in bench.broker.unsent] == [True]
        await bench.published()
        assert bench.failed == {}

    with_bench(test)


def test_a_publisher_that_hangs_fails_the_request_long_before_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "CONFIRM_TIMEOUT_S", 0.05)
    monkeypatch.setattr(publishing, "_LATE_S", 0.05)

    async def test(bench: Bench) -> None:
        bench.broker.hangs = True
        await bench.ask("r")

        assert type(bench.failed["r"]) is BrokerUnavailable
        assert [sent.cancelled() for sent in bench.broker.unsent] == [True]

    with_bench(test, request_timeout_s=600)


def test_a_request_that_has_ended_is_not_sent_any_more(
    fast_watch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    presence(monkeypatch, lambda: READY)

    async def test(bench: Bench) -> None:
        bench.broker.hangs = True
        await bench.core.add_request_async(a_request("r"))
        await watch_until(bench, lambda: "r" in bench.failed)

        assert type(bench.failed["r"]) is RequestTimeout
        assert [sent.cancelled() for sent in bench.broker.unsent] == [True]
        await until(lambda: not bench.core._publications)

    with_bench(test, request_timeout_s=0.05)


def test_while_the_broker_is_away_requests_fail_at_once_and_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "_BROKER_PAUSE_S", 0.1)

    async def test(bench: Bench) -> None:
        bench.broker.away = True
        await bench.ask("a")
        bench.broker.away = False
        # Within the pause nobody asks the broker
        await bench.ask("b")
        assert set(bench.failed) == {"a", "b"}

        # Steady load does not put off the next try
        began = time.monotonic()
        n = 0
        while not bench.broker.published:
            assert time.monotonic() - began < 5
            n += 1
            await bench.ask(f"c{n}")
            await asyncio.sleep(0.01)

        await bench.take((0, an_output([7], f"c{n}", FinishReason.STOP)))

    with_bench(test)


def test_no_more_come_in_than_may_wait_for_the_workers() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a", "b")

        with pytest.raises(TooManyRequests):
            bench.core.require_room(1)
        # a first token alone is none of the second stage's
        await bench.take((0, an_output([7], "a")))
        with pytest.raises(TooManyRequests):
            bench.core.require_room(1)

        await bench.take((1, an_output([8], "a")), stage="decode")
        bench.core.require_room(1)

    with_bench(test, leaves=("a", "b"), max_waiting=2)


def test_who_hangs_up_or_fails_makes_room() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a")
        await bench.core.abort_requests_async(["a"])
        bench.core.require_room(1)

        bench.broker.away = True
        await bench.ask("b")
        bench.core.require_room(1)

    with_bench(test, max_waiting=1)


def test_an_answer_of_one_token_makes_room() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a")
        await bench.take((0, an_output([7], "a", FinishReason.LENGTH)))
        bench.core.require_room(1)

    with_bench(test, max_waiting=1)


def test_a_job_is_not_refused_because_others_wait() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a")

        with core.stage_watcher(lambda *_: None):
            bench.core.require_room(1)

    with_bench(test, leaves=("a",), max_waiting=1)


def test_without_workers_nobody_is_told_to_come_again_soon() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a")
        bench.core.workers.known = []

        with pytest.raises(NoWorker):
            bench.core.require_room(1)

    with_bench(test, leaves=("a",), max_waiting=1)


# -- which way -------------------------------------------------------------------------------------


def whole_workers(*, prefill: bool = True) -> list[WorkerStatus]:
    """Ready ones, whose decode worker computes prompts of up to 10 tokens."""
    decode = msgspec.structs.replace(READY[1], short_prompt_tokens=10)
    return [READY[0], decode] if prefill else [decode]


def test_a_short_prompt_is_published_for_the_decode_worker_alone() -> None:
    async def test(bench: Bench) -> None:
        bench.core.workers.known = whole_workers()
        await bench.ask("r")

        (job,) = bench.broker.published
        assert isinstance(job, DecodeJob)
        assert job.is_whole
        assert (job.output_token_ids, job.handle) == ((), None)
        assert decode_request(job.request) == a_request("r")

        # Its answer comes from there, from the first token on
        await bench.take((0, an_output([7])), (1, an_output([8], finish_reason=FinishReason.STOP)))
        assert bench.answer() == [("r", [7], None), ("r", [8], FinishReason.STOP)]
        assert not bench.failed

    with_bench(test)


def test_answers_to_one_short_prompt_are_jobs_of_their_own() -> None:
    async def test(bench: Bench) -> None:
        bench.core.workers.known = whole_workers()
        first = a_request("0_r")
        for n in range(3):
            one = copy(first)
            one.sampling_params = SamplingParams(max_tokens=20, seed=n)
            one.request_id = f"{n}_r"
            await bench.core.add_request_async(one)
        await bench.published()

        jobs = {
            job.request_id: decode_request(job.request or b"") for job in bench.broker.published
        }
        assert {name: job.sampling_params.seed for name, job in jobs.items()} == {  # type: ignore[union-attr]
            "0_r": 0,
            "1_r": 1,
            "2_r": 2,
        }

    with_bench(test, leaves=("0_r", "1_r", "2_r"))


def test_without_prefill_workers_requests_are_taken_and_answered_by_decode_workers() -> None:
    async def test(bench: Bench) -> None:
        bench.core.workers.known = whole_workers(prefill=False)
        bench.core.require_room(1)
        request = a_request("r", prompt=list(range(100)))
        await bench.core.add_request_async(request)
        await bench.published()

        (job,) = bench.broker.published
        assert isinstance(job, DecodeJob)
        (record,) = bench.core.records()
        assert record.route == "no_prefill_worker"

    with_bench(test, leaves=("r",))


def test_one_that_waits_for_its_turn_is_not_given_up_for_a_stage_that_it_does_not_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(bench: Bench) -> None:
        # Given decode workers alone, which have room for two long prompts
        known = whole_workers(prefill=False)
        presence(monkeypatch, lambda: known)
        bench.core.workers.known = known
        for n in range(3):
            await bench.core.add_request_async(a_request(f"r{n}", prompt=list(range(3000))))
        await bench.published()
        assert len(bench.broker.published) == 2

        looks = 0

        def several_looks() -> bool:
            nonlocal looks
            looks += 1
            return looks > 20

        await watch_until(bench, several_looks)
        assert not bench.failed

    monkeypatch.setattr(core, "_WATCH_S", 0.005)
    with_bench(test, leaves=("r0", "r1", "r2"), stage_grace_s=0.001)
