"""A real API process, on services whose workers are stubs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.cluster.probes import free_ports
from pdtasks.cluster.rights import User
from tests.integration.conftest import ROOT, Services
from tests.waiting import wait_until


@contextmanager
def running_api(
    services: Services,
    nursery: Nursery,
    folder: Path,
    deadline_s: float,
    *,
    program: str = "pdtasks.cli",
    **env: str,
) -> Iterator[httpx.Client]:
    """Args:
    folder: for its log.
    deadline_s: of every request.
    program: another module that does what `pdtasks` does.
    env: more of the product's variables, without their prefix.
    """
    (port,) = free_ports(1)
    own = {
        "PDTASKS_BROKER_URL": services.rabbit.url_for(User.API),
        "PDTASKS_BUS_URL": services.bus_server.url_for(User.API),
        "PDTASKS_REQUEST_TIMEOUT_S": str(deadline_s),
        "PYTHONPATH": str(ROOT),
    } | {f"PDTASKS_{name.upper()}": value for name, value in env.items()}
    process = nursery.make(
        "api",
        [sys.executable, "-m", program, "api", "--port", str(port)],
        env=os.environ | services.env | own,
        log=folder / "api.log",
        cwd=folder,
    )
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=deadline_s + 20, trust_env=False) as client:

            def answers() -> bool:
                assert process.poll() is None, process.log_tail()
                try:
                    return client.get("/health").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(answers, 90)
            yield client
    finally:
        process.kill()
