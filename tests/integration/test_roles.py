"""A worker takes another role while it runs: no request is lost, and its engine stays."""

from __future__ import annotations

from typing import Any

from pdtasks.bus.orders import order_role
from pdtasks.bus.presence import read_workers
from pdtasks.messages import WorkerStatus
from tests.integration.asker import Asker
from tests.integration.conftest import (
    Services,
    StartWorker,
    StubWorker,
    cut_connections,
)
from tests.waiting import wait_until

#: No second attempt makes the same tokens.
RANDOM: dict[str, Any] = {"temperature": 1.0, "max_tokens": 6}


def status_of(services: Services, worker: StubWorker) -> WorkerStatus:
    (found,) = [w for w in read_workers(services.bus) if w.pid == worker.pid]
    return found


def ask_for(services: Services, worker: StubWorker, role: str) -> None:
    order_role(services.bus, status_of(services, worker), role)


def serves(services: Services, worker: StubWorker, role: str) -> bool:
    status = status_of(services, worker)
    return (status.role, status.state) == (role, "ready")


def test_one_worker_of_both_stages_is_all_that_is_needed(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    worker = start_worker("both")
    assert status_of(services, worker).role == "both"
    names = [f"r{number}" for number in range(6)]
    for name in names:
        asker.ask(name)
    wait_until(lambda: all(asker.finished(name) for name in names))

    assert {tuple(asker.tokens(name)) for name in names} == {(100, 101, 102, 103)}
    assert {stage for stage, _, _ in asker.outputs()} == {"prefill", "decode"}
    assert asker.failures() == {}
    assert sorted(worker.steering.added()) == sorted(names * 2), "both stages of each are here"


def test_a_decode_worker_becomes_a_prefill_worker_and_hands_on_what_it_has_begun(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    # Given a request in one of two decode workers that would not finish it in any time
    first = start_worker("prefill")
    changing = start_worker("decode", held=True)
    asker.ask("r", **RANDOM)
    wait_until(changing.steering.added)
    changing.steering.step(2)
    wait_until(lambda: len(asker.tokens()) == 3)
    begun = asker.tokens()
    start_worker("decode", 2)

    # When it is to serve prefill
    ask_for(services, changing, "prefill")

    # Then the other one goes on with the request, where it was
    wait_until(asker.questions)
    asker.tell(begun)
    wait_until(asker.finished)
    assert asker.tokens()[:3] == begun
    assert len(asker.tokens()) == 6
    assert asker.failures() == {}
    # and it computes prompts, in the same process, and no answers
    wait_until(lambda: serves(services, changing, "prefill"))
    changing.steering.release()
    first.steering.hold()
    for number in range(12):
        asker.ask(f"more{number}")
    wait_until(lambda: any(name.startswith("more") for name in changing.steering.added()))
    first.steering.release()
    wait_until(lambda: all(asker.finished(f"more{number}") for number in range(12)))
    assert len(changing.steering.added()) == len(set(changing.steering.added()))


def test_the_last_answers_end_before_prompts_come(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    # Given the only decode worker, with a request
    first = start_worker("prefill")
    changing = start_worker("decode", held=True)
    asker.ask("r")
    wait_until(changing.steering.added)

    # When it is to serve prefill, and there is nobody to hand it to
    ask_for(services, changing, "prefill")
    wait_until(lambda: status_of(services, changing).state == "changing")
    wait_until(lambda: "no room elsewhere" in changing.log)
    first.steering.hold()
    asker.ask("later")
    asker.ask("later still")

    # Then it ends that first
    assert not asker.finished("r")
    assert changing.steering.added() == ["r"]
    changing.steering.release()
    wait_until(lambda: asker.finished("r"))
    wait_until(lambda: serves(services, changing, "prefill"))
    first.steering.release()
    wait_until(lambda: asker.tokens("later") and asker.tokens("later still"))
    # and as it comes back, it answers what has been waiting
    ask_for(services, changing, "both")
    wait_until(lambda: asker.finished("later") and asker.finished("later still"))
    assert asker.failures() == {}


def test_roles_change_while_requests_come_and_none_is_lost(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    start_worker("prefill")
    start_worker("decode", 2)
    changing = start_worker("decode")
    names: list[str] = []
    for role in ("prefill", "both", "decode", "prefill", "decode", "both"):
        ask_for(services, changing, role)
        while not serves(services, changing, role):
            names.append(f"r{len(names)}")
            asker.ask(names[-1])
    wait_until(lambda: all(asker.finished(name) for name in names))
    assert {tuple(asker.tokens(name)) for name in names} == {(100, 101, 102, 103)}
    assert asker.failures() == {}
    assert not changing.has_ended()


def test_a_role_outlives_a_connection_to_rabbitmq(
    start_worker: StartWorker, asker: Asker, services: Services
) -> None:
    changing = start_worker("decode")
    ask_for(services, changing, "both")
    wait_until(lambda: serves(services, changing, "both"))

    with cut_connections(services, changing):
        asker.ask("r")
    wait_until(lambda: asker.finished("r"))
