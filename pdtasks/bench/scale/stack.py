"""What runs live: services, workers with the stub engine, API processes; more of them step by step.

For one thread, which has to outlive the stack (see `pdtasks.cluster.process`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx
import psutil
import valkey

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control.stack import Services, cpu_s, start_workers
from pdtasks.bench.scale.gpu import H200
from pdtasks.bench.scale.stub import MAX_MODEL_LEN, SLOWER
from pdtasks.bus.presence import read_workers
from pdtasks.cluster import children
from pdtasks.cluster.placement import Placement
from pdtasks.cluster.probes import free_ports, wait_until
from pdtasks.cluster.process import Process
from pdtasks.cluster.rights import User
from pdtasks.settings import Settings

#: Under this name the stub's "model" is served.
MODEL: Final = "stub-engine-with-gpu-times"
_STUB: Final = "pdtasks.bench.scale.stub"
_START_S: Final = 180.0
_STOP_S: Final = 20.0
#: Workers and API processes that start at once: on a few cores more would only wait.
_AT_ONCE: Final = 8


class ScaleStack:
    """Workers and API processes on running services; ended as a context."""

    def __init__(
        self, home: Path, services: Services, nursery: Nursery, *, slower: float = 1.0
    ) -> None:
        """Args:
        home: a folder of its own.
        nursery: where stub workers and API processes fork off.
        slower: how many times as long as a GPU the stub engines take.
        """
        self._services = services
        self._make = partial(nursery.make, stub=_STUB)
        self._slower = slower
        self._settings: Settings = children.stack_settings(
            home=home,
            broker_url=services.broker.url,
            broker_api_url=None,
            bus_url=services.bus.url,
            bus_urls=(),
            kv_urls=(services.kv.url,),
            served_model_name=MODEL,
            model=None,
            device="cpu",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=H200.max_num_seqs,
            short_prompt_tokens=0,  # it is the way through both stages that is measured
            # Many processes on few cores are silent for longer than on hosts of their own.
            worker_ttl_s=30.0,
            api_host="127.0.0.1",
        )
        self._workers: dict[str, list[Process]] = {"prefill": [], "decode": []}
        self._apis: list[tuple[Process, str]] = []
        self._ends = ExitStack()

    @property
    def urls(self) -> Sequence[str]:
        """Of the API processes."""
        return [url for _, url in self._apis]

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU that each part has used so far: its processes and their children."""
        parts = {
            **self._services.pids(),
            **{role: [p.pid for p in workers] for role, workers in self._workers.items()},
            "api": [process.pid for process, _ in self._apis],
        }
        return {name: cpu_s(pids) for name, pids in parts.items()}

    def memory_mib(self) -> dict[str, float]:
        """MiB that one process of each kind has for itself, on average."""
        groups = {**self._workers, "api": [process for process, _ in self._apis]}
        return {
            name: sum(psutil.Process(p.pid).memory_full_info().uss for p in own) / len(own) / 2**20
            for name, own in groups.items()
            if own
        }

    def bus_commands(self) -> dict[str, tuple[int, float]]:
        """Of each command that the bus has had so far: calls, and seconds that it was at them."""
        with valkey.Valkey.from_url(self._services.bus.operator_url) as bus:
            found: Mapping[str, Mapping[str, int]] = bus.info("commandstats")
        return {
            name.removeprefix("cmdstat_"): (s["calls"], s["usec"] / 1e6)
            for name, s in found.items()
        }

    def grow(self, prefill: int, decode: int, apis: int, progress: Callable[[str], None]) -> None:
        """Have so many of each, all ready. Raises StartFailed."""
        wanted = {"prefill": prefill, "decode": decode}
        missing = [
            Placement(role, number, "", {SLOWER: str(self._slower)})
            for role, own in self._workers.items()
            for number in range(len(own) + 1, wanted[role] + 1)
        ]
        while missing:
            now, missing = missing[:_AT_ONCE], missing[_AT_ONCE:]
            self._add_workers(now)
            running = sum(map(len, self._workers.values()))
            progress(f"{running} of {prefill + decode} workers with stub engines are ready")
        self._add_apis(apis - len(self._apis))

    def balancer(self, *, ttft_s: float, itl_s: float) -> Process:
        """What has its workers change roles, not started."""
        own = self._settings.model_copy(
            update={"bus_url": self._services.bus.url_for(User.BALANCER)}
        )
        return children.balancer(own, self.urls[0], ttft_s=ttft_s, itl_s=itl_s)

    def __enter__(self) -> Self:
        with ExitStack() as ends:
            children.rotate_logs(self._settings)
            self._temporary = children.make_temporary(self._settings)
            ends.callback(shutil.rmtree, self._temporary, ignore_errors=True)
            self._ends = ends.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # All at once: each takes a moment, and there may be many.
        for process, _ in self._apis:
            process.request_stop()
        for process in (p for own in self._workers.values() for p in own):
            process.request_stop()
        self._ends.close()

    def _add_workers(self, placements: Sequence[Placement]) -> None:
        new = [
            children.worker(
                self._settings, place, H200.max_num_seqs, self._temporary, make=self._make
            )
            for place in placements
        ]
        start_workers(new, self._ends)
        with valkey.Valkey.from_url(self._services.bus.url) as bus:

            def are_ready() -> bool:
                for worker in new:
                    if worker.poll() is not None:
                        raise worker.failure("has ended")
                ready = {status.pid for status in read_workers(bus) if status.state == "ready"}
                return all(worker.pid in ready for worker in new)

            if not wait_until(are_ready, _START_S):
                raise new[0].failure(f"or another was not ready within {_START_S:.0f} s")
        for worker, place in zip(new, placements, strict=True):
            self._workers[place.role].append(worker)

    def _add_apis(self, number: int) -> None:
        for port in free_ports(number) if number > 0 else ():
            own = self._settings.model_copy(update={"api_port": port})
            name = f"api{len(self._apis) + 1}"
            api = children.api(own, self._temporary, name=name, make=self._make)
            self._ends.callback(api.stop, _STOP_S)
            api.start()
            url = children.api_url(own)

            def is_ready(url: str = url, api: Process = api) -> bool:
                if api.poll() is not None:
                    raise api.failure("has ended")
                return _answers(url)

            if not wait_until(is_ready, _START_S):
                raise api.failure(f"was not ready within {_START_S:.0f} s")
            self._apis.append((api, url))


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False
