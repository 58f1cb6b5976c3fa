"""A request that one decode worker computes and answers, over real RabbitMQ and Valkey."""

from __future__ import annotations

import signal
from typing import Any

from vllm.v1.engine import FinishReason

from tests.integration.asker import Asker
from tests.integration.conftest import Services, StartWorker
from tests.integration.leftovers import wait_until_nothing_is_left
from tests.waiting import wait_until

#: No second attempt makes the same tokens.
RANDOM: dict[str, Any] = {"temperature": 1.0, "max_tokens": 6}


def test_a_decode_worker_answers_it_alone_and_leaves_nothing(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    start_worker("decode")

    asker.ask_whole("r")

    wait_until(asker.finished)
    assert [(stage, p, o.new_token_ids) for stage, p, o in asker.outputs()] == [
        ("decode", 0, [100]),
        ("decode", 1, [101]),
        ("decode", 2, [102]),
        ("decode", 3, [103]),
    ]
    assert asker.outputs()[-1][2].finish_reason == FinishReason.LENGTH
    (report,) = asker.messages()[-1].reports["r"]
    assert (report.worker, report.is_whole) == ("decode1@test", True)
    assert (report.prompt_tokens, report.output_tokens) == (3, 4)
    wait_until_nothing_is_left(services, asker.stream)


def test_several_answers_to_a_prompt_are_answered_each(
    start_worker: StartWorker, asker: Asker
) -> None:
    start_worker("decode")

    asker.ask_whole("r", siblings=("s", "t"))

    names = ("r", "s", "t")
    wait_until(lambda: all(asker.finished(name) for name in names))
    assert [asker.tokens(name) for name in names] == [[100, 101, 102, 103]] * 3


def test_one_that_is_lost_before_its_first_token_begins_again(
    start_worker: StartWorker, asker: Asker
) -> None:
    victim = start_worker("decode", held=True)
    asker.ask_whole("r", **RANDOM)
    wait_until(victim.steering.added)
    victim.signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL

    start_worker("decode", 2)
    wait_until(asker.questions)
    asker.tell([])

    wait_until(asker.finished)
    assert len(asker.tokens()) == 6
    assert asker.failures() == {}


def test_one_that_is_lost_in_its_answer_goes_on_after_the_last_token(
    start_worker: StartWorker, asker: Asker
) -> None:
    victim = start_worker("decode", held=True)
    asker.ask_whole("r", **RANDOM)
    wait_until(victim.steering.added)
    victim.steering.step(3)
    wait_until(lambda: len(asker.tokens()) == 3)
    begun = asker.tokens()
    victim.signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL

    start_worker("decode", 2)
    wait_until(asker.questions)
    asker.tell(begun)

    wait_until(asker.finished)
    assert asker.tokens()[:3] == begun
    assert len(asker.tokens()) == 6
    assert asker.failures() == {}


def test_a_worker_that_stops_hands_it_on_with_its_tokens(
    start_worker: StartWorker, asker: Asker
) -> None:
    leaving = start_worker("decode", held=True)
    asker.ask_whole("r", **RANDOM)
    wait_until(leaving.steering.added)
    leaving.steering.step(2)
    wait_until(lambda: len(asker.tokens()) == 2)
    begun = asker.tokens()
    start_worker("decode", 2)

    leaving.signal(signal.SIGTERM)

    assert leaving.wait() == 0
    wait_until(asker.questions)
    asker.tell(begun)
    wait_until(asker.finished)
    assert asker.tokens()[:2] == begun
    assert [p for _, p, _ in asker.outputs()] == [0, 1, 2, 3, 4, 5]


def test_a_caller_that_hangs_up_frees_its_worker(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    worker = start_worker("decode", held=True)
    asker.ask_whole("r")
    wait_until(worker.steering.added)

    services.bus.delete(asker.stream)
    worker.steering.step()

    wait_until_nothing_is_left(services)
