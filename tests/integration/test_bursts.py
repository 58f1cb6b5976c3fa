"""Do bursts of short tasks ever stop a worker? Against real RabbitMQ, with a stub engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import httpx
import pytest

from pdtasks.engine import ENGINE_VERSION
from pdtasks.handover import encode_request
from pdtasks.messages import PrefillJob
from pdtasks.presence import read_workers
from tests.integration.asker import Asker, engine_request
from tests.integration.conftest import Services, StartWorker, wait_until

TASKS = 20_000
BURST = 500


def connections_opened(services: Services) -> int:
    """RabbitMQ's own count since it was started; some seconds behind."""
    with httpx.Client(base_url=services.rabbit.api_url, timeout=10) as api:
        churn = api.get("overview").json().get("churn_rates", {})
        return int(churn.get("connection_created", 0))  # nothing is said of the first seconds


def settled(count: Callable[[], int]) -> int:
    """`count` when it has not changed for longer than RabbitMQ's statistics lag behind (5 s)."""
    last: int = wait_until(count)
    since = time.monotonic()
    while time.monotonic() - since < 6:
        time.sleep(0.5)
        if (now := count()) != last:
            last, since = now, time.monotonic()
    return last


def ask_burst(asker: Asker, names: list[str]) -> None:
    """Publish one request of one token for each name, all confirmed."""
    now = time.time()
    wire = {name: encode_request(engine_request(name, max_tokens=1)) for name in names}
    sent = [
        asker.publisher.send(
            PrefillJob(
                request_id=name,
                engine=ENGINE_VERSION,
                model=None,
                request=wire[name],
                submitted_at=now,
                deadline=now + 120,
            ),
            asker.stream,
        )
        for name in names
    ]
    assert not wait(sent, timeout=30).not_done
    for confirmed in sent:
        confirmed.result()


@pytest.mark.timeout(280)
def test_twenty_thousand_tasks_in_bursts_cost_no_connection_and_no_answer(
    start_worker: StartWorker, make_asker: Callable[[], Asker], services: Services, our_app: Any
) -> None:
    # Given a worker that sends events, and two askers of whom one hangs up with each burst
    worker = start_worker("prefill", concurrency=64, stub_records="no")
    stays = make_asker()
    before = settled(lambda: connections_opened(services))
    leavers = 0

    for start in range(0, TASKS, BURST):
        leaves = make_asker()
        ask_burst(leaves, [f"gone{n}" for n in range(start, start + BURST // 2)])
        ask_burst(stays, [f"r{n}" for n in range(start, start + BURST // 2)])
        leaves.hang_up()
        leaves.close()
        leavers += 1
        # (A burst is worked off before the next: a worker has to stand any number of them.)
        missing = {f"r{n}" for n in range(start, start + BURST // 2)}

        def all_are_answered(missing: set[str] = missing) -> bool:
            missing -= stays.take_finished()
            return not missing

        wait_until(all_are_answered, 60, f"answers of the burst at {start}")

    # Then nobody has lost a connection: only the askers have opened one each
    log = worker.log
    assert "Connection to broker lost" not in log
    assert "missed heartbeat" not in log
    opened = settled(lambda: connections_opened(services)) - before
    assert opened <= leavers + 1, f"{opened} connections for {leavers} askers that come and go"
    # and the worker is idle and ready for more
    (status,) = wait_until(
        lambda: [w for w in read_workers(services.bus) if w.held == w.active == 0]
    )
    assert status.state == "ready"
