"""What does `pdtasks up` do? Start services and workers in order, watch, restart, drain, stop.

One thread, one loop: children are started, asked and signalled from here only, so nothing needs a
lock and the kernel's parent-death signal means this process (see `process.py`).

Stopping is the start backwards: the API first, which finishes its streams while workers still
answer; then the workers, which finish their jobs while broker, bus and kv still take them; then the
services.  A second Ctrl-C ends everything at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import valkey

from pdtasks.cluster import children
from pdtasks.cluster.console import Console
from pdtasks.cluster.placement import (
    Plan,
    place_on_cores,
    place_on_gpus,
    ranks_per_worker,
    usable_cores,
    usable_gpus,
)
from pdtasks.cluster.probes import (
    broker_accepts,
    free_ports,
    http_status,
    port_is_taken,
    valkey_answers,
    wait_until,
)
from pdtasks.cluster.process import Process, StartFailed, describe_exit, identify
from pdtasks.cluster.rabbitmq import RabbitNode, server_programs
from pdtasks.cluster.stack import (
    Member,
    Stack,
    StackLock,
    StackState,
    clean_stale,
    home_marker,
    redact,
    remove_stack,
    write_stack,
)
from pdtasks.cluster.valkey import ValkeyServer, server_program
from pdtasks.errors import ConfigurationError, PdtasksError
from pdtasks.models import is_ready, resolve_model
from pdtasks.presence import read_workers
from pdtasks.settings import Settings, make_settings

_LOOP_S = 0.2
_ASK_S = 1.0  # between two questions to the same part
_START_S = 1800.0  # a model may have to come from the network first
_CONFIGURED_S = 15.0  # for services that run already
_GRACE_S = 15.0  # beyond `drain_timeout_s`: an engine needs a moment to end
_FLOWER_STOP_S = 5.0
_BACKOFF_MAX_S = 60.0
_TEMPORARY_PATH_LIMIT = 64  # bytes; vLLM adds a name of 36 and a socket's path may have 107
_STEADY_S = 60.0  # ready for so long: the next failure is a new one


# What Celery and vLLM write before each message: process, level, time, source.
_LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?(\[.*?\] |[A-Z]+ [\d: -]+\[.*?\] )?")


class StopRequested(Exception):
    """Ctrl-C, SIGTERM or a closed terminal."""


@dataclass
class Part:
    """One child that is restarted when it ends: a worker, the API, Flower."""

    process: Process
    role: str
    where: str  #: for people
    is_ready: Callable[[Part], bool]
    ready: bool = False
    started_at: float = 0.0
    ready_at: float = 0.0
    asked_at: float = 0.0
    failures: int = 0  #: in a row
    restart_at: float | None = None  #: waiting for it
    state: str = ""  #: the last one that was told

    @property
    def name(self) -> str:
        """As in messages and in the file name of its log."""
        return self.process.name


@dataclass(frozen=True)
class Size:
    """How much of what is started."""

    prefill: int = 1
    decode: int = 1
    concurrency: int | None = None  #: jobs one worker takes at once; None: what its engine batches
    flower: bool = True


def run_stack(overrides: Mapping[str, Any], size: Size, console: Console) -> int:
    """`pdtasks up`: run a stack until it is stopped; returns the exit code.

    Args:
        overrides: settings that the command line gave.

    Raises PdtasksError with the reason when it cannot start.
    """
    home = stack_settings().home
    with StackLock(home):
        for name in clean_stale(home):
            console.warn(f"ended {name}, left behind by a stack that was killed")
        # Only now: settings also come from the file of the stack that ran before.
        supervisor = Supervisor(stack_settings(**overrides), size, console)
        with supervisor.signals():
            return supervisor.run()


def stack_settings(**overrides: Any) -> Settings:
    """Settings with `overrides`, paths absolute: children run in another folder."""
    settings = make_settings(**overrides)
    absolute: dict[str, Any] = {
        "home": settings.home.expanduser().absolute(),
        "cache_dir": settings.cache_dir.expanduser().absolute(),
    }
    if settings.model and Path(settings.model).expanduser().exists():
        absolute["model"] = str(Path(settings.model).expanduser().absolute())
        absolute["served_model_name"] = settings.model_name
    return settings.model_copy(update=absolute)


class Supervisor:
    """The stack of one home. Its lock is held by the caller."""

    def __init__(self, settings: Settings, size: Size, console: Console) -> None:
        self.settings = settings
        self._size = size
        self._console = console
        self._home = settings.home
        self._logs = children.log_folder(settings)
        self._parts: list[Part] = []
        self._services: list[tuple[str, RabbitNode | ValkeyServer]] = []
        own = identify(os.getpid())
        assert own is not None, "this process runs"
        self._stack = Stack(pid=own.pid, pid_started=own.started)
        self._state: StackState = "starting"
        self._written: Stack | None = None
        self._signals = 0
        self._accepted_signals = 0  # those that already began a stop
        self._interruptible = False
        self._temporary: Path | None = None
        self._bus: valkey.Valkey | None = None
        self._presence: dict[int, str] = {}
        self._presence_at = 0.0

    # -- the whole life ---------------------------------------------------------------------------

    def run(self) -> int:
        """Start, watch until told to stop, stop; returns the exit code."""
        code = 0
        try:
            self.start()
            self.show()
            code = self.watch()
        except StopRequested:
            pass
        except PdtasksError as exc:
            self._console.bad(str(exc))
            code = 1
        finally:
            self.stop()
        return code

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Turn SIGINT, SIGTERM and SIGHUP into an orderly stop while the body runs."""

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self._signals += 1
            if self._interruptible:
                raise StopRequested

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal ends the body at once with StopRequested, for code that does not call us."""
        self._tick()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def _tick(self) -> None:
        """Called from every loop: note new children, and give way to a signal."""
        self._record()
        if self._signals > self._accepted_signals:
            raise StopRequested

    # -- start ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until it is ready.

        Raises PdtasksError with the reason, or StopRequested; call `stop` in either case.
        """
        settings = self.settings
        plan = self._plan()
        self._check_ports()
        if not settings.broker_url:
            server_programs()
        if not (settings.bus_url and settings.kv_urls):
            server_program()
        if plan.warning:
            self._console.warn(plan.warning)
        self._rotate_logs()
        self._record()

        if settings.model is None and not is_ready(None, settings.cache_dir):
            self._console.line("preparing the embedded model, which is done once")
        with self.interruptible():
            resolve_model(settings.model, settings.cache_dir, self._console.line)

        self._start_services()
        self._start_parts(plan)
        self._wait_for_parts()
        self._state = "ready"
        self._record()

    def _plan(self) -> Plan:
        if self._size.prefill < 1 or self._size.decode < 1:
            raise ConfigurationError("at least one prefill and one decode worker are needed")
        ranks = ranks_per_worker(self.settings.engine_args)
        count = (self._size.prefill, self._size.decode)
        if self.settings.device == "cuda":
            return place_on_gpus(*count, gpus=usable_gpus(), gpus_per_worker=ranks)
        return place_on_cores(*count, cores=usable_cores(), ranks_per_worker=ranks)

    def _check_ports(self) -> None:
        settings = self.settings
        update: dict[str, int] = {}
        wanted = [("the API", "api_port", settings.api_host, settings.api_port, "--port")]
        if self._size.flower:
            wanted.append(
                ("Flower", "flower_port", "127.0.0.1", settings.flower_port, "--flower-port")
            )
        for what, name, host, port, option in wanted:
            if port == 0:
                (update[name],) = free_ports(1)
            elif port_is_taken(host, port):
                raise ConfigurationError(
                    f"{what} cannot listen on port {port} of {host}, which is in use: "
                    f"choose another one with {option}, or stop what uses it"
                )
        self.settings = settings.model_copy(update=update)

    def _rotate_logs(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        for log in self._logs.glob("*.log"):
            log.replace(log.with_name(log.name + ".1"))

    def _start_services(self) -> None:
        settings = self.settings
        update: dict[str, Any] = {}
        marker = dict([home_marker(self._home).split("=", 1)])
        if not settings.bus_url:
            bus = ValkeyServer(
                self._home / "valkey", "bus", log=self._logs / "valkey-bus.log", env=marker
            )
            update["bus_url"] = self._start_service("bus", bus)
        if not settings.kv_urls:
            kv = ValkeyServer(
                self._home / "valkey", "kv", log=self._logs / "valkey-kv.log", env=marker
            )
            update["kv_urls"] = (self._start_service("kv", kv),)
        if not settings.broker_url:
            node = RabbitNode(self._home / "rabbitmq", log=self._logs / "rabbitmq.log", env=marker)
            update["broker_url"] = self._start_service("broker", node)
            update["broker_api_url"] = node.api_url
        self.settings = settings.model_copy(update=update)
        self._check_configured(update)
        self._record()

    def _start_service(self, role: str, service: RabbitNode | ValkeyServer) -> str:
        began = time.monotonic()
        name = "RabbitMQ" if role == "broker" else f"Valkey ({role})"
        self._services.append((role, service))

        def tick() -> None:
            self._console.progress(f"{time.monotonic() - began:4.0f} s  starting {name}")
            self._tick()

        url = service.start(tick)
        self._console.good(f"{name} ready after {time.monotonic() - began:.1f} s")
        return url

    def _check_configured(self, started: Mapping[str, Any]) -> None:
        """Services that were configured must answer before anything is built on them."""
        settings = self.settings
        checks: list[tuple[str, str, Callable[[str], bool]]] = []
        if "broker_url" not in started:
            checks.append(("broker", settings.require_broker(), broker_accepts))
        if "bus_url" not in started:
            checks.append(("bus", settings.require_bus(), valkey_answers))
        if "kv_urls" not in started:
            checks += [("kv server", url, valkey_answers) for url in settings.kv_urls]
        for name, url, accepts in checks:
            if not wait_until(lambda a=accepts, u=url: a(u), _CONFIGURED_S, self._tick):  # type: ignore[misc]
                raise StartFailed(
                    f"the {name} at {redact(url)} does not answer, or refuses the password: "
                    "check that it runs and that its URL is right"
                )
            self._console.good(f"{name} at {redact(url)} answers")

    def _start_parts(self, plan: Plan) -> None:
        settings = self.settings
        concurrency = self._size.concurrency or settings.max_num_seqs
        temporary = self._make_temporary()
        for placement in plan.workers:
            process = children.worker(settings, placement, concurrency, temporary)
            self._add_part(Part(process, placement.role, placement.devices, self._takes_jobs))
        url = children.api_url(settings)
        self._add_part(Part(children.api(settings, temporary), "api", url, _ok(f"{url}/ready")))
        if self._size.flower:
            url = children.flower_url(settings)
            process = children.flower(settings, secrets.token_urlsafe(48))
            self._add_part(Part(process, "flower", url, _ok(f"{url}/healthcheck")))

    def _make_temporary(self) -> Path:
        """A folder for the engines' sockets, whose paths have to be short."""
        self._temporary = self._home / "tmp"
        if len(os.fsencode(self._temporary)) > _TEMPORARY_PATH_LIMIT:
            self._temporary = Path(tempfile.mkdtemp(prefix="pdtasks-", dir="/tmp"))  # mode 0700
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(mode=0o700)
        return self._temporary

    def _add_part(self, part: Part) -> None:
        self._launch(part)
        self._parts.append(part)
        self._record()

    def _launch(self, part: Part) -> None:
        part.restart_at = None
        part.ready = False
        part.state = "starting"
        part.started_at = time.monotonic()
        part.process.start()

    def _wait_for_parts(self) -> None:
        began = time.monotonic()
        while waiting := [part for part in self._parts if not part.ready]:
            self._tick()
            self._check_services()
            for part in waiting:
                code = part.process.poll()
                if code is not None:
                    raise part.process.failure(f"stopped while it started ({describe_exit(code)})")
                self._ask(part)
            elapsed = time.monotonic() - began
            if elapsed > _START_S:
                raise waiting[0].process.failure(f"was not ready within {_START_S:.0f} s")
            names = ", ".join(part.name for part in waiting)
            said = _LOG_PREFIX.sub("", waiting[0].process.log_tail(1))[:80]
            self._console.progress(
                f"{elapsed:4.0f} s  waiting for {names}" + (f" ({said})" if said else "")
            )
            time.sleep(_LOOP_S)

    def _ask(self, part: Part) -> None:
        """Is it ready now? Not more often than needed: it is busy starting."""
        now = time.monotonic()
        if now - part.asked_at < _ASK_S:
            return
        part.asked_at = now
        if part.is_ready(part):
            part.ready, part.ready_at, part.state = True, now, "ready"
            took = now - part.started_at
            self._console.good(f"{part.name} ready after {took:.0f} s ({part.where})")

    def _takes_jobs(self, part: Part) -> bool:
        return self._worker_states().get(part.process.pid) == "ready"

    def _worker_states(self) -> dict[int, str]:
        """What the workers of this host say on the bus, by pid; asked once a second."""
        now = time.monotonic()
        if now - self._presence_at >= _ASK_S:
            self._presence_at = now
            if self._bus is None:
                self._bus = valkey.Valkey.from_url(self.settings.require_bus(), socket_timeout=1)
            own = {part.process.pid for part in self._parts if part.process.running}
            with contextlib.suppress(valkey.ValkeyError):
                statuses = read_workers(self._bus)
                self._presence = {s.pid: s.state for s in statuses if s.pid in own}
        return self._presence

    # -- watch ------------------------------------------------------------------------------------

    def watch(self) -> int:
        """Restart what ends, tell what changes. Returns 1 when a service is lost.

        Raises StopRequested.
        """
        while True:
            self._tick()
            try:
                self._check_services()
            except StartFailed as exc:
                self._console.bad(f"{exc}\nwithout it nothing works: stopping")
                return 1
            for part in self._parts:
                self._watch_part(part)
            time.sleep(_LOOP_S)

    def _check_services(self) -> None:
        for _, service in self._services:
            code = service.process.poll()
            if code is not None:
                raise service.process.failure(f"ended by itself ({describe_exit(code)})")

    def _watch_part(self, part: Part) -> None:
        now = time.monotonic()
        if part.restart_at is not None:
            if now >= part.restart_at:
                self._console.line(f"restarting {part.name}")
                self._launch(part)
                self._record()
            return
        code = part.process.poll()
        if code is not None:
            if part.ready and now - part.ready_at > _STEADY_S:
                part.failures = 0
            wait_s = min(2.0**part.failures, _BACKOFF_MAX_S)
            part.failures += 1
            part.restart_at = now + wait_s
            part.ready = False
            self._console.bad(
                f"{part.name} ended by itself ({describe_exit(code)}), starting again in "
                f"{wait_s:.0f} s. Its log is {part.process.log}"
            )
            self._record()
        elif not part.ready:
            self._ask(part)
        elif part.role in ("prefill", "decode"):
            state = self._worker_states().get(part.process.pid, "silent")
            if state != part.state:
                self._console.line(f"{part.name}: {part.state} → {state}")
                part.state = state

    def show(self) -> None:
        """The table of what runs, and where to go."""
        from pdtasks.cluster.status import format_status, read_status

        self._console.line("\n" + format_status(read_status(self.settings)))
        self._console.line(f"\nready: {children.api_url(self.settings)}/v1")
        self._console.line("Ctrl-C drains and stops; a second one stops at once.")

    # -- stop -------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain and stop everything that was started; at once on a further signal."""
        self._accepted_signals = self._signals
        started = bool(self._parts or self._services)
        if self._state == "ready":
            self._console.line("draining: running requests are finished first")
        elif started:
            self._console.line("stopping what was started")
        self._state = "draining"
        try:
            self._stop_in_order()
        except StopRequested:
            self._console.warn("stopping at once")
            self._accepted_signals = self._signals
            self._kill_all()
        finally:
            self._clean_up()
        if started:
            self._console.line("stopped")

    def _kill_all(self) -> None:
        for part in self._parts:
            part.process.kill()
        for _, service in self._services:
            for process in service.processes:
                process.kill()

    def _clean_up(self) -> None:
        for _, service in self._services:  # also removes sockets
            service.stop()
        if self._bus is not None:
            self._bus.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        remove_stack(self._home)

    def _stop_in_order(self) -> None:
        drain_s = self.settings.drain_timeout_s
        self._stop_parts([p for p in self._parts if p.role == "api"], drain_s + _GRACE_S)
        flower = [p for p in self._parts if p.role == "flower"]
        for part in flower:
            part.process.request_stop()
        workers = [p for p in self._parts if p.role in ("prefill", "decode")]
        self._stop_parts(workers, drain_s + _GRACE_S)
        self._stop_parts(flower, _FLOWER_STOP_S)
        for role, service in reversed(self._services):
            service.stop(self._tick)
            self._console.line(f"  {role} stopped")

    def _stop_parts(self, parts: Sequence[Part], deadline_s: float) -> None:
        for part in parts:
            part.process.request_stop()
        left = [part for part in parts if part.process.running]
        began = time.monotonic()
        while left:
            self._tick()
            for part in list(left):
                if not part.process.running:
                    left.remove(part)
                    self._console.line(f"  {part.name} stopped")
            elapsed = time.monotonic() - began
            if elapsed > deadline_s:
                for part in left:
                    part.process.kill()
                    self._console.warn(f"{part.name} did not stop in {deadline_s:.0f} s: killed")
                return
            if left:
                names = ", ".join(part.name for part in left)
                self._console.progress(f"{elapsed:4.0f} s  draining {names}")
            time.sleep(_LOOP_S)

    # -- the file ---------------------------------------------------------------------------------

    def _record(self) -> None:
        """Keep `stack.json` true; written only when something changed."""
        settings = self.settings
        services: list[Member] = []
        helpers: list[Member] = []
        folders = [] if self._temporary is None else [str(self._temporary)]
        for role, service in self._services:
            for index, process in enumerate(service.processes):
                (helpers if index else services).append(_member(process, role))
            if isinstance(service, ValkeyServer) and service.temporary is not None:
                folders.append(str(service.temporary))
        services += [_member(p.process, p.role) for p in self._parts]
        urls = {
            "api": children.api_url(self.settings),
            "broker": settings.broker_url,
            "bus": settings.bus_url,
            "kv": ",".join(settings.kv_urls),
            "flower": children.flower_url(self.settings) if self._size.flower else None,
        }
        stack = replace(
            self._stack,
            state=self._state,
            env=settings.to_env(),
            urls={name: url for name, url in urls.items() if url},
            services=tuple(services),
            helpers=tuple(helpers),
            folders=tuple(folders),
        )
        if stack != self._written:
            write_stack(self._home, stack)
            self._written = stack


def _ok(url: str) -> Callable[[Part], bool]:
    return lambda _part: http_status(url) == 200


def _member(process: Process, role: str) -> Member:
    identity = process.identity
    return Member(process.name, role, identity.pid, identity.started, str(process.log))
