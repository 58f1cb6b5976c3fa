"""A balancer follows the load of a real stack with the roles of its workers; engines are stubs."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest
import valkey

from pdtasks.balance.deciding import Targets
from pdtasks.balance.running import Balancer
from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.chaos.stack import STUB_MODEL, ChaosStack
from pdtasks.bus.keys import BALANCER
from pdtasks.bus.lease import Lease
from pdtasks.bus.presence import read_workers
from pdtasks.cluster import children
from pdtasks.cluster.console import Console
from pdtasks.cluster.rights import User
from pdtasks.terminal.asking import Client
from tests.integration.conftest import Services
from tests.waiting import wait_until

#: Whatever comes is late for one of them, and soon enough for the other.
PROMPTS_ARE_LATE = Targets(ttft_s=1e-6, itl_s=100.0, looks=2, rest_s=0.0)
ANSWERS_ARE_SLOW = Targets(ttft_s=100.0, itl_s=1e-6, looks=2, rest_s=0.0)


@contextmanager
def requests(url: str) -> Iterator[list[int]]:
    """One after the other, in the background; gives their status codes."""
    answers: list[int] = []
    enough = threading.Event()

    def ask() -> None:
        body = {"model": STUB_MODEL, "prompt": [5] * 40, "max_tokens": 5}
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            while not enough.is_set():
                answers.append(client.post("/v1/completions", json=body).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        enough.set()
        thread.join(40)


def test_roles_follow_the_load_and_no_request_notices(
    tmp_path: Path, bench_nursery: Nursery
) -> None:
    console = Console(io.StringIO())
    with ExitStack() as ends:
        stack = ends.enter_context(
            ChaosStack(tmp_path, "stub", console, deadline_s=60, nursery=bench_nursery)
        )
        url = next(iter(stack.urls.values()))
        client = ends.enter_context(closing(Client(url)))
        bus = ends.enter_context(closing(valkey.Valkey.from_url(stack.bus.url)))

        model = client.overview(0).api.model

        def has_one_more(stage: str, targets: Targets) -> None:
            balancer = Balancer(client, bus, targets, model=model, every_s=0.1, dry_run=False)
            said: list[str] = []

            def is_done() -> bool:
                told, acts = balancer.step()
                said.extend([told] if acts else [])
                stack.tick()
                ready = [w.role for w in read_workers(bus) if w.state == "ready"]
                return ready.count(stage) == 3 and len(ready) == 4

            wait_until(is_done, 40)
            assert f"to {stage}" in said[0]
            # The last one of the other stage stays, however late it is.
            assert not any(balancer.step()[1] for _ in range(5))
            balancer.leave()

        processes = {w.name: w.process for w in read_workers(bus)}
        with requests(url) as answers:
            has_one_more("prefill", PROMPTS_ARE_LATE)
            has_one_more("decode", ANSWERS_ARE_SLOW)

        assert len(answers) > 5
        assert set(answers) == {200}
        assert {w.name: w.process for w in read_workers(bus)} == processes, "all the same processes"


def test_the_balancer_of_up_has_workers_change_and_leaves_its_lease_when_it_is_stopped(
    tmp_path: Path, bench_nursery: Nursery
) -> None:
    with ExitStack() as ends:
        stack = ends.enter_context(
            ChaosStack(
                tmp_path, "stub", Console(io.StringIO()), deadline_s=60, nursery=bench_nursery
            )
        )
        url = next(iter(stack.urls.values()))
        bus = ends.enter_context(closing(valkey.Valkey.from_url(stack.bus.operator_url)))
        settings = stack.settings.model_copy(
            update={"bus_url": stack.bus.url_for(User.BALANCER), "broker_url": "", "kv_urls": ()}
        )
        process = children.balancer(settings, url, ttft_s=1e-6, itl_s=100.0)
        process.start()
        ends.callback(process.kill)

        def is_done() -> bool:
            stack.tick()
            assert process.running, process.log_tail(20)
            ready = [w.role for w in read_workers(bus) if w.state == "ready"]
            return ready.count("prefill") == 3 and len(ready) == 4

        with requests(url):
            wait_until(is_done, 60)
        lease = BALANCER + settings.model_name
        assert bus.exists(lease)

        process.request_stop()
        wait_until(lambda: not process.running, 10)
        assert not bus.exists(lease), "the next one need not wait"


@pytest.fixture
def key(services: Services) -> Iterator[str]:
    name = BALANCER + "test"
    yield name
    services.bus.delete(name, f"{name}:number")


def test_of_two_one_holds_the_lease_and_the_next_has_a_higher_number(
    services: Services, key: str
) -> None:
    first, second = (Lease(services.bus, key, 30.0) for _ in range(2))
    number = first.hold()
    assert number
    assert second.hold() == 0
    assert first.hold() == number

    first.leave()
    later = second.hold()
    assert later > number
    assert first.hold() == 0


def test_a_lease_that_is_not_kept_goes_to_another_one(services: Services, key: str) -> None:
    frozen, other = Lease(services.bus, key, 0.2), Lease(services.bus, key, 30.0)
    number = frozen.hold()
    later = wait_until(other.hold)
    assert later > number
    # and it finds out as soon as it asks
    assert frozen.hold() == 0
    # A leave that comes too late takes nothing from the other one.
    frozen.leave()
    assert other.hold() == later


def test_numbers_grow_also_where_the_bus_has_forgotten_them(services: Services, key: str) -> None:
    lease = Lease(services.bus, key, 30.0)
    number = lease.hold()
    services.bus.delete(key, f"{key}:number")
    wait_until(lambda: Lease(services.bus, key, 30.0).hold() >= number)
