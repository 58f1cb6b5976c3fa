"""A job is the worker's that has room for it, not of whoever was asked first; engines are stubs."""

from __future__ import annotations

from collections import Counter

from tests.integration.asker import Asker
from tests.integration.conftest import Services, StartWorker, cut_connections
from tests.waiting import wait_until

#: A prompt that fills a step of these engines.
LONG = tuple(range(1, 401))
STEP = {"stub_step_tokens": "400"}


def test_prompts_go_to_the_worker_that_computes_them(
    start_worker: StartWorker, asker: Asker
) -> None:
    # Given a prefill worker that stands, with eight places, and one that works
    slow = start_worker("prefill", 1, held=True, **STEP)
    fast = start_worker("prefill", 2, **STEP)
    start_worker("decode")

    names = [f"r{number}" for number in range(24)]
    for name in names:
        asker.ask(name, prompt=LONG)

    # Then the first has no more than it could begin soon, and all others are answered
    wait_until(lambda: sum(asker.finished(name) for name in names) >= 20)
    assert 1 <= len(slow.steering.added()) <= 2
    slow.steering.release()
    wait_until(lambda: all(asker.finished(name) for name in names))
    assert asker.failures() == {}
    assert Counter(slow.steering.added() + fast.steering.added()) == Counter(names)


def test_short_prompts_have_all_places(start_worker: StartWorker, asker: Asker) -> None:
    worker = start_worker("prefill", held=True, **STEP)
    start_worker("decode")

    for number in range(8):
        asker.ask(f"r{number}", prompt=(1, 2, 3))

    wait_until(lambda: len(worker.steering.added()) == 8)
    assert "Started consuming from prefill" in worker.log, "it has asked for more"
    worker.steering.release()
    wait_until(lambda: all(asker.finished(f"r{number}") for number in range(8)))


def test_a_new_connection_gives_no_more_than_the_lost_one(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    worker = start_worker("prefill", held=True, **STEP)
    start_worker("decode")
    names = [f"r{number}" for number in range(12)]
    for name in names:
        asker.ask(name, prompt=LONG)
    wait_until(lambda: len(worker.steering.added()) == 2)

    with cut_connections(services, worker):
        pass

    # What ran goes on, and was delivered again.
    wait_until(lambda: worker.log.count("joins its run") >= 2)
    assert len(set(worker.steering.added())) <= 4
    worker.steering.release()
    wait_until(lambda: all(asker.finished(name) for name in names))
    assert asker.failures() == {}
