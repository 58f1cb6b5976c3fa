"""The stack that chaos acts on: private services, two workers of each stage, two API processes.

As `pdtasks up` would run it, but for two things: here are two API processes, and a service that
ends is started again by whoever ended it.  For one thread, which has to outlive the stack (see
`pdtasks.cluster.process`).
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import valkey

from pdtasks.bench.chaos.nursery import Nursery
from pdtasks.bus.presence import read_workers
from pdtasks.cluster import children
from pdtasks.cluster.console import Console
from pdtasks.cluster.parts import LOOP_S, Part, Parts
from pdtasks.cluster.placement import place_workers
from pdtasks.cluster.probes import free_ports
from pdtasks.cluster.process import Process, describe_exit
from pdtasks.cluster.rabbitmq import RabbitNode
from pdtasks.cluster.valkey import ValkeyServer
from pdtasks.engine.models import resolve_model
from pdtasks.settings import Settings

EngineKind = Literal["stub", "real"]

#: Under this name the stub's "model" is served.
STUB_MODEL = "stub-engine"
_START_S = 300.0
_STOP_S = 20.0
_ASK_S = 5.0
#: Unlike the product's defaults, so that what they bound happens in a short run.
_SETTINGS: dict[str, Any] = {
    # Others' services and stacks are left alone.
    "broker_url": None,
    "broker_api_url": None,
    "bus_url": None,
    "bus_urls": (),
    "kv_urls": (),
    "api_host": "127.0.0.1",
    "kv_timeout_s": 3.0,
    "max_num_seqs": 32,
    # A request whose worker dies is no poison, however often that happens here.
    "delivery_limit": 10,
}
_OF_ENGINE: dict[EngineKind, dict[str, Any]] = {
    "stub": {
        "served_model_name": STUB_MODEL,
        "short_prompt_tokens": 0,  # the stub knows the way through both stages
        "model": None,
        "device": "cpu",
        # A worker that is frozen for longer is replaced.
        "worker_ttl_s": 3.0,
        "stall_timeout_s": 4.0,
    },
    "real": {
        "stall_timeout_s": 15.0,
        "cpu_kv_cache_gib": 1,
        # With half as many digits the company of a batch tips close choices, undisturbed too.
        "engine_args": {"dtype": "float32"},
    },
}


class ChaosStack:
    """A running stack; started and ended as a context."""

    def __init__(
        self,
        home: Path,
        engine: EngineKind,
        console: Console,
        *,
        deadline_s: float,
        nursery: Nursery | None = None,
        **settings: Any,
    ) -> None:
        """Args:
        home: a folder of its own.
        deadline_s: seconds from a request to its end.
        nursery: where stub engines fork off; None: one of its own.
        settings: further ones of the stack.
        """
        own = {"home": home, "request_timeout_s": deadline_s} | settings
        overrides = _SETTINGS | _OF_ENGINE[engine] | own
        self.settings: Settings = children.stack_settings(**overrides)
        self.workers: list[Part] = []
        self.apis: list[Part] = []
        logs = children.log_folder(self.settings)
        self.broker = RabbitNode(home / "rabbitmq", log=logs / "rabbitmq.log")
        self.bus = ValkeyServer(home / "valkey", "bus", log=logs / "valkey-bus.log", durable=True)
        self.kv = ValkeyServer(home / "valkey", "kv", log=logs / "valkey-kv.log")
        self._engine = engine
        self._nursery = nursery
        self._console = console
        self._parts = Parts(
            console,
            lambda: self.bus.url,
            _nothing,
            _nothing,
            stall_timeout_s=self.settings.stall_timeout_s,
        )
        self._ends = ExitStack()

    @property
    def urls(self) -> dict[str, str]:
        """Of the API processes, by name."""
        return {part.name: part.where for part in self.apis}

    def pids(self) -> dict[str, list[int]]:
        """Of the processes, by group; they have children."""
        return {
            "workers": [part.process.pid for part in self.workers],
            "API": [part.process.pid for part in self.apis],
            "RabbitMQ": [process.pid for process in self.broker.processes],
            "bus": [self.bus.process.pid],
            "kv": [self.kv.process.pid],
        }

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._ends.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ends.close()

    def _start(self) -> None:
        children.rotate_logs(self.settings)
        make: Callable[..., Process] = Process
        if self._engine == "stub":
            log = children.log_folder(self.settings) / "nursery.log"
            make = (self._nursery or self._ends.enter_context(Nursery(log))).make
        settings = self.settings
        resolve_model(settings.model, settings.cache_dir, self._console.line)  # made ready once
        for service in (self.bus, self.kv, self.broker):
            # What the broker keeps is nobody's concern any more.
            end = service.kill if isinstance(service, RabbitNode) else service.stop
            self._ends.callback(end)
            service.start()
        self.settings = self.settings.model_copy(
            update={
                "bus_url": self.bus.url,
                "kv_urls": (self.kv.url,),
                "broker_url": self.broker.url,
                "broker_api_url": self.broker.api_url,
            }
        )
        temporary = children.make_temporary(self.settings)
        self._ends.callback(shutil.rmtree, temporary, ignore_errors=True)
        self._ends.callback(self._parts.close)
        self._ends.callback(self._end_parts)
        self._start_parts(temporary, make)
        self._parts.wait(_START_S, self._check_services)

    def _start_parts(self, temporary: Path, make: Callable[..., Process]) -> None:
        settings = self.settings
        plan = place_workers(2, 2, device=settings.device, engine_args=settings.engine_args)
        for placement in plan.workers:
            process = children.worker(
                settings, placement, settings.max_num_seqs, temporary, make=make
            )
            part = Part(process, placement.role, placement.devices)
            self._parts.add(part)
            self.workers.append(part)
        for number, port in enumerate(free_ports(2), 1):
            own = settings.model_copy(update={"api_port": port})
            process = children.api(own, temporary, name=f"api{number}", make=make)
            url = children.api_url(own)
            part = Part(process, "api", url, f"{url}/ready")
            self._parts.add(part)
            self.apis.append(part)

    # -- while it runs ---------------------------------------------------------------------------

    def tick(self) -> None:
        """Start again what has ended. Raises StartFailed when a service ended by itself."""
        self._check_services()
        self._parts.watch()

    def watch_parts(self) -> None:
        """`tick`, while a service is restarted."""
        self._parts.watch()

    def wait(self, until: Callable[[], bool]) -> None:
        """Return when `until` says so; meanwhile the stack is watched."""
        while not until():
            self.tick()
            time.sleep(LOOP_S)

    def left_behind(self, within_s: float) -> tuple[str, ...]:
        """What workers keep of requests although none is under way; empty as soon as it is."""
        until = time.monotonic() + within_s
        with valkey.Valkey.from_url(self.bus.url, socket_timeout=_ASK_S) as bus:
            while True:
                workers = read_workers(bus)
                found = tuple(f"{w.name} holds {w.held} requests" for w in workers if w.held)
                if not found or time.monotonic() > until:
                    return found
                self.tick()
                time.sleep(LOOP_S)

    def _check_services(self) -> None:
        for service in (self.bus, self.kv, self.broker):
            code = service.process.poll()
            if code is not None:
                raise service.process.failure(f"ended by itself ({describe_exit(code)})")

    # -- the end ---------------------------------------------------------------------------------

    def _end_parts(self) -> None:
        for part in (*self.apis, *self.workers):
            part.process.signal(signal.SIGCONT)
        self._parts.stop("api", "prefill", "decode", deadline_s=_STOP_S)


def _nothing() -> None:
    """The stack's own loop sees to everything."""
