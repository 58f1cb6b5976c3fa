"""How are replies put together to one answer? Without network."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from api.client import PipelineHTTPError
from pdtasks.errors import (
    IncompatibleWorker,
    NoWorker,
    PdtasksError,
    RepliesLost,
    RequestTimeout,
    TooManyRequests,
    WorkerLost,
)
from pdtasks.messages import Failure, StageReport
from tests.unit.api.core_bench import (
    Bench,
    with_bench,
)
from tests.unit.factories import a_reply, an_output
from tests.waiting import until


def test_tokens_of_both_stages_make_one_answer() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")

        await bench.take((0, an_output([7])))
        await bench.take((1, an_output([8])))
        await bench.take((2, an_output([9], finish_reason=FinishReason.STOP)))

        assert bench.answer() == [("r", [7], None), ("r", [8], None), ("r", [9], FinishReason.STOP)]
        assert bench.core._open == {}
        assert bench.failed == {}

    with_bench(test)


def test_a_step_with_several_requests_is_one_message_for_vllm_as_well() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a", "b")

        await bench.take((0, an_output([7], "a")), (0, an_output([8], "b")))

        assert bench.core._outputs.qsize() == 1
        assert bench.answer() == [("a", [7], None), ("b", [8], None)]

    with_bench(test, leaves=("a", "b"))


def test_a_successor_that_repeats_what_is_known_is_not_heard_twice() -> None:
    # Given an answer of two tokens whose worker dies
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([7])))
        await bench.take((1, an_output([8])))

        # When another worker begins again after the first token
        await bench.take((1, an_output([8])))
        await bench.take((2, an_output([9])))
        await bench.take((3, an_output([10], finish_reason=FinishReason.LENGTH)))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9], [10]]
        assert bench.failed == {}

    with_bench(test)


def test_an_end_is_heard_even_if_its_token_is_known() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([7])))

        await bench.take((0, an_output([7], finish_reason=FinishReason.STOP)))

        assert bench.answer() == [("r", [7], None), ("r", [], FinishReason.STOP)]
        assert bench.core._open == {}

    with_bench(test)


def test_new_tokens_behind_known_ones_are_heard() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([7])))

        await bench.take((0, an_output([7, 8])))
        await bench.take((2, an_output([9])))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9]]
        assert bench.failed == {}

    with_bench(test, leaves=("r",))


def test_a_successor_with_another_answer_fails_the_request_rather_than_mixing_them() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r", "other")
        await bench.take((0, an_output([7])), (0, an_output([1], "other")))
        await bench.take((1, an_output([8])))
        bench.answer()

        await bench.take((1, an_output([666])), (1, an_output([2], "other")))

        assert type(bench.failed["r"]) is WorkerLost
        assert bench.answer() == [("other", [2], None)], "the other request goes on"

    with_bench(test, leaves=("other",))


def test_a_gap_fails_the_request_rather_than_hiding_it() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take((0, an_output([7])))

        await bench.take((2, an_output([9])))

        assert type(bench.failed["r"]) is WorkerLost

    with_bench(test)


def test_tokens_for_nobody_are_answered_with_an_abort() -> None:
    # The worker was started after the abort, or did not hear of it.
    async def test(bench: Bench) -> None:
        await bench.ask("known")

        await bench.take((0, an_output([7], "known")), (3, an_output([8], "forgotten")))

        assert bench.aborted == ["forgotten"]
        assert bench.answer() == [("known", [7], None)]

    with_bench(test, leaves=("known",))


def test_a_client_that_hangs_up_is_forgotten_and_the_workers_are_told_once() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a", "b")

        await bench.core.abort_requests_async(["a", "never heard of"])
        await bench.core.abort_requests_async(["a"])

        assert bench.aborted == ["a"]
        assert list(bench.core._open) == ["b"]

    with_bench(test, leaves=("b",))


def test_a_bus_that_lost_replies_fails_what_was_open_and_nothing_later() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a", "b")
        await bench.take((0, an_output([7], "a")))

        await bench.core._replies_are_lost()

        assert {r: type(e) for r, e in bench.failed.items()} == {"a": RepliesLost, "b": RepliesLost}
        assert sorted(bench.aborted) == ["a", "b"]
        await bench.ask("c")
        assert list(bench.core._open) == ["c"]

    with_bench(test, leaves=("c",))


REPORT = StageReport(
    stage="prefill", worker="w", queue_s=0, seconds=1, prompt_tokens=10, output_tokens=1
)


async def told(bench: Bench, external_id: str) -> list[tuple[StageReport, ...]]:
    return [record.reports() for record in await bench.core.reports.of(external_id)]


def test_stage_reports_can_be_asked_for_after_the_end() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take(
            (0, an_output([7], finish_reason=FinishReason.STOP)), reports={"r": (REPORT,)}
        )

        assert await told(bench, "external-r") == [(REPORT,)]
        assert await told(bench, "external-x") == []

    with_bench(test)


def test_what_prefill_adds_when_its_blocks_are_saved_counts_whenever_it_comes() -> None:
    early, late = REPORT, msgspec.structs.replace(REPORT, kv_seconds=0.5)
    decode = msgspec.structs.replace(REPORT, stage="decode", worker="d")

    async def test(bench: Bench) -> None:
        for name in ("a", "b"):
            await bench.ask(name)
        added = a_reply(reports={"a": (late,)}, stage="prefill")
        ends = a_reply(
            (0, an_output([7], "a", FinishReason.STOP)),
            (0, an_output([7], "b", FinishReason.STOP)),
            reports={"a": (early, decode), "b": (early, decode)},
            stage="decode",
        )
        await bench.core._take(added)
        await bench.core._take(ends)
        await bench.core._take(a_reply(reports={"b": (late,)}, stage="prefill"))

        for name in ("external-a", "external-b"):
            assert await told(bench, name) == [(late, decode)]

    with_bench(test)


def test_a_report_of_what_was_ended_here_is_waited_for() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.core.abort_requests_async(["r"])

        asked = asyncio.create_task(told(bench, "external-r"))
        await asyncio.sleep(0.05)
        assert not asked.done()
        await bench.core._take(a_reply(reports={"r": (REPORT,)}))

        assert await asked == [(REPORT,)]

    with_bench(test)


def test_a_workers_failure_fails_the_request_with_its_kind() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")

        await bench.take(
            failures={"r": Failure.of(WorkerLost("died")), "x": Failure.of(WorkerLost())}
        )

        assert type(bench.failed["r"]) is WorkerLost
        assert list(bench.failed) == ["r"]

    with_bench(test)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestTimeout("late"), 504),
        (NoWorker("nobody"), 503),
        (WorkerLost("died"), 503),
        (IncompatibleWorker("old"), 503),
        (TooManyRequests("full"), 429),
        (PdtasksError("odd"), 500),
    ],
)
def test_a_failure_becomes_an_http_error_of_its_status(error: PdtasksError, status: int) -> None:
    http = PipelineHTTPError(Failure.of(error).to_error())

    assert isinstance(http, GracefulHTTPError)
    assert http.http_status == status
    assert str(error) in str(http)


def test_one_bad_reply_does_not_end_the_answers_of_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        bench.stream.replies = [
            a_reply(outputs=b"\xc1 no outputs at all", positions=(0,)),
            a_reply((0, an_output([7], finish_reason=FinishReason.STOP))),
        ]

        listening = asyncio.create_task(bench.core._listen())
        await until(lambda: not bench.core._open)
        listening.cancel()

        assert bench.answer() == [("r", [7], FinishReason.STOP)]
        assert "could not be used" in caplog.text
        assert "invalid opcode" not in caplog.text, "an error's text may quote"

    with_bench(test)


def test_an_output_that_cannot_be_used_fails_its_own_request_alone() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("odd", "r")
        bench.core._open["odd"].answer.token_ids = None  # type: ignore[assignment]  # whatever is wrong

        await bench.core._take(
            a_reply(
                (0, an_output([5], request_id="odd")),
                (0, an_output([7], finish_reason=FinishReason.STOP)),
            )
        )

        assert bench.answer() == [("r", [7], FinishReason.STOP)]
        assert type(bench.failed["odd"]) is WorkerLost
        assert bench.aborted == ["odd"]

    with_bench(test)


def _with_absurd_figures() -> EngineCoreOutput:
    output = an_output([7], "honest")
    output.prefill_stats = PrefillStats(num_prompt_tokens=-(2**60), num_computed_tokens=2**60)
    output.events = [EngineCoreEvent(EngineCoreEventType.QUEUED, float("nan"))]
    output.kv_transfer_params = {"pdtasks": {"load": "somebody else's"}}
    return output


@pytest.mark.parametrize("token_id", [-1, 1000, 2**62])
def test_a_token_that_the_model_does_not_have_ends_its_request_alone(token_id: int) -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("spoilt", "honest")

        await bench.take((0, an_output([token_id], "spoilt")), (0, an_output([7], "honest")))

        assert isinstance(bench.failed["spoilt"], WorkerLost)
        assert bench.answer() == [("honest", [7], None)]

    with_bench(test, leaves=("honest",), vocabulary=1000)


def test_figures_that_cannot_be_are_dropped_and_the_token_stays() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("honest")

        await bench.take((0, _with_absurd_figures()))

        (output,) = bench.core._outputs.get_nowait().outputs
        assert output.new_token_ids == [7]
        assert output.prefill_stats is None
        assert output.events is None
        assert output.kv_transfer_params is None

    with_bench(test, leaves=("honest",))


@pytest.mark.parametrize(
    "fields", [{"positions": (0,)}, {"attempts": (1, 2, 3)}, {"outputs": b"canary \xc1"}], ids=str
)
def test_a_reply_that_does_not_fit_together_changes_nothing(
    caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a", "b")
        good = a_reply((0, an_output([7], "a")), (0, an_output([8], "b")))
        bench.stream.replies = [msgspec.structs.replace(good, **fields), good]

        listening = asyncio.create_task(bench.core._listen())
        await until(lambda: not bench.core._outputs.empty())
        listening.cancel()

        assert bench.answer() == [("a", [7], None), ("b", [8], None)]
        assert bench.failed == {}
        (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
        assert "\n" not in record.getMessage()
        assert "canary" not in record.getMessage()

    with_bench(test, leaves=("a", "b"))
