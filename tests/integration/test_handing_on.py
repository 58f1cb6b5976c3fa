"""A decode worker that is told to stop hands what it has begun to another one, at once."""

from __future__ import annotations

import signal
from typing import Any

from pdtasks.bus.presence import read_workers
from pdtasks.pipeline import submit
from tests.integration.asker import Asker
from tests.integration.conftest import HalfAnswered, Services, StartWorker
from tests.integration.steering import token_text
from tests.integration.test_publishing import alarm
from tests.waiting import wait_until

#: No second attempt makes the same tokens.
RANDOM: dict[str, Any] = {"temperature": 1.0, "max_tokens": 6}


def test_a_worker_that_stops_hands_its_requests_on_and_no_token_is_lost(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    # Given two requests in a worker that would not finish them in any time
    start_worker("prefill")
    leaving = start_worker("decode", held=True)
    asker.ask("r", **RANDOM)
    result = submit("hello", **RANDOM)
    wait_until(lambda: len(leaving.steering.added()) == 2)
    leaving.steering.step(2)
    wait_until(lambda: len(asker.tokens()) == 3)
    begun = asker.tokens()

    # When it is told to stop, and there is another one
    start_worker("decode", 2)
    leaving.signal(signal.SIGTERM)

    # Then it ends in peace, and the other one goes on where it was
    assert leaving.wait() == 0
    wait_until(asker.questions)
    asker.tell(begun)
    wait_until(asker.finished)
    assert asker.tokens()[:3] == begun
    assert len(asker.tokens()) == 6
    assert [p for stage, p, _ in asker.outputs() if stage == "decode"] == [1, 2, 3, 4, 5]
    assert asker.failures() == {}
    # also for who waits for a result: tokens of both workers, and their text
    answer = result.get(timeout=20)
    assert len(answer["token_ids"]) == 6
    assert answer["text"] == "".join(map(token_text, answer["token_ids"]))
    assert len({token // 1000 for token in answer["token_ids"]}) == 3, "of three attempts"
    result.forget()
    wait_until(lambda: not list(services.kv.scan_iter()), what="partial blocks are deleted")


def test_none_of_many_comes_back_to_who_has_handed_it_on(
    start_worker: StartWorker, asker: Asker
) -> None:
    names = [f"r{number}" for number in range(8)]
    start_worker("prefill")
    leaving = start_worker("decode", held=True)
    for name in names:
        asker.ask(name)
    wait_until(lambda: len(leaving.steering.added()) == len(names))
    start_worker("decode", 2)

    leaving.signal(signal.SIGTERM)

    assert leaving.wait() == 0
    wait_until(lambda: all(asker.finished(name) for name in names))
    assert {tuple(asker.tokens(name)) for name in names} == {(100, 101, 102, 103)}
    assert sorted(leaving.steering.added()) == names


def test_not_more_is_handed_on_than_others_can_begin(
    start_worker: StartWorker, asker: Asker
) -> None:
    # Given three requests, and another worker with room for one
    start_worker("prefill")
    leaving = start_worker("decode", held=True)
    for name in ("a", "b", "c"):
        asker.ask(name)
    wait_until(lambda: len(leaving.steering.added()) == 3)
    other = start_worker("decode", 2, concurrency=1)

    leaving.signal(signal.SIGTERM)
    wait_until(lambda: "handing on 1 requests" in leaving.log)
    leaving.steering.release()

    assert leaving.wait() == 0
    wait_until(lambda: all(asker.finished(name) for name in ("a", "b", "c")))
    assert len(other.steering.added()) == 1
    assert asker.failures() == {}


def test_what_rabbitmq_does_not_take_is_given_back_to_it(
    half_answered: HalfAnswered, start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    leaving, begun = half_answered(**RANDOM)
    start_worker("decode", 2)

    with alarm(services, "memory"):
        leaving.signal(signal.SIGTERM)
        assert leaving.wait() == 0
        assert "r is given back: RabbitMQ did not confirm the message in time" in leaving.log
        wait_until(asker.questions)
        asker.tell(begun)
        wait_until(asker.finished)
        # Here: what RabbitMQ has not confirmed it may take all the same when the alarm is over, and
        # of two attempts an API would count one.
        assert asker.tokens()[:3] == begun
        assert len(asker.tokens()) == 6
        assert asker.failures() == {}


def test_the_last_worker_of_a_stage_finishes_what_it_has(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    start_worker("prefill")
    leaving = start_worker("decode", held=True)
    asker.ask("r")
    wait_until(leaving.steering.added)

    leaving.signal(signal.SIGTERM)
    wait_until(
        lambda: {w.state for w in read_workers(services.bus) if w.role == "decode"} == {"draining"}
    )
    wait_until(lambda: "no room elsewhere" in leaving.log)
    leaving.steering.release()

    assert leaving.wait() == 0
    assert asker.tokens() == [100, 101, 102, 103]
    assert asker.questions() == []


def test_two_that_stop_together_do_not_hand_to_each_other(
    start_worker: StartWorker, asker: Asker
) -> None:
    start_worker("prefill")
    first = start_worker("decode", held=True)
    asker.ask("r")
    wait_until(first.steering.added)
    second = start_worker("decode", 2)

    for worker in (first, second):
        worker.signal(signal.SIGTERM)
    wait_until(lambda: "no room elsewhere" in first.log)
    first.steering.release()

    assert [first.wait(), second.wait()] == [0, 0]
    assert asker.tokens() == [100, 101, 102, 103]
