"""Several answers to one prompt, asked for with one message: each goes its own way."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.integration.asker import Asker
from tests.integration.conftest import DELIVERY_LIMIT, Services, StartWorker
from tests.integration.leftovers import wait_until_nothing_is_left
from tests.integration.steering import POISON
from tests.waiting import wait_until

NAMES = ("r", "s", "t")
ANSWER = [100, 101, 102, 103]


def all_finished(asker: Asker) -> bool:
    return all(asker.finished(name) for name in NAMES)


def test_they_run_together_and_each_is_handed_over_by_itself(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    prefill, decode = start_worker("prefill"), start_worker("decode")

    asker.ask("r", siblings=NAMES[1:])

    wait_until(lambda: all_finished(asker))
    assert [asker.tokens(name) for name in NAMES] == [ANSWER] * 3
    assert sorted(prefill.steering.added()) == [*NAMES]
    assert sorted(decode.steering.added()) == [*NAMES]
    wait_until_nothing_is_left(services, asker.stream)


def test_a_worker_that_is_killed_hands_all_of_them_to_another(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    start_worker("decode")
    victim = start_worker("prefill", held=True)
    asker.ask("r", siblings=NAMES[1:])
    wait_until(lambda: len(victim.steering.added()) == len(NAMES))

    victim.signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    start_worker("prefill", 2)

    wait_until(lambda: all_finished(asker))
    assert [asker.tokens(name) for name in NAMES] == [ANSWER] * 3
    assert asker.failures() == {}
    wait_until_nothing_is_left(services, asker.stream)


def test_one_that_nobody_wants_any_more_ends_alone(
    start_worker: StartWorker, asker: Asker, services: Services, abort: Callable[[str], None]
) -> None:
    start_worker("decode")
    prefill = start_worker("prefill", held=True)
    asker.ask("r", siblings=NAMES[1:])
    wait_until(lambda: len(prefill.steering.added()) == len(NAMES))

    abort("s")
    wait_until(lambda: "aborted s" in prefill.log)
    prefill.steering.release()

    wait_until(lambda: asker.finished("r") and asker.finished("t"))
    assert asker.tokens("s") == []
    wait_until_nothing_is_left(services, asker.stream)


def test_a_prompt_that_kills_every_worker_is_answered_for_to_all(
    start_worker: StartWorker, asker: Asker
) -> None:
    start_worker("decode")

    asker.ask("r", prompt=(1, POISON), siblings=NAMES[1:])
    for number in range(1, DELIVERY_LIMIT + 2):
        victim = start_worker("prefill", number, wait=False)
        wait_until(victim.has_ended, what="it took the poison")

    wait_until(lambda: len(asker.failures()) == len(NAMES))
    assert {failure.code for failure in asker.failures().values()} == {"WorkerLost"}


def test_what_is_wrong_with_a_prompt_is_told_to_all(
    start_worker: StartWorker, asker: Asker
) -> None:
    start_worker("prefill")

    asker.ask("r", prompt=(-1,), siblings=NAMES[1:])

    wait_until(lambda: len(asker.failures()) == len(NAMES))
    assert {failure.code for failure in asker.failures().values()} == {"InvalidRequest"}
