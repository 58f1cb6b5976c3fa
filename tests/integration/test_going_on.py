"""A request that is run again goes on where its asker says that the answer ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from pdtasks.bus import progress
from tests.integration.asker import Asker
from tests.integration.conftest import HalfAnswered, Services, StartWorker, StubWorker
from tests.integration.test_publishing import alarm
from tests.waiting import wait_until

#: No second attempt makes the same tokens.
RANDOM: dict[str, Any] = {"temperature": 1.0}


def kill(worker: StubWorker) -> None:
    worker.signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL


@pytest.fixture
def lost_in_decode(half_answered: HalfAnswered) -> Callable[..., list[int]]:
    """Kills decode's worker after three tokens; these."""

    def lose(**request: Any) -> list[int]:
        victim, tokens = half_answered(**request)
        kill(victim)
        return tokens

    return lose


def test_decode_goes_on_after_the_last_token_of_an_attempt_that_was_lost(
    lost_in_decode: Callable[..., list[int]], start_worker: StartWorker, asker: Asker
) -> None:
    begun = lost_in_decode(**RANDOM, max_tokens=6)

    start_worker("decode", 2)
    wait_until(asker.questions)
    asker.tell(begun)

    wait_until(asker.finished)
    # (`tokens` fails on a token that comes twice and differs, and on one that is missing.)
    assert asker.tokens()[:3] == begun
    assert len(asker.tokens()) == 6
    assert [p for stage, p, _ in asker.outputs() if stage == "decode"] == [1, 2, 3, 4, 5]
    assert asker.failures() == {}


def test_an_attempt_whose_request_nobody_waits_for_ends_without_the_engine(
    lost_in_decode: Callable[..., list[int]],
    start_worker: StartWorker,
    asker: Asker,
    services: Services,
) -> None:
    lost_in_decode()

    successor = start_worker("decode", 2)
    wait_until(asker.questions)
    asker.tell(None)

    wait_until(lambda: not list(services.kv.scan_iter()), what="its partial block is deleted")
    assert successor.steering.added() == []
    assert asker.failures() == {}


def test_an_attempt_that_another_has_taken_over_leaves_what_belongs_to_the_request(
    lost_in_decode: Callable[..., list[int]],
    start_worker: StartWorker,
    asker: Asker,
    services: Services,
) -> None:
    lost_in_decode()
    (tail,) = services.kv.scan_iter()

    successor = start_worker("decode", 2)
    wait_until(asker.questions)
    asker.tell(None, otherwise="elsewhere")

    # Its next job comes after that one
    asker.ask("next")
    wait_until(lambda: asker.finished("next"))
    assert successor.steering.added() == ["next"]
    wait_until(lambda: list(services.kv.scan_iter()) == [tail])
    assert asker.failures() == {}


def test_an_asker_that_does_not_say_gets_the_answer_from_the_first_token_on(
    lost_in_decode: Callable[..., list[int]], start_worker: StartWorker, asker: Asker
) -> None:
    lost_in_decode(max_tokens=4)

    start_worker("decode", 2)
    wait_until(asker.questions)
    asked = time.monotonic()
    wait_until(asker.finished)

    assert time.monotonic() - asked < progress.WAIT_S + 3
    assert asker.tokens() == [100, 101, 102, 103]


def test_a_first_token_that_was_seen_is_kept_when_prefill_runs_again(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    # Given a prefill worker that is lost between the first token and the hand-over
    victim = start_worker("prefill", held=True)
    start_worker("decode")
    asker.ask("r", **RANDOM)
    wait_until(victim.steering.added)
    with alarm(services, "memory"):
        victim.steering.step()
        wait_until(asker.tokens)
        kill(victim)
    (first,) = asker.tokens()

    # When another one runs the job
    start_worker("prefill", 2)
    wait_until(asker.questions)
    assert [stage for stage, _ in asker.questions()] == ["prefill"]
    asker.tell([first])

    # Then its own first token is nobody's business
    wait_until(asker.finished)
    assert asker.tokens()[0] == first
    assert len(asker.tokens()) == 4
    assert [stage for stage, _, _ in asker.outputs()] == ["prefill", "decode", "decode", "decode"]


def test_prefill_does_not_run_again_what_decode_has_begun(
    start_worker: StartWorker, asker: Asker
) -> None:
    victim = start_worker("prefill", held=True)
    decode = start_worker("decode")
    asker.ask("r")
    wait_until(victim.steering.added)
    kill(victim)

    successor = start_worker("prefill", 2)
    wait_until(asker.questions)
    asker.tell([100, 101])

    # Its next job comes after that one
    asker.ask("next")
    wait_until(lambda: asker.finished("next"))
    assert successor.steering.added() == ["next"]
    assert decode.steering.added() == ["next"]
    assert asker.failures() == {}
