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

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.stack import Services, cpu_s, private_services, start_workers
from pdtasks.cluster import children
from pdtasks.cluster.placement import Placement
from pdtasks.cluster.probes import free_ports, wait_until
from pdtasks.cluster.process import Process
from pdtasks.naming import STAGES
from pdtasks.settings import Settings

_PACKAGE: Final = "pdtasks.bench.stream"
MODEL: Final = "stub-engine"
#: A worker's places for each stream: a quarter of them is for those that have one token only.
_PLACES: Final = 4
_START_S = 120.0
_STOP_S = 20.0


@dataclass(frozen=True)
class Side:
    """One of those that are compared."""

    name: str
    url: str
    ready: str  #: path that answers when all of it is ready
    processes: Sequence[Process]  #: the first one is the server at `url`
    services: Sequence[int] = ()  #: pids

    def wait(self) -> None:
        """Return when it is ready. Raises StartFailed."""
        server, *_ = self.processes

        def answers() -> bool:
            for process in self.processes:
                if process.poll() is not None:
                    raise process.failure("has ended")
            try:
                return httpx.get(self.url + self.ready, timeout=5, trust_env=False).is_success
            except httpx.HTTPError:
                return False

        if not wait_until(answers, _START_S):
            raise server.failure(f"was not ready within {_START_S:.0f} s")

    def begin_to_stop(self) -> None:
        """Its context's end waits for it: so sides stop side by side."""
        for process in self.processes:
            process.request_stop()

    def cpu_s(self) -> float:
        """Seconds of CPU that all at work for it, but for the client, have used so far."""
        return cpu_s([*self.services, *(process.pid for process in self.processes)])


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
    """Workers, an API process and services under `home`, unless they are there; they are starting.

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
            children.worker(settings, place, _PLACES * streams, temporary, make=make)
            for place in places
        ]
        start_workers(workers, ends)
        api = children.api(settings, temporary, make=make)
        _start(api, ends)
        yield Side(
            name,
            children.api_url(settings),
            "/ready",
            [api, *workers],
            [pid for pids in services.pids().values() for pid in pids],
        )


@contextmanager
def vllm_side(home: Path, nursery: Nursery, streams: int) -> Iterator[Side]:
    """vLLM's front end, which is its own process for all; it is starting."""
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
        yield Side("vllm", f"http://127.0.0.1:{port}", "/health", [front])


def _settings(home: Path, services: Services | None, streams: int) -> Settings:
    found: Settings = children.stack_settings(
        home=home,
        broker_url=services and services.broker.url,
        broker_api_url=None,
        bus_url=services and services.bus.url,
        bus_urls=(),
        kv_urls=(services.kv.url,) if services else (),
        served_model_name=MODEL,
        model=None,
        device="cpu",
        max_num_seqs=_PLACES * streams,
        short_prompt_tokens=0,  # it is the way through both stages that is measured
        api_host="127.0.0.1",
        api_port=free_ports(1)[0],
    )
    return found


def _start(process: Process, ends: ExitStack) -> None:
    ends.callback(process.stop, _STOP_S)
    process.start()
