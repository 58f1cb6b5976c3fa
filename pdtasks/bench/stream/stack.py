"""What runs: our worker of each stage, an API process and services of their own; vLLM's front end.

For one thread, which has to outlive the stack (see `pdtasks.cluster.process`).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import httpx
import valkey

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.stack import Services, cpu_s, private_services, start_workers
from pdtasks.bus.presence import read_workers
from pdtasks.cluster import children
from pdtasks.cluster.placement import Placement
from pdtasks.cluster.probes import free_ports, wait_until
from pdtasks.cluster.process import Process
from pdtasks.naming import STAGES
from pdtasks.settings import Settings

_PACKAGE: Final = "pdtasks.bench.stream"
MODEL: Final = "stub-engine"
_START_S = 120.0
_STOP_S = 20.0


@dataclass(frozen=True)
class Side:
    """One of those that are compared."""

    name: str
    url: str
    pids: Sequence[int]  #: of all that is at work for it, but for the client

    def cpu_s(self) -> float:
        """Seconds of CPU that it has used so far."""
        return cpu_s(self.pids)


@contextmanager
def our_side(
    name: str,
    home: Path,
    nursery: Nursery,
    *,
    streams: int,
    stub: str,
    services: Services | None,
) -> Iterator[Side]:
    """Workers, an API process and services under `home`, unless they are there.

    Args:
        streams: at once.
        stub: a module of this package.
        services: None: its own.
    """
    home.mkdir()
    with ExitStack() as ends:
        services = services or ends.enter_context(private_services(home))
        settings = _settings(home, services, streams)
        make = partial(nursery.make, stub=f"{_PACKAGE}.{stub}")
        children.rotate_logs(settings)
        temporary = children.make_temporary(settings)
        ends.callback(shutil.rmtree, temporary, ignore_errors=True)
        places = [Placement(stage, 1, "", {}) for stage in STAGES]
        workers = [
            children.worker(settings, place, streams, temporary, make=make) for place in places
        ]
        start_workers(workers, ends)
        api = children.api(settings, temporary, make=make)
        _start(api, ends)
        with valkey.Valkey.from_url(services.bus.url) as bus:

            def are_ready() -> bool:
                ready = {status.pid for status in read_workers(bus) if status.state == "ready"}
                return all(worker.pid in ready for worker in workers)

            if not wait_until(are_ready, _START_S):
                raise workers[0].failure(f"or the other was not ready within {_START_S:.0f} s")
        url = children.api_url(settings)
        _wait_for(api, f"{url}/ready")
        of_services = [pid for pids in services.pids().values() for pid in pids]
        yield Side(name, url, [api.pid, *(worker.pid for worker in workers), *of_services])


@contextmanager
def vllm_side(home: Path, nursery: Nursery, streams: int) -> Iterator[Side]:
    """vLLM's front end, which is its own process for all."""
    home.mkdir()
    settings = _settings(home, None, streams)
    children.rotate_logs(settings)
    (port,) = free_ports(1)
    with ExitStack() as ends:
        front = nursery.make(
            "vllm_front",
            [sys.executable, "-m", f"{_PACKAGE}.vllm_front", str(port)],
            env={**children.common_env(settings), "OMP_NUM_THREADS": "1"},
            log=children.log_folder(settings) / "vllm_front.log",
            cwd=home,
        )
        _start(front, ends)
        url = f"http://127.0.0.1:{port}"
        _wait_for(front, f"{url}/health")
        yield Side("vllm", url, [front.pid])


def _settings(home: Path, services: Services | None, streams: int) -> Settings:
    found: Settings = children.stack_settings(
        home=home,
        broker_url=services and services.broker.url,
        broker_api_url=None,
        bus_url=services and services.bus.url,
        kv_urls=(services.kv.url,) if services else (),
        served_model_name=MODEL,
        model=None,
        device="cpu",
        max_num_seqs=streams,
        api_host="127.0.0.1",
        api_port=free_ports(1)[0],
    )
    return found


def _start(process: Process, ends: ExitStack) -> None:
    ends.callback(process.stop, _STOP_S)
    process.start()


def _wait_for(process: Process, url: str) -> None:
    def answers() -> bool:
        if process.poll() is not None:
            raise process.failure("has ended")
        try:
            return httpx.get(url, timeout=5, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    if not wait_until(answers, _START_S):
        raise process.failure(f"was not ready within {_START_S:.0f} s")
