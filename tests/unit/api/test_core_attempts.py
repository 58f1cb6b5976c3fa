"""Whose tokens make the answer when a request is run again? Without network."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.engine import FinishReason

from api import attempts, core
from pdtasks.bus.progress import Progress
from pdtasks.errors import EngineFailed
from pdtasks.messages import Ask, Failure
from tests.unit.api.core_bench import Bench, with_bench
from tests.unit.factories import an_output
from tests.waiting import until

OLD, NEW = 1, 2


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Progress]]:
    """What workers were told of their requests."""
    found: list[tuple[str, int, Progress]] = []

    async def tell(_bus: Any, request_id: str, attempt: int, progress: Progress) -> None:
        found.append((request_id, attempt, progress))

    monkeypatch.setattr(core, "tell_progress", tell)
    return found


async def begun(bench: Bench) -> None:
    """An answer of two tokens; the second is from the old attempt."""
    await bench.ask("r")
    await bench.take((0, an_output([7])), stage="prefill", attempts=(99,))
    await bench.take((1, an_output([8])), attempts=(OLD,))


def test_a_worker_that_runs_a_request_again_is_told_all_tokens_that_are_there(
    told: list[Any],
) -> None:
    async def test(bench: Bench) -> None:
        await begun(bench)

        await bench.take(asks={"r": Ask(attempt=NEW)})
        await until(lambda: bool(told))

        assert told == [("r", NEW, Progress(state="wanted", token_ids=(7, 8)))]

    with_bench(test, leaves=("r",))


def test_a_worker_is_told_when_nobody_waits_any_more(told: list[Any]) -> None:
    async def test(bench: Bench) -> None:
        await bench.take(asks={"gone": Ask(attempt=NEW)})
        await until(lambda: bool(told))

        assert told == [("gone", NEW, Progress(state="gone"))]

    with_bench(test)


def test_an_older_attempt_that_lives_is_not_heard_any_more(told: list[Any]) -> None:
    async def test(bench: Bench) -> None:
        await begun(bench)
        await bench.take(asks={"r": Ask(attempt=NEW)})

        await bench.take((2, an_output([66], finish_reason=FinishReason.STOP)), attempts=(OLD,))
        await bench.take((2, an_output([9])), attempts=(NEW,))
        await bench.take((3, an_output([10], finish_reason=FinishReason.STOP)), attempts=(NEW,))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9], [10]]
        assert bench.failed == {}

    with_bench(test)


def test_a_second_job_of_one_request_is_not_heard_while_the_first_goes_on() -> None:
    # Prefill was run twice and has handed over twice: nobody has asked anything
    async def test(bench: Bench) -> None:
        await begun(bench)

        await bench.take((1, an_output([55])), attempts=(NEW,))
        await bench.take((2, an_output([9], finish_reason=FinishReason.STOP)), attempts=(OLD,))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9]]
        assert bench.failed == {}

    with_bench(test)


def test_an_attempt_that_is_silent_is_succeeded_by_one_that_has_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempts, "SILENCE_S", 0.0)

    async def test(bench: Bench) -> None:
        await begun(bench)

        await bench.take((1, an_output([8])), attempts=(NEW,))
        await bench.take((2, an_output([9], finish_reason=FinishReason.STOP)), attempts=(NEW,))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9]]

    with_bench(test)


def test_an_attempt_that_was_displaced_never_comes_back_however_silent_the_new_one_is(
    told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "SILENCE_S", 0.0)

    async def test(bench: Bench) -> None:
        await begun(bench)
        await bench.take(asks={"r": Ask(attempt=NEW)})

        # The old one is ahead, and even one that fits is from nobody
        await bench.take((3, an_output([67])), attempts=(OLD,))
        await bench.take((2, an_output([66])), attempts=(OLD,))
        await bench.take((2, an_output([9], finish_reason=FinishReason.STOP)), attempts=(NEW,))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9]]
        assert bench.failed == {}

    with_bench(test)


def test_a_second_job_that_does_not_fit_takes_nothing_over(monkeypatch: pytest.MonkeyPatch) -> None:
    # The one that counts is silent for long: vLLM has put it off
    monkeypatch.setattr(attempts, "SILENCE_S", 0.0)

    async def test(bench: Bench) -> None:
        await begun(bench)

        await bench.take((3, an_output([67])), attempts=(NEW,))
        await bench.take((1, an_output([55])), attempts=(NEW,))
        await bench.take((2, an_output([9], finish_reason=FinishReason.STOP)), attempts=(OLD,))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9]]
        assert bench.failed == {}

    with_bench(test)


def test_a_job_that_was_handed_on_is_not_taken_back_by_who_gets_the_old_one(
    told: list[Any],
) -> None:
    # Its worker was killed before it could say that it has handed the job on
    async def test(bench: Bench) -> None:
        await begun(bench)
        await bench.take(asks={"r": Ask(attempt=NEW, handed_on=1)})

        await bench.take(asks={"r": Ask(attempt=3)})
        await until(lambda: len(told) == 2)
        assert told[1] == ("r", 3, Progress(state="elsewhere"))
        await bench.take((2, an_output([9], finish_reason=FinishReason.STOP)), attempts=(NEW,))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9]]

    with_bench(test)


def test_a_question_of_prefill_leaves_decode_its_answer(told: list[Any]) -> None:
    # Prefill was lost after its hand-over, before it could say that it is done
    async def test(bench: Bench) -> None:
        await begun(bench)

        await bench.take(stage="prefill", asks={"r": Ask(attempt=NEW)})
        await bench.take((2, an_output([9], finish_reason=FinishReason.STOP)), attempts=(OLD,))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9]]

    with_bench(test)


def test_an_answer_that_cannot_be_told_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def away(*_: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(core, "tell_progress", away)

    async def test(bench: Bench) -> None:
        await begun(bench)

        await bench.take(asks={"r": Ask(attempt=NEW)})
        await until(lambda: "bus is away: ConnectionError" in caplog.text)

    with_bench(test, leaves=("r",))


def a_failure(attempt: int) -> dict[str, Failure]:
    error = EngineFailed("out of memory")
    error.attempt = attempt
    return {"r": Failure.of(error)}


@pytest.mark.parametrize(("stage", "attempt"), [("decode", OLD), ("prefill", 99)])
def test_the_failure_of_an_attempt_that_was_displaced_is_not_the_requests(
    told: list[Any], stage: str, attempt: int
) -> None:
    async def test(bench: Bench) -> None:
        await begun(bench)
        await bench.take(asks={"r": Ask(attempt=NEW)})

        await bench.take(failures=a_failure(attempt), stage=stage)
        await bench.take((2, an_output([9], finish_reason=FinishReason.STOP)), attempts=(NEW,))

        assert [tokens for _, tokens, _ in bench.answer()] == [[7], [8], [9]]
        assert bench.failed == {}

    with_bench(test)


@pytest.mark.parametrize("attempt", [0, OLD])
def test_the_failure_of_the_attempt_that_counts_or_of_the_job_itself_ends_the_request(
    attempt: int,
) -> None:
    async def test(bench: Bench) -> None:
        await begun(bench)
        await bench.take(failures=a_failure(attempt))
        assert [type(error) for error in bench.failed.values()] == [EngineFailed]

    with_bench(test)


def test_a_failure_of_prefill_ends_a_request_that_no_other_stage_has_begun() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("r")
        await bench.take(failures=a_failure(99), stage="prefill")
        assert [type(error) for error in bench.failed.values()] == [EngineFailed]

    with_bench(test)
