"""Do API processes leave each other room in the workers? With two real ones and stub engines."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from pdtasks.bench.chaos.nursery import Nursery
from tests.integration.conftest import Services, StartWorker
from tests.integration.real_api import running_api
from tests.waiting import wait_until

#: Requests that one API process publishes alone, for eight places of a worker and a quarter beyond.
ALL, HALF, IN_ENGINE = 10, 5, 8
PATIENCE_S = 30


def at(api: httpx.Client, stage: str) -> int:
    """Requests of this process that are there."""
    return int(figure(api, "pdtasks_open_requests", f'stage="{stage}"'))


def figure(api: httpx.Client, name: str, label: str = "") -> float:
    lines = api.get("/metrics").text.splitlines()
    found = (line for line in lines if line.startswith(f"{name}{{") and label in line)
    return next((float(line.split()[-1]) for line in found), -1.0)


def state(api: httpx.Client) -> str:
    stages = ", ".join(f"{stage} {at(api, stage)}" for stage in ("line", "prefill", "decode"))
    return f"{stages}, part {figure(api, 'pdtasks_api_part')}"


def is_ready(api: httpx.Client) -> bool:
    return api.get("/ready").status_code == 200


def test_two_that_have_more_than_fits_get_half_of_the_workers_each_until_one_is_gone(
    start_worker: StartWorker, services: Services, bench_nursery: Nursery, tmp_path: Path
) -> None:
    prefill = start_worker("prefill", held=True)
    start_worker("decode")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(60) as callers, ExitStack() as ends:
        ends.callback(prefill.steering.release)
        second = ends.enter_context(running_api(services, bench_nursery, folders[1], 60))
        first_ends = ends.enter_context(ExitStack())
        first = first_ends.enter_context(running_api(services, bench_nursery, folders[0], 60))
        wait_until(lambda: is_ready(first) and is_ready(second), PATIENCE_S)
        model = first.get("/v1/models").json()["data"][0]["id"]

        def ask(api: httpx.Client) -> int:
            body = {"model": model, "prompt": "a b c", "max_tokens": 2, "temperature": 0}
            headers = {"X-Pdtasks-Route": "split"}
            try:
                url = api.base_url.join("/v1/completions")
                return httpx.post(url, json=body, headers=headers, timeout=90).status_code
            except httpx.TransportError:
                return 0  # its process is gone

        # One that is alone has all.
        asked_first = [callers.submit(ask, first) for _ in range(30)]
        wait_until(lambda: (at(first, "prefill"), at(first, "line")) == (ALL, 30 - ALL), PATIENCE_S)

        # The other takes its half, and the first one no more than that when places are free again.
        wait_until(lambda: figure(second, "pdtasks_api_part") == 0.5, PATIENCE_S)
        asked_second = [callers.submit(ask, second) for _ in range(20)]
        wait_until(lambda: (at(second, "prefill"), at(second, "line")) == (HALF, 15), PATIENCE_S)
        wait_until(lambda: figure(first, "pdtasks_api_part") == 0.5, PATIENCE_S)
        # (A step is of those that are in the engine by then.)
        wait_until(lambda: len(prefill.steering.added()) == IN_ENGINE, PATIENCE_S)
        prefill.steering.step()
        try:
            wait_until(lambda: at(first, "prefill") == HALF and at(first, "line") > 0, PATIENCE_S)
        except AssertionError:
            pytest.fail(f"it has not its half: {[state(api) for api in (first, second)]}")
        assert at(second, "prefill") <= HALF

        # One that was killed has none.
        first_ends.close()
        assert {call.result(PATIENCE_S) for call in asked_first} <= {0, 200}
        wait_until(lambda: figure(second, "pdtasks_api_part") == 1.0, PATIENCE_S)
        prefill.steering.release()
        assert {call.result(PATIENCE_S) for call in asked_second} == {200}
