"""What does `pdtasks up` do, and in which order? Prepare, services, parts, watch, stop.

One thread, one loop: children are started, asked and signalled from here only, so nothing needs a
lock and the kernel's parent-death signal means this process (see `process.py`).

Stopping is the start backwards: the API first, which finishes its streams while workers still
answer; then the workers, which finish their jobs while broker, bus and kv still take them; then the
services.  A second Ctrl-C ends everything at once.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtasks import tracing
from pdtasks.balance.deciding import Targets
from pdtasks.cluster import children
from pdtasks.cluster.console import Console
from pdtasks.cluster.parts import LOOP_S, Part, Parts
from pdtasks.cluster.placement import Plan, further_worker, place_workers
from pdtasks.cluster.probes import choose_port
from pdtasks.cluster.process import StartFailed
from pdtasks.cluster.rights import User
from pdtasks.cluster.services import Services
from pdtasks.cluster.signals import StopRequested, StopSignals
from pdtasks.cluster.stack import StackLock, StackRecord, clean_stale
from pdtasks.drained import Drained
from pdtasks.engine.models import is_ready, resolve_model
from pdtasks.errors import ConfigurationError, PdtasksError
from pdtasks.flower_login import require_login
from pdtasks.keys import KEY_VARIABLE, asks_for_keys, require_keys
from pdtasks.links import is_loopback
from pdtasks.naming import ROLES
from pdtasks.running_stack import StackState
from pdtasks.settings import Settings

_START_S = 240.0
_START_DOWNLOADING_S = 1800.0  # the engines fetch a Hugging Face model themselves
_GRACE_S = 15.0  # beyond `drain_timeout_s`: an engine needs a moment to end
_FLOWER_STOP_S = 5.0
_BALANCER_START_S = 20.0
#: Workers of one stage alone, below which none is ever free to change.
_LEAST_FOR_CHANGES = 3


@dataclass(frozen=True)
class Size:
    """How much of what is started."""

    prefill: int = 1
    decode: int = 1
    both: int = 0  #: workers that serve both stages
    further: Sequence[str] = ()  #: queues of each worker of another model
    concurrency: int | None = None  #: jobs one worker takes at once; None: what its engine batches
    api: int = 1  #: API processes, on ports that follow each other
    flower: bool = True
    targets: Targets | None = None  #: that roles are to follow the load for; None: they stay


def run_stack(overrides: Mapping[str, Any], size: Size, console: Console) -> int:
    """`pdtasks up`: run a stack until it is stopped; returns the exit code.

    Args:
        overrides: settings that the command line gave.

    Raises PdtasksError when it cannot even begin: another stack runs, a setting is wrong.
    """
    home = children.stack_settings().home
    with StackLock(home):
        for name in clean_stale(home):
            console.warn(f"ended {name}, left behind by a stack that was killed")
        # Only now: settings also come from the file of the stack that ran before.
        settings = children.stack_settings(**overrides)
        require_keys(settings, settings.api_host)
        tracing.require_usable()
        if size.flower:
            require_login(settings.flower_host)
        if size.targets is not None:
            _require_key(settings)
        with StopSignals() as signals:
            return Supervisor(settings, size, console, signals).run()


def _require_key(settings: Settings) -> None:
    """Raises ConfigurationError when the API would not tell the balancer anything."""
    if asks_for_keys(settings) and not os.environ.get(KEY_VARIABLE):
        raise ConfigurationError(
            f"--auto asks the API, which wants a key: set {KEY_VARIABLE} to one (`pdtasks keys "
            "new balancer` makes one)"
        )


class Supervisor:
    """The stack of one home. Its lock and the signals are held by the caller."""

    def __init__(
        self, settings: Settings, size: Size, console: Console, signals: StopSignals
    ) -> None:
        self.settings = settings
        self._size = size
        self._console = console
        self._signals = signals
        self._api_ports = [settings.api_port]
        self._state: StackState = "starting"
        self._temporary: Path | None = None
        self._file = StackRecord(settings.home)
        self._services = Services(console, self._tick)
        drained = Drained(settings.home)
        drained.clear()
        self._parts = Parts(
            console,
            self._bus_url,
            self._tick,
            self._record,
            stall_timeout_s=settings.stall_timeout_s,
            stays_away=drained.__contains__,
        )

    def run(self) -> int:
        """Start, watch until told to stop, stop; returns the exit code."""
        code = 0
        reason = ""
        try:
            self.start()
            self.show()
            code = self.watch()
        except StopRequested:
            pass
        except PdtasksError as exc:
            code, reason = 1, str(exc)
        finally:
            self.stop()
        if reason:  # after the stop: who comes back to the terminal finds it last
            self._console.bad(reason)
        return code

    def _tick(self) -> None:
        """Called from every loop: note new children, and give way to a signal."""
        self._record()
        self._signals.check()

    def _bus_url(self) -> str:
        return self.settings.require_bus()  # of the present settings: services change them

    # -- start ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until it is ready.

        Raises PdtasksError with the reason, or StopRequested; call `stop` in either case.
        """
        plan = place_workers(
            self._size.prefill,
            self._size.decode,
            self._size.both,
            device=self.settings.device,
            engine_args=self.settings.engine_args,
            further=[further_worker(queues, self.settings) for queues in self._size.further],
        )
        self._choose_ports()
        Services.require_programs(self.settings)
        self._warn(plan)
        children.rotate_logs(self.settings)
        self._record()

        model = self._prepare_model()
        self.settings = self._services.start(self.settings)
        self._services.check_configured(self.settings)
        self._record()
        self._start_parts(plan)
        further = (one.model for one in self.settings.models.values() if one.model)
        are_here = all(Path(one).is_dir() for one in (model, *further))
        deadline_s = _START_S if are_here else _START_DOWNLOADING_S
        self._parts.wait(deadline_s, self._services.check)
        if self._size.targets is not None:
            # Only now: it asks the API.
            self._start_balancer(self._size.targets)
            self._parts.wait(_BALANCER_START_S, self._services.check)
        self._state = "ready"
        self._record()

    def _choose_ports(self) -> None:
        settings = self.settings
        first = settings.api_port
        wanted = [first + number if first else 0 for number in range(self._size.api)]
        self._api_ports = [
            choose_port("the API", settings.api_host, port, "--port") for port in wanted
        ]
        update = {"api_port": self._api_ports[0]}
        if self._size.flower:
            port = choose_port(
                "Flower", settings.flower_host, settings.flower_port, "--flower-port"
            )
            update["flower_port"] = port
        self.settings = settings.model_copy(update=update)

    def _warn(self, plan: Plan) -> None:
        if plan.warning:
            self._console.warn(plan.warning)
        size = self._size
        if size.targets is not None and size.prefill + size.decode < _LEAST_FOR_CHANGES:
            self._console.warn(
                "--auto has nobody to change: each stage keeps one worker, and those of both stay "
                "as they are. Start more with --prefill and --decode"
            )
        host = self.settings.api_host
        if self.settings.api_open and not is_loopback(host):
            self._console.warn(f"the API on {host} asks for no key: anybody can use it")

    def _prepare_model(self) -> str:
        """The folder or Hugging Face name that the engines load."""
        settings = self.settings
        if settings.model is None and not is_ready(None, settings.cache_dir):
            self._console.line("preparing the embedded model, which is done once")
        with self._signals.interruptible():
            return resolve_model(settings.model, settings.cache_dir, self._console.line)

    def _start_parts(self, plan: Plan) -> None:
        settings = self.settings
        concurrency = self._size.concurrency or settings.max_num_seqs
        self._temporary = temporary = children.make_temporary(settings)
        for_worker = self._services.settings_for(User.WORKER, settings)
        for placement in plan.workers:
            process = children.worker(for_worker, placement, concurrency, temporary)
            self._parts.add(Part(process, placement.role, placement.devices))
        for_api = self._services.settings_for(User.API, settings)
        for number, port in enumerate(self._api_ports, start=1):
            name = "api" if len(self._api_ports) == 1 else f"api{number}"
            own = for_api.model_copy(update={"api_port": port})
            url = children.api_url(own)
            process = children.api(own, temporary, name=name)
            self._parts.add(Part(process, "api", url, f"{url}/ready"))
        if self._size.flower:
            url = children.flower_url(settings)
            for_flower = self._services.settings_for(User.FLOWER, settings)
            process = children.flower(for_flower, secrets.token_urlsafe(48))
            self._parts.add(Part(process, "flower", url, f"{url}/healthcheck"))

    def _start_balancer(self, targets: Targets) -> None:
        settings = self._services.settings_for(User.BALANCER, self.settings)
        process = children.balancer(
            settings, children.api_url(settings), ttft_s=targets.ttft_s, itl_s=targets.itl_s
        )
        where = f"first token {targets.ttft_s:g} s, each token {targets.itl_s:g} s"
        self._parts.add(Part(process, "balancer", where))

    # -- watch ------------------------------------------------------------------------------------

    def watch(self) -> int:
        """Restart what ends, tell what changes. Returns 1 when a service does not come back.

        Raises StopRequested.
        """
        while True:
            self._tick()
            try:
                self._services.check()
            except StartFailed as exc:
                self._console.bad(f"{exc}\nwithout it nothing works: stopping")
                return 1
            self._parts.watch()
            time.sleep(LOOP_S)

    def show(self) -> None:
        """The table of what runs, and where to go."""
        from pdtasks.cluster.status import format_status, read_status

        self._console.line("\n" + format_status(read_status(self.settings)))
        urls = (children.api_url(self.settings, port) for port in self._api_ports)
        self._console.line("\nready: " + ", ".join(f"{url}/v1" for url in urls))
        self._console.line("Ctrl-C drains and stops; a second one stops at once.")

    # -- stop -------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Drain and stop everything that was started; at once on a further signal."""
        self._signals.accept()
        started = self._parts.any_started or self._services.any_private
        if self._state == "ready":
            self._console.line("draining: running requests are finished first")
        elif started:
            self._console.line("stopping what was started")
        self._state = "draining"
        try:
            self._stop_in_order()
        except StopRequested:
            self._console.warn("stopping at once")
            self._signals.accept()
            self._parts.kill()
            self._services.kill()
        finally:
            self._clean_up()
        if started:
            self._console.line("stopped")

    def _stop_in_order(self) -> None:
        deadline_s = self.settings.drain_timeout_s + _GRACE_S
        self._parts.request_stop("balancer")
        self._parts.stop("api", deadline_s=deadline_s)
        self._parts.request_stop("flower")
        self._parts.stop(*ROLES, deadline_s=deadline_s)
        self._parts.stop("flower", "balancer", deadline_s=_FLOWER_STOP_S)
        self._services.stop()

    def _clean_up(self) -> None:
        self._services.close()
        self._parts.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._file.remove()

    def _record(self) -> None:
        own = [] if self._temporary is None else [self._temporary]
        self._file.update(
            state=self._state,
            env=self.settings.to_env(),
            urls=children.stack_urls(
                self.settings, flower=self._size.flower, api_ports=self._api_ports
            ),
            operator_urls=self._services.operator_urls(),
            services=[*self._services.members(), *self._parts.members()],
            helpers=self._services.helpers(),
            folders=[*own, *self._services.folders()],
        )
