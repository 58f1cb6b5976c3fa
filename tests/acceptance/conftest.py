"""One real stack for all acceptance tests: RabbitMQ, Valkey, two vLLM engines, API and Flower."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.acceptance.running_stack import START_TIMEOUT_S, Stack, free_ports, wait_until


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("stack")
    api_port, flower_port = free_ports(2)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PDTASKS_")}
    env["PDTASKS_HOME"] = str(home)
    log = (home / "up.txt").open("w")
    up = subprocess.Popen(
        [
            *(sys.executable, "-m", "pdtasks.cli", "up", "--prefill", "1", "--decode", "1"),
            *("--port", str(api_port), "--flower-port", str(flower_port)),
        ],
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    running = Stack(home, f"http://127.0.0.1:{api_port}", f"http://127.0.0.1:{flower_port}", env)
    try:

        def workers_are_ready() -> bool:
            assert up.poll() is None, (home / "up.txt").read_text()
            workers = running.status()["workers"]
            return len(workers) == 2 and all(w["state"] == "ready" for w in workers)

        def api_and_flower_answer() -> bool:
            try:
                return (
                    httpx.get(running.api_url + "/ready").status_code == 200
                    and httpx.get(running.flower_url + "/healthcheck").status_code == 200
                )
            except httpx.HTTPError:
                return False

        wait_until(workers_are_ready, START_TIMEOUT_S)
        wait_until(api_and_flower_answer, START_TIMEOUT_S)
        yield running
        running.bus.close()
        running.kv.close()
    finally:
        tree = psutil.Process(up.pid).children(recursive=True) if up.poll() is None else []
        up.send_signal(signal.SIGINT)
        code = up.wait(timeout=90)
        log.close()
        left = [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert code == 0, (home / "up.txt").read_text()
        assert not left, f"still there after a clean stop: {left}"


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with stack.client() as c:
        yield c
