"""What runs: private services, and of each side two workers and a client.

For one thread, which has to outlive the stack (see `pdtasks.cluster.process`).
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import httpx
import psutil
import valkey

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bench.control import celery_app
from pdtasks.bench.control.orders import Client
from pdtasks.bus.presence import read_workers
from pdtasks.cluster import children
from pdtasks.cluster.placement import Placement
from pdtasks.cluster.probes import wait_until
from pdtasks.cluster.process import Process
from pdtasks.cluster.rabbitmq import RabbitNode
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.naming import STAGES
from pdtasks.settings import Settings
from pdtasks.tls import celery_backend_url

_PACKAGE: Final = "pdtasks.bench.control"
_VHOST: Final = "stock"
_START_S = 120.0
_STOP_S = 20.0


@dataclass(frozen=True)
class Services:
    """Broker, bus and kv server, running."""

    broker: RabbitNode
    bus: ValkeyServer
    kv: ValkeyServer

    def pids(self) -> dict[str, list[int]]:
        """Their processes."""
        return {
            "broker": [process.pid for process in self.broker.processes],
            "bus": [process.pid for process in self.bus.processes],
            "kv": [process.pid for process in self.kv.processes],
        }


@contextmanager
def private_services(home: Path) -> Iterator[Services]:
    """Services as `pdtasks up` starts them."""
    logs = home / "logs"
    with (
        ValkeyServer(home / "valkey", "bus", log=logs / "valkey-bus.log", durable=True) as bus,
        ValkeyServer(home / "valkey", "kv", log=logs / "valkey-kv.log") as kv,
        RabbitNode(home / "rabbitmq", log=logs / "rabbitmq.log") as broker,
    ):
        yield Services(broker, bus, kv)


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    name: str
    client: Client
    workers: Sequence[Process]

    def cpu_s(self) -> float:
        """Seconds of CPU that client and workers have used so far."""
        return cpu_s([self.client.process.pid, *(worker.pid for worker in self.workers)])


def cpu_s(pids: Sequence[int]) -> float:
    """Seconds of CPU that these processes, and their children, have used so far."""
    found = 0.0
    for leader in map(psutil.Process, pids):
        for process in (leader, *leader.children(recursive=True)):
            times = process.cpu_times()
            found += times.user + times.system
    return found


class ControlStack:
    """Workers and clients of both sides; started and ended as a context."""

    def __init__(
        self,
        home: Path,
        services: Services,
        *,
        threads: int,
        prompt_tokens: int,
        nursery: Nursery | None = None,
        stock: bool = True,
    ) -> None:
        """Args:
        home: a folder of its own.
        nursery: where stub engines fork off; None: one of its own.
        stock: is the other side there?
        threads: of each worker.
        prompt_tokens: ids in a prompt.
        """
        self._services = services
        self._nursery = nursery
        self._has_stock = stock
        self._threads = threads
        self._prompt_tokens = prompt_tokens
        self.settings: Settings = children.stack_settings(
            home=home,
            broker_url=services.broker.url,
            broker_api_url=None,
            bus_url=services.bus.url,
            bus_urls=(),
            kv_urls=(services.kv.url,),
            served_model_name="stub-engine",
            model=None,
            device="cpu",
            max_num_seqs=threads,
            short_prompt_tokens=0,  # it is the way through both stages that is measured
        )
        self._ends = ExitStack()
        self.sides: tuple[Side, ...]

    def __enter__(self) -> Self:
        with ExitStack() as ends:
            children.rotate_logs(self.settings)
            nursery = self._nursery or ends.enter_context(Nursery(self._log("nursery")))
            make = partial(nursery.make, stub=f"{_PACKAGE}.stub")
            self._temporary = children.make_temporary(self.settings)
            ends.callback(shutil.rmtree, self._temporary, ignore_errors=True)
            # The nursery imports vLLM meanwhile.
            theirs = (self._stock(ends),) if self._has_stock else ()
            self.sides = (self._ours(ends, make), *theirs)
            self._ends = ends.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ends.close()

    def _ours(self, ends: ExitStack, make: Callable[..., Process]) -> Side:
        workers = [
            children.worker(
                self.settings,
                Placement(stage, 1, "", {}),
                self._threads,
                self._temporary,
                make=make,
            )
            for stage in STAGES
        ]
        start_workers(workers, ends)
        with valkey.Valkey.from_url(self._services.bus.url) as bus:

            def are_ready() -> bool:
                ready = {status.pid for status in read_workers(bus) if status.state == "ready"}
                return all(worker.pid in ready for worker in workers)

            if not wait_until(are_ready, _START_S):
                raise workers[0].failure(f"or the other was not ready within {_START_S:.0f} s")
        client = self._client(ends, "our_client", {}, make)
        return Side("pdtasks", client, workers)

    def _stock(self, ends: ExitStack) -> Side:
        env = {
            celery_app.BROKER_URL: _own_vhost(self._services.broker),
            celery_app.RESULT_URL: celery_backend_url(self._services.bus.operator_url),
        }
        workers = []
        for queue in (celery_app.PREFILL, celery_app.DECODE):
            argv = ["-m", "celery", "-A", celery_app.__name__, "worker", "-P", "threads"]
            argv += ["-c", str(self._threads), "-Q", queue, "-n", f"{queue}@%h"]
            workers.append(self._process(queue, argv, env))
        start_workers(workers, ends)
        # (Requests wait in the queues until the workers are there.)
        return Side("celery_chain", self._client(ends, "celery_client", env), workers)

    def _client(
        self,
        ends: ExitStack,
        module: str,
        env: dict[str, str],
        make: Callable[..., Process] = Process,
    ) -> Client:
        path = self._temporary / f"{module}.sock"
        argv = ["-m", f"{_PACKAGE}.{module}", str(path), str(self._prompt_tokens)]
        process = self._process(module, argv, env, make)
        return ends.enter_context(Client(process, path))

    def _process(
        self,
        name: str,
        argv: Sequence[str],
        env: dict[str, str],
        make: Callable[..., Process] = Process,
    ) -> Process:
        return make(
            name,
            [sys.executable, *argv],
            env={**children.common_env(self.settings), **env},
            log=self._log(name),
            cwd=self.settings.home,
        )

    def _log(self, name: str) -> Path:
        return children.log_folder(self.settings) / f"{name}.log"


def _own_vhost(broker: RabbitNode) -> str:
    """A URL of `broker` where the stock workers are alone: all of a vhost greet each other."""
    url = urlsplit(broker.operator_url)
    every = dict.fromkeys(("configure", "write", "read"), ".*")
    with httpx.Client(base_url=broker.operator_api_url, timeout=10, trust_env=False) as api:
        api.put(f"vhosts/{_VHOST}").raise_for_status()
        api.put(f"permissions/{_VHOST}/{url.username}", json=every).raise_for_status()
    return f"{url.scheme}://{url.netloc}/{_VHOST}"


def start_workers(workers: Sequence[Process], ends: ExitStack) -> None:
    """Start `workers`; they are stopped, together, when `ends` ends."""

    def stop() -> None:
        for worker in workers:
            worker.request_stop()
        until = time.monotonic() + _STOP_S
        for worker in workers:
            worker.stop(max(0.0, until - time.monotonic()))

    ends.callback(stop)
    for worker in workers:
        worker.start()
